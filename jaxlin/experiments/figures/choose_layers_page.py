"""What the study of chosen layers shows: figures and findings from its tables."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlin import plots
from jaxlin.experiments.figures.choices import MODULES, Choice
from jaxlin.experiments.figures.study import Row, Tables
from jaxlin.experiments.figures.summary import (
    NEVER_POOLED,
    counted,
    distinct,
    learnt,
    mean_interval,
    metric_of,
    name_of,
    number,
    of,
    poolable,
    sizes,
    spread,
    values_of,
    with_interval,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BY_LOSS, BY_KAPPA = "leave_one_out_error", "condition_number"
"""Criteria that layers are chosen by here: the first is the one that is asked whether choosing pays."""
EVERYTHING, LAST, RANDOM, START = "everything", "last_layers", "random_choice", "start"
NAMES = {
    BY_LOSS: "chosen by leave-one-out loss",
    BY_KAPPA: "chosen by κ",
    LAST: "last layers",
    RANDOM: "random choices",
    EVERYTHING: "everything",
    START: "start (no fine-tuning)",
}
OTHERS = (BY_KAPPA, LAST, RANDOM, EVERYTHING, START)
"""What the choice is held against."""
MEASURES = (("score_eval", "score", 1), ("loss_eval", "validation loss", -1), ("loss_train", "training loss", -1))
"""Column, in words, and whether more (1) or less (−1) is better."""


def by_accuracy(table: Sequence[Row]) -> list[Row]:
    """Returns the rows scored by accuracy, as what is averaged over tasks must be; a task of scores as it was."""
    return [
        row if row["accuracy_eval"] is None else {**row, "metric": "accuracy", "score_eval": row["accuracy_eval"]}
        for row in table
    ]


def share_used(table: Sequence[Row]) -> float:
    """Returns the share of the budget that the choice used, mean over tasks and seeds; the last layers use all."""
    used, budget = (values_of(of(table, arm=arm), "num_params").mean() for arm in (BY_LOSS, LAST))
    return float(used / budget)


def differences(table: Sequence[Row], other: str, column: str) -> np.ndarray:
    """Returns the choice minus another arm, a value a seed; of several runs of an arm in a seed the mean counts."""
    found = []
    for seed in distinct(table, "seed"):
        mine, theirs = (values_of(of(table, arm=arm, seed=seed), column) for arm in (BY_LOSS, other))
        if len(mine) and len(theirs):
            found.append(mine.mean() - theirs.mean())
    return np.array(found)


def pooled(table: Sequence[Row], other: str, column: str) -> np.ndarray:
    """Returns the mean difference of each task that may be pooled: an interval of these is one over tasks."""
    tasks = [task for task in distinct(table, "task") if task not in NEVER_POOLED]
    return np.array([differences(of(table, task=task), other, column).mean() for task in tasks])


def points(axis: Axes, values: np.ndarray, at: float, colour: str) -> None:
    """Draws the mean of values with its 95 % interval, and below them, hollow, the values."""
    axis.plot(values, np.full(len(values), at + 0.28), "o", color=colour, mfc="none", mew=0.8, ms=3.5)
    mean, low, high = mean_interval(values)
    axis.plot([mean], [at], "D", color=colour, ms=4)
    if np.isfinite(low):
        axis.plot([low, high], [at, at], "-", color=colour, lw=1.3)


def _difference_figure(table: Sequence[Row]) -> Figure:
    """Paired differences, a line an arm, a row a task and one for the mean of the tasks."""
    tasks = distinct(table, "task")
    lines = len(tasks) + (len(tasks) > 1)
    figure, axes = plots.canvas(lines, 3, plots.COLUMN, 1.2 * lines + 0.8, sharey=True)
    with plots.drawing():
        for line in range(lines):
            own = line < len(tasks)
            for axis, (column, name, better) in zip(axes[line], MEASURES, strict=True):
                for at, other in enumerate(OTHERS):
                    rows = of(table, task=tasks[line]) if own else table
                    values = (differences if own else pooled)(rows, other, column)
                    points(axis, values, at, plots.COLOURS[other])
                axis.axvline(0, color="#000000", lw=0.7)
                axis.locator_params(axis="x", nbins=3)
                if line == lines - 1:
                    axis.set_xlabel(f"{name}:\nchosen − other\n({'more' if better > 0 else 'less'} is better)")
            title = name_of(tasks[line]) if own else "mean of the tasks, interval over tasks"
            axes[line, 1].set_title(title)
            if own:
                axes[line, 0].set_title(f"score: {metric_of(of(table, task=tasks[line]))}")
        axes[0, 0].set_yticks(range(len(OTHERS)), [NAMES[other] for other in OTHERS])
        axes[0, 0].set_ylim(len(OTHERS) - 0.5, -0.5)
        plots.headline(
            figure,
            "Layers chosen by leave-one-out loss against others: paired differences, each panel on its own scale\n"
            f"(mean and 95 % interval; below them a circle a seed or task); {sizes(table, banded=False)}",
        )
    return figure


def _taken(table: Sequence[Row], arm: str) -> dict[tuple[int, str], int]:
    """Counts the draws of all tasks in which each module of a layer was chosen."""
    choices = [Choice.parse(row["choice"]) for row in of(table, arm=arm)]
    return Counter((layer, letter) for choice in choices for layer in choice.layers for letter in choice.modules)


def _most_taken(table: Sequence[Row], arm: str) -> str:
    """Says what a criterion took most often, and how often."""
    taken, draws = _taken(table, arm), counted(len(of(table, arm=arm)), "draw")
    most = max(taken.values())
    first = [f"the {MODULES[letter]} of layer {layer}" for (layer, letter), count in taken.items() if count == most]
    which = first[0] if len(first) == 1 else "no module of a layer more often than"
    return f"{NAMES[arm].removeprefix('chosen ')}, {which} in {most} of {draws}"


def _where(table: Sequence[Row], chosen: Sequence[Row]) -> Figure:
    """In which share of the draws each module of each layer was chosen, by two criteria."""
    tasks, letters = distinct(table, "task"), list(MODULES)
    every = Choice.parse(of(table, arm=EVERYTHING)[0]["choice"])
    depth = len(every.layers)
    figure, axes = plots.canvas(2, len(tasks), plots.width_of(len(tasks)), 2.6, sharex=True, sharey=True)
    with plots.drawing():
        for line, arm in enumerate((BY_LOSS, BY_KAPPA)):
            for column, task in enumerate(tasks):
                rows, counts = of(table, task=task, arm=arm), np.zeros((len(letters), depth))
                for row in rows:
                    choice = Choice.parse(row["choice"])
                    for letter in choice.modules:
                        counts[letters.index(letter), list(choice.layers)] += 1 / len(rows)
                axis = axes[line, column]
                image = axis.imshow(counts, cmap=plots.COUNT_MAP, vmin=0, vmax=1, aspect="auto")
                axis.grid(False)
                axis.set_xticks(range(depth))
                axis.set_yticks(range(len(letters)), list(MODULES.values()))
                if not line:
                    axis.set_title(name_of(task))
                else:
                    axis.set_xlabel("layer")
            axes[line, 0].set_ylabel(textwrap.fill(NAMES[arm].removeprefix("chosen "), 13))
        figure.colorbar(image, ax=axes, label="share of draws")
        train, draws = spread(distinct(table, "train_examples")), counted(len(distinct(table, "seed")), "draw")
        plots.headline(
            figure,
            f"What was chosen, on {chosen[0]['select_examples']} of {train} training examples, in {draws} a task:\n"
            + "; ".join(_most_taken(table, arm) for arm in (BY_KAPPA, BY_LOSS)),
        )
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws the paired differences, and what was chosen."""
    table = by_accuracy(tables["table"])
    return {"differences": _difference_figure(table), "chosen": _where(table, tables["chosen"])}


def _scores(table: Sequence[Row]) -> str:
    arms = [BY_LOSS, *OTHERS]
    lines = []
    for task in distinct(table, "task"):
        cells = [written(values_of(of(table, task=task, arm=arm), "score_eval")) for arm in arms]
        lines.append(f"| {name_of(task)} ({metric_of(of(table, task=task))}) | " + " | ".join(cells) + " |")
    sizes_of = [written(values_of(of(table, arm=arm), "num_params"), ".0f") for arm in arms]
    lines.append("| parameters tuned | " + " | ".join(sizes_of) + " |")
    head = " | ".join(NAMES[arm] for arm in arms)
    return (
        f"Validation score, mean over seeds and range:\n\n| Task | {head} |\n{'|---' * (len(arms) + 1)}|\n"
        + "\n".join(lines)
        + f"\n\n{learnt(table, EVERYTHING, 'tuning everything')}"
    ).strip()


def _differences(table: Sequence[Row]) -> str:
    lines = []
    for task in distinct(table, "task"):
        for column, name, _ in MEASURES:
            name = metric_of(of(table, task=task)) if column == "score_eval" else name
            cells = [with_interval(differences(of(table, task=task), other, column), "+.4f") for other in OTHERS]
            lines.append(f"| {name_of(task)} | {name} | " + " | ".join(cells) + " |")
    head = " | ".join(f"− {NAMES[other]}" for other in OTHERS)
    draws, count = len(distinct(table, "seed")), len(lines) * len(OTHERS)
    return (
        "Chosen by leave-one-out loss minus each other, paired by seed, with 95 % intervals over seeds:\n\n"
        f"| Task | of | {head} |\n{'|---' * (len(OTHERS) + 2)}|\n" + "\n".join(lines) + "\n\n"
        f"Each interval is Student's t of {counted(draws, 'draw')}, and as wide as so few make it. There are {count}: "
        f"if nothing differed, about {0.05 * count:.0f} of them would leave out zero by chance."
    )


def outcome(values: np.ndarray, better: int) -> int:
    """Returns 1 where the interval says better, −1 worse, 0 neither, as where all seeds differ alike."""
    _, low, high = mean_interval(values)
    return 0 if low <= 0 <= high or low == high else int(np.sign(low) * better)


def _against(table: Sequence[Row], other: str) -> str:
    """A row of the verdict's table: mean differences over tasks, and in how many tasks they are told apart."""
    tasks = distinct(table, "task")
    cells = [f"{values_of(of(table, arm=other), 'num_params').mean():.0f}"]
    for column, _, better in MEASURES:
        found = [outcome(differences(of(table, task=task), other, column), better) for task in tasks]
        over_tasks = pooled(table, other, column)
        mean = f"{with_interval(over_tasks, '+.4f')}; " if len(over_tasks) else ""
        cells.append(f"{mean}better in {found.count(1)}, worse in {found.count(-1)}")
    return f"| {NAMES[other]} | {' | '.join(cells)} |"


_ABREAST = (LAST, RANDOM)
"""What the choice has to beat: as cheap to name, within the same budget."""
_PAYS = {1: "pays", 0: "is not shown to pay", -1: "does not pay"}


def _training(table: Sequence[Row]) -> str:
    """Says where the training loss is told apart over tasks."""
    found = {other: pooled(table, other, "loss_train") for other in _ABREAST}
    told = {other: outcome(values, -1) for other, values in found.items()}
    said = []
    for sign, word in ((-1, "larger"), (1, "smaller")):
        parts = [f"{NAMES[o]} ({with_interval(found[o], '+.4f')})" for o in _ABREAST if told[o] == sign]
        if parts:
            said.append(f"its training loss is {word} than that of {' and of '.join(parts)}")
    return f"Told apart over tasks: {', and '.join(said)}. " if said else "Nor is its training loss told from theirs. "


def _verdict(table: Sequence[Row]) -> str:
    equal = {other: outcome(pooled(table, other, "score_eval"), 1) for other in _ABREAST}
    words = {1: "is better than that of", -1: "is worse than that of", 0: "cannot be told from that of"}
    ends = " and ".join(f"{words[sign]} {NAMES[other]}" for other, sign in equal.items())
    of_mean = counted(len(distinct(poolable(table), "task")), "task")
    heads = "".join(f" | {name}" for _, name, _ in MEASURES).replace("score", "accuracy")
    tuned = values_of(of(table, arm=BY_LOSS), "num_params").mean()
    return (
        f"**Choosing layers by leave-one-out loss {_PAYS[min(equal.values())]} here**: over {of_mean} its accuracy "
        f"{ends}. {_training(table)}It used {100 * share_used(table):.3g} % of the budget of parameters, the other two "
        "all of it: what differs may be the number of parameters as well as which they are.\n\n"
        f"The choice, which tunes {tuned:.0f} parameters at the mean, minus each other (mean over tasks, 95 % interval "
        f"over tasks; and in how many of {counted(len(distinct(table, 'task')), 'task')} the interval over draws "
        f"leaves out zero):\n\n| Minus | its parameters{heads} |\n{'|---' * (len(MEASURES) + 2)}|\n"
        + "\n".join(_against(table, other) for other in OTHERS)
    )


def _what(tables: Tables) -> str:
    table, chosen = tables["table"], tables["chosen"]
    lines = []
    for task in distinct(table, "task"):
        cells = [", ".join(row["choice"] for row in of(table, task=task, arm=arm)) for arm in (BY_LOSS, BY_KAPPA)]
        lines.append(f"| {name_of(task)} | " + " | ".join(cell.replace(", ", " · ") for cell in cells) + " |")
    return (
        f"Chosen of {chosen[0]['candidates']} candidates on {chosen[0]['select_examples']} examples, seed by seed "
        "(layers:modules, by first letter):\n\n| Task | by leave-one-out loss | by κ |\n|---|---|---|\n"
        + "\n".join(lines)
        + f"\n\nTaken most often: {'; '.join(_most_taken(table, arm) for arm in (BY_KAPPA, BY_LOSS))}.\n\n"
        + _said_before(table)
    )


def _said_before(table: Sequence[Row]) -> str:
    """How well what the kernel said of the choices within the budget ranks them by validation loss."""
    words = {BY_LOSS: "leave-one-out loss", BY_KAPPA: "κ"}
    ranks = {name: _ranks(table, name) for name in words}
    problems = [found for by_task in ranks[BY_LOSS].values() for found in by_task]
    if not problems:
        return "Too few choices were fine-tuned in a draw to rank them."
    said = []
    for name, by_task in ranks.items():
        means = [float(np.mean([rho for rho, _ in found])) for found in by_task.values()]
        over = f" ({spread(means, '+.2f')} by task)" if len(means) > 1 else ""
        said.append(f"{number(float(np.mean(means)), '+.2f')}{over} for {words[name]}")
    return (
        "Rank correlation of what the kernel said with the validation loss after fine-tuning, over the "
        f"{spread([count for _, count in problems])} choices within the budget of each draw, mean over "
        f"{counted(len(problems), 'draw')} of {counted(len(ranks[BY_LOSS]), 'task')}: {' and '.join(said)}."
    )


def _ranks(table: Sequence[Row], criterion: str) -> dict[str, list[tuple[float, int]]]:
    """Rank correlation of a criterion with the validation loss, and of how many choices: by task, a pair a seed."""
    from scipy.stats import spearmanr

    found: dict[str, list[tuple[float, int]]] = {}
    for task in distinct(table, "task"):
        for seed in distinct(table, "seed"):
            rows = [row for row in of(table, task=task, seed=seed) if row[criterion] is not None]
            unique = {row["choice"]: row for row in rows}.values()
            if len(unique) > 2:
                sides = [[row[column] for row in unique] for column in (criterion, "loss_eval")]
                found.setdefault(task, []).append((float(spearmanr(*sides).statistic), len(unique)))
    return found


def findings(tables: Tables) -> dict[str, str]:
    """Says whether choosing pays, how each arm scores, the paired differences, and what was chosen."""
    table = by_accuracy(tables["table"])
    return {
        "verdict": _verdict(table),
        "scores": _scores(table),
        "differences": _differences(table),
        "chosen": _what({**tables, "table": table}),
    }
