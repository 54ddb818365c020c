"""Whether the predictive intervals of the linearized model cover what they should (theory 2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.regression import KernelRegression


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Predictive intervals of the linearized Laplace posterior against targets that it has not seen (theory 2).

    The predictive distribution of example x is `N(f̄(x), σ²(K(x,x) − K(x,X)A⁻¹K(X,x) + λI))`.

    Attributes:
        levels: Nominal probabilities of the central intervals `[L]`.
        coverage: Share of targets, over examples and outputs, within each interval `[L]`.
        coverage_error: Standard deviation of `coverage` if the model were calibrated, `√(level(1 − level)/M)`: as if
            the outputs of one example hit or missed together, as those of two opposed logits do `[L]`.
        negative_log_density: `−log p(y)` in nats, mean over examples.
        negative_log_density_error: Its standard error over examples.
        squared_residual: `(y − f̄)ᵀ Σ⁻¹ (y − f̄)/C`, mean over examples; about 1 where the variance is right.
        squared_residual_error: Its standard error over examples.
        num_examples: M.
    """

    levels: Float[np.ndarray, " L"]
    coverage: Float[np.ndarray, " L"]
    coverage_error: Float[np.ndarray, " L"]
    negative_log_density: float
    negative_log_density_error: float
    squared_residual: float
    squared_residual_error: float
    num_examples: int


def calibration(
    fit: KernelRegression,
    kernel_test_train: Kernel,
    f0_test: Float[np.ndarray, "M C"],
    y_test: Float[np.ndarray, "M C"],
    kernel_test: Kernel | Float[np.ndarray, "M C C"] | Float[np.ndarray, " M"],
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95),
) -> Calibration:
    """Checks the predictive uncertainty of a regression on held-out targets.

    Args:
        fit: The regression, with a ridge above 0.
        kernel_test_train: `K(x_test, x_train)`.
        f0_test: Outputs of the pretrained model on the held-out examples.
        y_test: Targets there.
        kernel_test: `K(x_test, x_test)`, or its diagonal blocks; see `KernelRegression.test`.
        levels: Nominal probabilities of central intervals.

    Returns:
        What was covered, with its sampling error.

    Raises:
        InputError: If shapes do not fit, fewer than two examples are held out, a level is not between 0 and 1, the
            ridge is 0, or the pretrained model fits the training targets exactly (the variance is 0).
    """
    from scipy.special import ndtri

    nominal, y_test = np.asarray(levels, np.float64), np.asarray(y_test, np.float64)
    if nominal.ndim != 1 or not ((nominal > 0) & (nominal < 1)).all():
        raise InputError(f"levels={levels}; expected probabilities between 0 and 1")
    if y_test.shape != np.shape(f0_test) or len(y_test) < 2 or not np.isfinite(y_test).all():
        raise InputError(
            f"y_test has shape {y_test.shape} and f0_test {np.shape(f0_test)}; expected the same [M, C], M at least 2, "
            "and finite targets"
        )
    mean, latent = fit.test(kernel_test_train, f0_test, kernel_test=kernel_test, return_variance=True)
    if not fit.scale > 0:
        raise InputError("the pretrained model fits y exactly: its likeliest variance is 0, and there are no intervals")
    m, c = y_test.shape
    covariance = latent + fit.scale * fit.ridge * np.eye(c)
    residual = y_test - mean
    standardised = np.abs(residual) / np.sqrt(np.einsum("mcc->mc", covariance))
    squared = np.einsum("mc,mc->m", residual, np.linalg.solve(covariance, residual[..., None])[..., 0])
    surprise = 0.5 * (squared + np.linalg.slogdet(covariance)[1] + c * math.log(2 * math.pi))
    return Calibration(
        levels=nominal,
        coverage=(standardised[..., None] <= ndtri((1 + nominal) / 2)).mean((0, 1)),
        coverage_error=np.sqrt(nominal * (1 - nominal) / m),
        negative_log_density=float(surprise.mean()),
        negative_log_density_error=float(surprise.std(ddof=1)) / m**0.5,
        squared_residual=float(squared.mean()) / c,
        squared_residual_error=float(squared.std(ddof=1)) / c / m**0.5,
        num_examples=m,
    )
