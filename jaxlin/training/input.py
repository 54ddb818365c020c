"""Which examples a step sees: a function of the configuration and the data alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.training.config import TrainConfig


def epoch_order(data: Dataset, config: TrainConfig, epoch: int) -> np.ndarray:
    """Returns the order of the examples in one epoch; depends on their number and lengths, batch size and seed only."""
    n, size = len(data), config.batch_size
    if size >= n:
        return np.arange(n)
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(n)
    if not config.group_by_length or data.lengths is None:
        return order
    order = order[np.argsort(data.lengths[order], kind="stable")]
    # A last partial batch is a random stretch of lengths: were it always the longest, they would weigh more.
    start = rng.integers(n // size + 1) * size
    rest, partial = np.delete(order, np.s_[start : start + n % size]), order[start : start + n % size]
    whole = rest.reshape(-1, size)
    return np.concatenate([whole[rng.permutation(len(whole))].reshape(-1), partial])


def batches(data: Dataset, config: TrainConfig) -> Iterator[np.ndarray]:
    """Yields the examples of each step."""
    n, size = len(data), config.batch_size
    for step in range(config.total_steps(n)):
        epoch, within = divmod(step, config.steps_per_epoch(n))
        if within == 0:
            order = epoch_order(data, config, epoch)
        yield order[within * size : (within + 1) * size]
