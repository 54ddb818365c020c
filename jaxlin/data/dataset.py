"""Examples as host arrays, cut into batches of few shapes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxlin.errors import InputError
from jaxlin.hashing import add_array

_SEQUENCE_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
TRUNK = "trunk:"
"""Beginning of the names of columns of activations, `[N, T, …]` or one or none in place of T; see `jaxlin.trunk`."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples as columns, with the sequence lengths they are batched at.

    Attributes:
        columns: Host arrays by name; the leading axis of each is the example. Sequence columns
            (`input_ids`, `attention_mask`, `token_type_ids`, activations of every token) are padded on the right to
            one length.
        lengths: Number of tokens of each example up to its last live one `[N]`; `None` for data
            without sequence columns, which is never cut.
        buckets: At most four ascending lengths; a batch is cut to the smallest that fits it, so that
            a compiled function meets at most four shapes.
    """

    columns: Mapping[str, np.ndarray]
    lengths: np.ndarray | None = None
    buckets: tuple[int, ...] = ()

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> Dataset:
        """Builds a dataset from arrays, choosing buckets by the lengths where there is an `attention_mask`.

        Returns:
            The dataset, its columns as NumPy arrays.

        Raises:
            InputError: If there is no column or example, or the columns differ in length.
        """
        arrays = {name: np.asarray(value) for name, value in columns.items()}
        sizes = {name: value.shape[0] if value.ndim else None for name, value in arrays.items()}
        if not arrays or len(set(sizes.values())) != 1 or None in sizes.values():
            raise InputError(f"columns must be arrays with one leading axis, the example; their lengths are {sizes}")
        words = [name for name, value in arrays.items() if value.dtype.kind not in "biufV"]
        if words:
            raise InputError(
                f"column {words[0]!r} holds {arrays[words[0]].dtype}; expected numbers (tokenize text first)"
            )
        if 0 in sizes.values():
            raise InputError("the data set holds no example")
        if "attention_mask" not in arrays:
            return cls(arrays)
        mask = arrays["attention_mask"].astype(bool)
        lengths = mask.shape[1] - np.argmax(mask[:, ::-1], axis=1)
        lengths = np.where(mask.any(axis=1), lengths, 1)
        return cls(arrays, lengths, choose_buckets(lengths, mask.shape[1]))

    def __len__(self) -> int:
        """Number of examples."""
        return next(iter(self.columns.values())).shape[0]

    def __getitem__(self, name: str) -> np.ndarray:
        """One column."""
        return self.columns[name]

    def take(self, indices: np.ndarray) -> Dataset:
        """Returns the examples at `indices`, with buckets of their own."""
        return Dataset.from_columns({name: value[indices] for name, value in self.columns.items()})

    def batch(self, indices: np.ndarray, size: int | None = None, part: slice = slice(None)) -> dict[str, np.ndarray]:
        """Returns a batch, cut to the smallest bucket that holds it.

        Args:
            indices: Examples, at least one.
            size: Number of rows; rows beyond `indices` repeat the first (so they are always valid
                input) and carry `weight` 0.
            part: Which of the rows are returned, cut as the whole batch is.

        Returns:
            The columns and `weight` `[size]`, float32.
        """
        filler = (size or len(indices)) - len(indices)
        rows = np.concatenate([indices, np.full(filler, indices[0])])
        weight = np.concatenate([np.ones(len(indices)), np.zeros(filler)]).astype(np.float32)
        rows, weight = rows[part], weight[part]
        columns = self.columns
        if self.lengths is not None:
            longest = int(self.lengths[indices].max())
            width = next(bucket for bucket in self.buckets if bucket >= longest)
            columns = {name: value[:, :width] if self._is_cut(name) else value for name, value in columns.items()}
        return {**{name: value[rows] for name, value in columns.items()}, "weight": weight}

    def _is_cut(self, name: str) -> bool:
        """Whether a column has the tokens on its second axis."""
        return name in _SEQUENCE_COLUMNS or (name.startswith(TRUNK) and self.columns[name].ndim > 2)

    def has_tokens(self) -> bool:
        """Whether there is a column that a batch is cut in."""
        return self.lengths is not None and any(map(self._is_cut, self.columns))

    def groups(self) -> list[np.ndarray]:
        """Returns the examples of every bucket, shortest first."""
        if self.lengths is None:
            return [np.arange(len(self))]
        bucket = np.searchsorted(self.buckets, self.lengths)
        return [np.flatnonzero(bucket == b) for b in range(len(self.buckets))]

    def chunks(self, size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Yields `(indices, batch)` over all examples, those of one bucket together.

        Every batch has exactly `size` rows; the first `len(indices)` are the examples.
        """
        for group in self.groups():
            for start in range(0, len(group), size):
                indices = group[start : start + size]
                yield indices, self.batch(indices, size)

    def map(self, function: Callable[[dict[str, np.ndarray]], Any], chunk: int = 32) -> np.ndarray:
        """Returns `function(batch)` of every example in order, float64 `[N, K]`; it maps a batch to `[size, K]`."""
        out: np.ndarray | None = None
        for indices, batch in self.chunks(min(chunk, len(self))):
            values = np.asarray(function(batch), np.float64)[: len(indices)]
            if out is None:
                out = np.zeros((len(self), values.shape[1]))
            out[indices] = values
        assert out is not None  # a Dataset is never empty
        return out

    def sha256(self) -> str:
        """Hash of the content of all columns."""
        digest = hashlib.sha256()
        for name in sorted(self.columns):
            add_array(digest, name, self.columns[name])
        return digest.hexdigest()


def as_dataset(data: Dataset | Mapping[str, Any]) -> Dataset:
    """Returns `data` as a `Dataset`; a mapping of arrays is one whose columns they are."""
    return data if isinstance(data, Dataset) else Dataset.from_columns(data)


def choose_buckets(lengths: np.ndarray, longest: int) -> tuple[int, ...]:
    """Chooses at most four lengths, multiples of 8 where they fit, that waste little padding.

    Args:
        lengths: Lengths of the examples.
        longest: Length the columns are padded to; no bucket exceeds it.

    Returns:
        The lengths, ascending; the last holds the longest example.
    """
    ceil8 = np.minimum(-(-lengths // 8) * 8, longest)
    return tuple(sorted({int(np.quantile(ceil8, q, method="higher")) for q in (0.4, 0.7, 0.9, 1.0)}))
