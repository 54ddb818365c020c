"""Random projections of the Jacobian: rows whose Gram matrix estimates the kernel, with its error stated."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.models.model import named_key
from jaxlin.ntk.jacobian import MEMORY_BUDGET, Progress, jacobian, jacobian_bytes
from jaxlin.tunable import Tunable

_BLOCK = 1 << 22
"""Largest number of entries of the random matrix that are held at once; with `_COLUMNS` part of what a seed means."""

_COLUMNS = 1 << 14
"""Largest number of columns of J that are held in float64 at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sketch:
    """Jacobian rows of every example, projected: `S = J R / √d`, R of independent random signs `[P, d]`.

    `E[S Sᵀ] = K`, unnormalised (theory 0). With t = tr(K)², f = ‖K‖_F² and D = Σ_p ‖J_p‖⁴ over the columns of J,
    exactly `E‖S Sᵀ − K‖_F² = (t + f − 2D)/d` (Gaussian entries would lack the −2D). The error falls as 1/√d whatever P
    is, but is of the size of tr(K)/√d: the small eigenvalues of K are lost in it, and there are at most d.

    Attributes:
        rows: S, `[N, C, d]`, float64.
        trace: tr K: exact, up to the rounding of the Jacobian.
        column_fourth: D, exact likewise.
        seed: Data of the key that R was drawn from: sketches of one seed share R.
        events: What was changed on the way: that memory ran out, and passes took fewer examples.
    """

    rows: Float[np.ndarray, "N C d"]
    trace: float
    column_fourth: float
    seed: bytes
    events: tuple[str, ...] = ()

    @property
    def dimension(self) -> int:
        """Number of columns d."""
        return self.rows.shape[2]

    def kernel_matrix(self, other: Sketch | None = None) -> Float[np.ndarray, "m1 m2"]:
        """Returns the estimate of K as a matrix, example-major as `Kernel.matrix()`; unbiased.

        Args:
            other: The sketch of other examples, for a train-test kernel; default this one.

        Raises:
            InputError: If the two do not share their random matrix.
        """
        if other is not None and (other.seed, other.dimension) != (self.seed, self.dimension):
            raise InputError("two sketches make a kernel only if rng and dimension of both are the same")
        left = self.rows.reshape(-1, self.dimension)
        right = left if other is None else other.rows.reshape(-1, self.dimension)
        return left @ right.T

    @functools.cached_property
    def squared_norm(self) -> float:
        """Estimate of ‖K‖_F²: unbiased, but for a clip to what tr K allows, `[tr(K)²/m, tr(K)²]`."""
        flat, t, d = self.rows.reshape(-1, self.dimension), self.trace**2, self.dimension
        small = flat.T @ flat if d < len(flat) else flat @ flat.T
        # E‖S Sᵀ‖² = f + (t + f − 2D)/d, and t and D are known.
        unbiased = (float(np.sum(small**2)) - (t - 2 * self.column_fourth) / d) / (1 + 1 / d)
        return float(np.clip(unbiased, t / len(flat), t))

    @property
    def relative_error(self) -> float:
        """Standard error of `kernel_matrix()`, `√(E‖S Sᵀ − K‖_F²) / ‖K‖_F` with ‖K‖_F² as estimated; 0 where K is 0."""
        t, f = self.trace**2, self.squared_norm
        return (max(t + f - 2 * self.column_fourth, 0.0) / self.dimension / f) ** 0.5 if f else 0.0


def sketch(
    tun: Tunable,
    x: Dataset | Mapping[str, Any],
    dimension: int,
    *,
    theta: PyTree | None = None,
    rng: int | Array = 0,
    dtype: str | None = None,
    precision: str = "highest",
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> Sketch:
    """Projects the Jacobian rows of every example onto `dimension` random directions.

    The Jacobian is held for as many examples at a time as the budget allows. R is never held whole: for each such part
    of the examples its rows are drawn anew, some at a time, from `rng`, the leaf's path and d, whatever else is tuned.

    Args:
        tun: The model.
        x: Examples: a `Dataset` or a dict of arrays.
        dimension: d, at least 1.
        theta: Where; default `tun.theta0`.
        rng: Seed or key of the projection.
        dtype: `"float64"` computes the Jacobian in float64; `None` as the parameters. The projection is in float64.
        precision: Of matrix products on the device.
        memory_budget: Largest size in bytes of the part of the Jacobian that is held; at least one example's.
        progress: Called with examples done and in all.

    Returns:
        The sketch, with what its error follows from.

    Raises:
        InputError: If an argument is not one of those listed, an input does not fit the model, or one example's
            Jacobian exceeds the budget.
    """
    if dimension < 1:
        raise InputError(f"dimension={dimension}; expected at least 1")
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    data, key = as_dataset(x), named_key(rng, "sketch")
    tun.check_batch(data.columns)
    one = jacobian_bytes(tun, data, dtype) // len(data)
    if one > memory_budget:
        raise InputError(
            f"the Jacobian of one example takes {one / 2**30:.1f} GiB, more than "
            f"memory_budget={memory_budget / 2**30:.1f} GiB; raise it, or tune less"
        )
    size = min(len(data), int(memory_budget // max(one, 1)))
    rows: np.ndarray | None = None
    trace = 0.0
    events: dict[str, None] = {}  # each once, in order
    columns: dict[str, np.ndarray] = {}  # of every leaf Σ over rows of J², by column
    for start in range(0, len(data), size):
        part = _part(data, np.arange(start, min(start + size, len(data))))
        jac = jacobian(tun, part, theta, dtype=dtype, precision=precision, memory_budget=memory_budget)
        events |= dict.fromkeys(jac.events)
        if rows is None:
            rows = np.zeros((len(data), jac.outputs.shape[1], dimension))
        for path, leaf in jac.rows.items():
            flat = leaf.reshape(-1, leaf.shape[2])
            squares = np.einsum("mp,mp->p", flat, flat, dtype=np.float64)
            columns[path] = columns.get(path, np.zeros(len(squares))) + squares
            trace += float(squares.sum())
            projected = _project(flat, dimension, named_key(key, path))
            rows[start : start + len(part)] += projected.reshape(len(part), -1, dimension)
        if progress is not None:
            progress(start + len(part), len(data))
    assert rows is not None  # a Dataset is never empty
    fourth = sum(float(squares @ squares) for squares in columns.values())
    seed = np.asarray(jax.random.key_data(key)).tobytes()
    return Sketch(rows / dimension**0.5, trace, fourth, seed, tuple(events))


def _part(data: Dataset, examples: np.ndarray) -> Dataset:
    """Returns some examples at the buckets of all, so that no part meets shapes of its own."""
    columns = {name: value[examples] for name, value in data.columns.items()}
    return Dataset(columns, None if data.lengths is None else data.lengths[examples], data.buckets)


def _project(rows: np.ndarray, dimension: int, key: Array) -> Float[np.ndarray, "m d"]:
    """Returns rows `[m, size]` of one leaf times its random signs `[size, d]`, some columns of J at a time."""
    width, out = min(max(_BLOCK // dimension, 1), _COLUMNS), np.zeros((len(rows), dimension))
    for block, start in enumerate(range(0, rows.shape[1], width)):
        part = rows[:, start : start + width].astype(np.float64)
        words = jax.random.bits(jax.random.fold_in(key, block), (part.shape[1], -(-dimension // 32)), np.uint32)
        bits = np.unpackbits(np.asarray(words).view(np.uint8), axis=1, count=dimension)  # one random bit a sign
        out += part @ (1.0 - 2.0 * bits)
    return out
