"""Kinds of kernels: which rows of J they need, how those are paired, what may be done with the result."""

from __future__ import annotations

import dataclasses
import re
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError

_SIGN_THRESHOLD = 8.4
"""τ in units of the dtype's rounding: 1e-6 in float32 (theory 9)."""

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)
"""An array on the host or on a device."""

_KEY_BIAS = re.compile(r"(^|/)(key|k_proj|k_lin|k)/bias$")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of kernel (theory 9).

    Attributes:
        name: As `ntk(kind=...)` takes it.
        rows: Which rows of J an example has: `"each"` output's, that of their `"sum"` over √C, or of the
            `"difference"` of two.
        diagonal: Whether only equal outputs are paired.
        averaged: Whether it is the mean of those over the outputs.
        signs: Whether the rows of J on the left and on the right are replaced by their signs.
        rotary: Whether the model is known to turn keys by their position: then their biases count like any parameter.
    """

    name: str
    rows: str = "each"
    diagonal: bool = False
    averaged: bool = False
    signs: tuple[bool, bool] = (False, False)
    rotary: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the kernel of examples with themselves is symmetric; it is positive semidefinite then, too."""
        return self.signs[0] == self.signs[1]

    @property
    def of_signs(self) -> bool:
        """Whether signs of J enter."""
        return any(self.signs)

    def without_sign(self, path: str) -> bool:
        """Returns whether a leaf is a key bias that softmax ignores: its derivative is rounding, without a sign.

        The bias adds the same to a query's products with all keys, unless keys are turned by their position.
        """
        return not self.rotary and _KEY_BIAS.search(path) is not None

    def seeds(self, c: int) -> Float[np.ndarray, "k C"]:
        """Returns the output cotangents whose pullbacks are the rows of J that enter.

        Raises:
            InputError: If the kind is not defined for C outputs.
        """
        if self.rows == "sum":
            return np.full((1, c), c**-0.5)
        if self.rows == "difference":
            if c != 2:
                raise InputError(f'kind="{self.name}" is of the difference of two outputs; the model has {c}')
            return np.array([[-1.0, 1.0]])
        return np.eye(c)

    def finish(self, grams: AnyArray) -> AnyArray:
        """Returns the kernel of products of rows: `[N1, N2, k, k]`, or `[N1, N2, k]` where only equal ones are paired.

        Linear, so that it may be applied to sums of them, or to each block's.
        """
        if self.averaged:
            return grams.mean(axis=-1)
        return grams if self.rows == "each" else grams[:, :, 0, 0]

    def of_full(self, full: Float[np.ndarray, "N1 N2 C C"]) -> np.ndarray:
        """Returns the kernel from the full one.

        Raises:
            InputError: If it does not follow from that: the kinds of signs.
        """
        if self.of_signs:
            raise InputError(f'kind="{self.name}" does not follow from the full kernel; use another engine')
        seeds = self.seeds(full.shape[-1])
        grams = np.einsum("nmcd,kc,ld->nmkl", full, seeds, seeds, optimize=True)
        return self.finish(np.einsum("nmkk->nmk", grams) if self.diagonal else grams)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("full"),
        Kind("trace", diagonal=True, averaged=True),
        Kind("diagonal", diagonal=True),
        Kind("logit_difference", rows="difference"),
        Kind("pseudo", rows="sum"),
        Kind("signgd", signs=(True, True)),
        Kind("asymmetric_signgd", signs=(False, True)),
    )
}


def kind_of(name: str) -> Kind:
    """Returns the kind of a name.

    Raises:
        InputError: If there is none.
    """
    if name not in KINDS:
        raise InputError(f"kind={name!r} is unknown; expected one of {', '.join(KINDS)}")
    return KINDS[name]


def contrast_basis(c: int) -> Float[np.ndarray, "C C-1"]:
    """Returns Q, orthonormal columns that sum to 0: the directions of C logits that softmax sees (Helmert's contrasts).

    Raises:
        InputError: If there is one output only.
    """
    from scipy.linalg import helmert

    if c < 2:
        raise InputError(f"contrasts of outputs need at least two of them; there is {c}")
    return np.ascontiguousarray(helmert(c).T)


def thresholds(
    largest: Float[AnyArray, "N k"], dtype: np.dtype | type[np.floating] | jnp.dtype
) -> Float[AnyArray, "N k 1"]:
    """Returns the size up to which entries of J count as 0, from the largest of the same row and leaf (theory 9)."""
    return (_SIGN_THRESHOLD * float(jnp.finfo(dtype).eps) * largest)[..., None]


def signs(rows: AnyArray, threshold: AnyArray) -> AnyArray:
    """Returns -1, 0 or 1 by entry; NaN stays."""
    sign, absolute = (jnp.sign, jnp.abs) if isinstance(rows, jax.Array) else (np.sign, np.abs)
    return sign(rows) * ~(absolute(rows) <= threshold)
