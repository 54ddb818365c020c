"""Tasks from local files."""

from __future__ import annotations

from pathlib import Path

from jaxlin.data.columns import Columns, make_table_task
from jaxlin.data.known import KNOWN_TASKS, KnownTask
from jaxlin.data.readers import READERS, read_table
from jaxlin.data.task import Task
from jaxlin.errors import InputError

# As the hub's files are named, so that a folder downloaded from it is a task folder.
_NAMES = ("{split}{suffix}", "{split}-00000-of-00001{suffix}")


def load_file_task(
    name: str,
    train_file: Path,
    validation_file: Path,
    columns: Columns | None = None,
    known: KnownTask | None = None,
) -> Task:
    """Builds a task from two files: TSV, CSV, JSON, JSON lines or Parquet, by the suffix of their names.

    Args:
        name: Of the task.
        train_file: Training rows.
        validation_file: Validation rows; its format may be another.
        columns: Names of columns that are given.
        known: The known task that this is.

    Returns:
        The task; see `make_table_task` for columns and labels.

    Raises:
        InputError: If a file cannot be used, or as for `make_table_task`.
    """
    provenance = {"train_file": str(train_file), "validation_file": str(validation_file)}
    tables = read_table(train_file), read_table(validation_file)
    return make_table_task(name, *tables, provenance, columns, known)


def _find(folder: Path, splits: tuple[str, ...]) -> Path | None:
    """The file of the first of `splits` that is there; an `InputError` if a split is there twice."""
    for split in splits:
        names = [pattern.format(split=split, suffix=suffix) for pattern in _NAMES for suffix in READERS]
        found = [folder / name for name in names if (folder / name).is_file()]
        if len(found) > 1:
            raise InputError(f"{folder} has both {found[0].name} and {found[1].name}; expected one file of each split")
        if found:
            return found[0]
    return None


def _splits(task_name: str) -> tuple[str, tuple[str, ...]]:
    """Name of a task's folder, and of its validation split in order of preference."""
    known = KNOWN_TASKS.get(task_name)
    if known and known.folder:  # a part of another task's folder: only its own split
        return known.folder, (known.validation_split,)
    own = (known.validation_split,) if known else ()
    return task_name, tuple(dict.fromkeys(("validation", *own)))


def has_task(data_dir: Path, task_name: str) -> bool:
    """Whether `load_folder_task` would find both splits of the task."""
    folder, validation = _splits(task_name)
    return bool(_find(data_dir / folder, ("train",)) and _find(data_dir / folder, validation))


def tasks_in(data_dir: Path) -> list[str]:
    """Names of the tasks in a folder of task folders, sorted."""
    there = {path.name for path in data_dir.iterdir() if path.is_dir()} if data_dir.is_dir() else set()
    names = there | {name for name, known in KNOWN_TASKS.items() if known.folder in there}
    return sorted(name for name in names if has_task(data_dir, name))


def load_folder_task(data_dir: Path, task_name: str, columns: Columns | None = None) -> Task:
    """Builds a task from `data_dir/task_name/{train,validation}` with the suffix of any format.

    Of a known task, the split is also found by its name on the hub (`mnli_mismatched`: `validation_mismatched` in the
    folder `mnli`), and a file by the hub's way to name it (`train-00000-of-00001.parquet`).

    Args:
        data_dir: Folder of task folders.
        task_name: The task.
        columns: Names of columns that are given.

    Returns:
        The task, as `load_file_task` builds it.

    Raises:
        InputError: If there is no such task (those there are listed), or as for `load_file_task`.
    """
    if not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir} is not a folder")
    folder, validation_splits = _splits(task_name)
    train, validation = _find(data_dir / folder, ("train",)), _find(data_dir / folder, validation_splits)
    if train is None or validation is None:
        missing = "train" if train is None else " or ".join(validation_splits)
        there = tasks_in(data_dir)
        listed = f"it has {', '.join(there)}" if there else "nor any other task"
        raise InputError(f"{data_dir / folder} has no file {missing} ({', '.join(READERS)}); {data_dir}: {listed}")
    return load_file_task(task_name, train, validation, columns, KNOWN_TASKS.get(task_name))
