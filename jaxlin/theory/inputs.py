"""What every closed form asks of the kernels and outputs that it is given."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel, KernelInfo


def training_matrix(kernel: Kernel, what: str, **outputs: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "m m"]:
    """Returns the matrix of a kernel of training examples, m = N·C; m = N for a kind that stands for K ⊗ I_C.

    Args:
        kernel: Of the training examples with themselves.
        what: What needs it, for messages.
        **outputs: Arrays that must be of one shape `[N, C]`, by name.

    Raises:
        InputError: If shapes do not fit, the kernel is not symmetric, or something is not finite.
    """
    matrix = kernel.require_symmetric(what).matrix()
    first, *others = outputs.values()
    fits = first.ndim == 2 and first.size > 0 and len(matrix) == (len(first) if kernel.array.ndim == 2 else first.size)
    if not fits or any(other.shape != first.shape for other in others):
        raise InputError(
            f"expected the kernel of the training examples and {', '.join(outputs)} of shape [N, C]; got a matrix of "
            f"shape {matrix.shape}, {', '.join(f'{name} {array.shape}' for name, array in outputs.items())}"
        )
    if not all(np.isfinite(array).all() for array in (matrix, *outputs.values())):
        raise InputError(f"the kernel, or one of {', '.join(outputs)}, holds NaN or infinity")
    return matrix


def cross_matrix(
    kernel_test_train: Kernel, f0_test: Float[np.ndarray, "M C"], f0: Float[np.ndarray, "N C"], size: int
) -> Float[np.ndarray, "k m"]:
    """Returns the matrix of a kernel of test with training examples.

    Args:
        kernel_test_train: `K(x_test, x_train)`.
        f0_test: Outputs at θ₀ of the test examples.
        f0: Those of the training examples.
        size: Rows m of the training examples' matrix.

    Raises:
        InputError: If shapes do not fit, or something is not finite.
    """
    rows, c = kernel_test_train.matrix(), f0.shape[1]
    if f0_test.ndim != 2 or f0_test.shape[1] != c:
        raise InputError(f"f0_test has shape {f0_test.shape}; expected [M, {c}]")
    expected = (f0_test.size * size // f0.size, size)
    if rows.shape != expected:
        raise InputError(
            f"kernel_test_train has a matrix of shape {rows.shape}; expected (test outputs, training outputs) = "
            f"{expected}"
        )
    if not (np.isfinite(rows).all() and np.isfinite(f0_test).all()):
        raise InputError("kernel_test_train or f0_test holds NaN or infinity")
    return rows


def eigenpairs(
    matrix: Float[np.ndarray, "m m"], info: KernelInfo
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, "m m"], float]:
    """Returns μ, ascending and not negative, V, and the size up to which an eigenvalue counts as 0 (theory 6)."""
    values, vectors = np.linalg.eigh(matrix)
    values = np.clip(values, 0, None)
    rounding = float(np.finfo(info.gram_dtype).eps) * len(values)
    return values, vectors, float(np.max(values, initial=0.0)) * max((info.epsilon_J or 0.0) ** 2, rounding)
