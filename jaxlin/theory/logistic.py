"""The linearized model trained to the end by cross-entropy: kernel logistic regression on the pretrained logits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, Int

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.kinds import contrast_basis
from jaxlin.theory.inputs import cross_matrix, eigenpairs, training_matrix

_MAX_ITERATIONS = 200
_SUFFICIENT_DECREASE = 1e-4
_SMALLEST_STEP = 2.0**-40
_ROUNDING = 64 * float(np.finfo(np.float64).eps)
"""Relative rounding of the objective, up to which a step may seem to raise it."""


@dataclasses.dataclass(frozen=True, eq=False)
class KernelLogisticRegression:
    """The minimiser of `Σ CE(f₀ + J₀δ, labels) + (λ/2)‖δ‖²` (theory 0 to 2 with this loss).

    Attributes:
        alpha: `δ = J₀ᵀα`, rows of α summing to 0 `[N, C]`.
        outputs: `f₀ + J₀δ` on the training examples `[N, C]`.
        f0: Outputs of the pretrained model there `[N, C]`.
        ridge: λ of the summed loss.
        size: Rows of the kernel's matrix.
        loss: Σ CE there, in nats, without the pull.
        distance: ‖δ‖.
        gradient_norm: `‖J₀ᵀ(softmax(f) − one-hot) + λδ‖`, in parameter space.
        iterations: Newton steps taken.
    """

    alpha: Float[np.ndarray, "N C"]
    outputs: Float[np.ndarray, "N C"]
    f0: Float[np.ndarray, "N C"]
    ridge: float
    size: int
    loss: float
    distance: float
    gradient_norm: float
    iterations: int

    @property
    def objective(self) -> float:
        """`Σ CE + (λ/2)‖δ‖²`."""
        return self.loss + 0.5 * self.ridge * self.distance**2

    def test(self, kernel_test_train: Kernel, f0_test: Float[np.ndarray, "M C"]) -> Float[np.ndarray, "M C"]:
        """Returns the outputs (logits) on other examples `[M, C]`.

        Args:
            kernel_test_train: `K(x_test, x_train)`.
            f0_test: Outputs of the pretrained model there.

        Raises:
            InputError: If the shapes do not fit.
        """
        f0_test = np.asarray(f0_test, np.float64)
        rows = cross_matrix(kernel_test_train, f0_test, self.f0, self.size)
        return f0_test + (rows @ self.alpha.reshape(self.size, -1)).reshape(f0_test.shape)


def _seen_directions(
    matrix: Float[np.ndarray, "m m"], kernel: Kernel, n: int, c: int, ridge: float
) -> tuple[Float[np.ndarray, "NC r"], Float[np.ndarray, " r"]]:
    """Returns QV and √μ, for VμVᵀ the kernel of the contrasts Qᵀf that softmax sees.

    With u the coordinates of δ on the orthonormal `J₀ᵀQVμ^{-1/2}`, ‖u‖ = ‖δ‖, the outputs are `f₀ + QV√μ u` up to
    what softmax ignores, and `α = QVμ^{-1/2}u`; a minimiser has no other part. At λ = 0 directions below the kernel's
    noise floor count as null space; a ridge makes them harmless.
    """
    basis = contrast_basis(c)
    if len(matrix) == n:  # K ⊗ I_C, and K ⊗ I of the contrasts
        mu, vectors, floor = eigenpairs(matrix, kernel.info)
        mu, vectors = np.repeat(mu, c - 1), np.kron(vectors, np.eye(c - 1))
    else:
        seen = np.einsum("icjd,ck,dl->ikjl", matrix.reshape(n, c, n, c), basis, basis, optimize=True)
        mu, vectors, floor = eigenpairs(seen.reshape(n * (c - 1), -1), kernel.info)
    live = mu > (0.0 if ridge > 0 else floor)
    lifted = np.einsum("ck,ikr->icr", basis, vectors[:, live].reshape(n, c - 1, -1))
    return lifted.reshape(n * c, -1), np.sqrt(mu[live])


def _require_minimiser(directions: Float[np.ndarray, "NC r"], labels: Int[np.ndarray, " N"], c: int) -> None:
    """Checks that Σ CE alone has a minimiser: that no change of δ raises a margin `f_y − f_j` and lowers none.

    Albert and Anderson 1984. A linear program finds the change that raises the margins most; one counts as not lowered
    up to its feasibility tolerance, 1e-7 of the largest rise.

    Raises:
        InputError: If there is such a change.
    """
    from scipy.optimize import linprog

    n, rank = len(labels), directions.shape[1]
    separable = 0 < rank == n * (c - 1)  # then every change of the margins can be had
    if rank and not separable:
        by_output = directions.reshape(n, c, rank)
        margins = (by_output[np.arange(n), labels][:, None] - by_output)[np.arange(c) != labels[:, None]]
        count = len(margins)
        found = linprog(  # variables: the change, free, and the margins that it makes, from 0 to 1
            np.repeat([0.0, -1.0], [rank, count]),
            A_eq=np.concatenate([margins, -np.eye(count)], axis=1),
            b_eq=np.zeros(count),
            bounds=[(None, None)] * rank + [(0, 1)] * count,
            method="highs",
        )
        if found.status != 0:
            raise InputError(f"whether a minimiser exists is not decided ({found.message}); take ridge > 0")
        separable = -found.fun > 0.5  # 0 where there is none, else at least 1: some margin reaches it
    if separable:
        raise InputError(
            "there is no minimiser at ridge=0: a direction of the parameters separates all or some of the examples, "
            "and the loss falls along it for ever; take ridge > 0"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Objective:
    """`Σ CE(f₀ + Bu) + (λ/2)‖u‖²` in the coordinates u."""

    f0: Float[np.ndarray, "N C"]
    factor: Float[np.ndarray, "N C r"]
    onehot: Float[np.ndarray, "N C"]
    ridge: float

    def value(self, u: Float[np.ndarray, " r"]) -> tuple[float, Float[np.ndarray, "N C"]]:
        """Returns the objective and the probabilities."""
        from scipy.special import log_softmax

        log_p = log_softmax(self.f0 + self.factor @ u, axis=1)
        return float(0.5 * self.ridge * (u @ u) - np.sum(self.onehot * log_p)), np.exp(log_p)

    def gradient(self, u: Float[np.ndarray, " r"], p: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " r"]:
        """Returns `Bᵀ(p − one-hot) + λu`."""
        return np.tensordot(p - self.onehot, self.factor, 2) + self.ridge * u

    def newton_step(self, gradient: Float[np.ndarray, " r"], p: Float[np.ndarray, "N C"]) -> Float[np.ndarray, " r"]:
        """Returns `−(BᵀWB + λI)⁻¹ g`, W the blocks `diag(p) − ppᵀ`."""
        from scipy.linalg import cho_factor, cho_solve

        r = len(gradient)
        centred = self.factor - np.einsum("nc,ncr->nr", p, self.factor)[:, None]
        half = (np.sqrt(p)[:, :, None] * centred).reshape(-1, r)
        hessian = half.T @ half
        # Saturated probabilities may leave it singular to rounding.
        hessian[np.diag_indices(r)] += self.ridge + _ROUNDING * float(np.trace(hessian)) / r
        return -cho_solve(cho_factor(hessian), gradient)

    def minimise(self, tolerance: float) -> tuple[Float[np.ndarray, " r"], float, int]:
        """Returns u, the gradient's norm there and the number of damped Newton steps, under Armijo's rule, from 0.

        Raises:
            InputError: If the gradient's norm does not come down to the tolerance.
        """
        u = np.zeros(self.factor.shape[2])
        value, p = self.value(u)
        for iteration in range(_MAX_ITERATIONS):
            gradient = self.gradient(u, p)
            norm = float(np.linalg.norm(gradient))
            if norm <= tolerance:
                return u, norm, iteration
            move = self.newton_step(gradient, p)
            slope, step = float(gradient @ move), 1.0
            highest = value + _ROUNDING * abs(value)
            new_value, new_p = self.value(u + move)
            while not new_value <= highest + _SUFFICIENT_DECREASE * step * slope and step > _SMALLEST_STEP:
                step /= 2
                new_value, new_p = self.value(u + step * move)
            u, value, p = u + step * move, new_value, new_p
        raise InputError(
            f"the gradient's norm is {norm:.2g} after {_MAX_ITERATIONS} Newton steps; expected at most "
            f"{tolerance:.2g}. Take a larger tolerance, or a larger ridge"
        )


def kernel_logistic_regression(
    kernel: Kernel,
    labels: Int[np.ndarray, " N"],
    f0: Float[np.ndarray, "N C"],
    ridge: float,
    tolerance: float = 1e-9,
) -> KernelLogisticRegression:
    """Trains the linearized model by cross-entropy to the end, from its kernel alone.

    Minimises `Σ CE(softmax(f₀ + J₀δ), labels) + (λ/2)‖δ‖²` by Newton's method in as many coordinates as the kernel of
    the N(C−1) contrasts has directions: one eigendecomposition and a few tens of Cholesky factorisations of that size.

    Args:
        kernel: K₀ of the training examples; one of a kind `[N, N]` stands for K ⊗ I_C (theory 9).
        labels: Classes, integers from 0 to C−1.
        f0: Outputs (logits) of the pretrained model, C ≥ 2.
        ridge: λ of the summed loss, at least 0. Above 0 the minimiser is unique, and the δ found is within
            `gradient_norm/λ` of it. At 0 the least ‖δ‖ of the minimisers is meant, if there are any.
        tolerance: Largest norm of the gradient in parameter space, in units of `‖QᵀJ₀‖₂`, the square root of the
            largest eigenvalue of the contrasts' kernel.

    Returns:
        The minimiser.

    Raises:
        InputError: If shapes or labels do not fit, the ridge is negative, something is not finite, the tolerance is
            not reached; or if at ridge 0 a direction separates the data, all or in part: then there is no minimiser.
    """
    f0, labels = np.asarray(f0, np.float64), np.asarray(labels)
    matrix = training_matrix(kernel, "kernel logistic regression", f0=f0)
    n, c = f0.shape
    if c < 2:
        raise InputError("cross-entropy needs at least two outputs; f0 has one")
    if labels.shape != (n,) or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < c:
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected {n} integers from 0 to {c - 1}"
        )
    if not 0 <= ridge < math.inf or not 0 < tolerance < math.inf:
        raise InputError(f"ridge={ridge}, tolerance={tolerance}; expected at least 0 and above 0, and finite")
    directions, roots = _seen_directions(matrix, kernel, n, c, ridge)
    if ridge == 0:
        _require_minimiser(directions, labels, c)
    objective = _Objective(f0, (directions * roots).reshape(n, c, -1), np.eye(c)[labels], float(ridge))
    u, norm, iterations = objective.minimise(tolerance * float(np.max(roots, initial=0.0)))
    alpha, distance = (directions @ (u / roots)).reshape(n, c), float(np.linalg.norm(u))
    return KernelLogisticRegression(
        alpha=alpha,
        outputs=f0 + (matrix @ alpha.reshape(len(matrix), -1)).reshape(n, c),
        f0=f0,
        ridge=float(ridge),
        size=len(matrix),
        loss=dataclasses.replace(objective, ridge=0.0).value(u)[0],
        distance=distance,
        gradient_norm=norm,
        iterations=iterations,
    )
