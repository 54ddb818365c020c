"""What the study of the condition number shows: figures and findings from its tables."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxlin import plots
from jaxlin.data.known import CLASS_METRICS, KNOWN_TASKS
from jaxlin.experiments.figures.correlations import ALONE, EQUAL_SIZE, LOGARITHMS, PAPER, POOLED, PRIMARY, STABLE
from jaxlin.experiments.figures.study import Row, Tables
from jaxlin.experiments.figures.summary import METRICS, counted, distinct, name_of, number, of, poolable, spread
from jaxlin.theory.criteria import CRITERIA

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


KAPPA = PRIMARY[0]
_OUTCOMES = {
    (PAPER, "train_loss"): "training cross-entropy, Adam at a fixed rate",
    (PAPER, "metric"): "validation metric, same runs",
    (STABLE, "train_loss"): "training squared loss, descent at c/(μ₁+λ)",
}
_SHOWN = (KAPPA, *(f"{ALONE}{name}" for name in CRITERIA if f"{ALONE}{name}" != KAPPA), "num_params")
_WHOLE = tuple(name.removeprefix(ALONE) for name in _SHOWN)
"""The same of the kernel of all that is tuned, the head too."""


def name_of_predictor(predictor: str) -> str:
    """Returns a predictor in words."""
    if predictor == "num_params":
        return "number of parameters"
    words = plots.CRITERIA[predictor.removeprefix(ALONE)]
    return f"{words} (primary)" if predictor == KAPPA else words


def _counted(rows: Sequence[Row], column: str) -> str:
    return counted(len(distinct(rows, column)), column)


def _sizes(rows: Sequence[Row]) -> str:
    train, kernel, evaluation = (spread(distinct(rows, f"{part}_examples")) for part in ("train", "kernel", "eval"))
    return (
        f"{train} training examples, {kernel} of them in the kernel, {evaluation} for validation, "
        f"{_counted(rows, 'choice')}, {_counted(rows, 'draw')}"
    )


def _metric(task: str) -> str:
    """The metric that a task of classes is scored by, as it is written."""
    metrics = KNOWN_TASKS[task].metrics if task in KNOWN_TASKS else CLASS_METRICS
    return METRICS[metrics[0]]


def _is_logarithmic(predictor: str) -> bool:
    return predictor.removeprefix(ALONE) in LOGARITHMS


def _kind(choice: str) -> str:
    """The modules that a choice takes, such as `qkv` of `0,1:qkv`."""
    return choice.partition(":")[2]


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(_kind(row["choice"]) for row in rows))


class _Points(NamedTuple):
    """Choices, with an entry each: predictor, outcome, number of modules, and which modules they are."""

    predictor: np.ndarray
    outcome: np.ndarray
    num_modules: np.ndarray
    kind: np.ndarray


def _points(rows: Sequence[Row], outcome: str, predictor: str = KAPPA) -> _Points:
    """Means over draws of every choice, without what diverged; the geometric one where correlations take logarithms."""
    found = []
    for name in distinct(rows, "choice"):
        mine = [row for row in of(rows, choice=name) if row[outcome] is not None]
        if mine:
            said, values = (np.array([row[column] for row in mine], float) for column in (predictor, outcome))
            middle = np.exp(np.log(said).mean()) if _is_logarithmic(predictor) else said.mean()
            found.append((middle, values.mean(), mine[0]["num_modules"], _kind(name)))
    columns = zip(*found, strict=True) if found else ((),) * 4
    return _Points(*map(np.array, columns))


_MARKS = {"q": "o", "k": "^", "v": "s", "qv": "v", "qkv": "D"}
"""Of the kinds of modules that a choice takes in its layers."""
_SCATTERED = {"train_loss": "final cross-entropy", "metric": "validation score"}
"""Outcomes that choices are scattered by, in words."""


def _dots(axis: Axes, points: _Points, counts: Sequence[int]) -> Any:
    """Scatters choices, coloured by how many modules they tune; returns what a colour bar is made of."""
    scale: dict[str, Any] = {"cmap": plots.COUNT_MAP, "norm": "log", "vmin": min(counts), "vmax": max(counts)}
    for kind in dict.fromkeys(points.kind.tolist()):
        x, y, tuned = (values[points.kind == kind] for values in points[:3])
        image = axis.scatter(x, y, c=tuned, marker=_MARKS.get(kind, "o"), s=9, zorder=3, clip_on=False, **scale)
    return image


def _keys(figure: Figure, axes: np.ndarray, image: Any, rows: Sequence[Row], what: str) -> None:
    """Tells what colours and marks of panels mean, what they show, and of how many examples and draws they are."""
    ticks = sorted(distinct(rows, "num_modules"))
    kinds = _kinds(rows)
    bar = figure.colorbar(image, ax=axes[:, -1], label="modules tuned", aspect=15 * len(axes), pad=0.1)
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks])
    bar.minorticks_off()
    for kind in kinds:
        axes[0, 0].plot([], [], _MARKS.get(kind, "o"), color="#555555", ms=3.5, label=kind)
    figure.legend(loc="outside lower center", ncols=len(kinds))
    plots.headline(figure, f"{what} of Adam at a fixed rate, means over draws;\n{_sizes(rows)}")


_TASKS_ACROSS = 3


def _drawn(table: Sequence[Row]) -> tuple[list[Row], list[str]]:
    """What is scattered: rows of Adam's runs, of the tasks where some choice did not diverge, and these tasks."""
    rows = of(table, way=PAPER)
    tasks = distinct([row for row in rows if row["train_loss"] is not None], "task")
    return [row for row in rows if row["task"] in tasks], tasks


def _scatter(table: Sequence[Row], correlations: Sequence[Row]) -> Figure:
    """κ against final training loss and metric, a point a choice, a panel a task."""
    rows, tasks = _drawn(table)
    counts = distinct(rows, "num_modules")
    blocks = math.ceil(len(tasks) / _TASKS_ACROSS)
    columns, lines = math.ceil(len(tasks) / blocks), 2 * blocks
    figure, axes = plots.canvas(lines, columns, plots.COLUMN, 1.5 * lines + 0.7)
    for unused in axes[-2:, columns - (blocks * columns - len(tasks)) :].flat:
        unused.set_axis_off()
    with plots.drawing():
        for place, task in enumerate(tasks):
            line, column = 2 * (place // columns), place % columns
            for axis, outcome in zip(axes[line : line + 2, column], _SCATTERED, strict=True):
                image = _dots(axis, _points(of(rows, task=task), outcome), counts)
                rho = f"ρ = {_signed(one(correlations, KAPPA, outcome, task=task)['spearman'])}"
                above = name_of(task) if outcome == "train_loss" else _metric(task)
                axis.set(xscale="log", title=f"{above}\n{rho}")
                axis.xaxis.set_minor_formatter("")
                if not column:
                    axis.set_ylabel(_SCATTERED[outcome])
            axes[line + 1, column].set_xlabel("κ at θ₀")
        _keys(figure, axes, image, rows, "A point a choice of layers and modules: runs")
    return figure


def _scatter_others(table: Sequence[Row], correlations: Sequence[Row], outcome: str) -> Figure:
    """Ranks of every predictor but κ against those of one outcome, a row a predictor, a column a task."""
    from scipy.stats import rankdata

    rows, tasks = _drawn(table)
    counts, last = distinct(rows, "num_modules"), len(distinct(rows, "choice"))
    others = [name for name in _SHOWN if name != KAPPA]
    width, height = plots.width_of(len(tasks)), 0.72 * len(others) + 1.2
    figure, axes = plots.canvas(len(others), len(tasks), width, height)
    margin = max(0.05 * (last - 1), 0.5)
    limits = (1 - margin, last + margin)
    ranks = {"xlim": limits, "ylim": limits, "xticks": (1, last), "yticks": (1, last)}
    with plots.drawing():
        for place, predictor in enumerate(others):
            for axis, task in zip(axes[place], tasks, strict=True):
                points = _points(of(rows, task=task), outcome, predictor)
                x, y = (rankdata(values, nan_policy="omit") for values in points[:2])
                image = _dots(axis, points._replace(predictor=x, outcome=y), counts)
                rho = f"ρ = {_signed(one(correlations, predictor, outcome, task=task)['spearman'])}"
                axis.set_title(rho if place else f"{name_of(task)}\n{rho}", fontsize=7, pad=2)
                axis.set(**ranks)  # for each: Matplotlib takes half a minute for so many axes that share their limits
                axis.label_outer()
            axes[place, 0].set_ylabel(textwrap.fill(name_of_predictor(predictor), 12), fontsize=6.5)
        what = f"Choices of layers and modules ranked by a predictor (across) and by {_SCATTERED[outcome]} (up);\nruns"
        _keys(figure, axes, image, rows, what)
    return figure


def interval(axis: Axes, row: Row, name: str, at: float, **style: Any) -> None:
    """Draws a correlation and its interval at a height."""
    value, low, high = row[name], row[f"{name}_interval_low"], row[f"{name}_interval_high"]
    if np.isfinite(value):
        axis.plot([low, high], [at, at], "-", color=style["color"], lw=1)
        axis.plot([value], [at], **style)


def _forest(table: Sequence[Row], correlations: Sequence[Row]) -> Figure:
    """Every predictor's correlations, plain and partial, with their intervals."""
    pooled = of(correlations, task=POOLED)
    panels = [(key, name) for key, name in _OUTCOMES.items() if of(pooled, way=key[0], outcome=key[1])]
    figure, axes = plots.canvas(1, len(panels), plots.COLUMN, 3.0, sharey=True, sharex=True)
    plain, partial = plots.COLOURS["plain"], plots.COLOURS["partial"]
    with plots.drawing():
        for axis, ((way, outcome), name) in zip(axes[0], panels, strict=True):
            for at, predictor in enumerate(_SHOWN):
                (row,) = of(pooled, predictor=predictor, way=way, outcome=outcome)
                interval(axis, row, "spearman", at - 0.16, marker="o", color=plain)
                interval(axis, row, "partial", at + 0.16, marker="s", color=partial, mfc="white")
            axis.axvline(0, color="#000000", lw=0.7)
            axis.set(title=name.replace(", ", ",\n"), xlabel="rank correlation", xlim=(-1.05, 1.05))
        axes[0, 0].set_yticks(range(len(_SHOWN)), [name_of_predictor(name) for name in _SHOWN])
        axes[0, 0].invert_yaxis()
        axes[0, 0].plot([], [], "o-", color=plain, label="plain")
        axes[0, 0].plot([], [], "s-", color=partial, mfc="white", label="trace and size held constant")
        figure.legend(loc="outside lower center", ncols=2)
        plots.headline(
            figure,
            f"Spearman’s ρ over choices, {_counted(poolable(table), 'task')} averaged, 95 % intervals;\n"
            f"{_sizes(table)}",
        )
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws κ against outcomes, every predictor's correlations, and every other predictor against outcomes."""
    part = tables["table"], tables["correlations"]
    return {
        "scatter": _scatter(*part),
        "correlations": _forest(*part),
        "others_loss": _scatter_others(*part, "train_loss"),
        "others_metric": _scatter_others(*part, "metric"),
    }


def _signed(value: float) -> str:
    return number(value, "+.2f")


def cell(row: Row, name: str) -> str:
    """Writes a correlation and its interval; empty where there is none."""
    if not np.isfinite(row[name]):
        return ""
    low, high = (_signed(row[f"{name}_interval_{end}"]) for end in ("low", "high"))
    return f"{_signed(row[name])} [{low}, {high}]"


def _sign(row: Row, name: str) -> int:
    """1 or −1 where the correlation is known and its interval leaves out 0, else 0."""
    low, high = row[f"{name}_interval_low"], row[f"{name}_interval_high"]
    return int(np.sign(row[name])) if np.isfinite(row[name]) and low * high > 0 else 0


def one(correlations: Sequence[Row], predictor: str, outcome: str, way: str = PAPER, task: str = POOLED) -> Row:
    """Returns the row of one correlation."""
    (found,) = of(correlations, predictor=predictor, way=way, outcome=outcome, task=task)
    return found


def verdict(correlations: Sequence[Row]) -> str:
    """Says in a word whether the paper's claim holds: the smaller κ, the lower the loss; beyond what size says."""
    primary = one(correlations, KAPPA, "train_loss")
    plain, partial = _sign(primary, "spearman"), _sign(primary, "partial")
    if plain == 1:
        return "holds" if partial == 1 else "holds, but says no more than the kernel’s size"
    other = "does not hold as we read it, that a small κ is good: the relation is the other way round"
    return other if plain == -1 else "does not show"


def _scores(table: Sequence[Row]) -> str:
    """The range over choices of each task's validation score, means over draws, and what a constant answer has."""
    found = []
    for task in distinct(poolable(table), "task"):
        rows = of(table, way=PAPER, task=task)
        scores = _points(rows, "metric").outcome
        constant = number(rows[0]["majority_metric"], ".2f")
        found.append(f"{name_of(task)} {number(scores.min(), '.2f')} to {number(scores.max(), '.2f')} ({constant})")
    return ", ".join(found)


def _strengths(table: Sequence[Row]) -> str:
    """Rates of Adam and c of descent, with the tasks that were trained with each."""
    said = []
    for way, name in ((PAPER, "Adam’s rate"), (STABLE, "c")):
        rows = of(table, way=way)
        tasks = {value: distinct(of(rows, strength=value), "task") for value in sorted(distinct(rows, "strength"))}
        if len(tasks) == 1:
            said.append(f"{name} {next(iter(tasks)):g} on every task")
        elif tasks:
            each = (f"{value:g} on {', '.join(map(name_of, names))}" for value, names in tasks.items())
            said.append(f"{name} {' and '.join(each)}")
    return "; ".join(said)


def widest(table: Sequence[Row], correlations: Sequence[Row]) -> str:
    """κ's correlation with the metric of the task whose scores differ most between choices."""
    rows = of(poolable(table), way=PAPER)
    task = max(distinct(rows, "task"), key=lambda name: np.ptp(_points(of(rows, task=name), "metric").outcome))
    found = one(correlations, KAPPA, "metric", task=task)
    return f"on {name_of(task)}, whose scores differ most between choices, {cell(found, 'spearman')}"


_FEWEST = 4
"""Choices of one kind of modules that a correlation among them takes."""


def _by_kind(table: Sequence[Row]) -> list[str]:
    """κ of each kind of modules, and its correlation with training loss among choices of one kind."""
    from scipy.stats import spearmanr

    rows, found = of(table, way=PAPER), {}
    each = [_points(of(rows, task=task), "train_loss") for task in distinct(rows, "task")]
    for kind in _kinds(rows):
        points = [tuple(values[task.kind == kind] for values in task[:2]) for task in each]
        if min(len(kappa) for kappa, _ in points) < _FEWEST:
            return []
        middle = np.exp(np.mean([np.log(kappa).mean() for kappa, _ in points]))
        found[kind] = middle, len(points[0][0]), np.mean([spearmanr(*two).statistic for two in points])
    if len(found) < 2:
        return []
    kappas = ", ".join(f"{middle:.3g} for {kind}" for kind, (middle, *_) in found.items())
    within = ", ".join(f"{_signed(rho)} within {kind}" for kind, (*_, rho) in found.items())
    sizes = " to ".join(str(size) for size in sorted({size for _, size, _ in found.values()}))
    return [
        f"κ tells kinds of modules apart before anything else (geometric means: {kappas}); among the {sizes} choices "
        f"of one kind ρ is smaller: {within} (means over tasks; so few choices have wide intervals). What κ says of "
        "the loss is mostly which kind of module is tuned."
    ]


def _verdict(table: Sequence[Row], correlations: Sequence[Row]) -> str:
    primary, metric = one(correlations, KAPPA, "train_loss"), one(correlations, KAPPA, "metric")
    directions = {1: "the smaller κ, the lower the loss", -1: "the *larger* κ, the lower the loss"}
    plain, partial, on_metric = _sign(primary, "spearman"), _sign(primary, "partial"), _sign(metric, "spearman")
    left = {
        1: "what is left of it has the paper’s sign",
        -1: "what is left of it has the sign opposite to the paper’s",
        0: "nothing that differs from zero is left of it",
    }
    metrics = {
        1: "goes with a *better* one for larger κ",
        -1: "goes with a better one for smaller κ, as the paper says",
        0: "shows no relation that differs from zero",
    }
    lines = [
        f"**The paper’s claim {verdict(correlations)}** in this setting ({_sizes(table)}, "
        f"{_counted(poolable(table), 'task')}). log κ against final training loss (cross-entropy): "
        f"ρ = {cell(primary, 'spearman')} — " + (directions[plain] if plain else "the interval holds 0") + ". "
        f"Trained with {_strengths(table)}.",
        f"The validation scores, from the worst choice to the best (a constant answer’s): {_scores(table)}. For the "
        "validation metric κ "
        f"{metrics[on_metric]}, ρ = {cell(metric, 'spearman')}; {widest(table, correlations)}.",
    ]
    if np.isfinite(primary["partial"]):
        held = cell(primary, "partial")
        lines.insert(1, f"With trace and number of parameters held constant: {held}, so {left[partial]}.")
    every = one(correlations, KAPPA.removeprefix(ALONE), "train_loss")
    lines.append(
        "κ is here of the kernel of LoRA’s factors; that of all that is tuned, the new head too, has "
        f"ρ = {cell(every, 'spearman')} with training loss."
    )
    named = {"LoRA’s factors": _SHOWN, "all that is tuned": _WHOLE}
    best = (f"{_strongest(correlations, names)} of the kernel of {what}" for what, names in named.items())
    size = one(correlations, "num_params", "train_loss")
    lines.append(
        f"The strongest predictors of training loss are {' and '.join(best)}; the number of parameters, for which no "
        f"kernel is needed, has ρ = {cell(size, 'spearman')}."
    )
    equal = of(correlations, predictor=KAPPA, way=PAPER, outcome="train_loss", task=EQUAL_SIZE)
    if equal:
        lines.append(f"Among choices of equally many modules κ has ρ = {cell(equal[0], 'spearman')}.")
    lines += _by_kind(poolable(table))
    if of(correlations, way=STABLE):
        stable = one(correlations, KAPPA, "train_loss", STABLE)
        signs = {1: "the paper’s sign", -1: "the opposite sign", 0: "no sign that can be told"}
        lines.append(
            f"Under descent at c/(μ₁+λ), where theory says that κ_λ sets the rate, κ has "
            f"{signs[_sign(stable, 'spearman')]}: ρ = {cell(stable, 'spearman')}, by task {_by_task(correlations)}; "
            f"with trace and number of parameters held constant {cell(stable, 'partial')}. {_far(poolable(table))}"
        )
    return f"{lines[0]}\n\n" + "\n".join(f"- {line}" for line in lines[1:])


def _by_task(correlations: Sequence[Row]) -> str:
    """The range over tasks of κ's correlation with training loss under descent at c/(μ₁+λ)."""
    rows = of(correlations, predictor=KAPPA, way=STABLE, outcome="train_loss")
    return spread([row["spearman"] for row in rows if row["task"] not in (POOLED, EQUAL_SIZE)], "+.2f")


def _distances(table: Sequence[Row], way: str) -> np.ndarray:
    return np.array([row["distance"] for row in of(table, way=way) if row["distance"] is not None], float)


def beyond(table: Sequence[Row]) -> float:
    """Share of the runs of descent at c/(μ₁+λ) that go farther from θ₀ than any of Adam's."""
    by_adam, by_descent = _distances(table, PAPER), _distances(table, STABLE)
    return float(np.mean(by_descent > by_adam.max())) if by_adam.size and by_descent.size else 0.0


def _far(table: Sequence[Row]) -> str:
    """How far descent at c/(μ₁+λ) goes: what theory says is of what is near θ₀."""
    if not beyond(table):
        return ""
    by_adam, by_descent = _distances(table, PAPER), _distances(table, STABLE)
    return (
        f"Of {100 * beyond(table):.0f} % of these runs it is no test of the theory, which is of what is near θ₀: they "
        f"go farther than any of Adam’s, up to {by_descent.max():.2g} against {by_adam.max():.2g}, since the rate is "
        "large where μ₁ is small."
    )


def _strongest(correlations: Sequence[Row], predictors: Sequence[str]) -> str:
    """The predictor of training loss with the largest |ρ|, the number of parameters aside."""
    rows = [one(correlations, name, "train_loss") for name in predictors if name != "num_params"]
    best = max(rows, key=lambda row: abs(row["spearman"]) if np.isfinite(row["spearman"]) else -1)
    return f"{name_of_predictor(best['predictor'])} (ρ = {cell(best, 'spearman')})"


def _table(correlations: Sequence[Row], predictors: Sequence[str], ways: Sequence[str]) -> str:
    columns = [
        (name + partial, way, outcome, key)
        for (way, outcome), name in _OUTCOMES.items()
        if way in ways
        for partial, key in (("", "spearman"), ("; partial", "partial"))
    ]
    lines = [
        f"| {name_of_predictor(predictor)} | "
        + " | ".join(cell(one(correlations, predictor, outcome, way), key) for _, way, outcome, key in columns)
        + " |"
        for predictor in predictors
    ]
    heads = [name for name, *_ in columns]
    return f"| At θ₀ | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|\n" + "\n".join(lines)


def findings(tables: Tables) -> dict[str, str]:
    """Says whether the paper's claim holds, and what each predictor's correlations are."""
    table, found = tables["table"], tables["correlations"]
    return {
        "verdict": _verdict(table, found),
        "table": _table(found, _SHOWN, distinct(table, "way")),
        "whole_table": _table(found, _WHOLE, (PAPER,)),
    }
