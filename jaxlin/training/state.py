"""Where a training run stands."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxlin.training.optim import ProximalState

Row = dict[str, Any]
"""One line of a history: `step`, `loss` and so on."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """Where a training run stands, to go on from.

    Attributes:
        theta: The parameters.
        optimizer: State of `jaxlin.optim.proximal`; holds the point that is pulled to.
        step: Steps taken.
    """

    theta: PyTree
    optimizer: ProximalState
    step: int


def copied(tree: PyTree) -> PyTree:
    """Returns `tree` with buffers of its own."""
    return jax.tree.map(jnp.array, tree)
