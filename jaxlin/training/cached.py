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

_INDEX, _ALL = "index", "all"


def index_column(part: int) -> str:
    """Name of the column that says which row of a data set's cache an example is; its number is static in a trace."""
    return f"{_INDEX}:{part}"


def all_column(part: int) -> str:
    """Name of the column, of any content, that says a batch is a whole data set in order: no row is copied then."""
    return f"{_ALL}:{part}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CachedLinear:
    """`f̄(theta) = f₀ + J₀ (theta − at)` of the examples whose Jacobian is held.

    Attributes:
        at: Point of expansion.
        outputs: Of every data set `f(at)`, `[N, C]`.
        rows: Of every data set leaf path to Jacobian `[N, C, size]`, in theta's dtype or a narrower one, from which
            it is widened to be multiplied; leaves left out have a vanishing one.
    """

    at: PyTree
    outputs: tuple[Array, ...]
    rows: tuple[Mapping[str, Array], ...]

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns `f̄(theta)` of the examples at `batch[index_column(…)]`, or of all, `[B, C]`."""
        (part,) = [k for k in range(len(self.outputs)) if index_column(k) in batch or all_column(k) in batch]
        index = batch.get(index_column(part))
        delta = dict(zip(leaf_paths(theta), jax.tree.leaves(jax.tree.map(jnp.subtract, theta, self.at)), strict=True))
        outputs = self.outputs[part] if index is None else self.outputs[part][index]
        for path, whole in self.rows[part].items():
            rows = whole if index is None else whole[index]
            change = delta[path].reshape(-1)
            outputs += jnp.einsum("bcp,p->bc", rows.astype(change.dtype), change)
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
    out = []
    for k, part in enumerate(data):
        columns = {index_column(k): np.arange(len(part)), "labels": part["labels"]}
        out.append(Dataset(columns, part.lengths, part.buckets))
    outputs = tuple(jnp.asarray(jac.outputs) for jac in jacobians)
    rows = tuple({path: jnp.asarray(leaf) for path, leaf in jac.rows.items()} for jac in jacobians)
    return dataclasses.replace(tun, apply=CachedLinear(tun.theta0, outputs, rows)), out
