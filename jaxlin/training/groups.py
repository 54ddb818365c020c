"""A batch of all examples in groups of like length, each computed at its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlin.data.dataset import Dataset
from jaxlin.sharding import spread
from jaxlin.training.config import TrainConfig
from jaxlin.tunable import Batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """A batch whose examples are of several lengths.

    Attributes:
        batches: One for each length, shortest first.
        parts: In how many parts, one after the other, each is computed.
    """

    batches: tuple[Batch, ...]
    parts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def length_groups(data: Dataset, config: TrainConfig) -> list[np.ndarray]:
    """Returns the groups that the examples of full-batch descent are computed in: those of every bucket.

    There is one, of all, where batches are smaller (a batch is then of like lengths already), where the configuration
    does not group by length, or where no column has tokens, as in a model of cached Jacobians.
    """
    if config.group_by_length and config.batch_size >= len(data) and data.has_tokens():
        return [group for group in data.groups() if len(group)]
    return [np.arange(len(data))]


def spread_groups(batches: Sequence[Batch], mesh: Mesh | None, parts: int = 1, shares: int = 1) -> Batch | Groups:
    """Puts a step's batch on the devices, as `jaxlin.sharding.spread` does.

    Args:
        batches: The groups; each in the shares of the processes.
        mesh: As for `spread`.
        parts: Of the whole: a group is cut into as many that none holds more examples than one of the whole would.
        shares: As for `spread`.

    Returns:
        The batch where it is one, else its groups.
    """
    if len(batches) == 1:
        return spread(batches[0], mesh, parts, shares)
    sizes = [len(batch["weight"]) for batch in batches]
    own = tuple(-(-size * parts // sum(sizes)) for size in sizes)
    return Groups(tuple(spread(batch, mesh, k, shares) for batch, k in zip(batches, own, strict=True)), own)
