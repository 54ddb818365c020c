"""Looks: one for one thing in every figure, and what is drawn where all would not fit."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb

from jaxlin import plots
from jaxlin.experiments.figures import spectra_page, summary

GRID = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def luminance(colour):
    """Relative luminance of WCAG 2."""
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_a_pull_has_one_look_whatever_else_is_shown():
    colours, markers = zip(*map(plots.lam_look, GRID), strict=True)
    viridis = plt.get_cmap("viridis")
    np.testing.assert_allclose(colours, [viridis(at) for at in (0.0, 0.28, 0.41, 0.54, 0.67, 0.8, 0.93)])
    assert (np.diff([luminance(colour) for colour in colours]) > 0.03).all()
    assert len(set(markers)) == len(GRID)
    assert plots.lam_look(1e-9) == plots.lam_look(1e-4)
    assert plots.lam_look(1e3) == plots.lam_look(10.0)
    few = [{"lam": 3 * share, "lam_over_mu1": share} for share in (1.0, 0.0)]
    assert plots._lam_looks(few) == {0.0: plots.lam_look(0.0), 3.0: plots.lam_look(1.0)}


def test_without_a_unit_pulls_are_told_apart():
    looks = plots._lam_looks([{"lam": lam, "lam_over_mu1": None} for lam in (100.0, 0.0, 1000.0)])
    assert list(looks) == [0.0, 100.0, 1000.0]
    assert len({to_hex(colour) for colour, _ in looks.values()}) == 3


def test_colours_of_full_and_linearized_are_theirs_alone():
    of = {
        key: {name for name, colour in plots.COLOURS.items() if colour == plots.COLOURS[key]} for key in plots.COLOURS
    }
    assert of["full"] == {"full", "full_pulled", "coupled"}
    assert of["linearized"] == {"linearized"}
    tasks = {colour for colour, _ in plots.TASK_LOOKS.values()}
    assert not tasks & {plots.COLOURS["full"], plots.COLOURS["linearized"]}


@pytest.mark.parametrize(
    "names",
    [
        ("query", "key", "value", "everything", "start"),
        ("from_top", "from_bottom"),
        ("coupled", "selective", "decoupled"),
        ("prompt_head", "probe_head", "random_head"),
        ("condition_number", "last_layers", "random_choice", "everything", "start"),
        ("chosen", "runner_up", "everything", "start"),
    ],
)
def test_what_is_compared_in_one_figure_differs(names):
    assert len({plots.COLOURS[name] for name in names}) == len(names)


def test_every_task_has_its_look():
    assert set(plots.TASK_LOOKS) == set(summary.TASKS)
    assert len(set(plots.TASK_LOOKS.values())) == len(plots.TASK_LOOKS)
    usual = [plots.task_look(task)[0] for task in ("cola", "sst2", "mrpc", "qqp", "rte")]
    assert min(np.abs(np.subtract(to_rgb(a), to_rgb(b))).max() for a, b in itertools.combinations(usual, 2)) > 0.2
    assert plots.task_look("mine") == plots.task_look("mine")
    assert plots.task_look("mine") in plots.TASK_LOOKS.values()


def test_an_axis_of_pulls_has_few_ticks(axis):
    at = plots.lam_axis(axis, GRID, "λ/μ₁")
    np.testing.assert_allclose(at, [1e-5, *GRID[1:]])
    np.testing.assert_allclose(axis.get_xticks(), [1e-5, 1e-3, 1e-1, 10.0])
    assert axis.get_xticklabels()[0].get_text() == "0"
    plots.lam_axis(axis, (1e-3, 3e-3, 1e-2), "λ/μ₁")
    np.testing.assert_allclose(axis.get_xticks(), [1e-3, 1e-2])


def test_what_would_squeeze_the_others_is_far_below():
    others = np.array([0.76, 0.80])
    assert summary.far_below(0.51, others)
    assert not summary.far_below(0.75, others)
    assert not summary.far_below(0.90, others)


def test_numbers_have_a_true_minus():
    assert summary.number(-0.5) == "−0.5"
    assert summary.number(4.1e-5, ".2g") == "4.1e−05"
    assert summary.written([-0.5, 0.5]) == "0 (−0.5 to 0.5)"


def test_eigenvalues_are_drawn_relative_to_those_before(axis):
    rows = [
        {"index": 1, "base": 2.0, "eigenvalue": 3.0, "lower": 2.0, "upper": 8.0},
        {"index": 2, "base": 0.5, "eigenvalue": 1.0, "lower": None, "upper": 2.0},
        {"index": 3, "base": 0.0, "eigenvalue": 1.0, "lower": None, "upper": None},
    ]
    spectra_page.between(axis, rows)
    after = axis.lines[-1]
    np.testing.assert_allclose(after.get_xdata(), [1, 2])
    np.testing.assert_allclose(after.get_ydata(), [1.5, 2.0])
    (band,) = axis.collections
    assert band.get_datalim(axis.transData).y1 == 4.0
