"""Kernels of random linear models, for the closed forms."""

import numpy as np

from jaxlin.ntk.kernel import Kernel, KernelInfo

INFO = KernelInfo("test", "float64", "float64", "highest", "cpu", 1e-15)


def kernel_of(jac, n, other=None, *, info=INFO, keep=False):
    """Kernel of a dense Jacobian [n*C, P], or of two."""
    second = jac if other is None else other
    c = len(jac) // n
    array = (jac @ second.T).reshape(n, c, len(second) // c, c).transpose(0, 2, 1, 3)
    kept = {"all": jac.reshape(n, c, -1)} if keep else None
    return Kernel({"all": array}, other is None, info, {"all": ("all",)}, kept)


def problem(seed, n=6, c=2, p=20):
    """A random linear model: Jacobian of train and test examples, f0 and targets."""
    rng = np.random.default_rng(seed)
    jac, jac_test = rng.normal(size=(n * c, p)), rng.normal(size=(4 * c, p))
    return jac, jac_test, rng.normal(size=(n, c)), rng.normal(size=(4, c)), rng.normal(size=(n, c))


SIZES = {"P > m": 20, "P < m": 5}


def alike(matrix, symmetric=True):
    """A kernel [N1, N2] that stands for K ⊗ I_C."""
    return Kernel({"all": matrix}, symmetric, INFO, {"all": ("all",)}, kind="trace", of_two_sets=not symmetric)


def each_alone(matrix, c, symmetric=True):
    """A kernel [N1, N2, C] of kind "diagonal", every output's kernel the same."""
    array = np.repeat(matrix[:, :, None], c, axis=2)
    return Kernel({"all": array}, symmetric, INFO, {"all": ("all",)}, kind="diagonal", of_two_sets=not symmetric)
