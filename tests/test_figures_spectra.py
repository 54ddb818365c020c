"""Study 05 on small data: its tables are what kernels and bounds give, and what it says is what they hold."""

import dataclasses
import re
import shutil

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.figures import spectra as study
from jaxlin.experiments.figures import spectra_page as page
from jaxlin.experiments.figures.study import Work, read_tables, write_tables
from tests import cases


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    model, data = cases.headless_checkpoint(folder), cases.sentiments(folder / "data", 24, 24)
    return study.SpectraSetting(
        tasks=("sst2",),
        seeds=2,
        num_train=8,
        model_name_or_path=str(model),
        data_dir=data,
        lora_rank=2,
        kept=5,
    )


@pytest.fixture(scope="module")
def ran(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    work = Work(setting, Cache(folder / "runs"), lambda *_: None)
    write_tables(folder, study.compute(setting, work))
    return folder, work, read_tables(folder)


def test_a_text_that_is_drawn_twice_counts_once(ran):
    problem = ran[1].problem("sst2", 0)
    twice = {"train": problem.train.take(np.array([3, 1, 3, 2, 1]))}
    found = study.without_repetitions(
        dataclasses.replace(problem, loaded=dataclasses.replace(problem.loaded, data=twice))
    )
    assert found.train.sha256() == problem.train.take(np.array([3, 1, 2])).sha256()
    assert found.identity["data"] == [found.train.sha256()] != problem.identity["data"]
    assert study.without_repetitions(found) is found


def test_another_text_is_drawn_for_one_that_came_twice(setting, tmp_path):
    file = setting.data_dir / "sst2" / "train.tsv"
    header, *lines = file.read_text().splitlines()
    data = shutil.copytree(setting.data_dir, tmp_path / "data")
    (data / "sst2" / "train.tsv").write_text("\n".join([header, *lines, *lines]) + "\n")
    some = dataclasses.replace(setting, data_dir=data, num_train=14, seeds=1)
    work = Work(some, Cache(tmp_path / "runs"), lambda *_: None)
    assert len(study.without_repetitions(work.problem("sst2", 0)).train) < 14
    problem = study.distinct_texts(some, work, "sst2", 0)
    assert len(problem.train) == 14
    assert study.without_repetitions(problem) is problem
    assert {row["train_examples"] for row in study.compute(some, work)["sets"]} == {14}
    more = dataclasses.replace(some, num_train=1000)  # than there are
    work = Work(more, Cache(tmp_path / "runs"), lambda *_: None)
    whole = study.distinct_texts(more, work, "sst2", 0)
    assert len(work.problem("sst2", 0).train) == 2 * len(whole.train) > 14


def test_a_larger_draw_with_fewer_repetitions_is_cut(setting, monkeypatch):
    """As classes are drawn in proportion, a larger draw need not hold the smaller one."""
    work = Work(setting, Cache(setting.data_dir.parent / "runs"), lambda *_: None)
    problem, sizes = work.problem("sst2", 0), []

    def drawn(kept):
        return dataclasses.replace(
            problem, loaded=dataclasses.replace(problem.loaded, data={"train": problem.train.take(np.array(kept))})
        )

    def made(setting, *_):
        sizes.append(setting.num_train)
        return drawn(range(6))

    monkeypatch.setattr(work, "problem", lambda *_: drawn([0, 1, 2, 2, 1]))
    monkeypatch.setattr(work, "made", made)
    found = study.distinct_texts(dataclasses.replace(setting, num_train=5), work, "sst2", 0)
    assert sizes == [7]
    assert found.train.sha256() == problem.train.take(np.arange(5)).sha256()


def test_no_order_is_made_of_singular_kernels(ran):
    tables = ran[2]
    sets = [row | ({"condition_number": 1e9} if row["seed"] == 0 else {}) for row in tables["sets"]]
    said = page.findings({**tables, "sets": sets})["draws"]
    assert "nan" not in said
    assert "| – |" in said
    assert said.count("gives the layers no order in some draw") == 2


def test_tables_are_what_their_parts_give(setting, ran):
    _, work, tables = ran
    problem = work.problem("sst2", 1)
    targets = ("query", "key", "value")
    for head, model in ((study.PROBE, problem.model), (study.NEW, problem.loaded.model)):
        tun = jl.lora(model, 2, 2.0, ("key",), layers=[1], rng=1, train_head=False)
        spec = jl.spectrum(jl.ntk(tun, problem.train, check_examples=0).contrasts())
        (row,) = [
            row
            for row in tables["sets"]
            if (row["seed"], row["head"], row["kind"], row["choice"]) == (1, head, study.CELL, "1:k")
        ]
        assert row["trace"] == pytest.approx(spec.trace, rel=1e-4)
        assert row["mu_max"] == pytest.approx(spec.eigenvalues[0], rel=1e-4)
        assert row["num_params"] == tun.num_params
    whole = jl.lora(problem.model, 2, 2.0, targets, rng=1, train_head=False)
    kernel = jl.ntk(whole, problem.train, blocks="layer", check_examples=0).contrasts()
    mu = np.linalg.eigvalsh(kernel.matrix())[::-1]
    rows = [row for row in tables["bounds"] if row["seed"] == 1]
    assert {row["index"] for row in rows} == set(study.kept_indices(8, 5)) == {1, 2, 3, 5, 8}
    for row in rows:  # the one step of two layers
        assert row["eigenvalue"] == pytest.approx(mu[row["index"] - 1], rel=1e-3, abs=1e-6 * mu[0])
        assert row["added"] == 0
        assert row["lower"] - 1e-6 * mu[0] <= row["eigenvalue"] <= row["upper"] + 1e-6 * mu[0]
    everything = [row for row in tables["spectra"] if (row["seed"], row["kind"]) == (1, study.ALL)]
    assert [row["index"] for row in everything] == [1, 2, 3, 5, 8]
    assert everything[0]["eigenvalue"] == pytest.approx(mu[0], rel=1e-4)


def test_a_second_run_computes_nothing(setting, ran, monkeypatch):
    folder, _, tables = ran

    cases.forbid(monkeypatch, study, "ntk")
    work = Work(setting, Cache(folder / "runs"), lambda *_: None)
    (folder / "again").mkdir()
    write_tables(folder / "again", study.compute(setting, work))
    assert read_tables(folder / "again") == tables
    assert work.cache.seconds > 0


def test_what_it_says_is_what_the_tables_hold(ran):
    tables = ran[2]
    said = page.findings(tables)
    applying = [row for row in tables["holds"] if row["applies"]]
    assert len(tables["holds"]) == 2 * 8
    assert all(row["holds"] for row in applying)
    assert f"{len(applying)} apply, {len(applying)} hold. All of them hold." in said["bounds"]

    def log_kappas(head, kind):
        rows = [row for row in tables["sets"] if (row["head"], row["kind"]) == (head, kind)]
        return np.log([[row["condition_number"] for row in rows if row["seed"] == seed] for seed in (0, 1)])

    layers, everything = log_kappas("probe", "layer"), log_kappas("probe", "all")
    lower = "in every task" if everything.mean() < layers.mean(axis=0).min() else "in no task"
    assert f"κ of all layers is below that of the best single one {lower}" in said["choice"]
    assert f"κ of all layers is below that of the best single one {lower}" in said["in_short"]
    assert f"Of {len(applying)} bounds that apply as layers are added, {len(applying)} hold" in said["in_short"]
    factor = np.exp((everything - layers[:, 1:]).mean())  # from the top: layer 1 alone, then both
    change = f"{'falls' if factor < 1 else 'rises'} by a factor of {max(factor, 1 / factor):.3g} from the top"
    assert change in said["choice"]
    for head in ("probe", "random"):
        log = log_kappas(head, "layer")
        same = 1.0 if (np.diff(log[0]) > 0) == (np.diff(log[1]) > 0) else -1.0
        written = f"{same:+.2f}".replace("-", "−")
        assert re.search(
            rf"With a {head} head .* \(least rank correlation of a task {re.escape(written)}\)", said["draws"]
        )
    traces = [
        next(r["trace"] for r in tables["sets"] if (r["head"], r["choice"], r["seed"]) == ("probe", name, seed))
        for name in ("1:qkv", "0,1:qkv")
        for seed in (0, 1)
    ]
    share = np.mean(np.divide(traces[:2], traces[2:]))
    assert f"| {100 * share:.3g} % |" in said["layers"]
    assert f"{100 * share:.3g} to {100 * share:.3g} % of its trace" in said["in_short"]


def test_figures(ran):
    assert set(page.draw(ran[2])) == {"spectra", "kappa_by_choice", "bounds", "draws"}


@pytest.mark.parametrize(("change", "message"), [({"kept": 1}, "--kept 1"), ({"lam_rel": 0.0}, "--lam_rel 0")])
def test_bad_input(setting, change, message):
    with pytest.raises(jl.InputError, match=message):
        dataclasses.replace(setting, **change).check()
