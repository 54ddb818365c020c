"""Means, bands and intervals over seeds, and how they are written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxlin.experiments.figures.study import Row

TASKS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "rte": "RTE",
    "qnli": "QNLI",
    "mnli": "MNLI",
    "stsb": "STS-B",
    "imdb": "IMDb",
    "uci_yelp": "UCI Yelp",
    "uci_amazon": "UCI Amazon",
    "uci_imdb": "UCI IMDb",
    "stdlib": "standard library",
}
METRICS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}


def name_of(task: str) -> str:
    """Returns a task's name as it is written."""
    return TASKS.get(task, task)


def of(rows: Sequence[Row], **equal: Any) -> list[Row]:
    """Returns the rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in equal.items())]


def distinct(rows: Sequence[Row], column: str) -> list[Any]:
    """Returns the values of a column in the order in which they come, `None` left out."""
    return list(dict.fromkeys(row[column] for row in rows if row[column] is not None))


def values_of(rows: Sequence[Row], column: str) -> np.ndarray:
    """Returns the values of a column that are known."""
    return np.array([row[column] for row in rows if row[column] is not None], float)


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Returns the mean and its 95 % interval by Student's t; of one value the interval is infinite."""
    from scipy.stats import t

    known = np.asarray(values, float)
    mean = float(known.mean())
    if len(known) < 2:
        return mean, -math.inf, math.inf
    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return mean, mean - half, mean + half


def written(values: Sequence[float] | np.ndarray, form: str = ".3g") -> str:
    """Writes the mean of values and their range, such as `0.12 (0.11 to 0.14)`."""
    known = np.asarray(values, float)
    return f"{known.mean():{form}} ({known.min():{form}} to {known.max():{form}})"


def with_interval(values: Sequence[float] | np.ndarray, form: str = "+.3f") -> str:
    """Writes the mean of values and its 95 % interval, such as `+0.010 [−0.002, +0.022]`; of one value no interval."""
    mean, low, high = mean_interval(values)
    interval = f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else ""
    return f"{mean:{form}}{interval}".replace("-", "−")


def sizes(rows: Sequence[Row]) -> str:
    """Writes sample sizes and seeds for a caption, such as `1000 training, 872 validation examples, 3 seeds`."""
    train, evaluation = distinct(rows, "train_examples"), distinct(rows, "eval_examples")

    def spread(found: Sequence[int]) -> str:
        return f"{min(found)}" if min(found) == max(found) else f"{min(found)} to {max(found)}"

    seeds = len(distinct(rows, "seed"))
    shown = f"{seeds} seeds (mean, and range as a band)" if seeds > 1 else "1 seed"
    return f"{spread(train)} training and {spread(evaluation)} validation examples, {shown}"


def band(
    axis: Axes,
    rows: Sequence[Row],
    across: str,
    column: str,
    positions: Mapping[Any, float] | None = None,
    fmt: str = "-",
    **line: Any,
) -> None:
    """Draws the mean of a column over seeds against another, with the range of the seeds as a band.

    Args:
        axis: Where.
        rows: Of one line.
        across: Column of the abscissa.
        column: Column of the ordinate; where a row has none it is left out.
        positions: Abscissa of each value of `across`; `None`: the value.
        fmt: Of matplotlib's `plot`.
        line: Likewise.
    """
    at = sorted(distinct(rows, across))
    found = {value: known for value in at if len(known := values_of(of(rows, **{across: value}), column))}
    if not found:
        return
    x = [value if positions is None else positions[value] for value in found]
    low, mean, high = (np.array([each(known) for known in found.values()]) for each in (np.min, np.mean, np.max))
    if axis.get_yscale() == "log":
        low, mean, high = (np.where(values > 0, values, np.nan) for values in (low, mean, high))
    (drawn,) = axis.plot(x, mean, fmt, **line)
    axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.18, lw=0)


def lam_positions(axis: Axes, rows: Sequence[Row]) -> dict[float, float]:
    """Makes the axis one of λ/μ₁, with 0 at its left end; returns where each value stands."""
    shares = sorted(distinct(rows, "lam_over_mu1"))
    return dict(zip(shares, plots.lam_axis(axis, shares, "λ/μ₁").tolist(), strict=True))


def lam_looks(shares: Sequence[float]) -> dict[float, tuple[Any, str]]:
    """Returns colour and marker for each λ/μ₁, darker where it is smaller."""
    import matplotlib.pyplot as plt

    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(shares)))
    return dict(zip(sorted(shares), zip(shades, itertools.cycle("os^Dv"), strict=False), strict=True))
