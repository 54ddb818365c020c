"""The real command line, on a tiny checkpoint and on bad input."""

import csv
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlin import cli
from tests import cases


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxlin", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    before = jax.config.jax_compilation_cache_dir
    yield call
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = {}
    for name, size in (("train", 24), ("validation", 10)):
        rows = [
            ("good film in a way" if i % 2 else "bad and dull") + f" {rng.integers(9999)}\t{i % 2}" for i in range(size)
        ]
        paths[name] = tmp_path / f"{name}.tsv"
        paths[name].write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return paths


@pytest.fixture
def arguments(tmp_path, files):
    return {
        "model_name_or_path": cases.TINY_BERT,
        "head": "mean",
        "train_file": files["train"],
        "validation_file": files["validation"],
        "lora_rank": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "output_dir": tmp_path / "out",
    }


def flags(arguments):
    listed = []
    for name, value in arguments.items():
        if value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        listed += [f"--{name}", *values]
    return ["compare", *listed]


def test_a_run_writes_what_it_promises(run, arguments, tmp_path):
    code, out, err = run(*flags({**arguments, "lam_rel": [0, 0.1], "with_frozen_A": True}))
    assert code == 0, err
    folder = tmp_path / "out"
    results = json.loads((folder / "all_results.json").read_text())
    with (folder / "table.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["arm"] for row in table] == [row["arm"] for row in results["table"]]
    arms = {"full", "linearized", "full_A_frozen", "kernel_regression", "majority_class", "start", "linear_probe"}
    assert {row["arm"] for row in table} == arms
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 * 2 * 3
    for name in ("compare.png", "compare.svg", "spectrum.png", "spectrum.svg"):
        assert (folder / "figures" / name).stat().st_size > 5000
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 6
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["jax"] == jax.__version__
    assert len(config["data_sha256"]) == 64
    assert config["arguments"]["training"]["lam_rel"] == [0, 0.1]
    assert "training: 12/12" in (folder / "run.log").read_text()
    for text in ("κ", "‖θ−θ̄‖", "λ/μ₁", "kernel regression", "majority class", "linear probe", "full, A frozen"):
        assert text in out
    assert "left" in err
    assert "Traceback" not in err

    again = run(*flags(arguments))
    assert again[0] == 2
    assert "is not empty; give another folder, or --overwrite_output_dir" in again[2]
    code, _, err = run(*flags({**arguments, "lam_rel": [0.5], "overwrite_output_dir": True, "quiet": True}))
    assert code == 0, err
    assert not err
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 2


@pytest.mark.parametrize("peft", ["head", "full"])
def test_other_peft(run, arguments, tmp_path, peft):
    code, _, err = run(*flags({**arguments, "peft": peft, "lam_rel": [0, 1]}))
    assert code == 0, err
    assert (tmp_path / "out" / "figures" / "compare.png").exists()
    if peft == "head":  # linear in its parameters: no gap but rounding
        table = json.loads((tmp_path / "out" / "all_results.json").read_text())["table"]
        assert all(row["output_gap_relative_eval"] < 1e-3 for row in table if row["arm"] == "full")


def test_spd_and_cross_entropy_and_streaming(run, arguments):
    options = {"pull": "spd", "lams": ["0", "0.5"], "loss": "cross_entropy", "linear_mode": "streaming"}
    code, out, err = run(*flags({**arguments, **options}))
    assert code == 0, err
    assert "λ/μ₁" not in out


def write_scores(files, names=("text_a", "text_b", "rating")):
    rng = np.random.default_rng(1)
    for file in files.values():
        rows = [f"good {rng.integers(999)}\tfine {i}\t{5 * rng.random():.2f}" for i in range(14)]
        file.write_text("\n".join(["\t".join(names), *rows]) + "\n")


def test_scores_have_metrics_of_their_own(run, arguments, files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_scores(files)
    code, out, err = run(*flags({**arguments, "label_column_name": "rating", "lam_rel": [0, 0.1]}))
    assert code == 0, err
    assert "scores are standardised: the loss is in units of the training variance" in err
    for text in ("pearson", "spearman", "mean score"):
        assert text in out
    for text in ("accuracy", "agree", "KL", "majority", "nan"):
        assert text not in out
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    scores = np.array([float(line.split("\t")[2]) for line in files["train"].read_text().splitlines()[1:]])
    assert results["config"]["target_mean"] == pytest.approx(scores.mean())
    assert results["config"]["target_std"] == pytest.approx(scores.std())
    rows = {row["arm"]: row for row in results["table"]}
    assert rows["mean_score"]["loss_train"] == pytest.approx(0.5)  # half the variance, standardised
    assert rows["mean_score"]["pearson_eval"] is None
    assert -1 <= rows["full"]["spearman_eval"] <= 1
    undefined = ("accuracy", "f1", "matthews", "kl", "agreement", "agreement_f0")
    assert all(row[f"{name}_eval"] is None for row in results["table"] for name in undefined)


def test_classes_follow_the_names_of_the_checkpoint(run, arguments, files, tmp_path):
    """The same checkpoint with its classes named in another order: the same task, counted otherwise."""
    for file in files.values():
        lines = [f"{word} {i}\t{word}" for i in range(8) for word in ("neutral", "entailment", "contradiction")]
        file.write_text("\n".join(["sentence\tlabel", *(f"{file.stem} {line}" for line in lines)]) + "\n")
    names = ["ENTAILMENT", "neutral", "contradiction"]
    folder = tmp_path / "nli"
    shutil.copytree(cases.TINY_BERT, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    changed = {**arguments, "model_name_or_path": folder, "head": "auto", "lams": ["0"]}
    code, _, err = run(*flags(changed))
    assert code == 0, err
    assert "class ids follow the checkpoint's order, by name: ENTAILMENT, neutral, contradiction" in err
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["task"]["labels"] == ["entailment", "neutral", "contradiction"]


def test_both_spellings(run, arguments):
    dashed = [flag.replace("_", "-") if str(flag).startswith("--") else flag for flag in flags(arguments)]
    code, _, err = run(*dashed, "--lams", "0", "--quiet")
    assert code == 0, err


def with_file(files, text):
    files["train"].write_bytes(text if isinstance(text, bytes) else text.encode())


def damaged(tmp_path, edit):
    folder = tmp_path / "model"
    shutil.copytree(cases.TINY_BERT, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return {"model_name_or_path": folder}


def poisoned(tensors):
    tensors["bert.embeddings.word_embeddings.weight"][5, 5] = np.nan


BAD = {
    "unknown model": (lambda t, f: {"model_name_or_path": t / "none"}, "there is no folder"),
    "not a hub id": (lambda t, f: {"model_name_or_path": "no such model!"}, "neither a folder nor a valid hub id"),
    "folder without config": (lambda t, f: {"model_name_or_path": t}, "without config.json"),
    "NaN in weights": (lambda t, f: damaged(t, poisoned), "holds NaN or infinity"),
    "empty file": (lambda t, f: with_file(f, ""), "is empty (0 bytes)"),
    "one class": (lambda t, f: with_file(f, "sentence\tlabel\na b\t1\nc d\t1\n"), "the one label '1'"),
    "label outside": (lambda t, f: with_file(f, "sentence\tlabel\na b\t0\nc d\t2\n"), None),
    "missing column": (lambda t, f: with_file(f, "sentence\ttarget\na b\t1\n"), "no column 'label'"),
    "missing file": (lambda t, f: {"train_file": t / "none.tsv"}, "cannot be read"),
    "binary file": (lambda t, f: with_file(f, b"\x89PNG\r\n\x1a\n\x00"), "NUL byte in line 3: it is binary"),
    "one of two files": (lambda t, f: {"validation_file": False}, "belong together"),
    "two sources": (lambda t, f: {"task_name": "sst2"}, "--train_file and --task_name are both given; give one of"),
    "three sources": (lambda t, f: {"dataset_name": "a/b"}, "--train_file and --dataset_name are both given"),
    "folder and file": (
        lambda t, f: {"data_dir": t},
        "--data_dir is given beside --train_file; it is for a --task_name",
    ),
    "configuration of nothing": (lambda t, f: {"dataset_config_name": "x"}, "--dataset_config_name is given without"),
    "split of a file": (lambda t, f: {"train_split_name": "x"}, "--train_split_name is given without --dataset_name"),
    "columns of the embedded task": (
        lambda t, f: {"train_file": False, "validation_file": False, "label_column_name": "y"},
        "the embedded task has no columns to choose",
    ),
    "unknown task": (
        lambda t, f: {"train_file": False, "validation_file": False, "task_name": "SST-2"},
        "--task_name SST-2 is no task (near: sst2",
    ),
    "task not in the folder": (
        lambda t, f: {"train_file": False, "validation_file": False, "task_name": "sst2", "data_dir": t},
        "sst2 has no file train",
    ),
    "column that is not there": (lambda t, f: {"text_column_names": ["body"]}, "has no column 'body'"),
    "unknown suffix": (lambda t, f: {"train_file": cases.TINY_BERT / "model.safetensors"}, "has the suffix"),
    "constant scores": (lambda t, f: with_file(f, "sentence\tlabel\na b\t0.5\nc d\t0.5\n"), "training scores are 0.5"),
    "negative lam": (lambda t, f: {"lams": ["-1"]}, "each at least 0"),
    "lam no number": (lambda t, f: {"lams": ["much"]}, "expected numbers, or auto"),
    "two grids": (lambda t, f: {"lams": ["1"], "lam_rel": [1]}, "give one of them"),
    "rank 0": (lambda t, f: {"lora_rank": 0}, "LoRA rank 0: expected 1 to 32"),
    "rank too large": (lambda t, f: {"lora_rank": 33}, "LoRA rank 33: expected 1 to 32"),
    "no target": (lambda t, f: {"lora_targets": ["valeu"]}, "near: "),
    "no layer": (lambda t, f: {"lora_layers": [7]}, "expected some of 0 to 1"),
    "zero frozen head": (lambda t, f: {"head_init": "zero", "train_head": "False"}, None),
    "optimizer": (lambda t, f: {"optimizer": "adamw"}, "is AdamW towards theta0"),
    "steps": (lambda t, f: {"max_steps": -3}, "max_steps=-3"),
    "length": (lambda t, f: {"max_seq_length": 2}, "leaves no room"),
    "samples": (lambda t, f: {"max_train_samples": 1}, "at least 2"),
    "output is a file": (lambda t, f: {"output_dir": f["train"]}, "is a file; expected a folder"),
    "kernel examples": (lambda t, f: {"kernel_examples": 0}, "kernel_examples=0"),
    "seed": (lambda t, f: {"seed": -1}, "seed=-1"),
    "spd in units": (lambda t, f: {"pull": "spd", "lam_rel": [1]}, "give lams, not lam_rel"),
    "contradiction": (lambda t, f: {"peft": "head", "with_frozen_A": True}, "needs --peft lora"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(run, arguments, files, tmp_path, monkeypatch, case):
    change, message = BAD[case]
    monkeypatch.delenv("JAXLIN_DATA", raising=False)
    changed = {**arguments, **(change(tmp_path, files) or {})}
    if case == "label outside":
        files["train"].write_text("sentence\tlabel\na b\t0\nc d\t1\n")
        files["validation"].write_text("sentence\tlabel\nx y\t2\n")
        message = "label '2' is none of the task's classes: 0, 1"
    if case == "zero frozen head":
        changed.pop("train_head")
        code, _, err = run(*flags(changed), "--no-train_head")
        message = "the head is zero and frozen"
    else:
        code, _, err = run(*flags(changed))
    assert code == 2
    assert err.startswith("jaxlin: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_offline_and_not_cached(run, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*flags({**arguments, "model_name_or_path": "nobody/nothing"}))
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in err
    assert "hf download nobody/nothing" in err


def test_a_folder_that_is_no_run_is_never_overwritten(run, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    code, _, err = run(*flags({**arguments, "overwrite_output_dir": True}))
    assert code == 2
    assert "not a run; it is not overwritten" in err
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_truncation_is_counted_and_said(run, arguments, files):
    code, _, err = run(*flags({**arguments, "max_seq_length": 9, "lams": ["0"]}))
    assert code == 0, err
    assert "24 of 24 train texts are longer than 9 tokens and were truncated" in err


def test_divergence_keeps_the_log(run, arguments, tmp_path):
    code, _, err = run(*flags({**arguments, "optimizer": "sgd", "learning_rate": 1e12, "max_steps": 30, "lams": ["0"]}))
    assert code == 1
    assert "at step" in err.splitlines()[-1]
    assert "lower the learning rate" in err
    assert (tmp_path / "out" / "log.jsonl").read_text()
    assert not (tmp_path / "out" / "all_results.json").exists()
    assert "stopped: arm 'full'" in (tmp_path / "out" / "run.log").read_text()


def test_debug_shows_the_traceback(run, arguments):
    with pytest.raises(ValueError, match="LoRA rank 0"):
        run(*flags({**arguments, "lora_rank": 0, "debug": True}))


def test_doctor(run, monkeypatch):
    monkeypatch.delenv("JAXLIN_DATA", raising=False)
    code, out, _ = run("doctor")
    assert code == 0
    for text in ("jax ", "devices", "0.6.5, bridged to jax", "embedded task", "JAXLIN_DATA", "absent (not used)"):
        assert text in out


def test_as_a_program():
    program = [sys.executable, "-m", "jaxlin", "compare"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert "--model-name-or-path" in shown.stdout
    wrong = subprocess.run([*program, "--optimiser", "x"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_embedded_default(run, tmp_path):
    """The main job as in the README, shortened."""
    code, out, err = run("compare", "--output_dir", tmp_path / "out", "--max_steps", 4, "--lam_rel", 0, 1)
    assert code == 0, err
    table = json.loads((tmp_path / "out" / "all_results.json").read_text())["table"]
    full = {row["lam_over_mu1"]: row for row in table if row["arm"] == "full"}
    assert full[1.0]["output_gap_relative_eval"] < full[0.0]["output_gap_relative_eval"]
    assert "κ" in out


@pytest.mark.slow
def test_shared_data_through_the_command_line(run, tmp_path, data_folder):
    sizes = {"max_train_samples": 40, "max_eval_samples": 20, "max_steps": 4, "lam_rel": [0, 1]}
    code, _, err = run(*flags({"data_dir": data_folder, "task_name": "mrpc", **sizes, "output_dir": tmp_path / "out"}))
    assert code == 0, err
