"""The real program against a stand-in of the hub, online and then offline from the cache."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import yaml

from jaxlin.data.files import load_folder_task
from tests import cases
from tests.hub import TOKEN, serve

CARD = """---
configs:
- config_name: sst2
  data_files: [{split: train, path: sst2/train-*}, {split: validation, path: sst2/validation-*}]
- config_name: stsb
  data_files: [{split: train, path: stsb/train-*}]
---
"""
FEATURES = datasets.Features(
    {
        "sentence": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["negative", "positive"]),
        "idx": datasets.Value("int32"),
    }
)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    shutil.copytree(cases.TINY_BERT, root / "models" / "tiny-bert")  # an id without organisation, like roberta-base
    glue = root / "datasets" / "nyu-mll" / "glue"
    (glue / "sst2").mkdir(parents=True)
    for split, size in (("train", 24), ("validation", 10)):
        texts = [f"{'good film' if i % 2 else 'bad and dull'} {split} {i}" for i in range(size)]
        rows = {"sentence": texts, "label": [i % 2 for i in range(size)], "idx": list(range(size))}
        datasets.Dataset.from_dict(rows, FEATURES).to_parquet(glue / "sst2" / f"{split}-00000-of-00001.parquet")
    shutil.copytree(glue / "sst2", glue / "stsb")
    (glue / "README.md").write_text(CARD)
    program = root / "datasets" / "org" / "program"
    program.mkdir(parents=True)
    (program / "program.py").write_text("raise SystemExit('never run')")
    (program / "README.md").write_text("---\n---\n")
    for name in ("PRIVATE", "GATED"):
        (root / "datasets" / "org" / name).mkdir()
        (root / "datasets" / "org" / name / name).touch()
    return root


@pytest.fixture(scope="module")
def hub(repositories):
    with serve(repositories) as server:
        yield server


@pytest.fixture
def run(tmp_path):
    def call(endpoint, *arguments, **environment):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "JAXLIN_"))}
        env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), **environment}
        flags = ["--head", "mean", "--max_steps", "2", "--lora_rank", "2", "--lams", "0", *map(str, arguments)]
        command = [sys.executable, "-m", "jaxlin", "compare", *flags]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return call


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.slow
def test_model_and_known_task_online_then_from_the_cache(hub, run, tmp_path):
    named = ("--model_name_or_path", "tiny-bert", "--task_name", "sst2")
    first = run(hub.url, *named, "--output_dir", "first")
    assert first.returncode == 0, first.stderr
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    task = config["task"]
    assert task["labels"] == ["negative", "positive"]
    assert (task["dataset"], task["config"]) == ("nyu-mll/glue", "sst2")
    assert task["commit"] == hub.commit(hub.root / "datasets" / "nyu-mll" / "glue")
    written = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert written["dataset_revision"] == task["commit"]
    assert written["model_revision"] == hub.commit(hub.root / "models" / "tiny-bert")
    asked = len(hub.requests)
    for name, endpoint, offline, what, revision in (
        ("offline", hub.url, "1", named, "main"),
        ("unreachable", NOWHERE, "0", ("--config", "first/config.yaml"), task["commit"]),
    ):
        again = run(endpoint, *what, "--output_dir", name, "--quiet", HF_HUB_OFFLINE=offline)
        assert again.returncode == 0, again.stderr
        other = json.loads((tmp_path / name / "config.json").read_text())
        assert other["task"] == {**task, "revision": revision}
        assert other["tokenized_sha256"] == config["tokenized_sha256"]
        assert not again.stderr
    assert len(hub.requests) == asked


def test_a_downloaded_folder_is_a_task_folder(repositories):
    """As `hf download nyu-mll/glue --repo-type dataset --include 'sst2/*' --local-dir FOLDER` leaves it."""
    task = load_folder_task(repositories / "datasets" / "nyu-mll" / "glue", "sst2")
    assert (len(task.train), len(task.validation)) == (24, 10)


TINY = ("--model_name_or_path", cases.TINY_BERT)
ERRORS = {
    "unknown model": (("--model_name_or_path", "org/none"), "the hub has no model 'org/none'"),
    "unknown data set": ((*TINY, "--dataset_name", "org/none"), "the hub has no data set 'org/none' that can be read"),
    "bad id": ((*TINY, "--dataset_name", "a b"), "not a valid hub id"),
    "unknown configuration": (
        (*TINY, "--dataset_name", "nyu-mll/glue", "--dataset_config_name", "sst3"),
        "has no configuration 'sst3'; name one by --dataset_config_name (BuilderConfig 'sst3' not found. Available: "
        "['sst2', 'stsb'])",
    ),
    "no configuration": ((*TINY, "--dataset_name", "nyu-mll/glue"), "has several configurations; name one by"),
    "unknown split": (
        (*TINY, "--dataset_name", "nyu-mll/glue", "--dataset_config_name", "stsb"),
        "has no split 'validation'; it has train; name another by --validation_split_name",
    ),
    "unknown revision": (
        (*TINY, "--dataset_name", "nyu-mll/glue", "--dataset_config_name", "sst2", "--dataset_revision", "v9"),
        "has no revision 'v9'",
    ),
    "private": ((*TINY, "--dataset_name", "org/PRIVATE"), "or private and HF_TOKEN is not set"),
    "gated": ((*TINY, "--dataset_name", "org/GATED"), "org/GATED is gated: ask for access"),
    "a program": ((*TINY, "--dataset_name", "org/program"), "is a program, which is never run"),
    "known task that is not there": ((*TINY, "--task_name", "imdb"), "the hub has no data set 'stanfordnlp/imdb'"),
}
BY_DEFAULT = ("unknown configuration",)  # each starts a program


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in BY_DEFAULT else pytest.mark.slow) for case in ERRORS]
)
def test_errors_of_a_hub_that_answers(hub, run, case):
    arguments, message = ERRORS[case]
    failed = run(hub.url, *arguments)
    assert failed.returncode == 2, failed.stderr
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1


HOW_TO = (
    "run `hf download nyu-mll/glue --repo-type dataset --include 'sst2/*' --local-dir FOLDER`, then give --data_dir"
)


@pytest.mark.parametrize(
    ("offline", "reason"),
    [
        ("0", f"{NOWHERE} cannot be reached"),
        pytest.param("1", "HF_HUB_OFFLINE is set", marks=pytest.mark.slow),
    ],
)
def test_not_cached_and_out_of_reach(run, offline, reason):
    failed = run(NOWHERE, *TINY, "--task_name", "sst2", HF_HUB_OFFLINE=offline)
    assert failed.returncode == 2
    assert reason in failed.stderr
    assert HOW_TO in failed.stderr
    assert failed.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_token_is_used(hub, run):
    failed = run(hub.url, *TINY, "--dataset_name", "org/PRIVATE", HF_TOKEN=TOKEN)
    assert "data set org/PRIVATE cannot be loaded" in failed.stderr  # seen, and empty
