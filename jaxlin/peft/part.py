"""Some blocks of a Tunable alone: with the others multiplied by zero, or as a smaller theta."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlin.tunable import Batch, Tunable, check_inputs, leaf_paths


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
        check_inputs(self.apply, batch)


def mask_of(tun: Tunable, blocks: Collection[str]) -> PyTree:
    """Returns 1 for every leaf of theta that is in one of the blocks, 0 for the others."""
    paths = {path for name in blocks for path in tun.blocks[name]}
    mask = [jnp.float32(path in paths) for path in leaf_paths(tun.theta0)]
    return jax.tree.unflatten(jax.tree.structure(tun.theta0), mask)


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
    return dataclasses.replace(tun, apply=Masked(tun.apply, tun.theta0, mask_of(tun, blocks)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The function of some leaves of theta; the others stay where they are.

    Attributes:
        apply: Of the whole Tunable.
        rest: Path to value of the leaves that stay.
        paths: Of all leaves, in the order of the whole theta.
        structure: Of the whole theta.
    """

    apply: Callable[[PyTree, Batch], Array]
    rest: PyTree
    paths: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def whole(self, theta: PyTree) -> PyTree:
        """Returns the theta of the whole Tunable."""
        leaves = {**self.rest, **theta}
        return jax.tree.unflatten(self.structure, [leaves[path] for path in self.paths])

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns the outputs `[B, C]`."""
        return self.apply(self.whole(theta), batch)

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs as the model does."""
        check_inputs(self.apply, batch)


def part_of(tun: Tunable, blocks: Collection[str]) -> Tunable:
    """Returns `tun` as a function of some of its blocks alone.

    Args:
        tun: What is tuned in part.
        blocks: Names of its blocks.

    Returns:
        A Tunable whose theta is the mapping of the chosen leaves' paths to their values.
    """
    paths, chosen = leaf_paths(tun.theta0), {path for name in blocks for path in tun.blocks[name]}
    leaves = dict(zip(paths, jax.tree.leaves(tun.theta0), strict=True))
    part = Part(tun.apply, leaves, paths, jax.tree.structure(tun.theta0))
    theta0 = {path: leaf for path, leaf in leaves.items() if path in chosen}
    return Tunable(part, theta0, {name: tun.blocks[name] for name in blocks})
