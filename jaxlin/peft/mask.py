"""Some blocks of a Tunable alone, with no new compilation: the others are multiplied by zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlin.tunable import Batch, Tunable, leaf_paths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
    """`apply(theta0 + mask * (theta - theta0), batch)`; the mask is data, so that all masks share a compilation.

    Attributes:
        apply: Of the whole Tunable.
        theta0: Its start.
        mask: A 0 or 1 for every leaf of theta.
    """

    apply: Callable[[PyTree, Batch], Array]
    theta0: PyTree
    mask: PyTree

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns the outputs `[B, C]`."""
        return self.apply(
            jax.tree.map(lambda p, p0, on: p0 + on.astype(p.dtype) * (p - p0), theta, self.theta0, self.mask), batch
        )

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs as the model does."""
        Tunable(self.apply, self.theta0).check_batch(batch)


def only(tun: Tunable, blocks: Collection[str]) -> Tunable:
    """Returns `tun` with some of its blocks tuned; the rest of theta stays at its start, with zero gradient.

    Training it is training a Tunable of those blocks alone, at the cost of the whole: worth it where many choices of
    blocks are trained at a shape that compiles once.

    Args:
        tun: What is tuned in part.
        blocks: Names of its blocks.

    Returns:
        A Tunable of the same theta.
    """
    paths = {path for name in blocks for path in tun.blocks[name]}
    mask = [jnp.float32(path in paths) for path in leaf_paths(tun.theta0)]
    masked = Masked(tun.apply, tun.theta0, jax.tree.unflatten(jax.tree.structure(tun.theta0), mask))
    return dataclasses.replace(tun, apply=masked)
