"""Language modelling itself through every command: texts alone are enough, and the loss is that of their tokens."""

import csv
import json

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments.data_arguments import DataArguments, load_task
from tests import cases
from tests.test_prompt_commands import SIZES, pairs, words


@pytest.fixture
def texts(files):
    """Files without a label."""
    for file in files.values():
        rows = [line.split("\t")[0] for line in file.read_text().splitlines()[1:]]
        file.write_text("\n".join(["text", *rows]) + "\n")
    return {name: file.read_text().splitlines()[1:] for name, file in files.items()}


@pytest.fixture
def options(setting_arguments, tmp_path):
    folder = cases.write_language_model(tmp_path / "lm", cases.DECODERS["llama: LM"])
    return {**setting_arguments, "model_name_or_path": folder, "head": False, "next_token": True}


@pytest.mark.slow
def test_the_loss_is_that_of_the_texts(run, options, texts, tmp_path):
    code, out, err = run(*words("compare", options))
    assert code == 0, err
    assert "with head 'next-token loss'" in err
    assert "nats" in err
    assert "accuracy" not in out
    with (tmp_path / "out" / "table.csv").open() as stream:
        loss = {row["arm"]: float(row["loss_eval"]) for row in csv.DictReader(stream)}
    assert set(loss) == {"full", "linearized", "kernel_regression", "start"}
    model = jl.next_token_loss(jl.load_causal_lm(options["model_name_or_path"]))
    outputs = model.apply(model.params, jl.next_token_batch(model, texts["validation"]))
    assert loss["start"] == pytest.approx(float(np.mean(outputs**2) / 2), rel=1e-4)
    assert loss["full"] < loss["start"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ntk", "select", "bounds"])
def test_every_command_takes_it(run, options, texts, tmp_path, command):
    code, out, err = run(*words(command, options))
    assert code == 0, err
    assert "nats" in err
    assert "FAILS" not in out
    if command == "ntk":
        model = jl.next_token_loss(jl.load_causal_lm(options["model_name_or_path"]))
        jac, _ = cases.reference_jacobian(jl.lora(model, rank=2), jl.next_token_batch(model, texts["train"]))
        assert cases.relative_error(jl.load_kernel(tmp_path / "out" / "kernel.zarr").matrix(), jac @ jac.T) < 1e-4
    if command == "select":
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
        assert "--next_token" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_what_was_tuned_is_exported(run, options, texts, tmp_path):
    sizes = {**SIZES["compare"], "save_steps": 3}
    code, _, err = run(*cases.flags({**options, **sizes}))
    assert code == 0, err
    for kind in ("merged", "peft"):
        to = tmp_path / kind
        code, _, err = run("export", "--run", tmp_path / "out", "--format", kind, "--output_dir", to)
        assert code == 0, err
    merged = jl.next_token_loss(jl.load_causal_lm(tmp_path / "merged"))
    start = jl.next_token_loss(jl.load_causal_lm(options["model_name_or_path"]))
    batch = jl.next_token_batch(start, texts["train"])
    adapted = jl.load_adapter(start, tmp_path / "peft")
    expected = jl.predict(adapted, adapted.theta0, batch)
    np.testing.assert_allclose(merged.apply(merged.params, batch), expected, rtol=1e-5)
    assert np.abs(expected - start.apply(start.params, batch)).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "{text} {mask}", "label_words": ["a", "b"]}, "--template and --next_token are both given"),
        ({"head": "last"}, "--head is given beside --next_token"),
        ({"model_name_or_path": cases.TINY_BERT}, "lacks"),
        ({"loss": "cross_entropy"}, "--loss cross_entropy is given beside --next_token"),
        ({"text_column_names": ["words"]}, "has no column 'words'"),
    ],
)
def test_what_does_not_go_with_it(run, options, texts, tmp_path, change, message):
    code, _, err = run(*words("compare", {**options, **change}))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_pairs_are_refused(run, options, files):
    pairs(files)
    code, _, err = run(*words("compare", options))
    assert code == 2
    assert "--next_token reads one text, and task train has pairs; name one column by --text_column_names" in err


@pytest.mark.slow
def test_labels_are_neither_needed_nor_read(files):
    given = DataArguments(train_file=files["train"], validation_file=files["validation"])
    task = load_task(given, labelled=False)
    assert (task.label_names, task.metrics, task.num_labels) == ((), (), 1)
    assert not task.train.labels.any()
    assert [len(text) for text in task.train.texts] == [1] * len(task.train)
    embedded = load_task(DataArguments(), labelled=False)
    assert embedded.train.texts == load_task(DataArguments()).train.texts
    assert (embedded.label_names, embedded.metrics, embedded.validation.labels.any()) == ((), (), False)
