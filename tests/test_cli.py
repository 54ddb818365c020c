"""The real command line, on a tiny checkpoint and on bad input."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from tests import cases


def test_a_run_writes_what_it_promises(run, arguments, tmp_path):
    code, out, err = run(*cases.flags({**arguments, "lam_rel": [0, 0.1], "with_frozen_A": True}))
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
    with (folder / "history.csv").open() as stream:
        history = list(csv.DictReader(stream))
    assert [(row["arm"], int(row["step"]), float(row["loss"])) for row in history] == [
        (row["arm"], row["step"], row["loss"]) for row in log
    ]
    taken = results["summary"]
    assert set(taken["step_seconds"]) == {"full", "linearized", "full_A_frozen"}
    assert all(0 < seconds < taken["seconds"] for seconds in taken["step_seconds"].values())
    assert 0 < taken["compile_seconds"] < taken["seconds"]
    assert taken["peak_memory_of"] == "process"
    assert 1 << 26 < taken["peak_memory_bytes"] < 1 << 36
    assert not (folder / "profile").exists()
    assert "loss 0." in err
    for name in ("compare.png", "compare.svg", "spectrum.png", "spectrum.svg"):
        assert (folder / "figures" / name).stat().st_size > 5000
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 6
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["jax"] == jax.__version__
    assert len(config["data_sha256"]) == 64
    assert config["arguments"]["sweep"]["lam_rel"] == [0, 0.1]
    assert "training: 12/12" in (folder / "run.log").read_text()
    for text in ("κ", "‖θ−θ̄‖", "λ/μ₁", "kernel regression", "majority class", "linear probe", "full, A frozen"):
        assert text in out
    assert "left" in err
    assert "Traceback" not in err

    again = run(*cases.flags(arguments))
    assert again[0] == 2
    assert "is not empty; give another folder, or --overwrite_output_dir" in again[2]
    code, _, err = run(*cases.flags({**arguments, "lam_rel": [0.5], "overwrite_output_dir": True, "quiet": True}))
    assert code == 0, err
    assert not err
    assert len(list((folder / "tensorboard").glob("*/events.out.tfevents.*"))) == 2


PEFT = {
    "head": {},
    "full": {},
    "bitfit": {},
    "layer_norm": {},
    "ia3": {"lora_layers": [1], "ia3_targets": [r".*/(query|value)"], "ia3_feedforward": ["mlp/up"]},
    "select": {"select": "layer_1/attention"},
}


@pytest.mark.slow
@pytest.mark.parametrize("peft", PEFT)
def test_other_peft(run, arguments, tmp_path, peft):
    options = {**arguments, "lora_rank": False, "peft": peft, **PEFT[peft]}
    code, _, err = run(*cases.flags({**options, "lam_rel": [0, 1]}))
    assert code == 0, err
    assert (tmp_path / "out" / "figures" / "compare.png").exists()
    if peft == "head":  # linear in its parameters: no gap but rounding
        table = json.loads((tmp_path / "out" / "all_results.json").read_text())["table"]
        assert all(row["output_gap_relative_eval"] < 1e-3 for row in table if row["arm"] == "full")


@pytest.mark.slow
def test_everything_of_lora(run, arguments, tmp_path):
    options = {
        "lora_targets": [r".*/(query|mlp/up)"],
        "lora_rank_pattern": ["query=3"],
        "lora_alpha_pattern": ["mlp/up=2"],
        "use_rslora": True,
        "use_dora": True,
        "modules_to_save": ["attention_norm"],
        "loraplus_lr_ratio": 4,
        "lam_blocks": ["classifier=0.5"],
        "lam_rel": [0.1],
    }
    code, out, err = run(*cases.flags({**arguments, **options}))
    assert code == 0, err
    assert "in other" in out
    ranks = 2 * 3 * (32 + 32) + 2 * 2 * (32 + 48)
    magnitudes, norms, head = 2 * (32 + 48), 2 * 2 * 32, 33 * 2
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["summary"]["trainable_parameters"] == ranks + magnitudes + norms + head


@pytest.mark.slow
def test_linearizing_late(run, arguments, tmp_path):
    code, out, err = run(*cases.flags({**arguments, "lam_rel": [0, 0.1], "linearize_at": "0,1,3"}))
    assert code == 0, err
    assert "linearized at step k of it" in out
    assert "training: 10/10" in err  # for each λ full 3, linearized at 1: 2, at 3: 0; at the start: from the cache
    table = json.loads((tmp_path / "out" / "all_results.json").read_text())["table"]
    late = {row["linearize_at"]: row for row in table if row["lam"] == 0}
    assert late[3]["parameter_gap"] == 0
    assert late[1]["output_gap_eval"] > late[3]["output_gap_eval"]
    assert (tmp_path / "out" / "figures" / "linearize_at.png").stat().st_size > 5000


@pytest.mark.slow
def test_tracking_the_linearization(run, arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = {**arguments, "lam_rel": [0, 0.1], "track_linearization": ["0,1", "3"]}
    code, out, err = run(*cases.flags(options))
    assert code == 0, err
    folder = tmp_path / "out"
    with (folder / "linearization.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(float(row["lam_over_mu1"]), int(row["step"])) for row in rows] == [
        (share, step) for share in (0, 0.1) for step in (0, 1, 3)
    ]
    reports = json.loads((folder / "all_results.json").read_text())["linearization"]
    assert [row for report in reports for row in report["table"]] == [
        {name: json.loads(value) for name, value in row.items()} for row in rows
    ]
    full = [row for row in json.loads((folder / "all_results.json").read_text())["table"] if row["arm"] == "full"]
    for report, row in zip(reports, full, strict=True):
        assert report["lam"] == row["lam"]
        last = report["table"][-1]
        for ours, theirs in (("distance", "distance"), ("parameter_gap", "parameter_gap")):
            assert last[ours] == pytest.approx(row[theirs])
        assert last["trajectory_gap"] == pytest.approx(row["output_gap_train"], rel=1e-2)
        assert report["verdict"] in out
    assert "linearization report: 6/6" in err
    assert (folder / "figures" / "linearization.png").stat().st_size > 5000
    start = out.index("Along full fine-tuning")
    assert max(map(len, (line.rstrip() for line in out[start : out.index("λ/μ₁ = 0:")].splitlines()))) <= 80
    code, _, err = run(*cases.flags({**options, "track_linearization": ["two"], "overwrite_output_dir": True}))
    assert code == 2
    assert "--track_linearization two: expected steps, such as 0,10,50" in err
    code, _, err = run(*cases.flags({**options, "track_linearization": ["4"], "overwrite_output_dir": True}))
    assert code == 2
    assert "track_linearization=4 is no step of this run; expected 0 to 3" in err


@pytest.mark.slow
def test_the_file_that_a_run_wrote_runs_it_again(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths in, absolute ones in the file
    relative = {**arguments, "train_file": "train.tsv", "validation_file": "validation.tsv"}
    code, _, err = run(*cases.flags({**relative, "lam_rel": [0, 0.1], "lora_layers": [1], "no-group_by_length": True}))
    assert code == 0, err
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = run("compare", "--config", tmp_path / "out" / "config.yaml", "--output_dir", "again", "--seed", 0)
    assert code == 0, err
    first, second = (json.loads((f / "all_results.json").read_text()) for f in (tmp_path / "out", Path("again")))
    assert first["table"] == second["table"]
    # What stands on the command line counts more than the file, before it or behind.
    code, _, err = run("compare", "--seed=5", f"--config={tmp_path / 'out' / 'config.yaml'}", "--output_dir", "other")
    assert code == 0, err
    third = json.loads(Path("other/config.json").read_text())["arguments"]
    assert third["training"]["seed"] == 5
    assert third["training"]["group_by_length"] is False
    assert third["tuned"]["lora_layers"] == [1]
    written = yaml.safe_load(Path("other/config.yaml").read_text())
    assert "output_dir" not in written
    assert written["lam_rel"] == [0.0, 0.1]


@pytest.mark.slow
def test_spd_and_cross_entropy_and_streaming(run, arguments):
    options = {"pull": "spd", "lams": ["0", "0.5"], "loss": "cross_entropy", "linear_mode": "streaming"}
    code, out, err = run(*cases.flags({**arguments, **options}))
    assert code == 0, err
    assert "λ/μ₁" not in out


def write_scores(files, names=("text_a", "text_b", "rating")):
    rng = np.random.default_rng(1)
    for file in files.values():
        rows = [f"good {rng.integers(999)}\tfine {i}\t{5 * rng.random():.2f}" for i in range(14)]
        file.write_text("\n".join(["\t".join(names), *rows]) + "\n")


@pytest.mark.slow
def test_scores_have_metrics_of_their_own(run, arguments, files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_scores(files)
    code, out, err = run(*cases.flags({**arguments, "label_column_name": "rating", "lam_rel": [0, 0.1]}))
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


@pytest.mark.slow
def test_a_regression_head_of_its_own_keeps_its_units(run, arguments, files, tmp_path):
    def one_output(tensors):
        tensors.update({name: tensors[name][:1].copy() for name in ("classifier.weight", "classifier.bias")})

    folder = cases.edited_checkpoint(tmp_path, one_output)
    write_scores(files, ("sentence1", "sentence2", "label"))
    own = {**arguments, "model_name_or_path": folder, "head": "pooler", "max_steps": 1, "lams": ["0"]}
    code, _, err = run(*cases.flags(own))
    assert code == 0, err
    assert "standardised" not in err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["target_std"] is None


@pytest.mark.slow
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
    code, _, err = run(*cases.flags(changed))
    assert code == 0, err
    assert "class ids follow the checkpoint's order, by name: ENTAILMENT, neutral, contradiction" in err
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["task"]["labels"] == ["entailment", "neutral", "contradiction"]


def test_both_spellings(run, arguments):
    dashed = [flag.replace("_", "-") if str(flag).startswith("--") else flag for flag in cases.flags(arguments)]
    code, _, err = run(*dashed, "--lams", "0", "--quiet")
    assert code == 0, err


def test_offline_and_not_cached(run, arguments, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(*cases.flags({**arguments, "model_name_or_path": "nobody/nothing"}))
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in err
    assert "hf download nobody/nothing" in err


def test_a_folder_that_is_no_run_is_never_overwritten(run, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    code, _, err = run(*cases.flags({**arguments, "overwrite_output_dir": True}))
    assert code == 2
    assert "not a run; it is not overwritten" in err
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.slow
def test_truncation_is_counted_and_said(run, arguments, files):
    code, _, err = run(*cases.flags({**arguments, "max_seq_length": 9, "lams": ["0"]}))
    assert code == 0, err
    assert "24 of 24 train texts are longer than 9 tokens and were truncated" in err


def test_divergence_keeps_the_log(run, arguments, tmp_path):
    code, _, err = run(
        *cases.flags({**arguments, "optimizer": "sgd", "learning_rate": 1e12, "max_steps": 30, "lams": ["0"]})
    )
    assert code == 1
    assert "at step" in err.splitlines()[-1]
    assert "lower the learning rate" in err
    assert (tmp_path / "out" / "log.jsonl").read_text()
    assert not (tmp_path / "out" / "all_results.json").exists()
    assert "stopped: arm 'full'" in (tmp_path / "out" / "run.log").read_text()


def test_debug_shows_the_traceback(run, arguments):
    with pytest.raises(ValueError, match="LoRA rank 0"):
        run(*cases.flags({**arguments, "lora_rank": 0, "debug": True}))


def test_doctor(run, monkeypatch):
    monkeypatch.delenv("JAXLIN_DATA", raising=False)
    code, out, _ = run("doctor")
    assert code == 0
    for text in ("jax ", "devices", "0.6.5, bridged to jax", "embedded task", "JAXLIN_DATA", "absent (not used)"):
        assert text in out


def test_completion(run):
    code, out, _ = run("--tyro-print-completion", "bash")
    assert code == 0
    assert "--linearize-at" in out


def test_help_of_a_group_fits_a_screen(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run("compare", "--help")
    assert code == 0
    groups = re.split(r"^ \w+ options\s*$", out, flags=re.MULTILINE)[1:]
    assert len(groups) == 8
    assert max(group.count("\n") for group in groups) <= 40


def test_a_terminal_without_greek():
    program = [sys.executable, "-m", "jaxlin", "compare", "--help"]
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert "Pull strengths ? for the summed loss" in done.stdout


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
    code, _, err = run(
        *cases.flags({"data_dir": data_folder, "task_name": "mrpc", **sizes, "output_dir": tmp_path / "out"})
    )
    assert code == 0, err


@pytest.mark.slow
def test_a_profile_holds_a_trace_of_every_arm(run, arguments, tmp_path):
    code, _, err = run(*cases.flags({**arguments, "lam_rel": [0, 1], "max_steps": 9, "profile": True}))
    assert code == 0, err
    traces = {path.relative_to(tmp_path / "out" / "profile").parts[0] for path in tmp_path.rglob("*.xplane.pb")}
    assert traces == {"full", "linearized"}
