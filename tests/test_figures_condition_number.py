"""The experiment on small data: every number of its table is what its parts give, and a second run computes nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import jaxlin as jl
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.figures import condition_number as experiment
from jaxlin.experiments.figures import condition_number_page as page
from jaxlin.experiments.figures import correlations as analysis
from jaxlin.experiments.figures.study import Work, read_tables, write_tables
from jaxlin.theory.criteria import CRITERIA
from tests import cases

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "notebooks" / "results" / "06_condition_number_predicts"


@pytest.fixture
def setting(tmp_path):
    return experiment.ConditionNumberSetting(
        data_dir=cases.sentiments(tmp_path / "data", 40, 12, ("sst2", "cola", "wnli")),
        model_name_or_path=str(cases.TINY_BERT),
        tasks=("sst2", "cola"),
        layer_sets=("0", "1", "0,1"),
        module_sets=("q", "v"),
        seeds=2,
        num_train=32,
        num_tune=8,
        num_eval=None,
        num_kernel=8,
        lora_rank=2,
        batch_size=8,
        num_train_epochs=1.0,
        resamples=20,
        paper_learning_rates=(4e-3, 1e-3),
        stable_factors=(0.3,),
    )


def work_of(setting, tmp_path):
    return Work(setting, Cache(tmp_path / "runs"), lambda *_: None)


@pytest.mark.slow
def test_a_run_and_going_on(setting, tmp_path, monkeypatch):
    tables = experiment.compute(setting, work_of(setting, tmp_path))
    table, found = tables["table"], tables["correlations"]
    assert len(table) == 2 * 2 * 6 * 2
    assert {row["way"] for row in table} == {"paper", "stable"}
    assert sum(row["primary"] for row in found) == 1
    # Two tasks, pooled, and pooled among choices of equal size (four of one module).
    assert len(found) == 2 * (2 * len(CRITERIA) + 1) * 3 * 4
    equal = [row for row in found if row["task"] == "pooled, equal size"]
    assert {row["choices"] for row in equal} == {4}
    assert np.isnan(
        [row["spearman"] for row in equal if row["predictor"] == "num_params" and row["way"] == "stable"]
    ).all()
    assert {(row["train_examples"], row["eval_examples"]) for row in table} == {(32, 12)}

    cases.forbid(monkeypatch, experiment, "train_choices", "ntk")
    again = experiment.compute(setting, work_of(setting, tmp_path))
    assert str(again) == str(tables)  # NaN among them
    changed = dataclasses.replace(setting, num_train_epochs=2.0)
    with pytest.raises(AssertionError, match="computed again"):
        experiment.compute(changed, work_of(changed, tmp_path))
    write_tables(tmp_path, tables)
    read = read_tables(tmp_path)
    assert set(page.draw(read)) == {"scatter", "correlations", "others_loss", "others_metric"}
    assert set(page.findings(read)) == {"verdict", "table", "whole_table"}


@pytest.mark.slow
def test_one_row_from_its_parts(setting, tmp_path):
    study = experiment.Runs(setting, work_of(setting, tmp_path))
    choice = study.choices[1]
    assert choice.name == "0:v"
    drawn = study.drawn("sst2", 1)
    for way in ("paper", "stable"):
        own = jl.lora(tun_model(setting, drawn, way), 2, 2, ("value",), layers=[0], rng=1, train_head=way == "paper")
        (_, found) = study.runs("sst2", 1, way, [(study.choices[4], 2e-3), (choice, 1e-3)], tuning=True)
        mu1 = study.predictors("sst2", 1, way)["0:v"]["mu_max"]
        training = experiment._train_config(setting, way, 1e-3, mu1, drawn)
        theta = jl.train(own, drawn.train, None, training).theta
        outputs = jl.predict(own, theta, drawn.tune)
        expected = experiment.evaluate(outputs, drawn.tune["labels"], training.loss)
        assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        kernel = jl.ntk(own, drawn.train.take(np.arange(8))).contrasts()
        assert mu1 == pytest.approx(np.linalg.eigvalsh(kernel.matrix())[-1], rel=1e-4)
        assert found["learning_rate"] == training.learning_rate


def tun_model(setting, drawn, way):
    """The model that a way starts from."""
    model = jl.load_model(setting.model_name_or_path, 2, new_head=True, rng=drawn.draw)
    return model if way == "paper" else jl.probe_head(model, drawn.train, np.eye(2)[drawn.train["labels"]])


def test_what_diverged_is_the_worst():
    rows = [
        {"task": "a", "way": "paper", "draw": 0, "choice": str(i), "train_loss": value, "metric": metric}
        for i, (value, metric) in enumerate([(0.1, 0.9), (None, None), (0.5, 0.2)])
    ]
    np.testing.assert_allclose(analysis._values(rows, "a", "paper", "train_loss"), [[0.1, 0.9, 0.5]])
    np.testing.assert_allclose(analysis._values(rows, "a", "paper", "metric"), [[0.9, -0.5, 0.2]])
    nothing = [{**row, "train_loss": None} for row in rows]
    assert analysis._values(nothing, "a", "paper", "train_loss") is None


@pytest.mark.slow
def test_tasks_of_too_few_examples_are_not_pooled():
    rng = np.random.default_rng(0)
    columns = [prefix + name for prefix in ("", "lora_") for name in CRITERIA]
    table = [
        {name: float(rng.random()) for name in (*columns, "train_loss", "eval_loss", "metric")}
        | {"task": task, "way": "paper", "draw": draw, "choice": str(choice), "diverged": False}
        | {"num_params": 10 * choice, "num_modules": 1 + choice % 2}
        for task in ("cola", "sst2", "wnli")
        for draw in range(2)
        for choice in range(8)
    ]
    found = analysis.correlations(table, 20)
    without = analysis.correlations([row for row in table if row["task"] != "wnli"], 20)
    assert {row["task"] for row in found} - {row["task"] for row in without} == {"wnli"}
    np.testing.assert_equal([row for row in found if row["task"] != "wnli"], without)
    (primary,) = [row for row in found if row["primary"]]
    assert primary["problems"] == 2


def test_what_it_says_is_what_the_kept_tables_hold():
    tables = read_tables(KEPT)
    table, found = tables["table"], tables["correlations"]
    tasks = list(dict.fromkeys(row["task"] for row in table))
    each = []
    for task in tasks:
        rows = [row for row in table if (row["task"], row["way"]) == (task, "paper")]
        names = list(dict.fromkeys(row["choice"] for row in rows))
        means = [
            [np.mean([value(row) for row in rows if row["choice"] == name]) for name in names]
            for value in (lambda row: np.log(row["lora_condition_number"]), lambda row: row["train_loss"])
        ]
        each.append(scipy.stats.spearmanr(*means).statistic)
    rho = np.mean(each)
    (primary,) = [row for row in found if row["primary"]]
    assert primary["spearman"] == pytest.approx(rho, rel=1e-4)
    said = page.findings(tables)
    assert f"ρ = {rho:+.2f} [".replace("-", "−") in said["verdict"]
    assert len(tasks) == primary["problems"]
    for task, value in zip(tasks, each, strict=True):
        (row,) = [
            r
            for r in found
            if (r["predictor"], r["way"], r["outcome"], r["task"])
            == ("lora_condition_number", "paper", "train_loss", task)
        ]
        assert row["spearman"] == pytest.approx(value, rel=1e-4)
    record = json.loads((KEPT / "record.json").read_text())
    written = " ".join((ROOT / "docs" / "benchmarks.md").read_text().split())
    assert f"the {len(table):,} runs of" in written
    assert f"took {record['seconds']:.0f} s with the {6 * 3 * (2 + 3)} that choose rates" in written
    # docs/how-to/choose-layers.md: nothing beyond trace and number of parameters, of the metric.
    partial = [
        row
        for row in found
        if (row["way"], row["outcome"], row["task"]) == ("paper", "metric", "pooled")
        and row["predictor"] in page._SHOWN
        and np.isfinite(row["partial"])
    ]
    assert len(partial) == len(page._SHOWN) - 2
    whole = [page.one(found, name, "metric") for name in page._WHOLE if name != "num_params"]
    assert [row["predictor"] for row in whole if page._sign(row, "partial")] == ["residual_share"]
    assert sum(np.isfinite(row["partial"]) for row in whole) == 9
    assert all(row["partial_interval_low"] < 0 < row["partial_interval_high"] for row in partial)
    assert (len({row["choice"] for row in table}), len(tasks)) == (40, 6)
    away = [row["distance"] for row in table if row["way"] == "stable"]
    adam = max(row["distance"] for row in table if row["way"] == "paper")
    assert f"{100 * np.mean(np.array(away) > adam):.0f} % of these runs it is no test" in said["verdict"]
    assert said["verdict"].count("on every task") == 1
    assert {"scatter", "correlations"} <= set(page.draw(tables))


@pytest.mark.parametrize(
    ("plain", "partial", "expected"),
    [
        ((0.5, 0.3, 0.7), (0.4, 0.2, 0.5), "holds"),
        ((0.5, 0.3, 0.7), (0.1, -0.2, 0.3), "holds, but"),
        ((-0.5, -0.7, -0.3), (0.4, 0.2, 0.5), "the other way round"),
        ((0.1, -0.2, 0.3), (0.4, 0.2, 0.5), "does not show"),
        ((np.nan, 0.2, 0.3), (0.4, 0.2, 0.5), "does not show"),
    ],
)
def test_the_verdict_follows_from_the_intervals(plain, partial, expected):
    row = {"predictor": "lora_condition_number", "way": "paper", "outcome": "train_loss", "task": "pooled"}
    for name, (value, low, high) in (("spearman", plain), ("partial", partial)):
        row |= {name: value, f"{name}_interval_low": low, f"{name}_interval_high": high}
    said = page.verdict([row])
    assert expected in said
    assert (said == "holds") == (expected == "holds")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module_sets": ("x",)}, "0:x is no choice"),
        ({"layer_sets": ("0", "0")}, "each once"),
        ({"seeds": 0}, "--seeds 0: expected at least 1"),
        ({"lam_rel": 0.0}, "--lam_rel"),
        ({"tasks": ("wnli",)}, "--tasks wnli: expected one with enough"),
        ({"num_train": 60}, "sst2 has 40 training rows; expected --num_train 60 and --num_tune 8 of them"),
        ({"layer_sets": ("0", "1", "7")}, "it has 2, from 0"),
    ],
)
def test_bad_input(setting, tmp_path, monkeypatch, change, message):
    def checked_and_computed(changed):
        changed.check()
        experiment.compute(changed, work_of(changed, tmp_path))

    cases.forbid(monkeypatch, experiment, "train_choices")
    with pytest.raises(jl.InputError, match=message):
        checked_and_computed(dataclasses.replace(setting, **change))
