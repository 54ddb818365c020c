"""Predictions of the linearized model in closed form: kernel regression on the pretrained model's residual."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.dynamics import check_stable, phi_flow, phi_gradient_descent, phi_heavy_ball, phi_limit


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
        s = self.eigenvalues + self.ridge
        if t is not None and not 0 <= t < math.inf:
            raise InputError(f"t={t}; expected at least 0 and finite (None: the limit)")
        if momentum and learning_rate is None:
            raise InputError("momentum needs a learning_rate: the closed form is that of the discrete recursion")
        if learning_rate is not None and t is not None and t != int(t):
            raise InputError(f"t={t} counts gradient-descent steps; expected a whole number")
        if learning_rate is not None:
            check_stable(s, learning_rate, momentum)
        if t is None:
            phi = phi_limit(s, self.noise_floor)
        elif learning_rate is None:
            phi = phi_flow(s, t)
        elif momentum:
            phi = phi_heavy_ball(s, int(t), learning_rate, momentum)
        else:
            phi = phi_gradient_descent(s, int(t), learning_rate)
        residual = self._columns(self.f0 - self.y)
        return -(self.eigenvectors @ (phi[:, None] * (self.eigenvectors.T @ residual))).reshape(self.f0.shape)

    def _columns(self, values: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "m _"]:
        """One column for the kernel of all outputs, C of them for one that each output has alike."""
        return values.reshape(len(self.matrix), -1)

    def train(self, t: float | None = None, **options: Any) -> Float[np.ndarray, "N C"]:
        """Returns the outputs on the training examples `[N, C]`; arguments as for `coefficients`."""
        alpha = self.coefficients(t, **options)
        return self.f0 + (self.matrix @ self._columns(alpha)).reshape(self.f0.shape)

    def test(
        self,
        kernel_test_train: Kernel,
        f0_test: Float[np.ndarray, "M C"],
        t: float | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "M C"]:
        """Returns the outputs on other examples `[M, C]`.

        Args:
            kernel_test_train: `K(x_test, x_train)`.
            f0_test: Outputs of the pretrained model there `[M, C]`.
            t: As for `coefficients`.
            **options: As for `coefficients`.

        Raises:
            InputError: If the shapes do not fit.
        """
        rows, f0_test = kernel_test_train.matrix(), np.asarray(f0_test, np.float64)
        expected = (f0_test.size * len(self.matrix) // self.f0.size, len(self.matrix))
        if rows.shape != expected:
            raise InputError(
                f"kernel_test_train has a matrix of shape {rows.shape}; expected (test outputs, training outputs) = "
                f"{expected}"
            )
        return f0_test + (rows @ self._columns(self.coefficients(t, **options))).reshape(f0_test.shape)

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
    matrix = kernel.require_symmetric("kernel regression").matrix()
    fits = y.ndim == 2 and len(matrix) == (len(y) if kernel.array.ndim == 2 else y.size)
    if not fits or y.shape != f0.shape:
        raise InputError(
            f"expected the kernel of the training examples and y, f0 of shape [N, C]; got a matrix of shape "
            f"{matrix.shape}, y {y.shape}, f0 {f0.shape}"
        )
    if not ridge >= 0:
        raise InputError(f"ridge={ridge}; expected at least 0")
    if not all(np.isfinite(array).all() for array in (matrix, y, f0)):
        raise InputError("the kernel, y or f0 holds NaN or infinity")
    values, vectors = np.linalg.eigh(matrix)
    values = np.clip(values, 0, None)
    epsilon = kernel.info.epsilon_J or 0.0
    floor = float(values[-1]) * max(epsilon**2, float(np.finfo(kernel.info.gram_dtype).eps) * len(values))
    return KernelRegression(matrix, values, vectors, f0, y, float(ridge), floor)
