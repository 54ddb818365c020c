"""Products with the empirical NTK, and what follows of its spectrum, where the kernel itself does not fit.

`K v = J(x1) (J(x2)ᵀ v)` (theory 0): a backward pass over x2, then a forward tangent pass over x1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Array, Float, PyTree
from matfree import decomp, stochtrace

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.models.model import named_key
from jaxlin.ntk.jacobian import MAX_CHUNK, MEMORY_BUDGET, Progress, jacobian, jacobian_bytes, num_outputs, to_float64
from jaxlin.tunable import Batch, Tunable, leaf_paths

CHECK_TOLERANCE = 1e-4
"""Largest relative deviation from float64 at which a float32 (or float64) operator is returned."""

_BREAKDOWN = 1e-13
"""Off-diagonal entry, relative to the first diagonal one, at which Lanczos in float64 has exhausted its space."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Stacked:
    """A data set on the device: of every bucket its chunks, stacked, and where their rows stand."""

    buckets: tuple[Any, ...]  # (positions [chunks, rows], batch) of each; on unflattening anything may stand for them
    size: int = dataclasses.field(metadata={"static": True})


def _stack(data: Dataset) -> _Stacked:
    """Puts a data set on the device, in chunks of at most 16 examples of one length."""
    shapes: dict[Any, list[tuple[np.ndarray, dict[str, np.ndarray]]]] = {}
    size = min(MAX_CHUNK, len(data))
    for indices, batch in data.chunks(size):
        # A filler's position is beyond the end: there a vector reads as zero, and what is written is dropped.
        positions = np.concatenate([indices, np.full(size - len(indices), len(data))]).astype(np.int32)
        shapes.setdefault(tuple(value.shape for value in batch.values()), []).append((positions, batch))
    buckets = [jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *chunks) for chunks in shapes.values()]
    return _Stacked(tuple(buckets), len(data))


@jax.jit
def _pull(
    vector: Float[Array, "N C"], apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: _Stacked
) -> PyTree:
    """Returns `Jᵀ vector`, a pytree like theta; in float64 between chunks."""

    def add(total: PyTree, chunk: tuple[Array, Batch]) -> tuple[PyTree, None]:
        positions, batch = chunk
        outputs, pullback = jax.vjp(lambda p: apply(p, batch), theta)
        (gradient,) = pullback(vector.at[positions].get(mode="fill", fill_value=0).astype(outputs.dtype))
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient), None

    total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, vector.dtype), theta)
    for bucket in data.buckets:
        total, _ = jax.lax.scan(add, total, bucket)
    return total


@jax.jit
def _push(
    tangent: PyTree, apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: _Stacked
) -> Float[Array, "N C"]:
    """Returns `J tangent`, for a pytree like theta in float64."""
    along = jax.tree.map(lambda t, leaf: t.astype(leaf.dtype), tangent, theta)

    def rows(_: None, chunk: tuple[Array, Batch]) -> tuple[None, Array]:
        return None, jax.jvp(lambda p: apply(p, chunk[1]), (theta,), (along,))[1].astype(jnp.float64)

    parts = [jax.lax.scan(rows, None, bucket)[1] for bucket in data.buckets]
    flat = jnp.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    positions = jnp.concatenate([positions.reshape(-1) for positions, _ in data.buckets])
    return jnp.zeros((data.size, flat.shape[1])).at[positions].set(flat, mode="drop")


@functools.partial(jax.jit, static_argnames="depth")
def _lanczos(
    vector: Float[Array, "N C"], apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: _Stacked, depth: int
) -> tuple[Array, Array, Array]:
    """Returns Lanczos's diagonal and off-diagonal for K, and the norm of the residual, by matfree.

    Its `tridiag_sym` is this, symmetrized: where a singular K exhausts the Krylov space, entries above the diagonal are
    rounding blown up to the size of K, while those below it still say so.
    """
    decompose = decomp.hessenberg(depth, reortho="full", custom_vjp=False)
    found = decompose(lambda v, *where: _push(_pull(v, *where), *where), vector, apply, theta, data)
    return jnp.diagonal(found.J_small), jnp.diagonal(found.J_small, -1), jnp.linalg.norm(found.residual)


@dataclasses.dataclass(frozen=True, eq=False)
class NTKOperator:
    """The empirical NTK `K(x1, x2) = J(x1) J(x2)ᵀ`, unnormalised (theory 0), as a linear map on float64 vectors.

    Rows and columns are example-major, as those of `Kernel.matrix()`: `i*C + c` is output c of example i. A product
    costs one backward pass over x2 and one forward tangent pass over x1. It holds the inputs on the device, one
    chunk's activations, and J(x2)ᵀv in float64; neither K nor J.

    Attributes:
        tun: The model.
        theta: Where.
        data1: Rows.
        data2: Columns; the same object for a symmetric operator.
        num_outputs: C.
        dtype: Of the computation: `"float64"`, or `None` for that of the parameters. Between chunks sums are float64.
        precision: Of matrix products on the device.
        check_examples: Largest number of examples of each data set that were compared with float64.
        deviation: Largest relative deviation from float64 that was found there; `None` if nothing was compared.
            About `deviation * μ_1` is rounding: eigenvalues below are not known.
    """

    tun: Tunable
    theta: PyTree
    data1: Dataset
    data2: Dataset
    num_outputs: int
    dtype: str | None
    precision: str
    check_examples: int
    _function: tuple[Any, PyTree] = dataclasses.field(repr=False)
    _stacked: tuple[_Stacked, _Stacked] = dataclasses.field(repr=False)
    deviation: float | None = None

    @property
    def symmetric(self) -> bool:
        """Whether x2 is x1, so that K is symmetric and positive semidefinite."""
        return self.data1 is self.data2

    @property
    def shape(self) -> tuple[int, int]:
        """`(N1*C, N2*C)`."""
        return len(self.data1) * self.num_outputs, len(self.data2) * self.num_outputs

    @functools.cached_property
    def T(self) -> NTKOperator:
        """`K(x2, x1)`, checked likewise the first time; itself where it is symmetric."""
        if self.symmetric:
            return self
        swapped = {"data1": self.data2, "data2": self.data1, "_stacked": self._stacked[::-1]}
        return _checked(dataclasses.replace(self, **swapped))  # type: ignore[arg-type]

    def __matmul__(self, vectors: np.ndarray) -> np.ndarray:
        """Returns `K vectors`.

        Args:
            vectors: `[N2*C]`, columns `[N2*C, k]` (one product each), or `[N2, C]`.

        Returns:
            `[N1*C]`, `[N1*C, k]` or `[N1, C]`, float64.

        Raises:
            InputError: If `vectors` has another shape, or is not real.
        """
        v, c = np.asarray(vectors), self.num_outputs
        by_example = v.shape == (len(self.data2), c)
        if v.dtype.kind not in "biuf" or not (by_example or (v.ndim in (1, 2) and v.shape[0] == self.shape[1])):
            raise InputError(
                f"a product with this kernel takes real numbers of shape ({self.shape[1]},), ({self.shape[1]}, k) or "
                f"({len(self.data2)}, {c}); got {v.dtype} of shape {v.shape}"
            )
        if by_example or v.ndim == 1:
            product = self._push(self._pull(v))
            return product if by_example else product.reshape(-1)
        # The compiled programs that were checked, whatever the number of columns.
        products = [self._push(self._pull(column)).reshape(-1) for column in v.T]
        return np.stack(products, axis=1) if products else np.zeros((self.shape[0], 0))

    def linear_operator(self) -> scipy.sparse.linalg.LinearOperator:
        """Returns the operator as SciPy's, with its adjoint: float64, `[N1*C, N2*C]`."""
        return scipy.sparse.linalg.LinearOperator(
            self.shape,
            matvec=lambda v: self @ v.reshape(-1),
            rmatvec=lambda v: self.T @ v.reshape(-1),
            dtype=np.dtype(np.float64),
        )

    def _run(self, function: Callable[..., Any], operand: Any, data: _Stacked, **options: Any) -> Any:
        with jax.enable_x64(True), jax.default_matmul_precision(self.precision):
            return function(operand, *self._function, data, **options)

    def _pull(self, vector: np.ndarray) -> PyTree:
        """`J(x2)ᵀ vector`, on the device."""
        shaped = np.asarray(vector, np.float64).reshape(len(self.data2), self.num_outputs)
        return self._run(_pull, shaped, self._stacked[1])

    def _push(self, tangent: PyTree) -> Float[np.ndarray, "N1 C"]:
        return np.asarray(self._run(_push, tangent, self._stacked[0]))


def ntk_vector_product(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    theta: PyTree | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    check_examples: int = 2,
) -> NTKOperator:
    """Returns the map `v -> K(x1, x2) v` of the kernel `K = J(x1) J(x2)ᵀ` (theory 0), which is never formed.

    Before it is returned, its two compiled passes are run on a vector that is zero but for a few examples (one
    product's cost) and compared with the dense float64 Jacobian of those: XLA's CPU compiler (jaxlib <= 0.10.2) can
    be wrong by 1e-3, silently, in products of jvp and vjp.

    Args:
        tun: The model; the kernel is of exactly its theta.
        x1: Examples: a `Dataset` or a dict of arrays.
        x2: Other examples, for a train-test kernel; `None` for x1 itself.
        theta: Where; default `tun.theta0`.
        dtype: `"float64"` computes everything in float64; `None` as the parameters, with float64 sums over chunks.
        precision: Of matrix products on the device: `"highest"` is true float32.
        check_examples: How many examples of each data set are compared with float64, fewer where their float64
            Jacobian takes over 4 GiB; 0 for none.

    Returns:
        The operator, `[N1*C, N2*C]`.

    Raises:
        InputError: If an argument is not one of those listed, an input does not fit the model, or the float64 Jacobian
            of one example is too large.
        FloatingPointError: If the passes deviate from float64.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> from jaxlin.ntk.products import ntk_vector_product
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((2, 1))})
        >>> K = ntk_vector_product(tun, {"x": np.array([[1.0, 2.0], [0.0, 3.0]])})
        >>> K @ np.array([1.0, 0.0])  # K = x xᵀ = [[5, 6], [6, 9]]
        array([5., 6.])
    """
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    if check_examples < 0:
        raise InputError(f"check_examples={check_examples}; expected 0 (no check) or more")
    theta = tun.theta0 if theta is None else theta
    want, got = (jax.tree.map(jnp.shape, tree) for tree in (tun.theta0, theta))
    if want != got:
        raise InputError(f"theta must have the structure and shapes of theta0, {want}; got {got}")
    data1 = as_dataset(x1)
    data2 = data1 if x2 is None else as_dataset(x2)
    for data in (data1, data2):
        tun.check_batch(data.columns)
    c, function = num_outputs(tun, data1), (tun.apply, theta)
    # Inputs and frozen weights in the dtypes that JAX gives them by default, though products run with x64 on.
    with jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")):
        function = jax.tree.map(jnp.asarray, to_float64(function) if dtype == "float64" else function)
        first = _stack(data1)
        stacked = (first, first if data2 is data1 else _stack(data2))
    return _checked(NTKOperator(tun, theta, data1, data2, c, dtype, precision, check_examples, function, stacked))


def _checked(operator: NTKOperator) -> NTKOperator:
    """Compares both passes with float64 in a few examples; returns the operator with the deviation found."""
    if not operator.check_examples:
        return operator
    chosen2, rows2 = _reference(operator, operator.data2)
    chosen1, rows1 = (chosen2, rows2) if operator.symmetric else _reference(operator, operator.data1)
    paths, (n2, c) = leaf_paths(operator.theta), (len(operator.data2), operator.num_outputs)
    vector = np.zeros((n2, c))
    vector[chosen2] = np.random.default_rng(0).normal(size=(len(chosen2), c))
    shapes = dict(zip(paths, map(np.shape, jax.tree.leaves(operator.theta)), strict=True))
    exact = {
        path: np.einsum("nc,ncp->p", vector[chosen2], rows2[path]).reshape(shape) if path in rows2 else np.zeros(shape)
        for path, shape in shapes.items()
    }
    pulled = dict(zip(paths, jax.device_get(jax.tree.leaves(operator._pull(vector))), strict=True))
    tangent = jax.tree.unflatten(jax.tree.structure(operator.theta), list(exact.values()))
    pushed = operator._push(tangent)[chosen1]
    expected = sum((rows1[path] @ exact[path].reshape(-1) for path in rows1), np.zeros(pushed.shape))
    backward = _relative(np.concatenate([(pulled[path] - exact[path]).reshape(-1) for path in paths]), exact.values())
    forward = _relative(pushed - expected, [expected])
    deviation = float(np.maximum(backward, forward))  # NaN stays NaN
    _require(operator, deviation, "product with the kernel")
    return dataclasses.replace(operator, deviation=deviation)


def _reference(operator: NTKOperator, data: Dataset) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
    """Returns some examples, spread evenly, and the float64 Jacobian of each leaf there."""
    one = jacobian_bytes(operator.tun, data, "float64") // len(data)
    count = min(operator.check_examples, len(data), MEMORY_BUDGET // one)
    if not count:
        raise InputError(
            f"checking products against float64 takes {one / 2**30:.1f} GiB an example, more than "
            f"{MEMORY_BUDGET / 2**30:.0f} GiB; tune less, or pass check_examples=0 to go without"
        )
    chosen = np.unique(np.linspace(0, len(data) - 1, count).astype(int))
    options: dict[str, Any] = {"dtype": "float64", "precision": operator.precision}
    return chosen, jacobian(operator.tun, data.take(chosen), operator.theta, **options).rows


def _relative(error: np.ndarray, exact: Any) -> float:
    """Euclidean norm of an error, relative to that of some arrays together."""
    return float(np.linalg.norm(error) / max(sum(float(np.sum(part**2)) for part in exact) ** 0.5, 1e-300))


def _require(operator: NTKOperator, deviation: float, what: str) -> None:
    """Raises where a deviation from float64 is beyond what the dtype explains."""
    dtype = jnp.result_type(*jax.tree.leaves(operator._function[1]))
    eps = float(jnp.finfo(dtype).eps)
    tolerance = CHECK_TOLERANCE if eps <= jnp.finfo(jnp.float32).eps else 20 * eps
    if not deviation <= tolerance:
        raise FloatingPointError(
            f"a {what} deviates by {deviation:.1e} relative from what it was checked against (at most {tolerance:.0e} "
            f"is expected of {dtype}); the model returns NaN there, or a compiler bug is likely: use ntk(...), or "
            'dtype="float64"'
        )


def _symmetric(operator: NTKOperator, what: str) -> None:
    """Raises where an operator is of two data sets."""
    if not operator.symmetric:
        raise InputError(f"{what} needs the kernel of examples with themselves; this one is of two sets of examples")


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """The mean over random probes, with its error.

    Attributes:
        value: The estimate.
        standard_error: Of the mean: the samples' standard deviation over the root of their number.
        samples: What each probe gave.
        truncation: By how much the mean can be too large since Lanczos stopped at its depth; 0 where it cannot.
    """

    value: float
    standard_error: float
    samples: Float[np.ndarray, " probes"]
    truncation: float = 0.0


def _mean(samples: np.ndarray) -> tuple[Any, Any]:
    """Mean over probes and its standard error (matfree's divides by n, too small for few probes)."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / len(samples) ** 0.5


def _probes(operator: NTKOperator, probes: int, rng: int | Array, name: str) -> Iterator[np.ndarray]:
    """Yields vectors `[N, C]` of random signs; a probe does not depend on how many there are."""
    if probes < 2:
        raise InputError(f"probes={probes}; expected at least 2, for a standard error")
    key, shape = named_key(rng, name), (len(operator.data1), operator.num_outputs)
    sampler = stochtrace.sampler_signs(jnp.zeros(shape, jnp.float32), num=1)
    for i in range(probes):
        with jax.enable_x64(False):  # the same signs in either mode
            probe = sampler(jax.random.fold_in(key, i))[0]
        yield np.asarray(probe, np.float64)


def estimate_trace(
    operator: NTKOperator, *, probes: int = 32, rng: int | Array = 0, progress: Progress | None = None
) -> Estimate:
    """Estimates tr K = E‖Jᵀv‖² over vectors v of random signs (Hutchinson), at one backward pass a probe.

    Unbiased; its variance is 2 Σ_{a≠b} K_ab² / probes. The exact trace costs C backward passes
    (`ntk(..., kind="trace")`'s diagonal), so that this pays where C is large.

    Args:
        operator: A symmetric one.
        probes: Number of random vectors, at least 2.
        rng: Seed or key.
        progress: Called with probes done and in all.

    Returns:
        The estimate.

    Raises:
        InputError: If the operator is not symmetric, or there are fewer than two probes.
    """
    _symmetric(operator, "a trace")
    integrand, samples = stochtrace.monte_carlo_frobeniusnorm_squared(), []
    for done, probe in enumerate(_probes(operator, probes, rng, "trace"), 1):
        with jax.enable_x64(True):
            samples.append(float(integrand(operator._pull, probe)))
        if progress is not None:
            progress(done, probes)
    value, error = _mean(np.array(samples))
    return Estimate(float(value), float(error), np.array(samples))


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenvalues:
    """Some eigenvalues of a symmetric kernel.

    Attributes:
        values: μ, descending, `[k]`.
        residuals: ‖K v − μ v‖ of each, `[k]`: an eigenvalue of K lies that near, up to the rounding of a product
            (`NTKOperator.deviation * μ_1`).
        vectors: Their unit vectors as columns `[N*C, k]`, where asked for.
    """

    values: Float[np.ndarray, " k"]
    residuals: Float[np.ndarray, " k"]
    vectors: Float[np.ndarray, "m k"] | None


def extreme_eigenvalues(
    operator: NTKOperator,
    k: int = 6,
    *,
    which: str = "largest",
    vectors: bool = False,
    tolerance: float = 1e-6,
    max_products: int | None = None,
    rng: int = 0,
) -> Eigenvalues:
    """Computes the largest or smallest eigenvalues of K by implicitly restarted Lanczos (SciPy's `eigsh`).

    Small eigenvalues of a badly conditioned kernel take many products, and below rounding they are not known at all
    (theory 6): use `dtype="float64"` for them.

    Args:
        operator: A symmetric one.
        k: How many, from 1 to N*C − 1.
        which: `"largest"` or `"smallest"`.
        vectors: Whether to return the eigenvectors.
        tolerance: Residual at which Lanczos stops: relative to each of the largest eigenvalues; of the smallest, to
            μ_1. The eigenvalue's own error is of second order in it where it is apart from others.
        max_products: About how many products are made at most; default SciPy's limit.
        rng: Seed of the start vector.

    Returns:
        The eigenvalues, with their residuals.

    Raises:
        InputError: If the operator is not symmetric or vanishes, or an argument is out of range.
        FloatingPointError: If Lanczos does not converge within its limit.
    """
    _symmetric(operator, "a spectrum")
    m = operator.shape[0]
    if not 1 <= k < m:
        raise InputError(f"k={k}; expected from 1 to N*C - 1 = {m - 1} (all of them: spectrum(ntk(...)))")
    if which not in ("largest", "smallest"):
        raise InputError(f'which={which!r} is unknown; expected "largest" or "smallest"')
    if tolerance < 0:
        raise InputError(f"tolerance={tolerance}; expected at least 0")
    width = min(m, max(2 * k + 1, 20))
    start = np.random.default_rng(rng).normal(size=m)
    limit = None if max_products is None else max(1, max_products // max(width - k, 1))
    code = {"largest": "LA", "smallest": "SA"}[which]
    kernel, shift = operator.linear_operator(), 0.0
    if not np.any(kernel @ start):  # ARPACK cannot start
        raise InputError("this kernel vanishes: all of its eigenvalues are 0")
    shifted = scipy.sparse.linalg.LinearOperator(kernel.shape, lambda v: kernel @ v - shift * v, dtype=kernel.dtype)
    try:
        if which == "smallest":  # K - μ_1 has K's Krylov spaces, and ARPACK's tolerance is relative to what it finds
            shift = float(scipy.sparse.linalg.eigsh(kernel, 1, v0=start, tol=0.1, return_eigenvectors=False)[0])
        values, found = scipy.sparse.linalg.eigsh(
            shifted, k, which=code, v0=start, ncv=width, tol=tolerance, maxiter=limit
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        raise FloatingPointError(
            f"{len(error.eigenvalues)} of the {k} {which} eigenvalues converged to tolerance={tolerance}; raise it or "
            'max_products, or compute in dtype="float64"'
        ) from error
    order = np.argsort(values)[::-1]
    values, found = values[order] + shift, found[:, order]
    residuals = np.linalg.norm(operator @ found - found * values, axis=0)
    return Eigenvalues(values, residuals, found if vectors else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Density:
    """Share of the eigenvalues by their size, smoothed.

    Attributes:
        grid: μ, `[g]`.
        values: Density of the eigenvalues at each, `[g]`: it integrates to 1 over μ, or over log10 μ.
        standard_error: Over the probes, `[g]`.
    """

    grid: Float[np.ndarray, " g"]
    values: Float[np.ndarray, " g"]
    standard_error: Float[np.ndarray, " g"]


@dataclasses.dataclass(frozen=True, eq=False)
class LanczosQuadrature:
    """Gauss rules of K's spectral measure, one a probe: everything of the form tr f(K) follows, at no further product.

    Attributes:
        dimension: m = N*C.
        nodes: Ritz values of each probe; rounding can leave some below zero.
        weights: Their weights; those of a probe sum to 1.
        lower: Nodes and weights of the Gauss–Radau rules with a node at zero (Golub and Meurant): where f is increasing
            and concave as μ/(μ + λ) is, Gauss overestimates and Radau underestimates a probe's vᵀf(K)v.
    """

    dimension: int
    nodes: tuple[Float[np.ndarray, " _"], ...]
    weights: tuple[Float[np.ndarray, " _"], ...]
    lower: tuple[tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]], ...]

    def trace_of(self, function: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the estimate of tr f(K) and its standard error.

        Args:
            function: f; maps the nodes `[k]` to `[..., k]`.
        """
        pairs = zip(self.nodes, self.weights, strict=True)
        return _mean(np.array([self.dimension * (function(nodes) @ weights) for nodes, weights in pairs]))

    def effective_dimension(self, lam: float) -> Estimate:
        """Returns the estimate of tr K(K + λ)⁻¹, λ for the summed loss (theory 6).

        Raises:
            InputError: If λ is not positive.
        """
        _check_lam(lam)

        def per_probe(rules: Any) -> np.ndarray:
            clipped = [(np.clip(nodes, 0, None), weights) for nodes, weights in rules]
            return np.array([self.dimension * float(nodes / (nodes + lam) @ weights) for nodes, weights in clipped])

        samples = per_probe(zip(self.nodes, self.weights, strict=True))
        value, error = _mean(samples)
        truncation = max(0.0, float(value - per_probe(self.lower).mean()))
        return Estimate(float(value), float(error), samples, truncation)

    def density(self, grid: np.ndarray, *, width: float, scale: str = "log") -> Density:
        """Returns the density of the eigenvalues, each spread as a Gaussian.

        Args:
            grid: Where, `[g]`; above 0 on a logarithmic scale.
            width: Standard deviation of the Gaussian: in decades (`"log"`), or in units of μ (`"linear"`).
            scale: `"log"`: a density over log10 μ, in which eigenvalues at or below zero have no place, so that it
                integrates to the share of the others; `"linear"`: over μ.

        Raises:
            InputError: If an argument is out of range.
        """
        grid = _check_grid(grid, width, scale)

        def place(mu: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore"):
                return np.log10(np.clip(mu, 0, None)) if scale == "log" else mu

        at = place(grid)[:, None] / width
        values, error = self.trace_of(lambda nodes: np.exp(-0.5 * (at - place(nodes) / width) ** 2))
        norm = self.dimension * width * (2 * np.pi) ** 0.5
        return Density(grid, values / norm, error / norm)


def _check_grid(grid: np.ndarray, width: float, scale: str) -> np.ndarray:
    """Returns the grid of a density in float64; raises where an argument is out of range."""
    grid = np.asarray(grid, np.float64)
    if scale not in ("log", "linear"):
        raise InputError(f'scale={scale!r} is unknown; expected "log" or "linear"')
    if not width > 0:
        raise InputError(f"width={width}; expected above 0")
    if grid.ndim != 1 or not np.isfinite(grid).all() or (scale == "log" and not (grid > 0).all()):
        raise InputError(f'grid must be numbers [g], above 0 for scale="log"; got {grid} of shape {grid.shape}')
    return grid


def lanczos_quadrature(
    operator: NTKOperator,
    *,
    probes: int = 16,
    depth: int = 64,
    rng: int | Array = 0,
    progress: Progress | None = None,
) -> LanczosQuadrature:
    """Runs stochastic Lanczos quadrature (matfree's decomposition, fully reorthogonalised, of float64 vectors).

    The first coefficients are compared with a product by the operator, which was itself compared with float64.

    Args:
        operator: A symmetric one.
        probes: Number of vectors of random signs, at least 2.
        depth: Products a probe; at N*C a probe's rule is exact. Holds `[N*C, depth]` float64.
        rng: Seed or key.
        progress: Called with probes done and in all.

    Returns:
        Nodes and weights of every probe.

    Raises:
        InputError: If the operator is not symmetric, or an argument is out of range.
        FloatingPointError: If the first coefficients deviate, as they do if the model returns NaN.
    """
    _symmetric(operator, "a spectrum")
    if depth < 1:
        raise InputError(f"depth={depth}; expected at least 1")
    depth, rules, lower = min(depth, operator.shape[0]), [], []
    for done, probe in enumerate(_probes(operator, probes, rng, "lanczos"), 1):
        found = operator._run(_lanczos, probe, operator._stacked[0], depth=depth)
        diagonal, off_diagonal, residual = map(np.asarray, found)
        if done == 1:
            _check_first(operator, probe.reshape(-1), diagonal, np.append(off_diagonal, residual))
        gauss, radau = _rules(diagonal, off_diagonal, float(residual))
        rules.append(gauss)
        lower.append(radau)
        if progress is not None:
            progress(done, probes)
    nodes, weights = zip(*rules, strict=True)
    return LanczosQuadrature(operator.shape[0], nodes, weights, tuple(lower))


def _check_first(operator: NTKOperator, probe: np.ndarray, diagonal: np.ndarray, beyond: np.ndarray) -> None:
    """Compares the first Lanczos coefficients with a product by the operator."""
    unit = probe / np.linalg.norm(probe)
    product = operator @ unit
    first = product @ unit
    error = np.array([diagonal[0] - first, beyond[0] - np.linalg.norm(product - first * unit)])
    _require(operator, _relative(error, [product]), "Lanczos step")


def _rules(diagonal: np.ndarray, off_diagonal: np.ndarray, residual: float) -> tuple[Any, Any]:
    """Returns the Gauss rule of a tridiagonal matrix, and the Gauss–Radau rule with a node at (or just below) zero."""
    beyond = np.append(off_diagonal, residual)
    # Where the Krylov space is exhausted (a singular kernel), what follows is rounding or 0/0, and the rule exact.
    ends = np.flatnonzero(~(beyond > _BREAKDOWN * abs(diagonal[0])))
    k = int(ends[0]) + 1 if ends.size else len(diagonal)
    nodes, basis = scipy.linalg.eigh_tridiagonal(diagonal[:k], beyond[: k - 1])
    gauss = (nodes, basis[0] ** 2)
    if ends.size:
        return gauss, gauss
    node = min(-_BREAKDOWN * float(nodes[-1]), 2 * float(nodes[0]))  # below all of them, whatever rounding left
    last = node + residual**2 * float(basis[-1] ** 2 @ (1 / (nodes - node)))
    nodes, basis = scipy.linalg.eigh_tridiagonal(np.append(diagonal, last), beyond)
    return gauss, (nodes, basis[0] ** 2)


def _check_lam(lam: float) -> None:
    """Raises where λ is not positive."""
    if not lam > 0:
        raise InputError(f"lam={lam}; expected above 0 (at 0 it is the rank)")


def estimate_effective_dimension(
    operator: NTKOperator,
    lam: float,
    *,
    probes: int = 16,
    depth: int = 64,
    rng: int | Array = 0,
    progress: Progress | None = None,
) -> Estimate:
    """Estimates tr K(K + λ)⁻¹ = Σ μ/(μ + λ) (theory 6), λ for the summed loss, by stochastic Lanczos quadrature.

    For several λ: `lanczos_quadrature(operator).effective_dimension(lam)`, which runs Lanczos once. A λ below
    `operator.deviation * μ_1` counts rounding.

    Args:
        operator: A symmetric one.
        lam: λ, above 0.
        probes: Number of vectors of random signs, at least 2.
        depth: Products a probe.
        rng: Seed or key.
        progress: Called with probes done and in all.

    Returns:
        The estimate; `truncation` bounds what a larger depth would take off.

    Raises:
        InputError: If the operator is not symmetric, or an argument is out of range.
    """
    _check_lam(lam)
    return lanczos_quadrature(operator, probes=probes, depth=depth, rng=rng, progress=progress).effective_dimension(lam)


def spectral_density(
    operator: NTKOperator,
    grid: np.ndarray,
    *,
    width: float,
    scale: str = "log",
    probes: int = 16,
    depth: int = 64,
    rng: int | Array = 0,
    progress: Progress | None = None,
) -> Density:
    """Estimates the density of K's eigenvalues, smoothed by a Gaussian, by stochastic Lanczos quadrature.

    Depth and width belong together: what is narrower than the distance of the Ritz values there is theirs, not K's.

    Args:
        operator: A symmetric one.
        grid: Where, `[g]`; above 0 on a logarithmic scale.
        width: Standard deviation of the Gaussian: in decades (`"log"`), or in units of μ (`"linear"`).
        scale: `"log"`: a density over log10 μ; `"linear"`: over μ. See `LanczosQuadrature.density`.
        probes: Number of vectors of random signs, at least 2.
        depth: Products a probe.
        rng: Seed or key.
        progress: Called with probes done and in all.

    Returns:
        The density, with its standard error over the probes.

    Raises:
        InputError: If the operator is not symmetric, or an argument is out of range.
    """
    grid = _check_grid(grid, width, scale)
    return lanczos_quadrature(operator, probes=probes, depth=depth, rng=rng, progress=progress).density(
        grid, width=width, scale=scale
    )
