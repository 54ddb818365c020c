import json
import re

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.task import tokenize
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.export import ExportConfig
from jaxlin.experiments.export import run as export
from tests import cases


def config(tmp_path, name, **options):
    return ExportConfig(**{"run": tmp_path / "out", "output_dir": tmp_path / name, **options})


@pytest.mark.slow
def test_a_run_is_exported(run, arguments, tmp_path):
    code, _, err = run(*cases.flags({**arguments, "lam_rel": [0, 0.1]}))
    assert code == 0, err
    code, out, err = run("export", "--run", tmp_path / "out", "--output_dir", tmp_path / "a", "--lam_rel", 0.1,
                         "--format", "peft")  # fmt: skip
    assert code == 0, err
    assert "README.md" in out
    export(config(tmp_path, "m", lam_rel=0.1))
    row = next(
        row
        for row in cases.rows(tmp_path / "out" / "table.csv")
        if row["arm"] == "full" and float(row["lam_over_mu1"]) > 0.05
    )
    model = jl.load_model(cases.TINY_BERT, 2, head="mean")
    tun = jl.load_adapter(model, tmp_path / "a")
    theta = jl.load_checkpoint(tmp_path / "out" / "checkpoints" / "lam_1" / "full", tun)
    jax.tree.map(np.testing.assert_array_equal, tun.theta0, theta)
    batch = {k: v for k, v in cases.text_batch(4, longest=9).items() if k != "labels"}
    whole = jl.load_model(tmp_path / "m", 2)  # no class of transformers has its head, which lies beside it
    assert (whole.module.head, whole.source.head_is_new) == ("mean", False)
    np.testing.assert_allclose(whole.apply(whole.params, batch), tun.apply(theta, batch), atol=1e-5)
    assert jl.load_model(tmp_path / "m", 2, new_head=True).source.head_is_new
    assert jl.load_model(tmp_path / "m", 2, head="cls").source.head_is_new
    with pytest.raises(jl.InputError, match=r"is a head that reads 'mean', of shapes .*: load_model"):
        jl.load_model(tmp_path / "m", 3)
    assert whole.tokenizer("a film")["input_ids"] == model.tokenizer("a film")["input_ids"]
    for card in ((tmp_path / name / "README.md").read_text() for name in ("a", "m")):
        assert f"= {float(row['lam_over_mu1']):.3g} μ₁ (summed loss)" in card
        assert f"outputs {100 * float(row['output_gap_relative_eval']):.3g} % (evaluation)" in card
        kappa = json.loads((tmp_path / "out" / "all_results.json").read_text())["summary"]["condition_number"]
        assert f"{kappa:.4g} (24 training examples)" in card
        assert "24 training examples; sha256" in card
        assert f"| Evaluation accuracy | {float(row['accuracy_eval']):.4g} |" in card
    for options, message in {
        (): "the run has λ = 0 .*; choose one by --lam or --lam_rel",
        (("lam", 1.0), ("lam_rel", 1.0)): "both given",
        (("lam", 0.0), ("step", 2)): "no checkpoint of step 2; it has",
        (("lam", 0.0), ("output_dir", tmp_path / "a")): "is there already and is not an empty folder",
        (("lam", 0.0), ("arm", "full_A_frozen")): "is no folder of checkpoints",
        (("adapter_name_or_path", "x"),): "one of them",
        (("run", tmp_path / "a"),): "config.json cannot be read",
    }.items():
        with pytest.raises(jl.InputError, match=message):
            export(config(tmp_path, "none", **dict(options)))
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a", "m", "out", "train.tsv", "validation.tsv"]


@pytest.fixture
def adapter(tmp_path):
    """An adapter for the tiny model, and its outputs' function."""
    model = jl.load_model(cases.TINY_BERT, 2, head="mean")
    tun = jl.lora(model, rank=3)
    theta = jax.tree.map(lambda leaf: leaf + 0.05, tun.theta0)
    jl.save_adapter(tun, theta, tmp_path / "adapter", model)
    return tun, theta


@pytest.mark.slow
def test_commands_start_from_an_adapter(run, arguments, setting_arguments, tmp_path, adapter):
    start = {"lora_rank": False, "adapter_name_or_path": tmp_path / "adapter"}
    code, out, err = run(*cases.flags({**arguments, **start, "lam_rel": [0, 0.1], "with_frozen_A": True}))
    assert code == 0, err
    assert "a new one starts as" not in out
    table = cases.rows(tmp_path / "out" / "table.csv")
    tun, theta = adapter
    task = load_task(DataArguments(train_file=tmp_path / "train.tsv", validation_file=tmp_path / "validation.tsv"))
    data, _ = tokenize(task.validation, jl.load_model(cases.TINY_BERT, 2, head="mean").tokenizer, 128)
    f = jl.predict(tun, theta, data)
    mean = 0.5 * np.mean(np.sum((f - np.eye(2)[data["labels"]]) ** 2, axis=1))
    found = next(float(row["loss_eval"]) for row in table if row["arm"] == "start")
    assert found == pytest.approx(mean, rel=1e-5)
    # Around it, the linearized model moves A too.
    assert all(float(row["distance_A"]) > 0 for row in table if row["arm"] == "linearized")
    few = {"num_samples": 6, "max_seq_length": 16}
    options = {"ntk": few, "bounds": {**few, "steps": 4, "selective_steps": 2, "directions": 1}}
    for command, sizes in options.items():
        given = {**setting_arguments, **start, **sizes, "output_dir": tmp_path / command}
        code, _, err = run(*cases.flags(given, command))
        assert code == 0, err
    # What comes of it is an adapter again, which is merged like any other.
    export(config(tmp_path, "again", lam_rel=0.1, format="peft"))
    export(ExportConfig(tmp_path / "merged", adapter_name_or_path=str(tmp_path / "again"),
                        model_name_or_path=str(cases.TINY_BERT)))  # fmt: skip
    again = jl.load_adapter(jl.load_model(cases.TINY_BERT, 2, head="mean"), tmp_path / "again")
    expected, merged = jl.merge(again), jl.load_model(tmp_path / "merged", 2, head="mean").params
    jax.tree.map(np.testing.assert_array_equal, merged["encoder"], expected["encoder"])
    assert re.search(r"Adapter \| `.*again`", (tmp_path / "merged" / "README.md").read_text())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 2}, "--lora_rank and --adapter_name_or_path .* are both given"),
        ({"peft": "full"}, "is a LoRA adapter; --peft is full"),
        ({"adapter_name_or_path": "nowhere"}, "there is no folder nowhere"),
    ],
)
def test_bad_options_beside_an_adapter(run, arguments, tmp_path, adapter, options, message):
    given = {**arguments, "lora_rank": False, "adapter_name_or_path": tmp_path / "adapter", **options}
    code, _, err = run(*cases.flags(given))
    assert code == 2
    assert re.search(message, err)
    assert not (tmp_path / "out").exists()
