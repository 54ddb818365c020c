"""Eigenvalues, traces and spectral densities of the empirical NTK, from products with it alone.

Restarted Lanczos for single eigenvalues; for functions of all of them random probes, and Lanczos quadrature of each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from matfree import decomp, stochtrace

from jaxlin.errors import InputError
from jaxlin.models.model import named_key
from jaxlin.ntk.jacobian import Progress
from jaxlin.ntk.products import NTKOperator, Stacked, pull, push, relative, require
from jaxlin.tunable import Batch

_BREAKDOWN = 1e-13
"""Off-diagonal entry, relative to the first diagonal one, at which Lanczos in float64 has exhausted its space."""


@functools.partial(jax.jit, static_argnames="depth")
def _lanczos(
    vector: Float[Array, "N C"], apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: Stacked, depth: int
) -> tuple[Array, Array, Array]:
    """Returns Lanczos's diagonal and off-diagonal for K, and the norm of the residual, by matfree.

    Its `tridiag_sym` is this, symmetrized: where a singular K exhausts the Krylov space, entries above the diagonal are
    rounding blown up to the size of K, while those below it still say so.
    """
    decompose = decomp.hessenberg(depth, reortho="full", custom_vjp=False)
    found = decompose(lambda v, *where: push(pull(v, *where), *where), vector, apply, theta, data)
    return jnp.diagonal(found.J_small), jnp.diagonal(found.J_small, -1), jnp.linalg.norm(found.residual)


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
            samples.append(float(integrand(operator.pull, probe)))
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
    import scipy.sparse.linalg

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
class Extreme:
    """The largest |eigenvalue| of a symmetric map, from products with it.

    Attributes:
        value: |μ|.
        residual: ‖A v − μ v‖ relative to |μ|: an eigenvalue lies that near. 0 where A vanishes.
        vector: v, `[m]`, a start for a map nearby.
    """

    value: float
    residual: float
    vector: Float[np.ndarray, " m"]


def largest_magnitude(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    *,
    tolerance: float = 1e-3,
    zero: float = 0.0,
    start: Float[np.ndarray, " m"] | None = None,
    width: int = 12,
    rng: int = 0,
) -> Extreme:
    """Computes the largest |eigenvalue| of a symmetric map by implicitly restarted Lanczos (SciPy's `eigsh`).

    Args:
        product: Maps `[m]` to `A v`, `[m]`, float64.
        size: m.
        tolerance: Relative residual at which Lanczos stops; the error of |μ| is of second order in it where μ is apart
            from others.
        zero: Norm of A times a unit vector at which it is rounding, and the map counts as 0.
        start: Start vector, such as that of a map nearby; random by default.
        width: Vectors held, and products made at least; Lanczos restarts beyond.
        rng: Seed of a random start.

    Returns:
        The eigenvalue.

    Raises:
        FloatingPointError: If Lanczos does not converge, or a product is NaN.
    """
    import scipy.sparse.linalg

    start = np.random.default_rng(rng).normal(size=size) if start is None else start
    start = start / np.linalg.norm(start)
    first = product(start)
    if not np.isfinite(first).all():
        raise FloatingPointError("a product is NaN or infinite: so are the model's outputs or derivatives there")
    if np.linalg.norm(first) <= zero:  # ARPACK cannot start
        return Extreme(0.0, 0.0, start)
    if size == 1:
        return Extreme(float(abs(first[0])), 0.0, start)
    operator = scipy.sparse.linalg.LinearOperator((size, size), lambda v: product(v.reshape(-1)), dtype=np.float64)
    try:
        (mu,), vectors = scipy.sparse.linalg.eigsh(
            operator, 1, which="LM", v0=start, ncv=min(size, width), tol=tolerance
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        raise FloatingPointError(f"the largest |eigenvalue| did not converge to tolerance={tolerance}") from error
    vector = vectors[:, 0]
    return Extreme(float(abs(mu)), float(np.linalg.norm(product(vector) - mu * vector) / abs(mu)), vector)


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
        found = operator.run(_lanczos, probe, operator.stacked[0], depth=depth)
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
    require(operator, relative(error, [product]), "Lanczos step")


def _rules(diagonal: np.ndarray, off_diagonal: np.ndarray, residual: float) -> tuple[Any, Any]:
    """Returns the Gauss rule of a tridiagonal matrix, and the Gauss–Radau rule with a node at (or just below) zero."""
    import scipy.linalg

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
