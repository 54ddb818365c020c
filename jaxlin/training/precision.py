"""Mixed precision: the network in bfloat16, everything around it in the parameters' own dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxlin.linearize import Linearized
from jaxlin.training.cached import CachedLinear
from jaxlin.tunable import Batch, Tunable, check_inputs


def _cast(tree: PyTree, dtype: str) -> PyTree:
    def cast(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class InDtype:
    """`apply`, computed in another dtype: weights and inputs are cast as they enter, outputs as they leave.

    Attributes:
        apply: The model; its leaves keep their own dtype.
        dtype: Of the computation.
    """

    apply: Callable[[PyTree, Batch], Array]
    dtype: str = dataclasses.field(metadata={"static": True})

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns `apply(theta, batch)`, `[B, C]` in the dtype of theta, each number with the digits of `dtype`."""
        outputs = _cast(self.apply, self.dtype)(_cast(theta, self.dtype), _cast(dict(batch), self.dtype))
        return outputs.astype(jnp.result_type(*jax.tree.leaves(theta)))

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs as the model does."""
        check_inputs(self.apply, batch)


def in_dtype(tun: Tunable, dtype: str) -> Tunable:
    """Returns `tun` with its network computed in `dtype`, such as `"bfloat16"`.

    Weights and activations have that dtype; theta0, gradients and outputs keep the parameters' own, and the
    statistics of LayerNorm and softmax are float32. Of a linearized model the network's primal and tangent are cast,
    and not `theta − at`, which would lose what is small beside theta. A linearization whose Jacobian is held has no
    network, and stays as it is.

    Args:
        tun: The model.
        dtype: Of the computation.
    """
    if isinstance(tun.apply, CachedLinear):
        return tun
    if isinstance(tun.apply, Linearized):
        inner = in_dtype(dataclasses.replace(tun, apply=tun.apply.apply), dtype)
        return dataclasses.replace(tun, apply=dataclasses.replace(tun.apply, apply=inner.apply))
    return dataclasses.replace(tun, apply=InDtype(tun.apply, dtype))
