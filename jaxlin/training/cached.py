"""The linearized model from a Jacobian computed once: no network in its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

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
@dataclasses.dataclass(frozen=True, eq=False)
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


def cached_linearized(
    tun: Tunable, data: Sequence[Dataset], jacobians: Sequence[Jacobian]
) -> tuple[Tunable, list[Dataset]]:
    """Returns the linearization of `tun` as a Tunable of cached Jacobians, and the data it works on.

    The new datasets hold row numbers, with the lengths of the originals, so that a trainer meets the
    examples in the same order. The trajectory equals that of `linearize(tun)` to rounding.

    Args:
        tun: The model, linearized at its `theta0`.
        data: Datasets, such as a training and an evaluation split.
        jacobians: Their Jacobians at `theta0`.

    Returns:
        The cached linear model and one dataset for each of `data`.
    """
    paths = [path for path in leaf_paths(tun.theta0) if any(path in jac.rows for jac in jacobians)]

    def stack(path: str) -> Array:
        shape = next(jac.rows[path].shape for jac in jacobians if path in jac.rows)
        parts = [
            jac.rows.get(path, np.zeros((len(part), *shape[1:]), jac.outputs.dtype))
            for part, jac in zip(data, jacobians, strict=True)
        ]
        return jnp.asarray(np.concatenate(parts))

    outputs = jnp.asarray(np.concatenate([jac.outputs for jac in jacobians]))
    out, start = [], 0
    for part in data:
        columns = {INDEX: np.arange(start, start + len(part)), "labels": part["labels"]}
        out.append(Dataset(columns, part.lengths, part.buckets))
        start += len(part)
    linear = CachedLinear(tun.theta0, outputs, {path: stack(path) for path in paths})
    return dataclasses.replace(tun, apply=linear), out
