"""The figures of study 08: what the kernel predicts, beside fine-tuning and the linear probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlin import plots
from jaxlin.experiments.figures.summary import (
    band,
    distinct,
    far_below,
    lam_positions,
    metric_of,
    name_of,
    number,
    of,
    sizes,
    values_of,
)
from jaxlin.training.compare import MAJORITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlin.experiments.figures.study import Row, Tables

FULL, PULLED = "full", "full_pulled"
PROBE, ALONE, REGRESSION, LOGISTIC = "linear_probe", "kernel_alone", "kernel_regression", "kernel_logistic"
ARMS = (FULL, PULLED, REGRESSION, ALONE, LOGISTIC, PROBE, MAJORITY)
"""In the order in which they are shown."""
NAMES = {
    FULL: "full, no pull",
    PULLED: "full, pull λ",
    REGRESSION: "kernel from the probe",
    ALONE: "kernel alone",
    LOGISTIC: "kernel, logistic",
    PROBE: "linear probe (start)",
    MAJORITY: "majority class",
}
_MARKERS = {FULL: "o", PULLED: "s", REGRESSION: "D", ALONE: "^", LOGISTIC: "v", PROBE: "P", MAJORITY: "x"}


def _panels(rows: Sequence[Row], height: float, title: str, sharey: bool) -> tuple[Figure, list[Axes], list[str]]:
    """Returns a figure with a panel a task, four in a line."""
    tasks = distinct(rows, "task")
    columns = min(len(tasks), 4)
    lines = math.ceil(len(tasks) / columns)
    figure, axes = plots.canvas(lines, columns, plots.width_of(columns), height * lines + 0.4, sharey=sharey)
    plots.headline(figure, title)
    for unused in axes.flat[len(tasks) :]:
        unused.set_axis_off()
    return figure, list(axes.flat[: len(tasks)]), tasks


def _scores(table: Sequence[Row]) -> Figure:
    """Draws the score of every arm, a panel a task."""
    figure, axes, tasks = _panels(table, 2.1, f"Validation scores; {sizes(table)}", True)
    arms = [arm for arm in ARMS if of(table, arm=arm)]
    with plots.drawing():
        for axis, task in zip(axes, tasks, strict=True):
            mine = of(table, task=task)
            others = values_of([row for row in mine if row["arm"] != MAJORITY], "score_eval")
            for place, arm in enumerate(reversed(arms)):
                values = values_of(of(mine, arm=arm), "score_eval")
                if len(values) and far_below(values.mean(), others):
                    text = f"← {number(values.mean(), '.2f')}"
                    axis.text(0.02, place, text, transform=axis.get_yaxis_transform(), va="center", fontsize=6.5)
                elif len(values):
                    colour = plots.COLOURS[arm]
                    axis.plot([values.min(), values.max()], [place] * 2, color=colour, lw=4, alpha=0.35)
                    axis.plot(values.mean(), place, _MARKERS[arm], color=colour, ms=5)
            axis.set_yticks(range(len(arms)), [NAMES[arm] for arm in reversed(arms)])
            axis.set(title=name_of(task), xlabel=metric_of(mine))
    return figure


def _curves(curve: Sequence[Row]) -> Figure:
    """Draws leave-one-out and validation loss against λ, a panel a task."""
    title = f"Leave-one-out against validation; {sizes(curve)}"
    figure, axes, tasks = _panels(curve, 2.3, title, False)
    with plots.drawing():
        for axis, task in zip(axes, tasks, strict=True):
            mine = of(curve, task=task)
            at = lam_positions(axis, mine)
            for arm in (ALONE, REGRESSION):
                rows, colour = of(mine, arm=arm), plots.COLOURS[arm]
                band(axis, rows, "lam_over_mu1", "loss_eval", at, fmt="o-", color=colour, label=NAMES[arm])
                band(axis, rows, "lam_over_mu1", "loss_leave_one_out", at, fmt="o--", color=colour, mfc="white")
            for share in distinct(of(mine, arm=ALONE, chosen=True), "lam_over_mu1"):
                axis.axvline(at[share], color=plots.COLOURS["start"], lw=0.9, ls="-.")
            axis.set(title=name_of(task))
        axes[0].set_ylabel("mean squared loss ½‖f−y‖²")
        axes[0].plot([], [], "k-", label="validation")
        axes[0].plot([], [], "k--", label="leave-one-out")
        axes[0].plot([], [], color=plots.COLOURS["start"], lw=0.9, ls="-.", label="λ chosen")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _calibration(tables: Tables) -> Figure:
    """Draws coverage of predictive intervals, from nothing and from the probe, and reliability of four arms."""
    coverage, reliability = tables["coverage"], tables["reliability"]
    panels = [
        (of(coverage, arm=ALONE), "level", "coverage", "(a) Intervals, kernel alone"),
        (of(coverage, arm=REGRESSION), "level", "coverage", "(b) Intervals, from the probe"),
        *(
            (of(reliability, arm=arm), "confidence", "accuracy", f"({letter}) {NAMES[arm]}")
            for letter, arm in zip("cdef", (LOGISTIC, REGRESSION, FULL, PROBE), strict=True)
        ),
    ]
    figure, axes = plots.canvas(2, 3, plots.COLUMN, 4.0)
    tasks = distinct(coverage, "task")
    with plots.drawing():
        for axis, (rows, across, column, title) in zip(axes.flat, panels, strict=True):
            axis.plot([0, 1], [0, 1], color="#000000", lw=0.8, ls=":")
            for task in tasks:
                mine, (colour, style) = of(rows, task=task), plots.task_look(task)
                if across == "level":
                    band(axis, mine, across, column, fmt=style, color=colour, label=name_of(task))
                else:
                    x, y = (
                        [values_of(of(mine, bin=k), c).mean() for k in distinct(mine, "bin")] for c in (across, column)
                    )
                    axis.plot(x, y, style, color=colour, label=name_of(task))
            words = ("nominal coverage", "share covered") if across == "level" else ("mean probability", "accuracy")
            axis.set(title=title, xlabel=words[0], ylabel=words[1])
            if across == "confidence":
                axis.set(xlim=_around(reliability, "confidence"), ylim=_around(reliability, "accuracy"))
        axes[0, 0].legend()
        title = "Calibration on validation examples (dotted: perfect); bands: (a) and (b) only"
        plots.headline(figure, f"{title}\n{sizes(coverage)}")
    return figure


def _around(rows: Sequence[Row], column: str) -> tuple[float, float]:
    values = values_of(rows, column)
    return (float(values.min()) - 0.03, min(float(values.max()) + 0.03, 1.0)) if len(values) else (0.0, 1.0)


STAGES = (
    ("linear probe", lambda row: row["arm"] == PROBE, PROBE),
    ("kernel alone", lambda row: row["arm"] == "kernel" and not row["stage"].endswith(REGRESSION), ALONE),
    ("fine-tuning, one λ", lambda row: row["arm"] == FULL, FULL),
)
"""What is timed: its name, which rows of the table are of it, whose colour it has."""
_PREDICTING = ("validation", "predictions")


def seconds_of(times: Sequence[Row], task: str, which: Callable[[Row], bool], predicting: bool) -> np.ndarray:
    """Returns processor seconds of every seed: of fitting, or of predicting validation examples."""
    mine = [row for row in of(times, task=task) if which(row)]
    mine = [row for row in mine if any(word in row["stage"] for word in _PREDICTING) == predicting]
    return np.array([values_of(of(mine, seed=seed), "cpu_seconds").sum() for seed in distinct(mine, "seed")])


def _times(times: Sequence[Row]) -> Figure:
    """Draws the processor's time of fitting and of predicting, medians over seeds."""
    tasks = distinct(times, "task")
    figure, axes = plots.canvas(1, 2, plots.COLUMN, 0.38 * len(tasks) + 1.3, sharey=True)
    with plots.drawing():
        for axis, predicting in zip(axes.flat, (False, True), strict=True):
            for line, (name, which, colour) in enumerate(STAGES):
                found = [np.median(seconds_of(times, task, which, predicting)) for task in tasks]
                places = np.arange(len(tasks)) + 0.27 * (line - 1)
                bars = axis.barh(places, found, height=0.25, color=plots.COLOURS[colour], label=name)
                shown = [f"{value:.2g}" if value < 10 else f"{value:.0f}" for value in found]
                axis.bar_label(bars, shown, padding=2, fontsize=6.5)
            axis.set(xlabel="seconds of processor time", title="(b) Predicting" if predicting else "(a) Fitting")
            axis.margins(x=0.12)
        axes[0, 0].set_yticks(range(len(tasks)), [name_of(task) for task in tasks])
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        train, held = distinct(times, "train_examples"), distinct(times, "eval_examples")
        plots.headline(
            figure,
            f"Processor time (median of {_seeds(times)}): {_range(train)} training, {_range(held)} validation examples",
        )
    return figure


def _seeds(rows: Sequence[Row]) -> str:
    count = len(distinct(rows, "seed"))
    return f"{count} seeds" if count > 1 else "1 seed"


def _range(found: Sequence[int]) -> str:
    return f"{found[0]}" if min(found) == max(found) else f"{min(found)} to {max(found)}"


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws scores; leave-one-out against validation; calibration; times."""
    return {
        "scores": _scores(tables["table"]),
        "leave_one_out": _curves(tables["curve"]),
        "calibration": _calibration(tables),
        "times": _times(tables["times"]),
    }
