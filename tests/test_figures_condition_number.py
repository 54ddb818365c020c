"""The experiment on small data: every number of its table is what its parts give, and a second run computes nothing."""

import csv
import dataclasses

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments import condition_number as experiment
from jaxlin.experiments import correlations as analysis
from jaxlin.theory.criteria import CRITERIA
from tests import cases


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    for task in ("sst2", "cola"):
        (tmp_path / "data" / task).mkdir(parents=True)
        for split, size in (("train", 40), ("validation", 12)):
            rows = [f"{'good' if i % 2 else 'bad'} film {rng.integers(9999)}\t{i % 2}" for i in range(size)]
            (tmp_path / "data" / task / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return experiment.ConditionNumberConfig(
        output_dir=tmp_path / "out",
        data_dir=tmp_path / "data",
        model_name_or_path=str(cases.TINY_BERT),
        tasks=("sst2", "cola"),
        layer_sets=("0", "1", "0,1"),
        module_sets=("q", "v"),
        draws=2,
        num_train=16,
        num_tune=8,
        num_eval=10,
        num_kernel=8,
        lora_rank=2,
        batch_size=8,
        num_train_epochs=1.0,
        resamples=20,
    )


def rows_of(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_a_run_and_going_on(config, monkeypatch):
    found = experiment.run(config)
    table = rows_of(config.output_dir / "table.csv")
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
    assert rows_of(config.output_dir / "correlations.csv")[0]["predictor"] == "condition_number"

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(experiment, "train", never)
    monkeypatch.setattr(experiment, "ntk", never)
    again = experiment.run(config)
    assert str(again) == str(found)  # NaN among them
    with pytest.raises(AssertionError, match="computed again"):
        experiment.run(dataclasses.replace(config, num_train_epochs=2.0))


def test_one_row_from_its_parts(config):
    study = experiment.Study(config, lambda _: None)
    choice = study.choices[1]
    assert choice.name == "0:v"
    drawn = study.drawn("sst2", 1)
    for way in ("paper", "stable"):
        own = jl.lora(tun_model(config, drawn, way), 2, 2, ("value",), layers=[0], rng=1, train_head=way == "paper")
        found = study.run("sst2", 1, choice, way, 1e-3, tuning=True)
        mu1 = study.predictors("sst2", 1, way)["0:v"]["mu_max"]
        training = experiment._train_config(config, way, 1e-3, mu1, drawn)
        theta = jl.train(own, drawn.train, None, training).theta
        outputs = jl.predict(own, theta, drawn.tune)
        expected = experiment.evaluate(outputs, drawn.tune["labels"], training.loss)
        assert found["eval_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        kernel = jl.ntk(own, drawn.train.take(np.arange(8))).contrasts()
        assert mu1 == pytest.approx(np.linalg.eigvalsh(kernel.matrix())[-1], rel=1e-4)
        assert found["learning_rate"] == training.learning_rate


def tun_model(config, drawn, way):
    """The model that a way starts from."""
    model = jl.load_model(config.model_name_or_path, 2, new_head=True, rng=drawn.draw)
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


def test_what_is_kept_reads_as_it_was(tmp_path):
    cache = experiment.Cache(tmp_path / "runs")
    for _ in range(2):
        found = cache.get(
            {"a": 1}, lambda: {"loss": float("inf"), "metric": float("nan"), "name": "x", "rows": {"y": 2.0}}
        )
        assert found["loss"] == np.inf
        assert np.isnan(found["metric"])
        assert (found["name"], found["rows"]) == ("x", {"y": 2.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module_sets": ("x",)}, "0:x is no choice"),
        ({"layer_sets": ("0", "0")}, "each once"),
        ({"draws": 0}, "--draws 0"),
        ({"lam_rel": 0.0}, "--lam_rel"),
        ({"num_train": 60}, "40 training rows"),
        ({"layer_sets": ("0", "1", "7")}, "it has 2, from 0"),
    ],
)
def test_bad_input(config, change, message):
    with pytest.raises(jl.InputError, match=message):
        experiment.run(dataclasses.replace(config, **change))
