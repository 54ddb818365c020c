"""How far derivatives at some θ are from those at θ₀: norms of `J(θ) − J₀` and `K_θ − K₀`.

From Jacobians where they fit in memory (one pass over the examples for all norms), else from products alone: then
`J(θ) − J₀` is the Jacobian of `f − f̄` (`jaxlin.linearize.Remainder`), and Lanczos finds its norm.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree, Shaped

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.linearize import remainder
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.jacobian import MEMORY_BUDGET, Jacobian, gram, jacobian, jacobian_bytes, to_float64
from jaxlin.ntk.lanczos import largest_magnitude
from jaxlin.ntk.on_device import gram_on_device, multiplies_on_device
from jaxlin.ntk.products import NTKOperator, ntk_vector_product
from jaxlin.tunable import Tunable

METHODS = ("auto", "dense", "products")
STACKED, PER_EXAMPLE, PER_PAIR, DRIFT = "stacked", "jacobian", "kernel", "drift"

_ROUNDING = 1e-13
"""Norm of `J(θ) − J₀` from products, relative to σ, that is rounding."""

Pairs = Int[np.ndarray, "k 2"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A spectral norm, or the largest of several.

    Attributes:
        value: The norm.
        residual: That of Lanczos for its square, relative (`Extreme.residual`); 0 by dense linear algebra.
    """

    value: float
    residual: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """What "per example" and "per pair" are of.

    Attributes:
        examples: Indices.
        pairs: Indices of the two examples of each pair.
    """

    examples: Int[np.ndarray, " s"]
    pairs: Pairs

    @property
    def members(self) -> Int[np.ndarray, " _"]:
        """The examples of the pairs, ascending."""
        return np.unique(self.pairs)

    def of_pairs(self, array: Float[np.ndarray, "n n C C"]) -> Float[np.ndarray, "k C C"]:
        """Returns the blocks of the pairs, of a kernel of `members`."""
        first, second = np.searchsorted(self.members, self.pairs).T
        return array[first, second]


def distance(theta: PyTree, other: PyTree) -> float:
    """Returns ‖θ − θ′‖ in float64."""
    leaves = zip(jax.tree.leaves(theta), jax.tree.leaves(other), strict=True)
    return float(sum(np.sum((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2) for a, b in leaves)) ** 0.5


def _matrix(array: Float[np.ndarray, "N N C C"]) -> Float[np.ndarray, "m m"]:
    n, c = array.shape[1:3]
    return array.transpose(0, 2, 1, 3).reshape(n * c, n * c)


def _largest(symmetric: Float[np.ndarray, "*k m m"]) -> float:
    """Largest |eigenvalue| of one symmetric matrix, or of several."""
    if not np.isfinite(symmetric).all():
        raise FloatingPointError("the model's derivatives are NaN or infinite there")
    return float(np.abs(np.linalg.eigvalsh(symmetric)).max())


def _largest_block_norm(blocks: Float[np.ndarray, "k C C"]) -> float:
    return _largest(blocks @ blocks.transpose(0, 2, 1)) ** 0.5


def _own(array: Float[np.ndarray, "N N C C"]) -> Float[np.ndarray, "N C C"]:
    return array[np.arange(len(array)), np.arange(len(array))]


def _gram_of(leaves: Iterable[Shaped[np.ndarray, "N C _"]], n: int, c: int) -> Float[np.ndarray, "N N C C"]:
    """Returns `J Jᵀ` of rows by leaf, in float64, where kernels are multiplied."""
    if multiplies_on_device():
        return gram_on_device(leaves, n, c)
    return sum((gram(rows, rows) for rows in leaves), np.zeros((n, n, c, c)))


class DenseChange:
    """Norms from Jacobians that are held."""

    def __init__(self, tun: Tunable, data: Dataset, sample: Sample, memory_budget: int, dtype: str | None) -> None:
        """Computes J₀.

        Args:
            tun: The model.
            data: The examples.
            sample: Of the norms per example and per pair.
            memory_budget: Largest size of a Jacobian in bytes.
            dtype: `"float64"`, or `None` for the parameters' own.
        """
        self.sample = sample
        self._tun = to_float64(tun) if dtype == "float64" else tun  # here, and not for every theta
        self._options: dict[str, Any] = {"dtype": dtype, "memory_budget": memory_budget}
        self._data = data
        self.start = jacobian(self._tun, data, **self._options)

    def _jacobian(self, theta: PyTree) -> Jacobian:
        like = self._tun.theta0
        theta = jax.tree.map(lambda leaf, start: np.asarray(leaf, start.dtype), theta, like)
        return jacobian(self._tun, self._data, theta, **self._options)

    def _moved(self, jac: Jacobian) -> Iterator[Shaped[np.ndarray, "N C _"]]:
        """Yields `J(θ) − J₀`, a leaf at a time."""
        for path in {**self.start.rows, **jac.rows}:
            both = [rows[path] for rows in (jac.rows, self.start.rows) if path in rows]
            yield both[0] - both[1] if len(both) > 1 else both[0]  # the other one vanishes

    def sigma(self) -> Norm:
        """Returns ‖J₀‖₂."""
        return Norm(_largest(_matrix(self.kernel0)) ** 0.5)

    @staticmethod
    def kernel(jac: Jacobian) -> Float[np.ndarray, "N N C C"]:
        """Returns `J Jᵀ`."""
        return _gram_of(jac.rows.values(), *jac.outputs.shape)

    @functools.cached_property
    def kernel0(self) -> Float[np.ndarray, "N N C C"]:
        """K₀."""
        return self.kernel(self.start)

    def norms(self, theta: PyTree, quantities: Collection[str]) -> dict[str, Norm]:
        """Returns norms of what has changed between θ₀ and θ; see `change`."""
        jac, wanted, sample = self._jacobian(theta), set(quantities), self.sample
        found = {}
        if {STACKED, PER_EXAMPLE} & wanted:
            square = _gram_of(self._moved(jac), *jac.outputs.shape)
        if {PER_PAIR, DRIFT} & wanted:
            drift = self.kernel(jac) - self.kernel0
        if STACKED in wanted:
            found[STACKED] = _largest(_matrix(square)) ** 0.5
        if PER_EXAMPLE in wanted:
            found[PER_EXAMPLE] = _largest_block_norm(_own(square)[sample.examples]) ** 0.5
        if DRIFT in wanted:
            found[DRIFT] = _largest(_matrix(drift))
        if PER_PAIR in wanted:
            found[PER_PAIR] = _largest_block_norm(sample.of_pairs(drift[np.ix_(sample.members, sample.members)]))
        return {name: Norm(found[name]) for name in quantities}


class ProductChange:
    """Norms from products with J and Jᵀ; per example and per pair from small kernels. J is never held."""

    def __init__(
        self, tun: Tunable, data: Dataset, sample: Sample, memory_budget: int, tolerance: float, seed: int
    ) -> None:
        """Puts the examples on the device.

        Args:
            tun: The model.
            data: The examples.
            sample: Of the norms per example and per pair.
            memory_budget: For the small kernels, bytes.
            tolerance: Relative residual at which Lanczos stops.
            seed: Of its start.
        """
        self.tun, self.data, self.sample = tun, data, sample
        self._lanczos = functools.partial(largest_magnitude, tolerance=tolerance, rng=seed)
        self._ntk = functools.partial(ntk, dtype="float64", memory_budget=memory_budget, check_examples=0)

    @functools.cached_property
    def _operators(self) -> tuple[NTKOperator, NTKOperator]:
        """K, and `(J − J₀)(J − J₀)ᵀ`, which vanishes at θ₀ itself: nothing to be compared with there."""
        options: dict[str, Any] = {"dtype": "float64", "check_examples": 0}
        return tuple(ntk_vector_product(t, self.data, **options) for t in (self.tun, remainder(self.tun)))  # type: ignore[return-value]

    @functools.cached_property
    def _sigma(self) -> Norm:
        found = self._lanczos(self._operators[0].__matmul__, self._operators[0].shape[0])
        return Norm(found.value**0.5, found.residual)

    def sigma(self) -> Norm:
        """Returns ‖J₀‖₂."""
        return self._sigma

    @functools.cached_property
    def _pairs0(self) -> Float[np.ndarray, "n n C C"]:
        return self._ntk(self.tun, self.data.take(self.sample.members)).array

    def norms(self, theta: PyTree, quantities: Collection[str]) -> dict[str, Norm]:
        """Returns norms of what has changed between θ₀ and θ; see `change`."""
        return {name: getattr(self, f"_{name}")(theta) for name in quantities}

    def _stacked(self, theta: PyTree) -> Norm:
        operator = self._operators[1].at(theta)
        zero = (_ROUNDING * self._sigma.value) ** 2
        found = self._lanczos(operator.__matmul__, operator.shape[0], zero=zero)
        return Norm(found.value**0.5, found.residual)

    def _drift(self, theta: PyTree) -> Norm:
        start, there = self._operators[0], self._operators[0].at(theta)
        zero = _ROUNDING * self._sigma.value**2
        found = self._lanczos(lambda v: there @ v - start @ v, start.shape[0], zero=zero)
        return Norm(found.value, found.residual)

    def _jacobian(self, theta: PyTree) -> Norm:
        square = self._ntk(remainder(self.tun), self.data.take(self.sample.examples), theta=theta).array
        return Norm(_largest_block_norm(_own(square)) ** 0.5)

    def _kernel(self, theta: PyTree) -> Norm:
        there = self._ntk(self.tun, self.data.take(self.sample.members), theta=theta).array
        return Norm(_largest_block_norm(self.sample.of_pairs(there - self._pairs0)))


def all_pairs(examples: Sequence[int] | np.ndarray) -> Pairs:
    """Returns every pair of some examples once, those of an example with itself among them."""
    chosen = np.asarray(examples, int)
    first, second = np.triu_indices(len(chosen))
    return np.stack([chosen[first], chosen[second]], axis=1)


def change(
    tun: Tunable,
    data: Dataset,
    sample: Sample | None = None,
    *,
    method: str = "auto",
    tolerance: float = 1e-3,
    memory_budget: int = MEMORY_BUDGET,
    seed: int = 0,
    dtype: str | None = "float64",
) -> DenseChange | ProductChange:
    """Returns what measures how far derivatives are from those at θ₀.

    Its `norms(theta, quantities)` are `"stacked"`: ‖J(θ) − J₀‖₂ over all examples; `"drift"`: ‖K_θ − K₀‖₂ over all
    examples; `"jacobian"`: the largest ‖J(θ;x) − J(θ₀;x)‖₂ of single examples; `"kernel"`: the largest
    ‖K_θ(x,x′) − K_θ₀(x,x′)‖₂ of pairs. Its `sigma()` is ‖J₀‖₂.

    Args:
        tun: The model.
        data: The examples.
        sample: Examples and pairs of the last two; all of them by default.
        method: `"dense"`: Jacobians are held; `"products"`: they are not; `"auto"`: dense where three of them fit
            the budget (J₀, J(θ), and what makes their difference).
        tolerance: Relative residual at which Lanczos stops.
        memory_budget: Bytes for Jacobians.
        seed: Of Lanczos's start.
        dtype: Of Jacobians that are held: `"float64"`, or `None` for the parameters' own. Products are in float64.

    Returns:
        One of the two.

    Raises:
        InputError: If an argument is not one of those listed, the data do not fit the model, or Jacobians that are to
            be held do not fit the budget.
    """
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; expected one of {', '.join(METHODS)}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance}; expected above 0 and below 1")
    if dtype not in ("float64", None):
        raise InputError(f"dtype={dtype!r}; expected 'float64', or None for the dtype of the parameters")
    tun.check_batch(data.columns)
    if sample is None:
        sample = Sample(np.arange(len(data)), all_pairs(np.arange(len(data))))
    fits = 3 * jacobian_bytes(tun, data, dtype) <= memory_budget
    if method == "dense" or (method == "auto" and fits):
        return DenseChange(tun, data, sample, memory_budget, dtype)
    return ProductChange(tun, data, sample, memory_budget, tolerance, seed)
