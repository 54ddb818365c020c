"""Study 07 on small data: its rows are what selection and training give, and what it says is what they hold."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import jaxlin as jl
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.figures import choose_layers as study
from jaxlin.experiments.figures import choose_layers_page as page
from jaxlin.experiments.figures.choices import MODULES, Choice
from jaxlin.experiments.figures.study import Work, read_tables, write_tables
from jaxlin.training.compare import MAJORITY
from tests import cases

KEPT = Path(__file__).parents[1] / "notebooks" / "results" / study.STUDY.name


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    model, data = cases.headless_checkpoint(folder), cases.sentiments(folder / "data", 32, 32)
    return study.ChooseLayersSetting(
        tasks=("sst2",),
        seeds=2,
        num_train=20,
        num_eval=12,
        model_name_or_path=str(model),
        data_dir=data,
        lora_rank=2,
        select_examples=8,
        budget_layers=1,
        random_choices=1,
        num_train_epochs=1.0,
        batch_size=10,
    )


@pytest.fixture(scope="module")
def ran(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    work = Work(setting, Cache(folder / "runs"), lambda *_: None)
    write_tables(folder, study.compute(setting, work))
    return folder, work, read_tables(folder)


@pytest.mark.slow
def test_rows_are_what_their_parts_give(setting, ran):
    _, work, tables = ran
    problem = work.problem("sst2", 1)
    order = np.random.default_rng(1).permutation(20)
    others, some = (problem.train.take(np.sort(part)) for part in (order[8:], order[:8]))
    model = jl.probe_head(problem.loaded.model, others, np.eye(2)[others["labels"]])
    targets = tuple(MODULES.values())
    alone = jl.lora(model, 2, 2.0, targets, rng=1, train_head=False)
    rows = {row["arm"]: row for row in tables["table"] if row["seed"] == 1}
    for criterion in (page.BY_LOSS, page.BY_KAPPA):
        options = {"budget": alone.num_params // 2, "criterion": criterion, "contrasts": True}
        report = jl.select_layers(alone, some, np.eye(2)[some["labels"]], **options)
        assert study._choice(report.table[0]).name == rows[criterion]["choice"]
        assert rows[criterion]["num_params"] == report.num_params <= alone.num_params // 2
        assert rows[criterion][criterion] == pytest.approx(report.table[0][criterion], rel=1e-4)
    choice = Choice.parse(rows[page.LAST]["choice"])
    assert (choice.layers, choice.modules) == ((1,), "qkv")
    assert rows[page.RANDOM]["choice"] == "0:qkv"
    own = jl.lora(model, 2, 2.0, targets, layers=[1], rng=1, train_head=False)
    training = jl.TrainConfig(
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        batch_size=10,
        num_train_epochs=1.0,
        seed=1,
        group_by_length=True,
    )
    theta = jl.train(own, problem.train, None, training).theta
    for split, part in (("train", problem.train), ("eval", problem.eval)):
        outputs = jl.predict(own, theta, part)
        loss = 0.5 * np.sum((outputs - np.eye(2)[part["labels"]]) ** 2, axis=1).mean()
        assert rows[page.LAST][f"loss_{split}"] == pytest.approx(loss, rel=1e-4)
    hits = np.mean(outputs.argmax(axis=1) == problem.eval["labels"])
    assert rows[page.LAST]["score_eval"] == pytest.approx(hits)
    assert rows[page.START]["distance"] == 0
    most = np.bincount(problem.train["labels"]).argmax()
    assert rows[MAJORITY]["score_eval"] == pytest.approx(np.mean(problem.eval["labels"] == most))
    assert rows[page.EVERYTHING]["num_params"] == alone.num_params


@pytest.mark.slow
def test_a_second_run_computes_nothing(setting, ran, monkeypatch):
    folder, _, tables = ran

    cases.forbid(monkeypatch, study, "train", "predict", "select_layers")
    work = Work(setting, Cache(folder / "runs"), lambda *_: None)
    (folder / "again").mkdir()
    write_tables(folder / "again", study.compute(setting, work))
    assert read_tables(folder / "again") == tables


def made(scores, seeds=3):
    """A table of two tasks; scores are by arm, and each seed adds the same to all."""
    rng = np.random.default_rng(0)
    rows = []
    for task in ("a", "b"):
        for seed in range(seeds):
            shift = rng.normal()
            for arm, score in scores.items():
                noise = 1e-3 * rng.normal()
                row = {"task": task, "seed": seed, "arm": arm, "score_eval": score + shift + noise}
                rows.append({**row, "loss_eval": -score - shift - noise})
    return rows


def test_paired_differences():
    table = made({page.BY_LOSS: 0.5, page.RANDOM: 0.25, page.LAST: 0.75, page.EVERYTHING: 0.5})
    for arm, size, sign in ((page.RANDOM, 0.25, 1), (page.LAST, -0.25, -1), (page.EVERYTHING, 0.0, 0)):
        found = page.differences([row for row in table if row["task"] == "a"], arm, "score_eval")
        np.testing.assert_allclose(found, size, atol=5e-3)
        assert len(found) == 3
        assert page.outcome(found, 1) == sign
        assert page.outcome(page.differences(table, arm, "loss_eval"), -1) == sign
        np.testing.assert_allclose(page.pooled(table, arm, "score_eval"), size, atol=3e-3)
    twice = [*table, *({**row, "score_eval": row["score_eval"] + 1} for row in table if row["arm"] == page.RANDOM)]
    np.testing.assert_allclose(page.differences(twice, page.RANDOM, "score_eval"), 0.25 - 0.5, atol=5e-3)
    assert page.outcome(np.array([0.1]), 1) == page.outcome(np.array([0.1, 0.1]), 1) == 0
    scores = [{**row, "task": "stsb"} for row in table if row["task"] == "b"]
    assert len(page.pooled([row for row in table if row["task"] == "a"] + scores, page.LAST, "score_eval")) == 1


def test_scores_are_accuracies_where_there_are():
    of_classes = {"accuracy_eval": 0.7, "score_eval": 0.1, "metric": "matthews"}
    assert page.by_accuracy([of_classes]) == [{"accuracy_eval": 0.7, "score_eval": 0.7, "metric": "accuracy"}]
    of_scores = {"accuracy_eval": None, "score_eval": 0.1, "metric": "pearson"}
    assert page.by_accuracy([of_scores]) == [of_scores]


def test_what_it_says_is_what_the_kept_tables_hold():
    tables = read_tables(KEPT)
    table, said = tables["table"], page.findings(tables)
    tasks, seeds = (list(dict.fromkeys(row[name] for row in table)) for name in ("task", "seed"))

    def values(arm, column, task, seed):
        return np.mean([r[column] for r in table if (r["arm"], r["task"], r["seed"]) == (arm, task, seed)])

    lines = {line.split(" | ")[0].strip("| "): line for line in said["verdict"].splitlines() if line.startswith("|")}
    for arm in page.OTHERS:
        cells = lines[page.NAMES[arm]].strip("| ").split(" | ")[2:]
        for cell, column, better in zip(cells, ("accuracy_eval", "loss_eval", "loss_train"), (1, -1, -1), strict=True):
            each = [[values(page.BY_LOSS, column, t, s) - values(arm, column, t, s) for s in seeds] for t in tasks]
            means = np.mean(each, axis=1)
            low, high = scipy.stats.t.interval(0.95, len(tasks) - 1, means.mean(), scipy.stats.sem(means))
            found = [cases.number(text) for text in re.findall(r"[+−][\d.]+", cell)]
            np.testing.assert_allclose(found, (means.mean(), low, high), atol=6e-5)
            ends = [scipy.stats.t.interval(0.95, len(v) - 1, np.mean(v), scipy.stats.sem(v)) for v in each if np.ptp(v)]
            signs = [better * np.sign(low) for low, high in ends if low * high > 0]
            assert f"better in {signs.count(1)}, worse in {signs.count(-1)}" in cell
    sizes = [np.mean([row["num_params"] for row in table if row["arm"] == arm]) for arm in (page.BY_LOSS, page.LAST)]
    assert f"It used {100 * sizes[0] / sizes[1]:.3g} % of the budget" in said["verdict"]
    for arm, words in (
        (page.BY_KAPPA, "by κ, the query of layer 0"),
        (page.BY_LOSS, "by leave-one-out loss, no module"),
    ):
        names = [Choice.parse(row["choice"]) for row in table if row["arm"] == arm]
        blocks = [block for choice in names for block in choice.blocks]
        most = max(map(blocks.count, blocks))
        assert re.search(rf"{words}.* in {most} of {len(names)} draws", said["chosen"])
        assert (blocks.count("layer_0/query") == most) == (arm == page.BY_KAPPA)
    for criterion in (page.BY_LOSS, page.BY_KAPPA):
        each = []
        for task in tasks:
            rhos = []
            for seed in seeds:
                rows = [r for r in table if (r["task"], r["seed"]) == (task, seed) and r[criterion] is not None]
                pairs = {r["choice"]: (r[criterion], r["loss_eval"]) for r in rows}
                rhos.append(scipy.stats.spearmanr(*zip(*pairs.values(), strict=True)).statistic)
            each.append(np.mean(rhos))
        mean, least, most = (f"{value:+.2f}".replace("-", "−") for value in (np.mean(each), min(each), max(each)))
        assert f"{mean} ({least} to {most} by task)" in said["chosen"]
    count = 3 * len(tasks) * len(page.OTHERS)
    assert f"There are {count}: if nothing differed, about {count / 20:.0f} of them" in said["differences"]


@pytest.mark.slow
def test_what_it_says_is_what_the_tables_hold(ran):
    tables = ran[2]
    said = page.findings(tables)
    table = tables["table"]
    by = {(row["arm"], row["seed"]): row for row in table}
    for arm in page.OTHERS:
        one, two = (by[page.BY_LOSS, seed]["loss_eval"] - by[arm, seed]["loss_eval"] for seed in (0, 1))
        half = 12.706204736174698 * abs(one - two) / 2  # Student's t with one degree of freedom
        parts = [(one + two) / 2, (one + two) / 2 - half, (one + two) / 2 + half]
        mean, low, high = (f"{part:+.4f}".replace("-", "−") for part in parts)
        assert f"{mean} [{low}, {high}]" in said["differences"]
    scores = [by[page.LAST, seed]["score_eval"] for seed in (0, 1)]
    assert f"{np.mean(scores):.3g} ({min(scores):.3g} to {max(scores):.3g})" in said["scores"]
    chosen = " · ".join(by[page.BY_LOSS, seed]["choice"] for seed in (0, 1))
    assert f"| {chosen} |" in said["chosen"]
    assert "layers by leave-one-out loss" in said["verdict"]
    assert set(page.draw(tables)) == {"differences", "chosen"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"select_examples": 20}, "--num_train 20"),
        ({"random_choices": 0}, "--random_choices 0"),
        ({"budget_layers": 3}, "the model has 2"),
        ({"random_choices": 2}, "only 1 others"),
    ],
)
def test_bad_input(setting, tmp_path, change, message):
    def checked_and_computed(changed):
        changed.check()
        study.compute(changed, Work(changed, Cache(tmp_path / "runs"), lambda *_: None))

    with pytest.raises(jl.InputError, match=message):
        checked_and_computed(dataclasses.replace(setting, **change))
