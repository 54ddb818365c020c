"""What predicts fine-tuning? Rank correlations of every criterion at θ₀ with every outcome, by task and pooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlin.experiments.figures.summary import NEVER_POOLED
from jaxlin.theory.correlation import Correlation, rank_correlation
from jaxlin.theory.criteria import CRITERIA

PAPER, STABLE = "paper", "stable"
"""The two ways to train: the paper's fixed rate, and c/(μ₁ + λ)."""
PRIMARY = ("lora_condition_number", PAPER, "train_loss")
"""Predictor, way to train and outcome of the claim that is tested; the others are secondary."""
OUTCOMES = ("train_loss", "eval_loss", "metric")
LOGARITHMS = ("condition_number", "regularized_condition_number", "mu_max", "mu_min", "trace")
"""Predictors that are averaged over draws by their logarithm."""
POOLED, EQUAL_SIZE = "pooled", "pooled, equal size"
"""Under `task`: all tasks together, and only choices of equally many modules among each other."""
ALONE = "lora_"
"""Prefix of predictors of the kernel of the LoRA factors alone; those without it are of all that is tuned."""


def _values(table: Sequence[Mapping[str, Any]], task: str, way: str, column: str) -> np.ndarray | None:
    """`[draws, choices]` of one column; what diverged counts as worse than all others; `None` if nothing is known."""
    rows = [row for row in table if (row["task"], row["way"]) == (task, way)]
    draws = sorted({row["draw"] for row in rows})
    names = [row["choice"] for row in rows if row["draw"] == draws[0]]
    by_place = {(row["draw"], row["choice"]): row[column] for row in rows}
    found = np.array([[by_place[draw, name] for name in names] for draw in draws], float)
    known = found[np.isfinite(found)]
    if not known.size:
        return None
    beyond = float(np.ptp(known)) or 1.0
    worse = known.min() - beyond if column == "metric" else known.max() + beyond
    found = np.where(np.isfinite(found), found, worse)
    return np.log(np.maximum(found, 1e-300)) if column.removeprefix(ALONE) in LOGARITHMS else found


def correlations(
    table: Sequence[Mapping[str, Any]], resamples: int, progress: Callable[[int, int], None] = lambda *_: None
) -> list[dict[str, Any]]:
    """Correlates every predictor with every outcome, by task and pooled.

    Partial correlations hold the ranks of log trace (of the same kernel) and of the number of parameters constant.
    Under the task `"pooled, equal size"` only choices of equally many modules are ranked among each other. A task in
    which every run diverged has no row and no part in what is pooled, nor has one of `NEVER_POOLED` a part.

    Args:
        table: Rows of `condition_number`; whole draws only.
        resamples: Bootstrap resamples and permutations.
        progress: Called with predictors done and in all.

    Returns:
        A row a predictor, way, outcome and task, `"pooled"` among them; `primary` marks the one named beforehand,
        `diverged_share` and `bound_share` say how many runs have no numbers and how many κ are "≥".
    """
    tasks = list(dict.fromkeys(row["task"] for row in table))
    predictors = [prefix + name for prefix in ("", ALONE) for name in CRITERIA] + ["num_params"]
    out = []
    ways = list(dict.fromkeys(row["way"] for row in table))
    for way in ways:
        columns = {
            name: {task: _values(table, task, way, name) for task in tasks}
            for name in {*predictors, *OUTCOMES, "num_modules"}
        }
        for place, predictor in enumerate(predictors, start=ways.index(way) * len(predictors) + 1):
            own_trace = "trace" if predictor in CRITERIA else f"{ALONE}trace"
            for outcome in OUTCOMES:
                names = (predictor, outcome, own_trace, "num_params", "num_modules")
                known: dict[str, list[np.ndarray]] = {}
                for task in tasks:
                    parts = [part for name in names if (part := columns[name][task]) is not None]
                    if len(parts) == len(names):
                        known[task] = parts
                counted = {task: parts for task, parts in known.items() if task not in NEVER_POOLED}
                problems = {task: [parts] for task, parts in known.items()} | {POOLED: list(counted.values())}
                for name, members in problems.items():
                    if members:
                        x, y, trace, size, _ = zip(*members, strict=True)
                        found = rank_correlation(x, y, [trace, size], resamples=resamples)
                        row = _flat(predictor, way, outcome, name, found)
                        row["primary"] = (predictor, way, outcome, name) == (*PRIMARY, POOLED)
                        out.append(row | _caveats(table, predictor, way, list(counted) if name == POOLED else [name]))
                groups, parted = _of_equal_size(list(counted.values()))
                if parted:
                    x, y, trace, *_ = zip(*parted, strict=True)
                    found = rank_correlation(x, y, [trace], groups=groups, resamples=resamples)
                    row = _flat(predictor, way, outcome, EQUAL_SIZE, found) | {"primary": False}
                    out.append(row | _caveats(table, predictor, way, list(counted)))
            progress(place, len(ways) * len(predictors))
    return out


def _of_equal_size(problems: Sequence[Sequence[np.ndarray]]) -> tuple[list[int], list[list[np.ndarray]]]:
    """Parts each task's choices by their number of modules, at least three of a size; says of which size each is."""
    groups, parted = [], []
    for parts in problems:
        sizes = parts[-1][0]
        for count in np.unique(sizes):
            if (members := sizes == count).sum() >= 3:
                groups.append(int(count))
                parted.append([part[:, members] for part in parts])
    return groups, parted


def _caveats(table: Sequence[Mapping[str, Any]], predictor: str, way: str, tasks: Sequence[str]) -> dict[str, Any]:
    """Share of runs that diverged, and of κ that are only known to be at least so large."""
    rows = [row for row in table if row["way"] == way and row["task"] in tasks]
    flag = f"{predictor}_is_bound"
    bounds = float(np.mean([row[flag] for row in rows])) if flag in rows[0] else None
    return {"diverged_share": float(np.mean([row["diverged"] for row in rows])), "bound_share": bounds}


def _flat(predictor: str, way: str, outcome: str, task: str, found: Correlation) -> dict[str, Any]:
    row: dict[str, Any] = {"predictor": predictor, "way": way, "outcome": outcome, "task": task}
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, tuple):
            row[f"{name}_low"], row[f"{name}_high"] = value
        else:
            row[name] = value
    return row
