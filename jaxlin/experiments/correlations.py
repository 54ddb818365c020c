"""What predicts fine-tuning? Rank correlations of every criterion at θ₀ with every outcome, by task and pooled."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlin.theory.correlation import Correlation, rank_correlation
from jaxlin.theory.criteria import CRITERIA

PAPER, STABLE = "paper", "stable"
"""The two ways to train: the paper's fixed rate, and c/(μ₁ + λ)."""
PRIMARY = ("lora_condition_number", PAPER, "train_loss")
"""Predictor, way to train and outcome of the claim that is tested; the others are secondary."""
OUTCOMES = ("train_loss", "eval_loss", "metric")
LOGARITHMS = ("condition_number", "regularized_condition_number", "mu_max", "mu_min", "trace")
"""Predictors that are averaged over draws by their logarithm."""
ALONE = "lora_"
"""Prefix of predictors of the kernel of the LoRA factors alone; those without it are of all that is tuned."""


def _values(table: Sequence[Mapping[str, Any]], task: str, way: str, column: str) -> np.ndarray:
    """`[draws, choices]` of one column; what diverged counts as the worst of the task."""
    rows = [row for row in table if (row["task"], row["way"]) == (task, way)]
    draws = sorted({row["draw"] for row in rows})
    names = [row["choice"] for row in rows if row["draw"] == draws[0]]
    by_place = {(row["draw"], row["choice"]): row[column] for row in rows}
    found = np.array([[by_place[draw, name] for name in names] for draw in draws], float)
    worst = np.nanmin if column == "metric" else np.nanmax
    found = np.where(np.isfinite(found), found, worst(found))
    return np.log(np.maximum(found, 1e-300)) if column.removeprefix(ALONE) in LOGARITHMS else found


def correlations(table: Sequence[Mapping[str, Any]], resamples: int) -> list[dict[str, Any]]:
    """Correlates every predictor with every outcome, by task and pooled.

    Partial correlations hold the ranks of log trace (of the same kernel) and of the number of parameters constant.
    Under the task `"pooled, equal size"` only choices of equally many modules are ranked among each other.

    Args:
        table: Rows of a `Study`; whole draws only.
        resamples: Bootstrap resamples and permutations.

    Returns:
        A row a predictor, way, outcome and task, `"pooled"` among them; `primary` marks the one named beforehand.
    """
    tasks = list(dict.fromkeys(row["task"] for row in table))
    predictors = [prefix + name for prefix in ("", ALONE) for name in CRITERIA] + ["num_params"]
    out = []
    for way in (PAPER, STABLE):
        columns = {
            name: [_values(table, task, way, name) for task in tasks]
            for name in {*predictors, *OUTCOMES, "num_modules"}
        }
        for predictor in predictors:
            for outcome in OUTCOMES:
                own_trace = "trace" if predictor in CRITERIA else f"{ALONE}trace"
                names = (predictor, outcome, own_trace, "num_params")
                for k, task in enumerate([*tasks, "pooled"]):
                    part = slice(None) if task == "pooled" else slice(k, k + 1)
                    x, y, *controls = (columns[name][part] for name in names)
                    found = rank_correlation(x, y, controls, resamples=resamples)
                    primary = (predictor, way, outcome) == PRIMARY and task == "pooled"
                    out.append({**_flat(predictor, way, outcome, task, found), "primary": primary})
                x, y, trace, _ = (_of_equal_size(columns[name], columns["num_modules"]) for name in names)
                if x:
                    found = rank_correlation(x, y, [trace], resamples=resamples)
                    out.append({**_flat(predictor, way, outcome, "pooled, equal size", found), "primary": False})
    return out


def _of_equal_size(values: Sequence[np.ndarray], sizes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Parts each task's choices by their number of modules; what has fewer than three of a size is left out."""
    groups = [
        (part, size[0] == count) for part, size in zip(values, sizes, strict=True) for count in np.unique(size[0])
    ]
    return [part[:, members] for part, members in groups if members.sum() >= 3]


def _flat(predictor: str, way: str, outcome: str, task: str, found: Correlation) -> dict[str, Any]:
    row: dict[str, Any] = {"predictor": predictor, "way": way, "outcome": outcome, "task": task}
    for name, value in dataclasses.asdict(found).items():
        if isinstance(value, tuple):
            row[f"{name}_low"], row[f"{name}_high"] = value
        else:
            row[name] = value
    return row
