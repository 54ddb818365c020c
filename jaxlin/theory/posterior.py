"""How sure the linearized model is: linearized Laplace (theory 2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel


def diagonal_blocks(
    kernel_test: Kernel | Float[np.ndarray, "M C C"] | Float[np.ndarray, " M"], m: int, c: int
) -> Float[np.ndarray, "M k k"]:
    """Returns `K(x, x)` of each test example: `[M, C, C]`, or `[M, 1, 1]` for a kernel that stands for K ⊗ I_C.

    Args:
        kernel_test: Kernel of the test examples with themselves; or only those blocks, as an array (`[M]` for K ⊗ I_C).
        m: Number of test examples.
        c: Outputs that the kernel tells apart; 1 for one that stands for K ⊗ I_C.

    Raises:
        InputError: If the shape does not fit, the kernel is not symmetric, or something is not finite.
    """
    if isinstance(kernel_test, Kernel):
        array = kernel_test.require_symmetric("the posterior variance").array
        found = array[np.arange(len(array)), np.arange(len(array))]
        blocks = found[..., None] * np.eye(c) if array.ndim == 3 else found
    else:
        blocks = np.asarray(kernel_test, np.float64)
    blocks = blocks[:, None, None] if blocks.ndim == 1 else blocks
    if blocks.shape != (m, c, c):
        raise InputError(f"kernel_test gives diagonal blocks of shape {blocks.shape}; expected {(m, c, c)}")
    if not np.isfinite(blocks).all():
        raise InputError("kernel_test holds NaN or infinity")
    return blocks


def posterior_covariance(
    rows: Float[np.ndarray, "k m"],
    blocks: Float[np.ndarray, "M c c"],
    eigenvectors: Float[np.ndarray, "m m"],
    s: Float[np.ndarray, " m"],
) -> Float[np.ndarray, "M c c"]:
    """Returns `K(x,x) − K(x,X) A⁻¹ K(X,x)` of each test example (theory 2).

    The covariance of its latent outputs, in units of σ², under `δ ~ N(0, σ²I)` given `y = f + N(0, σ²λI)`.
    Eigenvalues that rounding makes negative are 0.

    Args:
        rows: `K(x_test, X)`.
        blocks: `K(x, x)` of each test example.
        eigenvectors: V of K(X, X).
        s: μ + λ, above 0.
    """
    known = ((rows @ eigenvectors) / np.sqrt(s)).reshape(*blocks.shape[:2], -1)
    values, vectors = np.linalg.eigh(blocks - known @ known.swapaxes(1, 2))
    return (vectors * np.clip(values, 0, None)[:, None, :]) @ vectors.swapaxes(1, 2)
