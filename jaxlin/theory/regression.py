"""Predictions of the linearized model in closed form: kernel regression on the pretrained model's residual."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, overload

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.dynamics import phi_at
from jaxlin.theory.inputs import cross_matrix, eigenpairs, training_matrix
from jaxlin.theory.posterior import diagonal_blocks, posterior_covariance


@dataclasses.dataclass(frozen=True, eq=False)
class KernelRegression:
    """The linearized model trained by squared loss, at any time (theory 2).

    Attributes:
        matrix: K₀ `[m, m]`, example-major, m = N·C; or m = N for a kernel that stands for K ⊗ I_C (theory 9).
        eigenvalues: μ `[m]`, ascending.
        eigenvectors: V `[m, m]`.
        f0: Outputs of the pretrained model on the training examples `[N, C]`.
        y: Targets `[N, C]`.
        ridge: λ of the summed loss.
        noise_floor: Directions with `μ + λ` at or below it count as null space at infinite time.
    """

    matrix: Float[np.ndarray, "m m"]
    eigenvalues: Float[np.ndarray, " m"]
    eigenvectors: Float[np.ndarray, "m m"]
    f0: Float[np.ndarray, "N C"]
    y: Float[np.ndarray, "N C"]
    ridge: float
    noise_floor: float

    def coefficients(
        self, t: float | None = None, learning_rate: float | None = None, momentum: float = 0.0
    ) -> Float[np.ndarray, "N C"]:
        """Returns `α_t` with `δ_t = J₀ᵀ α_t`: `−V φ_t(μ+λ) Vᵀ r₀`.

        Args:
            t: Gradient-descent steps where `learning_rate` is given, else time of the flow; `None`: infinity.
            learning_rate: η of the summed loss.
            momentum: Heavy-ball momentum of gradient descent.

        Raises:
            InputError: If t is negative, the step diverges, or momentum is given without a learning rate.
        """
        phi = phi_at(self.eigenvalues + self.ridge, t, learning_rate, momentum, self.noise_floor)
        residual = self._columns(self.f0 - self.y)
        return -(self.eigenvectors @ (phi[:, None] * (self.eigenvectors.T @ residual))).reshape(self.f0.shape)

    @property
    def outputs_apart(self) -> bool:
        """Whether the kernel tells outputs apart, rather than standing for K ⊗ I_C (theory 9)."""
        return len(self.matrix) == self.f0.size

    def residuals(
        self, t: float | None = None, learning_rate: float | None = None, momentum: float = 0.0
    ) -> Float[np.ndarray, "m k"]:
        """Returns r̄_i(t), the residual f̄_t − y along each eigenvector: `(1 − μ_i φ_t(μ_i+λ)) Vᵀ r₀` (theory 2).

        Args:
            t: As for `coefficients`.
            learning_rate: As for `coefficients`.
            momentum: As for `coefficients`.

        Returns:
            In the order of `eigenvalues`: `[m, 1]`; `[N, C]`, output by output, for a kernel that stands for K ⊗ I_C.
        """
        phi = phi_at(self.eigenvalues + self.ridge, t, learning_rate, momentum, self.noise_floor)
        return (1 - self.eigenvalues * phi)[:, None] * (self.eigenvectors.T @ self._columns(self.f0 - self.y))

    def without(self, example: int) -> KernelRegression:
        """Returns the regression on the other examples; costs an eigendecomposition of their kernel."""
        n, rest = len(self.f0), np.delete(np.arange(len(self.f0)), example)
        kept = np.arange(len(self.matrix)).reshape(n, -1)[rest].reshape(-1)
        matrix = self.matrix[np.ix_(kept, kept)]
        values, vectors = np.linalg.eigh(matrix)
        f0, y = self.f0[rest], self.y[rest]
        return KernelRegression(matrix, np.clip(values, 0, None), vectors, f0, y, self.ridge, self.noise_floor)

    def _columns(self, values: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "m _"]:
        """One column for the kernel of all outputs, C of them for one that each output has alike."""
        return values.reshape(len(self.matrix), -1)

    def train(self, t: float | None = None, **options: Any) -> Float[np.ndarray, "N C"]:
        """Returns the outputs on the training examples `[N, C]`; arguments as for `coefficients`."""
        alpha = self.coefficients(t, **options)
        return self.f0 + (self.matrix @ self._columns(alpha)).reshape(self.f0.shape)

    @overload
    def test(
        self,
        kernel_test_train: Kernel,
        f0_test: Float[np.ndarray, "M C"],
        t: float | None = None,
        *,
        kernel_test: None = None,
        return_variance: Literal[False] = False,
        **options: Any,
    ) -> Float[np.ndarray, "M C"]: ...

    @overload
    def test(
        self,
        kernel_test_train: Kernel,
        f0_test: Float[np.ndarray, "M C"],
        t: float | None = None,
        *,
        kernel_test: Kernel | Float[np.ndarray, "M C C"] | Float[np.ndarray, " M"] | None,
        return_variance: Literal[True],
        **options: Any,
    ) -> tuple[Float[np.ndarray, "M C"], Float[np.ndarray, "M C C"]]: ...

    def test(
        self,
        kernel_test_train: Kernel,
        f0_test: Float[np.ndarray, "M C"],
        t: float | None = None,
        *,
        kernel_test: Kernel | Float[np.ndarray, "M C C"] | Float[np.ndarray, " M"] | None = None,
        return_variance: bool = False,
        **options: Any,
    ) -> Float[np.ndarray, "M C"] | tuple[Float[np.ndarray, "M C"], Float[np.ndarray, "M C C"]]:
        """Returns the outputs on other examples `[M, C]`, and how sure they are.

        Args:
            kernel_test_train: `K(x_test, x_train)`.
            f0_test: Outputs of the pretrained model there `[M, C]`.
            t: As for `coefficients`.
            kernel_test: For the variance: `K(x_test, x_test)`, or only its diagonal blocks, one for each example
                (`[M]` where the kernel stands for K ⊗ I_C).
            return_variance: Whether to return the posterior covariance too: linearized Laplace, at t = ∞ and λ > 0.
            **options: As for `coefficients`.

        Returns:
            The outputs; with `return_variance` also the covariance `[M, C, C]` of the latent outputs of each example
            at the likeliest `scale`. Targets vary by `scale·ridge·I` more.

        Raises:
            InputError: If the shapes do not fit, or the variance is asked for without `kernel_test`, at a finite time,
                or at ridge 0.
        """
        f0_test = np.asarray(f0_test, np.float64)
        rows = cross_matrix(kernel_test_train, f0_test, self.f0, len(self.matrix))
        mean = f0_test + (rows @ self._columns(self.coefficients(t, **options))).reshape(f0_test.shape)
        if not return_variance:
            return mean
        if t not in (None, math.inf):
            raise InputError(f"t={t}; the posterior variance is that of training to the end (None)")
        if kernel_test is None:
            raise InputError("return_variance needs kernel_test: K(x_test, x_test), or its diagonal blocks [M, C, C]")
        scale, c = self.scale, self.f0.shape[1]
        blocks = diagonal_blocks(kernel_test, len(f0_test), c if self.outputs_apart else 1)
        latent = posterior_covariance(rows, blocks, self.eigenvectors, self.eigenvalues + self.ridge)
        return mean, scale * (latent if self.outputs_apart else latent * np.eye(c))

    def leave_one_out(self) -> Float[np.ndarray, "N C"]:
        """Returns the outputs for each example of the model trained to infinity on the others.

        Raises:
            InputError: If the ridge is 0: the formula needs `K + λI` invertible.
        """
        self._require_ridge("leave-one-out")
        n = len(self.f0)
        c = len(self.matrix) // n
        scaled = self.eigenvectors / (self.eigenvalues + self.ridge)
        inverse = (scaled @ self.eigenvectors.T).reshape(n, c, n, c)
        solved = (scaled @ (self.eigenvectors.T @ self._columns(self.f0 - self.y))).reshape(n, c, -1)
        diagonal = inverse[np.arange(n), :, np.arange(n), :]
        return self.y + np.linalg.solve(diagonal, solved).reshape(self.y.shape)

    @property
    def scale(self) -> float:
        """Variance σ² at which r₀ ~ N(0, σ²(K + λI)) is likeliest, `r₀ᵀ(K + λI)⁻¹r₀/m` (theory 2).

        Raises:
            InputError: If the ridge is 0.
        """
        self._require_ridge("the Gaussian process")
        along = self.eigenvectors.T @ self._columns(self.f0 - self.y)
        return float(np.sum(along**2 / (self.eigenvalues + self.ridge)[:, None]) / self.y.size)

    def log_marginal_likelihood(self) -> float:
        """Returns log p(y) of the Gaussian process that this regression is the mean of, at its likeliest `scale`.

        `−(m/2)(log 2πσ² + 1) − ½ log det(K + λI)`, m = N·C; for a kernel that stands for K ⊗ I_C the determinant is of
        that.

        Raises:
            InputError: If the ridge is 0, or r₀ vanishes.
        """
        scale = self.scale
        if not scale > 0:
            raise InputError("the pretrained model fits y exactly: the marginal likelihood is unbounded")
        alike = self.y.size / len(self.matrix)
        log_det = alike * float(np.sum(np.log(self.eigenvalues + self.ridge)))
        return -0.5 * (self.y.size * (math.log(2 * math.pi * scale) + 1) + log_det)

    def _require_ridge(self, what: str) -> None:
        if not self.ridge > 0:
            raise InputError(f"{what} needs ridge > 0; it is {self.ridge}")


def kernel_regression(
    kernel: Kernel, y: Float[np.ndarray, "N C"], f0: Float[np.ndarray, "N C"], ridge: float
) -> KernelRegression:
    """Prepares closed-form predictions of the linearized model under squared loss (theory 2).

    Args:
        kernel: K₀ of the training examples; one of a kind `[N, N]` stands for K ⊗ I_C (theory 9).
        y: Targets `[N, C]`.
        f0: Outputs of the pretrained model `[N, C]`.
        ridge: λ of the summed loss `½‖f − y‖² + (λ/2)‖δ‖²`, at least 0.

    Returns:
        The predictor; one eigendecomposition, of the m × m kernel, serves all of its times.

    Raises:
        InputError: If the shapes do not fit, the ridge is negative, or the kernel is not symmetric or finite.
    """
    y, f0 = np.asarray(y, np.float64), np.asarray(f0, np.float64)
    matrix = training_matrix(kernel, "kernel regression", y=y, f0=f0)
    if not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge}; expected at least 0, and finite")
    values, vectors, floor = eigenpairs(matrix, kernel.info)
    return KernelRegression(matrix, values, vectors, f0, y, float(ridge), floor)
