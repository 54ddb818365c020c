"""`jaxlin select`: what it writes, what it says, what it refuses."""

import functools
import json
import re
import typing
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxlin.data.dataset import Dataset
from jaxlin.experiments.select import SelectArguments, _parts
from jaxlin.theory.selection import SELECTION_CRITERIA
from tests import cases

words = functools.partial(cases.flags, command="select")


@pytest.fixture
def options(setting_arguments):
    targets = ["query", "value"]
    return {**setting_arguments, "lora_targets": targets, "num_samples": 12, "probe_samples": 12, "draws": 2}


class Page(HTMLParser):
    """What a page refers to, its elements and its text."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.links, self.text = [], [], ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data") and v[0] != "#"]

    def handle_data(self, data):
        self.text += data


def test_it_writes_tables_a_configuration_and_a_page(run, options, tmp_path):
    code, out, err = run(*words({**options, "num_eval_samples": 6, "criterion": "leave_one_out_error", "budget": 500}))
    assert code == 0, err
    folder = tmp_path / "out"
    table = cases.rows(folder / "table.csv")
    assert len(table) == 8  # 3 sets of layers × 3 of modules, but for the one above the budget
    errors = [float(row["leave_one_out_error"]) for row in table]
    assert errors == sorted(errors)
    assert max(int(row["num_params"]) for row in table) <= 500
    found = json.loads((folder / "all_results.json").read_text())
    summary = found["summary"]
    assert summary["method"] == "exhaustive"
    assert summary["optimality_gap"] == 0
    assert summary["examples"] == 12
    assert summary["eval_accuracy"]["examples"] == 6
    assert len(summary["loss"]["by_draw"]) == 2
    assert [str(layer) for layer in summary["layers"]] == table[0]["layers"].split()
    assert summary["learning_rate_mean_loss"] == pytest.approx(12 * summary["learning_rate_summed_loss"])
    assert {row["criterion"] for row in cases.rows(folder / "by_criterion.csv")} == set(SELECTION_CRITERIA)
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["target_modules"] == [module.rpartition("/")[2] for module in summary["modules"]]
    assert adapter["layers_to_transform"] == summary["layers"]
    assert (adapter["r"], adapter["modules_to_save"]) == (2, ["classifier"])
    page = Page(folder / "report.html")
    assert page.elements.count("svg") == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "script" not in page.elements
    assert "12 of the training examples make the kernels, the other 12 the probe head" in err
    for text in ("Predicted accuracy (leave-one-out)", "Ranks are not chosen", "jaxlin compare", "Is it linear there?"):
        assert text in page.text
    for figure in ("candidates", "cells", "spectra", "lam"):
        assert (folder / "figures" / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
        assert ET.parse(folder / "figures" / f"{figure}.svg").getroot().tag.endswith("svg")
    assert "What each criterion would choose" in out
    assert re.search(r"tune layers? [01].*: .* and the head: \d+ parameters", out)

    code, _, err = run("select", "--config", folder / "config.yaml", "--output_dir", tmp_path / "again", "--quiet")
    assert (code, err) == (0, "")
    for one, other in zip(cases.rows(tmp_path / "again" / "table.csv"), table, strict=True):
        assert one["modules"] == other["modules"]
        np.testing.assert_allclose(float(one["trace"]), float(other["trace"]), rtol=1e-6)


@pytest.mark.slow
def test_the_command_line_that_it_prints_runs(run, options, tmp_path):
    code, _, err = run(*words({**options, "contrasts": True, "no-train_head": True}))
    assert code == 0, err
    text = Page(tmp_path / "out" / "report.html").text
    command = re.search(r"jaxlin compare .*", text).group(0).split()
    assert "--no-train_head" in command
    code, _, err = run(*command[1:], "--max_steps", 2, "--output_dir", tmp_path / "compared", "--quiet")
    assert code == 0, err
    layers = json.loads((tmp_path / "out" / "all_results.json").read_text())["summary"]["layers"]
    assert (
        json.loads((tmp_path / "compared" / "config.json").read_text())["arguments"]["tuned"]["lora_layers"] == layers
    )


@pytest.mark.slow
def test_a_random_head_is_drawn_anew(run, options, tmp_path):
    code, _, err = run(*words({**options, "head_init": "random", "criterion": "trace", "exhaustive_limit": 1}))
    assert code == 0, err
    assert "probe head" not in err
    summary = json.loads((tmp_path / "out" / "all_results.json").read_text())["summary"]
    assert summary["examples"] == 12
    assert summary["method"] == "greedy"
    assert summary["optimum_bound"] >= 0
    assert np.ptp(summary["loss"]["by_draw"]) > 1e-3  # another head each


@pytest.mark.parametrize("seed", range(3))
def test_kernels_and_probe_have_the_classes_in_their_shares(seed):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1, 2], [60, 36, 4]))
    data = Dataset.from_columns({"labels": labels, "at": np.arange(100)})
    train, others = _parts(data, SelectArguments(num_samples=50, probe_samples=50, seed=seed), True)
    assert sorted([*train["at"], *others["at"]]) == list(range(100))
    assert (len(train), len(others)) == (50, 50)
    for part in (train, others):
        np.testing.assert_array_equal(np.bincount(part["labels"]), [30, 18, 2])
    few, _ = _parts(data, SelectArguments(num_samples=3, probe_samples=50, seed=seed), True)
    assert sorted(few["labels"]) == [0, 1, 2]
    scores = Dataset.from_columns({"labels": np.linspace(0, 1, 20), "at": np.arange(20)})
    train, others = _parts(scores, SelectArguments(num_samples=8, probe_samples=50, seed=seed), True)
    assert sorted([*train["at"], *others["at"]]) == list(range(20))


def test_choices_of_the_command_are_those_of_the_library():
    assert set(typing.get_args(typing.get_type_hints(SelectArguments)["criterion"])) == set(SELECTION_CRITERIA)


BAD = {
    "no samples": ({"num_samples": 1}, "--num_samples 1: expected at least 2"),
    "no draws": ({"draws": 0}, "--draws 0: expected at least 1"),
    "memory": ({"memory_budget": 0}, "--memory_budget 0.0: expected GiB above 0"),
    "compare's": ({"max_train_samples": 5}, "--max_train_samples and --max_eval_samples are of compare"),
    "validation without data": ({"criterion": "validation_error"}, "needs --num_eval_samples"),
    "criterion": ({"criterion": "kappa"}, "invalid choice"),
    "small budget": ({"budget": 70}, "the smallest candidate tunes 194 parameters, 66 of them always"),
    "pull": ({"lam_rel": -1}, "lam_rel=-1.0; expected above 0"),
    "no layers": ({"peft": "head", "lora_targets": False, "lora_rank": 8}, "there are no layers to choose from"),
    "limit": ({"exhaustive_limit": 0}, "exhaustive_limit=0"),
    "frozen zero head": ({"head_init": "zero", "no-train_head": True}, "the head is zero and frozen"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(run, options, tmp_path, case):
    change, message = BAD[case]
    code, _, err = run(*words({**options, **change}))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_methods_have_layers_too(run, options, tmp_path):
    code, _, err = run(*words({**options, "peft": "bitfit", "lora_targets": False, "lora_rank": 8, "budget": 300}))
    assert code == 0, err
    folder = tmp_path / "out"
    assert not (folder / "adapter_config.json").exists()
    assert "No configuration for the peft library" in Page(folder / "report.html").text
    assert all(int(row["num_params"]) <= 300 for row in cases.rows(folder / "table.csv"))
