"""What every inequality of the theory returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

_ROUNDING = 1e-9
"""Share of a bound by which what is measured may pass it: rounding of float64 eigenproblems and sums."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """An inequality of `theory.md`, beside what was measured.

    Attributes:
        name: Section and letter there, and what is bounded.
        value: The bound; an array where there is one for every eigenvalue or step.
        measured: What it bounds, of the same shape.
        conditions: What the inequality needs, in words, and whether it is so.
        lower: Whether `value` bounds from below.
        sampled: Whether the bound uses a supremum that was only sampled: then it is itself an estimate from below,
            and one that fails shows that, rather than a contradiction.
        rounding: Absolute error of what was measured, such as that of an eigenvalue far below the largest.
    """

    name: str
    value: Float[np.ndarray, ...]
    measured: Float[np.ndarray, ...]
    conditions: Mapping[str, bool]
    lower: bool = False
    sampled: bool = False
    rounding: float = 0.0

    @property
    def slack(self) -> Float[np.ndarray, ...]:
        """By how much the inequality is satisfied; negative where it is not."""
        return np.asarray(self.measured - self.value if self.lower else self.value - self.measured)

    @property
    def applies(self) -> bool:
        """Whether all of its conditions are met."""
        return all(self.conditions.values())

    @property
    def holds(self) -> bool | None:
        """Whether the inequality is satisfied everywhere, up to rounding; `None` where a condition fails.

        NaN satisfies nothing.
        """
        if not self.applies:
            return None
        size = np.maximum(np.abs(self.value), np.abs(self.measured))
        room = self.rounding + _ROUNDING * np.where(np.isfinite(size), size, 0)
        satisfied = self.measured >= self.value - room if self.lower else self.measured <= self.value + room
        return bool(np.all(satisfied))

    @property
    def tightness(self) -> float:
        """Smaller over larger of bound and measured, where they are nearest; 1 where the bound is reached."""
        value, measured = np.abs(np.atleast_1d(self.value)), np.abs(np.atleast_1d(self.measured))
        large = np.maximum(value, measured)
        ratio = np.divide(np.minimum(value, measured), large, out=np.ones_like(large), where=large > 0)
        ratio[np.isinf(value) & np.isinf(measured)] = 1
        return float(ratio.max())


def bound(
    name: str,
    value: float | np.ndarray,
    measured: float | np.ndarray,
    conditions: Mapping[str, bool] | None = None,
    *,
    lower: bool = False,
    sampled: bool = False,
    rounding: float = 0.0,
) -> Bound:
    """Returns the bound of what was computed, in float64."""
    arrays = np.asarray(value, np.float64), np.asarray(measured, np.float64)
    return Bound(name, *arrays, {key: bool(met) for key, met in (conditions or {}).items()}, lower, sampled, rounding)
