"""Labelled text with a training and a validation split."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxlin.data.dataset import Dataset
from jaxlin.data.known import CLASS_METRICS, SCORE_METRICS
from jaxlin.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts and labels.

    Attributes:
        texts: One tuple an example: one text, or a pair.
        labels: Integer classes, or floating-point scores `[N]`.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: Shaped[np.ndarray, " N"]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.texts)

    def take(self, indices: np.ndarray) -> TextSplit:
        """Returns the examples at `indices`."""
        return TextSplit(tuple(self.texts[i] for i in indices), self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A text classification or regression task.

    Attributes:
        name: For titles and logs.
        train: Training split; no text of it is also in `validation`.
        validation: Validation split.
        label_names: Names of the classes by id; empty for scores.
        provenance: Where the text came from, for the record.
        metrics: Names of `jaxlin.training.metrics.METRICS` that the task is judged by, the primary one first.
    """

    name: str
    train: TextSplit
    validation: TextSplit
    label_names: tuple[str, ...]
    provenance: Mapping[str, Any]
    metrics: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Number of outputs: the number of classes, 1 for scores."""
        return max(len(self.label_names), 1)

    def sha256(self) -> str:
        """Hash of all texts and labels."""
        rows = [[split.texts, split.labels.tolist()] for split in (self.train, self.validation)]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def unlabelled(texts: tuple[tuple[str, ...], ...]) -> TextSplit:
    """Returns texts without labels: each has the score 0."""
    return TextSplit(texts, np.zeros(len(texts)))


def make_task(
    name: str,
    train: TextSplit,
    validation: TextSplit,
    label_names: tuple[str, ...],
    provenance: Mapping[str, Any],
    metrics: tuple[str, ...] | None = None,
) -> Task:
    """Builds a task, dropping (and counting in the provenance) training examples whose text is in validation.

    Args:
        name: For titles and logs.
        train: Training split.
        validation: Validation split.
        label_names: Names of the classes by id; empty for scores.
        provenance: Where the text came from.
        metrics: What the task is judged by, beside its loss; `None`: accuracy for classes, both correlations for
            scores.

    Returns:
        The task.

    Raises:
        InputError: If a split is empty, or the training split has a single class.
    """
    seen = {_normalised(text) for text in validation.texts}
    kept = np.array([i for i, text in enumerate(train.texts) if _normalised(text) not in seen], int)
    dropped = len(train) - len(kept)
    train = train.take(kept)
    for split, what in ((train, "training"), (validation, "validation")):
        if not len(split):
            why = f": the text of all {dropped} rows is also in validation" if what == "training" and dropped else ""
            raise InputError(f"task {name!r}: the {what} split holds no example{why}")
    if label_names and len(np.unique(train.labels)) < 2:
        only = label_names[train.labels[0]]
        raise InputError(f"task {name!r}: all {len(train)} training examples have the one label {only!r}; expected two")
    record = {**provenance, "train_rows_also_in_validation_dropped": dropped}
    metrics = (CLASS_METRICS if label_names else SCORE_METRICS) if metrics is None else metrics
    return Task(name, train, validation, label_names, record, metrics)


def _normalised(text: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(" ".join(part.lower().split()) for part in text)


def subsample(split: TextSplit, size: int | None, seed: int) -> TextSplit:
    """Returns at most `size` examples, the same for the same seed; classes keep their shares, and at least one each.

    Raises:
        InputError: If `size` is less than one example a class.
    """
    if size is None or size >= len(split):
        return split
    rng = np.random.default_rng(seed)
    scores = split.labels.dtype.kind == "f"
    groups = np.zeros(len(split), int) if scores else split.labels
    values, counts = np.unique(groups, return_counts=True)
    if size < len(values):
        raise InputError(f"a subset of {size} example(s) is too small; expected at least {len(values)}, one a class")
    parts = [
        rng.permutation(np.flatnonzero(groups == value))[:share]
        for value, share in zip(values, _shares(counts, size), strict=True)
    ]
    return split.take(np.sort(np.concatenate(parts)))


def _shares(counts: np.ndarray, size: int) -> np.ndarray:
    """Rounds `size` examples in proportion to `counts` to whole ones by the largest remainder, none to zero."""
    exact = size * counts / counts.sum()
    shares = np.maximum(exact.astype(int), 1)
    while shares.sum() < size:
        shares[np.argmax(exact - shares)] += 1
    while shares.sum() > size:
        shares[np.argmax(np.where(shares > 1, shares - exact, -np.inf))] -= 1
    return shares


def padding_id(tokenizer: Any) -> int:
    """Returns the id that fills up rows, masked: the end of text where a tokenizer knows no padding (GPT-2)."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in ids if token is not None)


def padded(rows: Sequence[Sequence[int]], value: int) -> np.ndarray:
    """Returns rows of uneven lengths as one int32 array, filled up on the right with `value`."""
    out = np.full((len(rows), max(map(len, rows))), value, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def tokenize(split: TextSplit, tokenizer: Any, max_length: int, token_types: bool = True) -> tuple[Dataset, int]:
    """Turns texts into a `Dataset`.

    Args:
        split: Texts and labels.
        tokenizer: A Hugging Face tokenizer.
        max_length: Tokens a text is truncated to, special tokens counted.
        token_types: Whether the model tells the two texts of a pair apart (BERT), or takes no such column (RoBERTa).

    Returns:
        The dataset (`input_ids`, `attention_mask`, `labels`, `token_type_ids` if the model takes them), and how many
        texts were truncated.

    Raises:
        InputError: If `max_length` leaves no room for text.
    """
    pairs = len(split.texts[0]) == 2
    fields = [list(column) for column in zip(*split.texts, strict=True)]
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special + pairs:
        raise InputError(f"max_seq_length={max_length} leaves no room for text beside {special} special tokens")
    # Every option explicit: a tokenizer.json may embed truncation and padding of its own.
    full = tokenizer(*fields, truncation=False, padding=False, verbose=False)
    truncated = sum(len(ids) > max_length for ids in full["input_ids"])
    options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
    encoded = tokenizer(*fields, **options, return_token_type_ids=token_types)
    columns: dict[str, np.ndarray] = {"labels": split.labels}
    pad = {"input_ids": padding_id(tokenizer), "attention_mask": 0, "token_type_ids": 0}
    for name, value in pad.items():
        if name in encoded:
            columns[name] = padded(encoded[name], value)
    return Dataset.from_columns(columns), truncated
