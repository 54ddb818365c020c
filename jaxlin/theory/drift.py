"""How far a kernel has moved from the one at θ₀: drift, rotation of the top eigenspace, alignment (theory 5(d), 6)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.spectrum import jacobian_error

NORMS = ("frobenius", "spectral")

_RESOLVED = 20.0
"""Gap below an eigenspace that leaves it defined, in units of ε_J μ₁: errors of K are up to 2 ε_J μ₁, and by Davis and
Kahan's theorem turn the eigenspace by at most that over the gap, 0.1 rad here."""


def relative(value: float, scale: float) -> float:
    """Returns `value/scale`; 0 where both vanish (what has not moved is equal), infinity where the scale alone does."""
    return value / scale if scale > 0 else (0.0 if value == 0 else float("inf"))


def _matrix(kernel: Kernel, what: str) -> Float[np.ndarray, "m m"]:
    matrix = kernel.require_symmetric(what).matrix()
    if not np.isfinite(matrix).all():
        raise InputError(
            f"{what} needs finite kernels; one holds NaN or infinity: check the parameters it was taken at"
        )
    return matrix


def _matrices(kernel: Kernel, kernel0: Kernel, what: str) -> tuple[np.ndarray, np.ndarray]:
    pair = _matrix(kernel, what), _matrix(kernel0, what)
    if pair[0].shape != pair[1].shape:
        raise InputError(f"{what} compares kernels of the same examples; these are {pair[0].shape} and {pair[1].shape}")
    return pair


def _norm(matrix: np.ndarray, norm: str) -> float:
    if norm not in NORMS:
        raise InputError(f"norm={norm!r} is unknown; expected one of {', '.join(NORMS)}")
    return float(np.linalg.norm(matrix) if norm == "frobenius" else np.abs(np.linalg.eigvalsh(matrix)).max())


def relative_drift(kernel: Kernel, kernel0: Kernel, norm: str = "frobenius") -> float:
    """Returns ‖K_t − K₀‖/‖K₀‖, what theory 5(d) bounds; 0 where both vanish, infinity where K₀ alone does.

    Args:
        kernel: K_t, of examples with themselves.
        kernel0: K₀, of the same examples.
        norm: `"frobenius"` or `"spectral"`.

    Raises:
        InputError: If a kernel is not symmetric or finite, they differ in size, or the norm is unknown.
    """
    matrix, matrix0 = _matrices(kernel, kernel0, "kernel drift")
    return relative(_norm(matrix - matrix0, norm), _norm(matrix0, norm))


def kernel_alignment(kernel: Kernel, kernel0: Kernel) -> float:
    """Returns `⟨K_t, K₀⟩/(‖K_t‖‖K₀‖)`, Frobenius: 1 where they are equal but for scale; NaN where one vanishes.

    Args:
        kernel: K_t, of examples with themselves.
        kernel0: K₀, of the same examples.

    Raises:
        InputError: If a kernel is not symmetric or finite, or they differ in size.
    """
    matrix, matrix0 = _matrices(kernel, kernel0, "kernel alignment")
    scale = float(np.linalg.norm(matrix) * np.linalg.norm(matrix0))
    return float(np.sum(matrix * matrix0)) / scale if scale > 0 else float("nan")


def top_eigenspace(kernel: Kernel, top: int) -> tuple[Float[np.ndarray, "m k"], float]:
    """Returns an orthonormal basis of the eigenspace of the largest eigenvalues, and the gap below it.

    Args:
        kernel: Of examples with themselves, `[m, m]` as a matrix.
        top: k, the number of eigenvalues.

    Returns:
        The basis, and `(μ_k − μ_{k+1})/μ₁`: infinite for k = m, 0 for a kernel that vanishes.

    Raises:
        InputError: If the kernel is not symmetric or finite, or k is not between 1 and m.
    """
    import scipy.linalg

    matrix = _matrix(kernel, "the top eigenspace")
    m = len(matrix)
    if not 1 <= top <= m:
        raise InputError(f"top={top}; expected between 1 and {m}, the size of the kernel")
    values, vectors = scipy.linalg.eigh(matrix, subset_by_index=[max(m - top - 1, 0), m - 1])
    gap = float("inf") if top == m else relative(float(values[1] - values[0]), float(values[-1]))
    return vectors[:, -top:], gap


def widest_gap(kernel: Kernel, low: int, high: int) -> int:
    """Returns the k between `low` and `high` with the largest μ_k/μ_{k+1}: whose top eigenspace is best defined.

    Args:
        kernel: Of examples with themselves, `[m, m]` as a matrix.
        low: Smallest k, at least 1.
        high: Largest k; from m on there is no gap, and k = m counts only where `low` leaves no other.

    Raises:
        InputError: If the kernel is not symmetric or finite.
    """
    mu = np.linalg.eigvalsh(_matrix(kernel, "the top eigenspace"))[::-1]
    low, high = min(low, len(mu)), min(high, len(mu) - 1)
    floor = max(float(mu[0]) * len(mu) * np.finfo(float).eps, np.finfo(float).tiny)
    mu = np.maximum(mu, floor)
    return low + int(np.argmax(mu[low - 1 : high] / mu[low : high + 1])) if low < high else low


def principal_angles(kernel: Kernel, kernel0: Kernel, top: int) -> Float[np.ndarray, " k"]:
    """Returns the principal angles between the top-k eigenspaces of two kernels, in radians, descending.

    Args:
        kernel: K_t, of examples with themselves.
        kernel0: K₀, of the same examples.
        top: k.

    Returns:
        Angles between 0 and π/2. All are NaN where one of the kernels has no such eigenspace: its μ_k and μ_{k+1} are
        tied, or nearer than the error of its Jacobian can tell, as in one that vanishes.

    Raises:
        InputError: If a kernel is not symmetric or finite, they differ in size, or k is not between 1 and m.
    """
    from scipy.linalg import subspace_angles

    _matrices(kernel, kernel0, "principal angles")
    spaces = [(*top_eigenspace(one, top), jacobian_error(one.info)) for one in (kernel, kernel0)]
    if any(gap <= _RESOLVED * epsilon for _, gap, epsilon in spaces):
        return np.full(top, np.nan)
    return np.asarray(subspace_angles(spaces[0][0], spaces[1][0]), np.float64)
