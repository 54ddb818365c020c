"""Rank correlation of a predictor, known before training, with what training gave, over many choices of what is tuned.

Values are `[R, C]`: R random draws (of A, head and data order) of C choices; what is correlated are a choice's means
over draws. Several such problems (tasks) are pooled by averaging their correlations, so that no difference between
them counts. Problems over the same choices are not independent: a choice that is good for one task may be good for all.
So they are resampled and permuted together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError

Values = Sequence[Float[np.ndarray, "_ _"]]


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Correlations with 95 % bootstrap intervals, means over the problems in which both sides vary; NaN if none does.

    Attributes:
        spearman: Of ranks within each problem, weighted by its number of choices.
        spearman_interval: Bootstrap over choices and draws, resampled whole and alike in all problems over the same
            choices; resamples in which a side is constant in every problem are left out.
        kendall: τ_b, likewise.
        kendall_interval: Likewise.
        p_value: Of |spearman| under permutations of the choices, alike in all problems over the same choices.
        partial: Spearman of what the ranks of the controls leave of both sides; NaN without controls.
        partial_interval: Likewise.
        choices: Number of different choices.
        problems: Number of problems in which both sides vary.
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
    problems: int
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
    i, j = np.triu_indices(x.shape[1], 1)
    parts = [(x[k : k + 128], y[k : k + 128]) for k in range(0, len(x), 128)]  # signs take memory
    return np.concatenate([_cosine(*(np.sign(side[:, i] - side[:, j]) for side in part)) for part in parts])


def _residual(ranks: Float[np.ndarray, "B C"], controls: Float[np.ndarray, "B C k"]) -> Float[np.ndarray, "B C"]:
    """What a linear fit on the controls leaves, row by row."""
    fit = controls @ (np.linalg.pinv(controls, rcond=1e-9) @ ranks[..., None])
    return ranks - fit[..., 0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Means over draws of each problem, a row a resample."""

    x: list[Float[np.ndarray, "B _"]]
    y: list[Float[np.ndarray, "B _"]]
    controls: list[list[Float[np.ndarray, "B _"]]]

    def _mean(self, by_problem: Sequence[Float[np.ndarray, " B"]]) -> Float[np.ndarray, " B"]:
        """Mean over the problems where it is defined, weighted by their number of choices."""
        values, weights = np.stack(by_problem), np.array([[float(x.shape[1])] for x in self.x])
        weights = np.where(np.isfinite(values), weights, 0)
        total = weights.sum(axis=0)
        summed = np.sum(weights * np.where(np.isfinite(values), values, 0), axis=0)
        return np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0)

    def by_problem(self) -> list[Float[np.ndarray, " B"]]:
        """Correlation of ranks in each problem; NaN where a side is constant."""
        return [_cosine(_ranks(x), _ranks(y)) for x, y in zip(self.x, self.y, strict=True)]

    def spearman(self) -> Float[np.ndarray, " B"]:
        """Correlation of ranks within each problem."""
        return self._mean(self.by_problem())

    def partial(self) -> Float[np.ndarray, " B"]:
        """Spearman of residuals on the ranks of the controls."""
        if not any(self.controls):
            return np.full(len(self.x[0]), np.nan)
        found = []
        for x, y, controls in zip(self.x, self.y, self.controls, strict=True):
            matrix = np.stack([_ranks(control) for control in controls], axis=-1)
            found.append(_cosine(_residual(_ranks(x), matrix), _residual(_ranks(y), matrix)))
        return self._mean(found)

    def kendall(self) -> Float[np.ndarray, " B"]:
        """τ_b."""
        return self._mean([_kendall(x, y) for x, y in zip(self.x, self.y, strict=True)])


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Central 95 % of the values that are defined."""
    defined = values[np.isfinite(values)]
    if not defined.size:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)


def _check(x: Values, y: Values, controls: Sequence[Values], groups: Sequence[int]) -> None:
    if not len(x):
        raise InputError("a correlation needs at least one problem")
    if len(groups) != len(x):
        raise InputError(f"{len(groups)} groups are given for {len(x)} problems; expected one each")
    shapes_of: dict[int, tuple[int, ...]] = {}
    for k, parts in enumerate(zip(x, y, *controls, strict=True)):
        shapes = [part.shape for part in parts]
        if len(set(shapes)) > 1 or shapes[0][0] < 1 or shapes[0][1] < 3:
            raise InputError(f"problem {k}: values have shapes {shapes}; expected the same [draws, at least 3 choices]")
        if shapes_of.setdefault(groups[k], shapes[0])[1] != shapes[0][1]:
            raise InputError(f"problem {k} has other choices than those before; name them apart by groups")
        if not all(np.isfinite(part).all() for part in parts):
            raise InputError(f"problem {k}: values hold NaN or infinity")


def rank_correlation(
    x: Values,
    y: Values,
    controls: Sequence[Values] = (),
    *,
    groups: Sequence[int] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Correlates a predictor with an outcome over choices, with intervals and a permutation test.

    Args:
        x: The predictor, one array `[R, C]` a problem.
        y: The outcome, likewise.
        controls: What the partial correlation holds constant, each like x.
        groups: For each problem a number; those with the same one are over the same choices, in the same order. By
            default all are. Draws are the same everywhere.
        resamples: Bootstrap resamples, and permutations.
        seed: Of both.

    Returns:
        The correlations.

    Raises:
        InputError: If shapes differ, a problem has fewer than 3 choices, or a value is not finite.
    """
    groups = [0] * len(x) if groups is None else list(groups)
    _check(x, y, controls, groups)
    rng = np.random.default_rng(seed)
    sizes = {group: part.shape[1] for group, part in zip(groups, x, strict=True)}
    rows = {draws: rng.integers(draws, size=(resamples, draws)) for draws in sorted({part.shape[0] for part in x})}
    columns = {group: rng.integers(size, size=(resamples, size)) for group, size in sizes.items()}

    def resampled(values: np.ndarray, group: int) -> np.ndarray:
        return values[rows[len(values)][:, :, None], columns[group][:, None, :]].mean(axis=1)

    def sample(of: Callable[[np.ndarray, int], np.ndarray]) -> _Sample:
        sides = [[of(part, group) for part, group in zip(side, groups, strict=True)] for side in (x, y, *controls)]
        return _Sample(sides[0], sides[1], [list(parts) for parts in zip(*sides[2:], strict=True)] or [[] for _ in x])

    whole = sample(lambda values, _: values.mean(axis=0)[None])
    drawn = sample(resampled)
    spearman = float(whole.spearman()[0])
    return Correlation(
        spearman,
        _interval(drawn.spearman()),
        float(whole.kendall()[0]),
        _interval(drawn.kendall()),
        _p_value(whole, groups, spearman, resamples, rng),
        float(whole.partial()[0]),
        _interval(drawn.partial()),
        choices=sum(sizes.values()),
        problems=sum(bool(np.isfinite(found[0])) for found in whole.by_problem()),
        draws=min(rows),
    )


def _p_value(whole: _Sample, groups: Sequence[int], spearman: float, resamples: int, rng: np.random.Generator) -> float:
    """Share of permutations of the choices whose |Spearman| is as large, the identity counted."""
    if not np.isfinite(spearman):
        return float("nan")
    sizes = {group: part.shape[1] for group, part in zip(groups, whole.x, strict=True)}
    orders = {group: rng.permuted(np.tile(np.arange(size), (resamples, 1)), axis=1) for group, size in sizes.items()}
    permuted = _Sample(
        [part[0][orders[group]] for part, group in zip(whole.x, groups, strict=True)],
        [np.repeat(part, resamples, axis=0) for part in whole.y],
        [[] for _ in whole.x],
    )
    found = np.abs(permuted.spearman())
    return float((1 + np.sum(found >= abs(spearman) - 1e-12)) / (resamples + 1))
