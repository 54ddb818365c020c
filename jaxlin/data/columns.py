"""From two tables to a task: which columns hold text and label, and what the labels mean.

The rules are those of Hugging Face's run_glue, but for one: where neither options nor known names say which
columns hold the text, run_glue takes the first two that are not the label, whatever they hold. Here they are
taken only if they are the one or two columns of words; else it is an error that lists the columns.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlin.data.known import KnownTask
from jaxlin.data.readers import Table
from jaxlin.data.task import Task, TextSplit, make_task, unlabelled
from jaxlin.errors import InputError

LABEL = "label"
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
"""Text columns of GLUE and its like, looked for in this order."""

MAX_CLASSES = 1000
"""More different labels than these are taken for a mistake, such as a column of text."""

_NO_TEXT = ("idx", "id")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names of columns, where they are given.

    Attributes:
        text: One text column, or the two of a pair; empty: by the rules.
        label: The label column; `None`: `"label"`.
        labelled: Whether there must be labels; if not, a label column is neither read nor taken for text.
    """

    text: tuple[str, ...] = ()
    label: str | None = None
    labelled: bool = True


def make_table_task(
    name: str,
    train: Table,
    validation: Table,
    provenance: Mapping[str, Any],
    columns: Columns | None = None,
    known: KnownTask | None = None,
) -> Task:
    """Builds a task from the tables of its splits.

    Text columns: those given; a known task's; the first of `TEXT_COLUMNS` that is there; else the columns of words
    that are neither label, `idx` nor `id`, if they are one or two. Labels: of a known task, or a column with declared
    classes, its class ids or names; else whole numbers are class ids (sorted and counted from 0: stars 1 to 5 are
    five classes), other numbers scores (one output), and anything else class names in order of the alphabet. Where none
    are wanted, every text has the score 0, and the task is judged by no metric.

    Args:
        name: Of the task.
        train: Training table.
        validation: Validation table.
        provenance: Where they came from.
        columns: Names of columns that are given.
        known: The known task that this is.

    Returns:
        The task, training rows whose text is also in validation left out.

    Raises:
        InputError: If a column is missing or not to be found, a text or label is missing or of the wrong kind, a
            validation label is not among the classes, or training has one class only; says which row.
    """
    columns = columns or Columns()
    label = columns.label or LABEL
    for table in (train, validation) if columns.labelled else ():
        _require(table, (label,), "--label_column_name")
    text = _text_columns(train, label, columns.text, known)
    for table in (train, validation):
        _require(table, text, "--text_column_names")
    texts = [tuple(zip(*(_texts(table, column) for column in text), strict=True)) for table in (train, validation)]
    record = {**provenance, "text_columns": list(text), "label_column": label if columns.labelled else None}
    if not columns.labelled:
        return make_task(name, unlabelled(texts[0]), unlabelled(texts[1]), (), record, ())
    classes = _Classes.of(train, label, known)
    labels = [classes.encode(table, label) for table in (train, validation)]
    splits = [TextSplit(*part) for part in zip(texts, labels, strict=True)]
    return make_task(name, splits[0], splits[1], classes.names, record, known.metrics if known else None)


def _require(table: Table, names: Sequence[str], option: str) -> None:
    for name in names:
        if name not in table.columns:
            raise InputError(
                f"{table.source} has no column {name!r}; its columns: {', '.join(table.columns)}; "
                f"name another by {option}"
            )


def _text_columns(table: Table, label: str, given: Sequence[str], known: KnownTask | None) -> tuple[str, ...]:
    if len(given) > 2 or len(set(given)) < len(given) or label in given:
        raise InputError(
            f"--text_column_names {' '.join(given)}: expected one or two columns, each once and not the label {label!r}"
        )
    if given:
        return tuple(given)
    for names in ((known.text_columns,) if known else ()) + TEXT_COLUMNS:
        if all(name in table.columns and name != label for name in names):
            return names
    words = [name for name, values in table.columns.items() if name not in (label, *_NO_TEXT) and _is_text(values)]
    if len(words) not in (1, 2):
        raise InputError(
            f"{table.source} has no text column known; its columns: {', '.join(table.columns)}; name one or two by "
            "--text_column_names"
        )
    return tuple(words)


def _is_text(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values) and not isinstance(_kind(values), type)


def _texts(table: Table, column: str) -> list[str]:
    for i, value in enumerate(table.columns[column]):
        if not isinstance(value, str):
            what = "no value" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
            raise InputError(f"{table.where(i)}: column {column!r} holds {what}; expected text")
        if not _is_unicode(value):
            raise InputError(f"{table.where(i)}: column {column!r} holds half a character (a lone surrogate)")
    return table.columns[column]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value) else None
    return int(value) if isinstance(value, int) else None  # a bool is 0 or 1


def _score(value: Any) -> float | None:
    if isinstance(value, str) and "_" in value:  # a number in Python only
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _kind(values: Sequence[Any]) -> type | None:
    """`int` or `float` where all values are such numbers, written or not; else `None`."""
    if all(_whole(value) is not None for value in values):
        return int
    return float if all(_score(value) is not None for value in values) else None


def _check_labels(table: Table, column: str) -> None:
    for i, value in enumerate(table.columns[column]):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise InputError(f"{table.where(i)}: the label is empty; expected a class or a score in column {column!r}")
        if not isinstance(value, str | int | float):
            raise InputError(f"{table.where(i)}: the label is a {type(value).__name__}; expected a class or a score")


@dataclasses.dataclass(frozen=True)
class _Classes:
    """What the labels of a task are.

    `key` maps a value to what `ids` holds, `None` if it is no such value; `names` is empty for scores.
    """

    names: tuple[str, ...]
    ids: Mapping[Any, int]
    key: Callable[[Any], Any]

    @classmethod
    def of(cls, train: Table, column: str, known: KnownTask | None) -> _Classes:
        _check_labels(train, column)
        values = train.columns[column]
        declared = known.label_names if known else train.class_names.get(column, ())
        kind = _kind(values)
        if known and not declared and kind is None:
            raise InputError(
                f"{train.source}: the labels of this task are scores; column {column!r} holds {values[0]!r}"
            )
        if (known and not declared) or (not declared and kind is float):
            return cls((), {}, _score)
        if declared and kind is float:
            raise InputError(
                f"{train.source}: column {column!r} holds scores such as {values[0]}, but this task has the classes "
                f"{_list(declared)}"
            )
        if declared:
            ids: dict[Any, int] = {name.casefold(): i for i, name in enumerate(declared)}
            return cls(declared, dict(enumerate(range(len(declared)))), _whole) if kind else cls(declared, ids, _name)
        key: Callable[[Any], Any] = _whole if kind else (lambda value: str(value).strip())
        found = sorted({key(value) for value in values})
        if len(found) < 2:
            raise InputError(
                f"{train.source}: all {len(values)} rows have the one label {str(found[0])!r}; expected two"
            )
        if len(found) > MAX_CLASSES:
            raise InputError(
                f"{train.source}: column {column!r} holds {len(found)} different labels, such as "
                f"{str(found[0])[:40]!r}; expected at most {MAX_CLASSES} classes, or scores such as 0.5"
            )
        return cls(tuple(map(str, found)), {value: i for i, value in enumerate(found)}, key)

    def encode(self, table: Table, column: str) -> np.ndarray:
        """Class ids or scores `[N]`."""
        _check_labels(table, column)
        keys = [self.key(value) for value in table.columns[column]]
        for i, key in enumerate(keys):
            if not self.names and (key is None or not math.isfinite(key)):
                given = table.columns[column][i]
                raise InputError(
                    f"{table.where(i)}: the score is {given!r}; expected a finite number, not NaN or infinite"
                )
            if self.names and key not in self.ids:
                given = str(table.columns[column][i]).strip()
                missing = " (-1 marks a row without label: is this a test split?)" if given == "-1" else ""
                raise InputError(
                    f"{table.where(i)}: label {given[:40]!r} is none of the task's classes: "
                    f"{_list(self.names)}{missing}"
                )
        return np.array([self.ids[key] for key in keys]) if self.names else np.array(keys, np.float64)


def _name(value: Any) -> str:
    return str(value).strip().casefold()


def _list(names: Sequence[str]) -> str:
    numbers = all(_whole(name) is not None for name in names)
    shown = ", ".join(name if numbers else f"{i} {name}" for i, name in enumerate(names[:10]))
    return shown + (f", … ({len(names)} in all)" if len(names) > 10 else "")
