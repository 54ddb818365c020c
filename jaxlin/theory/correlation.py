"""Rank correlation of a predictor, known before training, with what training gave, over many choices of what is tuned.

Values are `[R, C]`: R random draws (of A, head and data order) of C choices; what is correlated are a choice's means
over draws. Several such problems (tasks) are pooled by ranking within each, so that no difference between them counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError

Values = Sequence[Float[np.ndarray, "_ _"]]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Correlations with 95 % bootstrap intervals; NaN where one side is constant.

    Attributes:
        spearman: Of ranks within each problem, the problems together.
        spearman_interval: Bootstrap over choices and draws, both resampled whole.
        kendall: τ_b, the mean over problems.
        kendall_interval: Likewise.
        p_value: Of |spearman| under permutations of the choices within each problem.
        partial: Spearman of what the ranks of the controls leave of both sides; NaN without controls.
        partial_interval: Likewise.
        choices: Number of choices, of all problems together.
        draws: Smallest number of draws.
    """

    spearman: float
    spearman_interval: tuple[float, float]
    kendall: float
    kendall_interval: tuple[float, float]
    p_value: float
    partial: float
    partial_interval: tuple[float, float]
    choices: int
    draws: int


def _ranks(values: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
    """Mid-ranks along the last axis, scaled to mean 0 and norm 1; 0 where all are tied."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=-1)
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 0)


def _cosine(a: Float[np.ndarray, "B C"], b: Float[np.ndarray, "B C"]) -> Float[np.ndarray, " B"]:
    scale = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    product = np.sum(a * b, axis=-1)
    return np.divide(product, scale, out=np.full_like(product, np.nan), where=scale > 1e-9)


def _kendall(x: Float[np.ndarray, "B C"], y: Float[np.ndarray, "B C"]) -> Float[np.ndarray, " B"]:
    """τ_b of every row: the cosine of the signs of all pairs' differences."""
    found = np.empty(len(x))
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        signs = [np.sign(side[:, None] - side[None, :]).reshape(1, -1) for side in (a, b)]
        found[i] = _cosine(*signs)[0]
    return found


def _residual(ranks: Float[np.ndarray, "B C"], controls: Float[np.ndarray, "B C k"]) -> Float[np.ndarray, "B C"]:
    """What a linear fit on the controls leaves, row by row."""
    fit = controls @ (np.linalg.pinv(controls, rcond=1e-9) @ ranks[..., None])
    return ranks - fit[..., 0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Means over draws of each problem, a row a resample."""

    x: list[Float[np.ndarray, "B C"]]
    y: list[Float[np.ndarray, "B C"]]
    controls: list[list[Float[np.ndarray, "B C"]]]

    def _together(self, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Float[np.ndarray, " B"]:
        """Correlation over all problems; one of more choices counts more, as ranks have norm 1 in each."""
        weights = [x.shape[1] ** 0.5 for x in self.x]
        sides = [np.concatenate([w * part[i] for w, part in zip(weights, parts, strict=True)], 1) for i in (0, 1)]
        return _cosine(*sides)

    def spearman(self) -> Float[np.ndarray, " B"]:
        """Correlation of ranks within each problem."""
        return self._together([(_ranks(x), _ranks(y)) for x, y in zip(self.x, self.y, strict=True)])

    def partial(self) -> Float[np.ndarray, " B"]:
        """Spearman of residuals on the ranks of the controls."""
        if not any(self.controls):
            return np.full(len(self.x[0]), np.nan)
        parts = []
        for x, y, controls in zip(self.x, self.y, self.controls, strict=True):
            matrix = np.stack([_ranks(control) for control in controls], axis=-1)
            parts.append((_residual(_ranks(x), matrix), _residual(_ranks(y), matrix)))
        return self._together(parts)

    def kendall(self) -> Float[np.ndarray, " B"]:
        """Mean τ_b over problems."""
        return np.asarray(np.mean([_kendall(x, y) for x, y in zip(self.x, self.y, strict=True)], axis=0))


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Central 95 % of the values that are defined."""
    defined = values[np.isfinite(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)


def _check(x: Values, y: Values, controls: Sequence[Values]) -> None:
    if not len(x):
        raise InputError("a correlation needs at least one problem")
    for k, parts in enumerate(zip(x, y, *controls, strict=True)):
        shapes = [part.shape for part in parts]
        if len(set(shapes)) > 1 or shapes[0][0] < 1 or shapes[0][1] < 3:
            raise InputError(f"problem {k}: values have shapes {shapes}; expected the same [draws, at least 3 choices]")
        if not all(np.isfinite(part).all() for part in parts):
            raise InputError(f"problem {k}: values hold NaN or infinity")


def rank_correlation(
    x: Values, y: Values, controls: Sequence[Values] = (), *, resamples: int = 1000, seed: int = 0
) -> Correlation:
    """Correlates a predictor with an outcome over choices, with intervals and a permutation test.

    Args:
        x: The predictor, one array `[R, C]` a problem.
        y: The outcome, likewise.
        controls: What the partial correlation holds constant, each like x.
        resamples: Bootstrap resamples, and permutations.
        seed: Of both.

    Returns:
        The correlations.

    Raises:
        InputError: If shapes differ, a problem has fewer than 3 choices, or a value is not finite.
    """
    _check(x, y, controls)
    rng = np.random.default_rng(seed)
    whole = _Sample(
        [part.mean(axis=0)[None] for part in x],
        [part.mean(axis=0)[None] for part in y],
        [[control[k].mean(axis=0)[None] for control in controls] for k in range(len(x))],
    )
    drawn = _Sample([], [], [])
    for k, part in enumerate(x):
        draws, choices = part.shape
        rows = rng.integers(draws, size=(resamples, draws))
        columns = rng.integers(choices, size=(resamples, choices))

        def resampled(values: np.ndarray, rows: np.ndarray = rows, columns: np.ndarray = columns) -> np.ndarray:
            return values[rows[:, :, None], columns[:, None, :]].mean(axis=1)

        drawn.x.append(resampled(part))
        drawn.y.append(resampled(y[k]))
        drawn.controls.append([resampled(control[k]) for control in controls])
    spearman = float(whole.spearman()[0])
    return Correlation(
        spearman,
        _interval(drawn.spearman()),
        float(whole.kendall()[0]),
        _interval(drawn.kendall()),
        _p_value(whole, spearman, resamples, rng),
        float(whole.partial()[0]),
        _interval(drawn.partial()),
        sum(part.shape[1] for part in x),
        min(part.shape[0] for part in x),
    )


def _p_value(whole: _Sample, spearman: float, resamples: int, rng: np.random.Generator) -> float:
    """Share of permutations within problems whose |Spearman| is as large, the identity counted."""
    if not np.isfinite(spearman):
        return float("nan")
    permuted = _Sample([], [], [[] for _ in whole.x])
    for x, y in zip(whole.x, whole.y, strict=True):
        permuted.x.append(rng.permuted(np.repeat(x, resamples, axis=0), axis=1))
        permuted.y.append(np.repeat(y, resamples, axis=0))
    found = np.abs(permuted.spearman())
    return float((1 + np.sum(found >= abs(spearman) - 1e-12)) / (resamples + 1))
