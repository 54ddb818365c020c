"""What a kernel says about the training that it describes: the numbers that layers are chosen by (theory 6)."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.theory.spectrum import Spectrum

CRITERIA: dict[str, bool] = {
    "condition_number": False,
    "regularized_condition_number": False,
    "mu_max": True,
    "mu_min": True,
    "trace": True,
    "effective_dimension": True,
    "alignment": True,
    "residual_share": True,
    "leave_one_out_error": False,
    "log_marginal_likelihood": True,
}
"""Name to whether more of it promises better training."""


def alignment(matrix: Float[np.ndarray, "m m"], target: Float[np.ndarray, "m k"]) -> float:
    """Returns the kernel-target alignment `⟨K, yyᵀ⟩/(‖K‖‖yyᵀ‖)` in Frobenius norms (theory 6); NaN where one vanishes.

    Args:
        matrix: K; with k columns of y it stands for K ⊗ I_k (theory 9).
        target: y, or r₀; k columns are one vector, stacked.
    """
    scale = target.shape[1] ** 0.5 * np.linalg.norm(matrix) * np.sum(target**2)
    return float(np.sum((matrix @ target) * target) / scale) if scale > 0 else float("nan")


def residual_share(fit: KernelRegression, k: int) -> float:
    """Returns the share of ‖r₀‖² that lies in the eigenspace of the k largest eigenvalues; NaN where r₀ vanishes.

    Args:
        fit: The regression of f₀ on y.
        k: Number of eigenvalues, from 1 to N·C. Those of K ⊗ I_C (theory 9) are C-fold: of an eigenspace that is
            counted in part, that part of its share.

    Raises:
        InputError: If k is out of range.
    """
    if not 1 <= k <= fit.y.size:
        raise InputError(f"k={k}; expected from 1 to the kernel's {fit.y.size} eigenvalues")
    residual = (fit.f0 - fit.y).reshape(len(fit.matrix), -1)
    whole, fold = float(np.sum(residual**2)), residual.shape[1]
    along = np.sum((fit.eigenvectors.T @ residual) ** 2, axis=1)[::-1]
    counted = np.clip(k / fold - np.arange(len(along)), 0, 1)
    return float(counted @ along) / whole if whole > 0 else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Criteria:
    """The numbers of `CRITERIA` of one kernel, and what they stand on.

    Attributes:
        values: By name. `regularized_condition_number`, `effective_dimension`, `leave_one_out_error` (mean over
            examples of ½‖f₋ᵢ(xᵢ) − yᵢ‖²) and `log_marginal_likelihood` are at λ; `alignment` is of r₀ = f₀ − y;
            `residual_share` is of the top tenth of the eigenvalues. Those two and `log_marginal_likelihood` are NaN
            where f₀ fits y exactly. Of a kernel that stands for K ⊗ I_C (theory 9) all are those of K ⊗ I_C.
        lam: λ of the summed loss.
        condition_number_is_bound: Whether κ is "≥": its smallest eigenvalue is not resolved.
        fit: The kernel regression that they come from.
    """

    values: dict[str, float]
    lam: float
    condition_number_is_bound: bool
    fit: KernelRegression


def criteria(
    kernel: Kernel,
    y: Float[np.ndarray, "N C"],
    f0: Float[np.ndarray, "N C"],
    lam: float | None = None,
    lam_rel: float = 1e-2,
) -> Criteria:
    """Computes every criterion from one eigendecomposition of the kernel.

    Args:
        kernel: K₀ of labelled examples with themselves.
        y: Targets `[N, C]`.
        f0: Outputs at θ₀ `[N, C]`.
        lam: λ of the summed loss; `None` for `lam_rel` times μ₁.
        lam_rel: λ in units of this kernel's μ₁.

    Returns:
        The criteria.

    Raises:
        InputError: If the shapes do not fit, the kernel is not symmetric or finite or vanishes, or λ is not positive.
    """
    fit = kernel_regression(kernel, y, f0, 0.0)
    mu = fit.eigenvalues[::-1]
    if not mu[0] > 0:
        raise InputError("the kernel vanishes: what is tuned changes no output")
    lam = lam_rel * float(mu[0]) if lam is None else lam
    if not lam > 0:
        raise InputError(f"lam={lam}; expected above 0")
    fit = dataclasses.replace(fit, ridge=lam)
    residual = (fit.f0 - fit.y).reshape(len(fit.matrix), -1)
    mu = np.repeat(mu, residual.shape[1])  # of K ⊗ I_C, where it stands for that
    spec = Spectrum.of_eigenvalues(mu, kernel.info)
    held_out = fit.leave_one_out()
    return Criteria(
        {
            "condition_number": spec.condition_number,
            "regularized_condition_number": spec.regularized_condition_number(lam),
            "mu_max": float(mu[0]),
            "mu_min": float(mu[-1]),
            "trace": spec.trace,
            "effective_dimension": spec.effective_dimension(lam),
            "alignment": alignment(fit.matrix, residual),
            "residual_share": residual_share(fit, max(1, len(mu) // 10)),
            "leave_one_out_error": float(np.mean(0.5 * np.sum((held_out - fit.y) ** 2, axis=1))),
            "log_marginal_likelihood": fit.log_marginal_likelihood() if fit.scale > 0 else float("nan"),
        },
        lam,
        spec.condition_number_is_bound,
        fit,
    )
