"""The linearized model from a Jacobian computed once: no network in its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.ntk.jacobian import Jacobian
from jaxlin.tunable import Batch, Tunable, leaf_paths

INDEX = "index"
"""Column that says which row of the cache an example is."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedLinear:
    """`f̄(theta) = f₀ + J₀ (theta − at)` of the examples whose Jacobian is held.

    Attributes:
        at: Point of expansion.
        outputs: `f(at)`, `[N, C]`.
        rows: Leaf path to Jacobian `[N, C, size]`; leaves left out have a vanishing one.
    """

    at: PyTree
    outputs: Array
    rows: Mapping[str, Array]

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns `f̄(theta)` of the examples at `batch["index"]`, `[B, C]`."""
        index = batch[INDEX]
        delta = dict(zip(leaf_paths(theta), jax.tree.leaves(jax.tree.map(jnp.subtract, theta, self.at)), strict=True))
        outputs = self.outputs[index]
        for path, rows in self.rows.items():
            outputs += jnp.einsum("bcp,p->bc", rows[index], delta[path].reshape(-1))
        return outputs


def cached_linearized(tun: Tunable, data: Dataset, jac: Jacobian) -> tuple[Tunable, Dataset]:
    """Returns the linearization of `tun` on `data` as a Tunable of cached Jacobians, and its data.

    The data's examples are row numbers, in `data`'s order, so that a trainer meets them in the same
    order as the originals. The trajectory equals that of `linearize(tun)` to rounding.

    Args:
        tun: The model that was linearized at its `theta0`.
        data: The examples.
        jac: Their Jacobian at `theta0`.
    """
    rows = {path: jnp.asarray(value) for path, value in jac.rows.items()}
    columns = {INDEX: np.arange(len(data)), **{k: v for k, v in data.columns.items() if k == "labels"}}
    linear = CachedLinear(tun.theta0, jnp.asarray(jac.outputs), rows)
    return dataclasses.replace(tun, apply=linear), Dataset.from_columns(columns)
