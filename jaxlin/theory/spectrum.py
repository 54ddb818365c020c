"""What the kernel's eigenvalues say, and how far they can be trusted (theory 6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel, KernelInfo


def jacobian_error(info: KernelInfo) -> float:
    """Returns ε_J as it was measured; where it was not, ten times the rounding of the Jacobian's dtype (theory 6)."""
    return max(1e-15, 10 * float(jnp.finfo(info.dtype).eps)) if info.epsilon_J is None else info.epsilon_J


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenvalues of a symmetric kernel, with the noise they stand on (theory 6).

    Attributes:
        eigenvalues: μ, descending, float64 `[N*C]`, non-negative: rounding below zero is clipped.
        noise_floor: Eigenvalues at or below it are rounding: about `(ε_J σ)²` of the Jacobian, or the
            Gram's own `eps·μ_1·√m` where that is larger.
        resolution: Smallest eigenvalue known to about 10 %, `μ_1` divided by the largest condition
            number that can be reported: `(0.05/ε_J)²` of a Jacobian.
    """

    eigenvalues: Float[np.ndarray, " m"]
    noise_floor: float
    resolution: float

    @classmethod
    def of_eigenvalues(cls, eigenvalues: Float[np.ndarray, " m"], info: KernelInfo, gram: bool = True) -> Spectrum:
        """Returns the spectrum of descending eigenvalues, with the noise of how they were computed.

        Args:
            eigenvalues: μ, descending, non-negative.
            info: Of the kernel.
            gram: Whether they are those of a Gram matrix, rather than squared singular values of J.
        """
        gram_eps = float(np.finfo(info.gram_dtype).eps) * len(eigenvalues) ** 0.5 if gram else 0.0
        epsilon = jacobian_error(info)
        top = float(eigenvalues[0])
        return cls(
            eigenvalues,
            noise_floor=top * max(epsilon**2, gram_eps),
            resolution=top * max((epsilon / 0.05) ** 2, 10 * gram_eps),
        )

    @property
    def rank(self) -> int:
        """Numerical rank: the number of eigenvalues above the noise floor."""
        return int(np.sum(self.eigenvalues > self.noise_floor))

    @property
    def trace(self) -> float:
        """Σμ."""
        return float(self.eigenvalues.sum())

    @property
    def condition_number(self) -> float:
        """κ = μ_max/μ_min, or the largest value that the noise lets be told; see `condition_number_is_bound`.

        NaN for a kernel that vanishes.
        """
        top, low = float(self.eigenvalues[0]), float(self.eigenvalues[-1])
        return top / max(low, self.resolution) if top > 0 else float("nan")

    @property
    def condition_number_is_bound(self) -> bool:
        """Whether `condition_number` is a lower bound ("≥"): the smallest eigenvalue is not resolved."""
        return float(self.eigenvalues[-1]) < self.resolution

    @property
    def condition_number_on_range(self) -> float:
        """κ over the eigenvalues that are resolved: μ_max over the smallest of them."""
        kept = self.eigenvalues[self.eigenvalues >= max(self.resolution, np.finfo(float).tiny)]
        return float(kept[0] / kept[-1]) if kept.size else float("nan")

    def regularized_condition_number(self, lam: float) -> float:
        """Returns κ_λ = (μ_max + λ)/(μ_min + λ), λ for the summed loss.

        Raises:
            InputError: If λ is not positive.
        """
        if not lam > 0:
            raise InputError(f"lam={lam}; expected above 0 (at 0 it is condition_number)")
        return float((self.eigenvalues[0] + lam) / (self.eigenvalues[-1] + lam))

    def effective_dimension(self, lam: float) -> float:
        """Returns Σ μ/(μ + λ), λ for the summed loss.

        Raises:
            InputError: If λ is not positive.
        """
        if not lam > 0:
            raise InputError(f"lam={lam}; expected above 0 (at 0 it is the rank)")
        return float(np.sum(self.eigenvalues / (self.eigenvalues + lam)))

    def summary(self) -> dict[str, Any]:
        """Returns its numbers, for a record."""
        return {
            "mu_max": float(self.eigenvalues[0]),
            "mu_min": float(self.eigenvalues[-1]),
            "trace": self.trace,
            "condition_number": self.condition_number,
            "condition_number_is_lower_bound": self.condition_number_is_bound,
            "condition_number_on_range": self.condition_number_on_range,
            "rank": self.rank,
            "kernel_size": len(self.eigenvalues),
            "noise_floor": self.noise_floor,
            "resolution": self.resolution,
        }


def _triangular_factor(leaves: list[np.ndarray]) -> np.ndarray:
    """Returns R with `RᵀR = J Jᵀ`, in float64, by QR of some columns of J at a time: J is never copied whole."""
    m = leaves[0].shape[0] * leaves[0].shape[1]
    width = max(8 * m, 1 << 12)
    factor = np.zeros((0, m))
    pending: list[np.ndarray] = []
    for rows in leaves:
        flat = rows.reshape(m, -1)
        pending += [flat[:, start : start + width] for start in range(0, flat.shape[1], width)]
        while sum(part.shape[1] for part in pending) >= width or (rows is leaves[-1] and pending):
            taken = [pending.pop(0)]
            while pending and sum(part.shape[1] for part in taken) < width:
                taken.append(pending.pop(0))
            columns = np.concatenate([factor, *(part.T for part in taken)])  # float64, as factor is
            factor = np.asarray(np.linalg.qr(columns, mode="r"))
    return factor


def spectrum(kernel: Kernel, ignore_constant: bool = False) -> Spectrum:
    """Computes the eigenvalues of a symmetric kernel.

    From the singular values of the Jacobian where the kernel kept it (its condition number is the
    square root of the kernel's), else from the matrix.

    Args:
        kernel: A kernel of examples with themselves.
        ignore_constant: Whether to leave out the direction that softmax ignores, a constant added to all logits of an
            example: the spectrum of `kernel.contrasts()`, N(C−1) eigenvalues. For training by cross-entropy.

    Returns:
        The spectrum. Its noise floor takes ε_J as measured; where it was not, ten times the rounding of
        the Jacobian's dtype is assumed (1e-6 for float32).

    Raises:
        InputError: If the kernel is not symmetric and positive semidefinite, or holds NaN or infinity; with
            `ignore_constant`, if it is not of kind `"full"` or has one output.
    """
    kernel = kernel.contrasts() if ignore_constant else kernel
    matrix, info = kernel.require_symmetric("a spectrum").matrix(), kernel.info
    if not np.isfinite(matrix).all():
        raise InputError("the kernel holds NaN or infinity; check the model's weights and inputs")
    m = len(matrix)
    if kernel.jacobian:
        sigma = np.linalg.svd(_triangular_factor(list(kernel.jacobian.values())), compute_uv=False)
        eigenvalues = np.zeros(m)
        eigenvalues[: len(sigma)] = sigma**2  # the rest are exact zeros: fewer parameters than outputs
        return Spectrum.of_eigenvalues(eigenvalues, info, gram=False)
    return Spectrum.of_eigenvalues(np.clip(np.linalg.eigvalsh(matrix)[::-1], 0, None), info)
