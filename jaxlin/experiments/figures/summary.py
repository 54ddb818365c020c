"""Means, bands and intervals over seeds, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots
from jaxlin.training.compare import MAJORITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from jaxlin.experiments.figures.study import Row

TASKS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "qqp": "QQP",
    "rte": "RTE",
    "qnli": "QNLI",
    "wnli": "WNLI",
    "mnli": "MNLI",
    "mnli_mismatched": "MNLI mismatched",
    "stsb": "STS-B",
    "imdb": "IMDb",
    "yelp": "Yelp",
    "ag_news": "AG News",
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


def metric_of(rows: Sequence[Row]) -> str:
    """Returns the metric that rows of one task are scored by, as it is written."""
    metric = str(rows[0]["metric"])
    return METRICS.get(metric, metric)


def of(rows: Sequence[Row], **equal: Any) -> list[Row]:
    """Returns the rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in equal.items())]


def distinct(rows: Sequence[Row], column: str) -> list[Any]:
    """Returns the values of a column in the order in which they come, `None` left out."""
    return list(dict.fromkeys(row[column] for row in rows if row[column] is not None))


def values_of(rows: Sequence[Row], column: str) -> np.ndarray:
    """Returns the values of a column that are known."""
    return np.array([row[column] for row in rows if row[column] is not None], float)


def far_below(value: float, others: np.ndarray) -> bool:
    """Whether a value lies so far below others that an axis which shows it would squeeze them."""
    return bool(value < others.min() - 0.5 * np.ptp(others))


def mean_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Returns the mean and its 95 % interval by Student's t; of one value the interval is infinite."""
    from scipy.stats import t

    known = np.asarray(values, float)
    mean = float(known.mean())
    if len(known) < 2:
        return mean, -math.inf, math.inf
    half = float(t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return mean, mean - half, mean + half


def number(value: float, form: str = "g") -> str:
    """Writes a number with a true minus sign."""
    return f"{value:{form}}".replace("-", "−")


def written(values: Sequence[float] | np.ndarray, form: str = ".3g") -> str:
    """Writes the mean of values and their range, such as `0.12 (0.11 to 0.14)`."""
    known = np.asarray(values, float)
    mean, low, high = (number(value, form) for value in (known.mean(), known.min(), known.max()))
    return f"{mean} ({low} to {high})"


def with_interval(values: Sequence[float] | np.ndarray, form: str = "+.3f") -> str:
    """Writes the mean of values and its 95 % interval, such as `+0.010 [−0.002, +0.022]`; of one value no interval."""
    mean, low, high = mean_interval(values)
    interval = f" [{number(low, form)}, {number(high, form)}]" if math.isfinite(low) else ""
    return f"{number(mean, form)}{interval}"


def learnt(table: Sequence[Row], arm: str, what: str, **at: Any) -> str:
    """Says where an arm scores above the majority class: where the 95 % interval over seeds of the difference does.

    Args:
        table: With rows of the arm and of `majority_class`; tasks without these are left out.
        arm: Which.
        what: It, in words.
        at: What its rows have besides.

    Returns:
        Sentences; empty if there is no such task.
    """
    above: list[str] = []
    others: list[str] = []
    for task in distinct(table, "task"):
        rows, baseline = of(table, task=task, arm=arm, **at), of(table, task=task, arm=MAJORITY)
        if rows and baseline:
            majority = {row["seed"]: row["score_eval"] for row in baseline}
            gained = [row["score_eval"] - majority[row["seed"]] for row in rows]
            score, of_majority = (values_of(part, "score_eval").mean() for part in (rows, baseline))
            words = f"{name_of(task)} ({metric_of(rows)} {score:.3g} against {of_majority:.3g})"
            (above if mean_interval(gained)[1] > 0 else others).append(words)
    said = []
    if above:
        said.append(f"Against always answering the majority class, {what} has learnt something on {', '.join(above)}.")
    if others:
        said.append(
            f"On {', '.join(others)} the 95 % interval over seeds of the difference to the majority class is not above "
            "0: nothing that shows is learnt there, and such scores do not tell methods apart."
        )
    return " ".join(said)


def gains(table: Sequence[Row], arm: str, other: str, **at: Any) -> dict[str, np.ndarray]:
    """Returns by task how much better an arm scores than another, seed by seed.

    Args:
        table: With rows of both; tasks without one of them are left out.
        arm: Which.
        other: What is taken off it.
        at: What the arm's rows have besides.

    Returns:
        Differences of `score_eval`.
    """
    found = {}
    for task in distinct(table, "task"):
        before = {row["seed"]: row["score_eval"] for row in of(table, task=task, arm=other)}
        rows = of(table, task=task, arm=arm, **at)
        if rows and before:
            found[task] = np.array([row["score_eval"] - before[row["seed"]] for row in rows])
    return found


def gaining(found: Mapping[str, Sequence[float] | np.ndarray]) -> list[str]:
    """Returns the tasks where the 95 % interval over seeds of a gain is above 0."""
    return [task for task, values in found.items() if mean_interval(values)[1] > 0]


NEVER_POOLED = ("stsb", "wnli")
"""Tasks that no claim over tasks counts: of scores, or of too few examples."""


def poolable(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of tasks that a claim over tasks counts."""
    return [row for row in rows if row["task"] not in NEVER_POOLED]


def spread(values: Sequence[float] | np.ndarray, form: str = "d") -> str:
    """Writes the range of values, by default whole numbers; or one of its ends where they are written the same."""
    low, high = number(min(values), form), number(max(values), form)
    return low if low == high else f"{low} to {high}"


def counted(count: int, what: str) -> str:
    """Writes a count of something, such as `1 task` or `4 tasks`."""
    return f"{count} {what}{'s' * (count != 1)}"


def sizes(rows: Sequence[Row], banded: bool = True) -> str:
    """Writes sample sizes and seeds for a caption, such as `1000 training, 872 validation examples, 3 seeds`.

    Args:
        rows: With the columns of `Problem.labels`.
        banded: Whether the figure draws the seeds as `band` does.

    Returns:
        The words.
    """
    train, evaluation = distinct(rows, "train_examples"), distinct(rows, "eval_examples")

    seeds = len(distinct(rows, "seed"))
    shown = f"{seeds} seeds" if seeds > 1 else "1 seed"
    if seeds > 1 and banded:
        shown += " (mean, and range as a band)"
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


def against_the_pull(
    table: Sequence[Row],
    panels: Sequence[tuple[str, str, str]],
    lines: Sequence[tuple[Mapping[str, str], str, str, str]],
    title: str,
    nested: bool = False,
) -> Figure:
    """Draws several quantities against λ/μ₁, a row a task and a column a quantity, the legend below.

    Args:
        table: Rows with `task` and `lam_over_mu1`.
        panels: Column, what it is, and scale; `score_eval` is named by the task's `metric`.
        lines: What rows of a line have, its label, colour and style; it is left out where it has no value.
        title: With sample sizes.
        nested: Draw each line thinner, with smaller open markers, than the one before: for lines that coincide.

    Returns:
        The figure.
    """
    tasks = distinct(table, "task")
    figure, axes = plots.canvas(len(tasks), len(panels), plots.COLUMN, 1.7 * len(tasks) + 0.6, sharex=True)
    with plots.drawing():
        for line, task in enumerate(tasks):
            mine = of(table, task=task)
            for column, (key, name, scale) in enumerate(panels):
                axis = axes[line, column]
                axis.set_yscale(scale)
                at = lam_positions(axis, mine)
                for place, (values, label, colour, style) in enumerate(lines):
                    look: dict[str, Any] = {"color": colour, "label": label}
                    if nested:
                        look |= {"mfc": "none", "lw": max(2.4 - 0.6 * place, 1.0), "ms": max(8.0 - 2.5 * place, 3.0)}
                    band(axis, of(mine, **values), "lam_over_mu1", key, at, style, **look)
                name = metric_of(mine) if key == "score_eval" else name
                axis.set(ylabel=name, title=name_of(task) if column == len(panels) // 2 else "")
                axis.set_xlabel("pull λ/μ₁" if task == tasks[-1] else "")
        drawn = {line.get_label(): line for axis in axes[0] for line in axis.lines}
        shown = [drawn[label] for _, label, *_ in lines if label in drawn]
        figure.legend(handles=shown, loc="outside lower center", ncols=3)
        plots.headline(figure, title)
    return figure
