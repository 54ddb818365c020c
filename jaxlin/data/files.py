"""Tasks from local TSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxlin.data.task import Task, TextSplit, make_task
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


def read_tsv(file: Path) -> dict[str, list[str]]:
    """Reads a tab-separated file with a header line and no quoting (a `"` is a character like any other).

    Returns:
        Column name to fields, stripped.

    Raises:
        InputError: If the file is missing, empty, not UTF-8, or a line has another number of fields
            than the header; says which.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a TSV file")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) < 2:
        raise InputError(f"{file} holds {len(lines)} line(s); expected a header line and rows of data")
    header = [name.strip() for name in lines[0].split("\t")]
    if len(set(header)) < len(header):
        raise InputError(f"{file} has a column name twice: {header}")
    rows = [line.split("\t") for line in lines[1:]]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(
                f"{file}, line {number}: {len(row)} field(s), but the header has {len(header)} ({', '.join(header)}); "
                "fields are separated by tabs and not quoted"
            )
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


def _text_columns(columns: dict[str, list[str]], file: Path) -> tuple[str, ...]:
    if LABEL not in columns:
        hint = (
            "; is it separated by commas? Tabs are expected" if len(columns) == 1 and "," in next(iter(columns)) else ""
        )
        raise InputError(f"{file} has no column {LABEL!r}; its columns: {', '.join(columns)}{hint}")
    if "" in columns[LABEL]:
        raise InputError(f"{file}, line {columns[LABEL].index('') + 2}: the label is empty")
    for names in TEXT_COLUMNS:
        if all(name in columns for name in names):
            return names
    known = ", ".join(" + ".join(names) for names in TEXT_COLUMNS)
    raise InputError(f"{file} has no text column known; expected one of {known}; its columns: {', '.join(columns)}")


def _as_numbers(values: list[str], kind: type) -> np.ndarray | None:
    try:
        return np.array([kind(value) for value in values])
    except ValueError:
        return None


def _labels(
    train: list[str], validation: list[str], files: tuple[Path, Path]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Returns both splits' labels and the class names: ids 0 … C−1, names in order of the alphabet, or scores."""
    ids = _as_numbers(train, int)
    if ids is not None:
        names = tuple(str(i) for i in range(int(ids.max()) + 1))
        if ids.min() < 0:
            raise InputError(f"{files[0]} has the label {ids.min()}; expected class ids 0, 1, …")
        if len(names) > max(100, 2 * len(set(train))):
            raise InputError(
                f"{files[0]} has the label {ids.max()} but only {len(set(train))} classes; expected ids 0, 1, …"
            )
    else:
        scores, scores_validation = _as_numbers(train, float), _as_numbers(validation, float)
        if scores is not None and scores_validation is not None:
            for numbers, file in ((scores, files[0]), (scores_validation, files[1])):
                if not np.isfinite(numbers).all():
                    raise InputError(f"{file} has a label that is NaN or infinite")
            return scores, scores_validation, ()
        names = tuple(sorted(set(train)))
        if len(names) > 100:
            raise InputError(
                f"{files[0]} has {len(names)} different labels, such as {names[0]!r}; expected at most 100 classes"
            )
    where = {name: i for i, name in enumerate(names)}
    out = []
    for values, file in ((train, files[0]), (validation, files[1])):
        canonical = [str(int(v)) if ids is not None and v.lstrip("+-").isdigit() else v for v in values]
        for number, value in enumerate(canonical, start=2):
            if value not in where:
                raise InputError(
                    f"{file}, line {number}: label {value!r} is none of the training file's classes: {', '.join(names)}"
                )
        out.append(np.array([where[value] for value in canonical]))
    return out[0], out[1], names


def load_tsv_task(name: str, train_file: Path, validation_file: Path) -> Task:
    """Builds a task from two TSV files with a `label` column and text columns named as in GLUE.

    Integer labels are class ids 0 … C−1, other numbers scores (one output), anything else class names.

    Returns:
        The task, training rows whose text is also in validation left out.

    Raises:
        InputError: If a file cannot be read as TSV, a column is missing, a validation label is not among
            the training classes, or training has one class only.
    """
    tables = {file: read_tsv(file) for file in (train_file, validation_file)}
    names = _text_columns(tables[train_file], train_file)
    if _text_columns(tables[validation_file], validation_file) != names:
        raise InputError(f"{validation_file} has other text columns than {train_file} ({', '.join(names)})")
    train, validation, classes = _labels(
        tables[train_file][LABEL], tables[validation_file][LABEL], (train_file, validation_file)
    )
    splits = [
        TextSplit(tuple(zip(*(tables[file][column] for column in names), strict=True)), labels)
        for file, labels in ((train_file, train), (validation_file, validation))
    ]
    provenance = {"train_file": str(train_file), "validation_file": str(validation_file), "text_columns": list(names)}
    return make_task(name, splits[0], splits[1], classes, provenance)


def load_folder_task(data_dir: Path, task_name: str) -> Task:
    """Builds a task from `data_dir/task_name/{train,validation}.tsv`.

    Returns:
        The task, as `load_tsv_task` builds it.

    Raises:
        InputError: If there is no such task (those there are listed), or as for `load_tsv_task`.
    """
    folder = data_dir / task_name
    if not (folder / "train.tsv").is_file():
        if not data_dir.is_dir():
            raise InputError(f"--data_dir {data_dir} is not a folder")
        there = sorted(path.parent.name for path in data_dir.glob("*/train.tsv"))
        listed = f"; it has {', '.join(there)}" if there else ", nor any other task"
        raise InputError(f"{data_dir} has no {task_name}/train.tsv{listed}")
    return load_tsv_task(task_name, folder / "train.tsv", folder / "validation.tsv")
