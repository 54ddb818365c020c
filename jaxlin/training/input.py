"""Which examples a step sees: a function of the configuration and the data alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.training.config import TrainConfig
from jaxlin.training.groups import length_groups

if TYPE_CHECKING:
    from grain import DatasetIterator

READ_AHEAD = 4
"""Batches that are made before they are asked for."""


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


class StepSource:
    """Random access to what each step sees, as a function of its number: the source of a grain pipeline.

    Element i is what step i + 1 sees: its examples, and this process's rows of the batch, which is one or, of all
    examples, may be several of different lengths (`length_groups`).
    """

    def __init__(self, data: Dataset, config: TrainConfig, process_index: int = 0, process_count: int = 1) -> None:
        """Prepares to read.

        Args:
            data: All training examples, on every process.
            config: Order and batch size.
            process_index: Which of the processes this is.
            process_count: How many share a batch: each has an equal number of its rows, in order, with rows of
                `weight` 0 at the end where they do not divide it.
        """
        self._data, self._config = data, config
        self._index, self._count = process_index, process_count
        self._groups = length_groups(data, config)
        self._epoch, self._order = -1, np.arange(0)

    def __len__(self) -> int:
        """Number of steps of the run."""
        return self._config.total_steps(len(self._data))

    def __getitem__(self, index: SupportsIndex) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
        """Returns the examples of step `index` + 1, and the batch or batches."""
        size = self._config.batch_size
        if len(self._groups) > 1:
            return np.concatenate(self._groups), [self._share(group, len(group)) for group in self._groups]
        epoch, within = divmod(int(index), self._config.steps_per_epoch(len(self._data)))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self._data, self._config, epoch)
        indices = self._order[within * size : (within + 1) * size]
        return indices, [self._share(indices, min(size, len(self._data)))]

    def _share(self, indices: np.ndarray, size: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of some examples, filled up to a size."""
        share = -(-size // self._count)
        rows = slice(self._index * share, (self._index + 1) * share)
        return self._data.batch(indices, share * self._count, rows)


def step_input(
    data: Dataset, config: TrainConfig, first: int = 0, process_index: int = 0, process_count: int = 1
) -> DatasetIterator[tuple[np.ndarray, list[dict[str, np.ndarray]]]]:
    """Returns the input of a run, read ahead by a thread: what `StepSource` has for every step.

    Args:
        data: As for `StepSource`.
        config: Likewise.
        first: Steps that are left out at its begin.
        process_index: As for `StepSource`.
        process_count: Likewise.

    Returns:
        A grain iterator: `get_state()` and `set_state(…)` say and set where it is; `close()` ends the thread.
    """
    import grain

    source = StepSource(data, config, process_index, process_count)
    # One thread: elements are made in order, so that an epoch's order is computed once.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    iterator.set_state({**iterator.get_state(), "next_index": first})
    return iterator
