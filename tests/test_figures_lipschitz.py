"""Study 04 on small data: its numbers are what `lipschitz_profile` gives, and its findings those of its tables."""

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.figures import lipschitz
from jaxlin.experiments.figures.run import run_study
from jaxlin.experiments.figures.study import Work
from jaxlin.experiments.figures.summary import of
from tests import cases

SHARES = (0.0, 1e-2)
RADII = (0.5, 2.0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    model, data = cases.headless_checkpoint(folder), cases.sentiments(folder / "data", 24, 10)
    return lipschitz.LipschitzSetting(
        tasks=("sst2",),
        seeds=1,
        num_train=12,
        max_seq_length=16,
        model_name_or_path=str(model),
        data_dir=data,
        lora_rank=2,
        radii=RADII,
        directions=2,
        profile_examples=4,
        points=2,
        num_train_epochs=2.0,
        batch_size=4,
        mu_examples=6,
    )


@pytest.fixture(scope="module")
def study(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "04"
    return folder, run_study(lipschitz.STUDY, setting, folder, "test", quiet=True)[0]


@pytest.mark.slow
def test_the_profiles_are_those_of_the_parts(setting, study, tmp_path):
    problem = Work(setting, Cache(tmp_path), lambda *_: None).problem("sst2", 0)
    tun = problem.tun
    some, few = (problem.train.take(index) for index in (np.array([0, 3, 7, 11]), np.array([0, 2, 4, 6, 8, 11])))
    tables = study[1]
    random = [row for row in tables["profile"] if row["lam_over_mu1"] is None]
    names = ["stacked", "jacobian", "kernel"]
    found = jl.lipschitz_profile(tun, some, RADII, quantity=names, directions=2, examples=[0, 1, 2, 3])
    assert [row["quantity"] for row in random] == names * 2
    for row, expected in zip(random, found.table, strict=True):
        for key in ("radius", "L_avg", "L_upper", "directions"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4)
    sigma = np.sqrt(np.linalg.eigvalsh(jl.ntk(tun, some).matrix())[-1])
    assert random[0]["sigma"] == pytest.approx(sigma, rel=1e-4)
    mu1 = np.linalg.eigvalsh(jl.ntk(tun, few).matrix())[-1] * 12 / 6
    for share in SHARES:
        config = jl.TrainConfig(
            lr_scheduler_type="linear", batch_size=4, num_train_epochs=2.0, lam=share * mu1, group_by_length=True
        )
        run = jl.train(tun, problem.train, problem.eval, config, keep=[1, 6])
        (end,) = of(tables["reached"], lam_over_mu1=share)
        assert end["radius"] == pytest.approx(max(row["distance"] for row in run.history), rel=1e-3)
        assert end["score_eval"] == pytest.approx(run.history[-1]["eval_accuracy"])
        for step in (1, 6):
            point = jl.lipschitz_profile(tun, some, [], along=[run.states[step].theta])
            (row,) = of(tables["profile"], lam_over_mu1=share, step=step, quantity="stacked")
            assert row["radius"] == pytest.approx(run.history[step - 1]["distance"], rel=1e-3)
            assert row["L_upper"] == pytest.approx(point.largest(), rel=1e-2)


@pytest.mark.slow
def test_findings_are_of_the_tables(study):
    tables = study[1]
    lines = [line for line in lipschitz.findings(tables)["reach"].splitlines() if line.startswith("| SST-2")]
    ratios = []
    for share, line in zip(SHARES, lines, strict=True):
        (end,) = of(tables["reached"], lam_over_mu1=share)
        (last,) = of(tables["profile"], lam_over_mu1=share, step=6, quantity="stacked")
        upper = [of(tables["profile"], radius=r, quantity="stacked")[0]["L_upper"] for r in RADII]
        share_of_way = np.clip(np.log(last["radius"] / RADII[0]) / np.log(RADII[1] / RADII[0]), 0, 1)
        random = upper[0] + share_of_way * (upper[1] - upper[0])
        ratios.append(last["L_upper"] / random)
        moved = last["radius"] / last["sigma"]
        expected = [share, end["radius"], last["radius"], ratios[-1], last["L_upper"] * moved, random * moved]
        assert [cases.number(cell) for cell in line.split("|")[2:8]] == pytest.approx(expected, rel=5e-3)
    short = lipschitz.findings(tables)["in_short"]
    assert f"{min(ratios):.2g} to {max(ratios):.2g} times as much" in short
    moved = of(tables["profile"], lam_over_mu1=0.0, step=6, quantity="stacked")[0]
    change = moved["L_upper"] * moved["radius"] / moved["sigma"]
    assert f"At λ/μ₁ = 0 it has changed by {change:.2g} to {change:.2g} of its norm" in short
    assert "from below" in lipschitz.findings(tables)["profile"]


@pytest.mark.slow
def test_the_figure_and_what_a_second_run_computes(setting, study, monkeypatch):
    folder, tables = study
    assert (folder / "figures" / "profile.png").is_file()
    for name in ("train", "ntk", "lipschitz_profile"):
        monkeypatch.setattr(lipschitz, name, lambda *_, **__: pytest.fail("computed again"))
    again, _ = run_study(lipschitz.STUDY, setting, folder, "test", quiet=True)
    assert str(again) == str(tables)
