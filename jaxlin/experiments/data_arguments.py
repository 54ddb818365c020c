"""Which data a command uses: its arguments, and the task that they name."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlin.data.columns import Columns
from jaxlin.data.files import has_task, load_file_task, load_folder_task, tasks_in
from jaxlin.data.hub import load_hub_task
from jaxlin.data.known import KNOWN_TASKS, known_task_of
from jaxlin.data.stdlib import load_stdlib_task
from jaxlin.data.task import Task, unlabelled
from jaxlin.errors import InputError

STDLIB = "stdlib"


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """Data.

    Attributes:
        task_name: stdlib (embedded: docstrings of Python's standard library), a task in data_dir, or a known one
            from the hub (cola sst2 mrpc qqp stsb mnli mnli_mismatched qnli rte wnli imdb yelp ag_news).
        data_dir: Folder of <task>/{train,validation}.{tsv,csv,json,jsonl,parquet}; default: the environment
            variable JAXLIN_DATA.
        train_file: Training rows in place of task_name: .tsv, .csv, .json, .jsonl or .parquet.
        validation_file: Validation rows, likewise.
        dataset_name: Hub data set in place of task_name.
        dataset_config_name: Its configuration.
        dataset_revision: Branch, tag or commit of it, or of a task_name of the hub.
        train_split_name: Its training split; default: train.
        validation_split_name: Its split to evaluate on; default: validation.
        text_column_names: One text column, or the two of a pair; default: as run_glue finds them.
        label_column_name: Column of labels; default: label.
        max_seq_length: Tokens a text is truncated to.
        max_train_samples: Use so many training examples, stratified.
        max_eval_samples: Use so many validation examples, stratified.
    """

    task_name: str = STDLIB
    data_dir: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_split_name: str | None = None
    validation_split_name: str | None = None
    text_column_names: tuple[str, ...] = ()
    label_column_name: str | None = None
    max_seq_length: int = 64
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


def with_folder(arguments: DataArguments) -> DataArguments:
    """Returns the arguments with the folder that `JAXLIN_DATA` stands for written out."""
    default = os.environ.get("JAXLIN_DATA")
    elsewhere = arguments.data_dir is not None or arguments.dataset_revision
    taken = default and not elsewhere and has_task(Path(default), arguments.task_name)
    return dataclasses.replace(arguments, data_dir=Path(default)) if default and taken else arguments


_OF_HUB = ("dataset_config_name", "train_split_name", "validation_split_name")


def _check(arguments: DataArguments) -> None:
    """Refuses options that contradict each other, or that nothing would heed."""
    files = [name for name in ("train_file", "validation_file") if getattr(arguments, name)]
    named = [f"--{files[0]}"] if files else []
    named += ["--dataset_name"] if arguments.dataset_name else []
    named += ["--task_name"] if arguments.task_name != STDLIB else []
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are both given; give one of them")
    if len(files) == 1:
        raise InputError(f"--train_file and --validation_file belong together; only --{files[0]} is given")
    if arguments.data_dir is not None and named != ["--task_name"]:
        raise InputError(
            f"--data_dir is given {f'beside {named[0]}' if named else 'without --task_name'}; it is for a --task_name"
        )
    for name in _OF_HUB:
        if getattr(arguments, name) and not arguments.dataset_name:
            raise InputError(f"--{name} is given without --dataset_name; it is for a hub data set named by that")
    if arguments.dataset_revision and not arguments.dataset_name and not _may_be_of_hub(arguments):
        raise InputError("--dataset_revision is given, but the data are not of the hub; it is for those that are")
    for name in ("text_column_names", "label_column_name"):
        if getattr(arguments, name) and not named:
            raise InputError(f"--{name} is given, but the embedded task has no columns to choose; name the data")


def _may_be_of_hub(arguments: DataArguments) -> bool:
    return arguments.task_name in KNOWN_TASKS and arguments.data_dir is None


def check_numbers(arguments: Any, data: DataArguments, **least: int) -> None:
    """Refuses numbers of a command that takes its own `--num_samples` and a `--memory_budget`.

    Args:
        arguments: The command's.
        data: Which data.
        **least: Name of an argument to the smallest number that it may be.

    Raises:
        InputError: If one is too small, or examples are counted as another command counts them.
    """
    for name, smallest in least.items():
        if getattr(arguments, name) < smallest:
            raise InputError(f"--{name} {getattr(arguments, name)}: expected at least {smallest}")
    if not arguments.memory_budget > 0:
        raise InputError(f"--memory_budget {arguments.memory_budget}: expected GiB above 0")
    if data.max_train_samples or data.max_eval_samples:
        own = " and ".join(f"--{name}" for name in ("num_samples", "num_eval_samples") if hasattr(arguments, name))
        raise InputError(f"--max_train_samples and --max_eval_samples are of compare; give {own}")


def load_task(arguments: DataArguments, labelled: bool = True) -> Task:
    """Loads the task that the arguments name.

    Args:
        arguments: Which.
        labelled: Whether its labels are wanted; if not, there need be none, and every text has the score 0.

    Returns:
        The task, whole.

    Raises:
        InputError: If they contradict each other, or the data cannot be used.
    """
    _check(arguments)
    columns = Columns(arguments.text_column_names, arguments.label_column_name, labelled)
    if arguments.train_file and arguments.validation_file:
        return load_file_task(arguments.train_file.stem, arguments.train_file, arguments.validation_file, columns)
    if arguments.dataset_name:
        known = known_task_of(arguments.dataset_name, arguments.dataset_config_name)
        return load_hub_task(
            arguments.dataset_name,
            arguments.dataset_config_name,
            revision=arguments.dataset_revision,
            train_split=arguments.train_split_name or "train",
            validation_split=arguments.validation_split_name or (known.validation_split if known else "validation"),
            columns=columns,
            known=known,
        )
    if arguments.task_name == STDLIB:
        task = load_stdlib_task()
        if labelled:
            return task
        train, validation = (unlabelled(split.texts) for split in (task.train, task.validation))
        return dataclasses.replace(task, train=train, validation=validation, label_names=(), metrics=())
    return _named_task(arguments, columns)


def _named_task(arguments: DataArguments, columns: Columns) -> Task:
    """A task of a folder that is given, else of `JAXLIN_DATA` unless a revision is, else a known one from the hub."""
    name, revision = arguments.task_name, arguments.dataset_revision
    if arguments.data_dir is not None:
        return load_folder_task(arguments.data_dir, name, columns)
    default = os.environ.get("JAXLIN_DATA")
    if default and not revision and ((Path(default) / name).is_dir() or has_task(Path(default), name)):
        return load_folder_task(Path(default), name, columns)
    known = KNOWN_TASKS.get(name)
    if known is not None:
        return load_hub_task(
            known.hub,
            known.config,
            name=name,
            revision=revision,
            validation_split=known.validation_split,
            columns=columns,
            known=known,
        )
    raise InputError(_no_task("task_name", name, "any other hub data set is named by --dataset_name"))


def check_tasks(names: Sequence[str], data_dir: Path | None) -> None:
    """Refuses tasks that are none, of a command whose `--tasks` are loaded one after the other.

    Args:
        names: As for `DataArguments.task_name`.
        data_dir: As for `DataArguments`.

    Raises:
        InputError: Naming the first that `load_task` would not find in a folder, embedded, or known of the hub.
    """
    if data_dir is not None:
        there = tasks_in(data_dir)
        if missing := [name for name in names if not has_task(data_dir, name)]:
            raise InputError(
                f"--tasks {' '.join(names)}: there is no {missing[0]} in --data_dir {data_dir}; there are "
                f"{', '.join(there) or 'none'}"
            )
        return
    default = os.environ.get("JAXLIN_DATA")
    for name in names:
        if name not in (STDLIB, *KNOWN_TASKS) and not (default and has_task(Path(default), name)):
            raise InputError(_no_task("tasks", name, "others are files in a folder named by --data_dir"))


def _no_task(option: str, name: str, others: str) -> str:
    """Says that there is no such task, and which there are."""
    default = os.environ.get("JAXLIN_DATA")
    there = tasks_in(Path(default)) if default else []
    near = difflib.get_close_matches(name.lower(), [STDLIB, *there, *KNOWN_TASKS], n=3)
    local = f"in {default} (JAXLIN_DATA) {', '.join(there) or 'none'}" if default else "no folder (--data_dir FOLDER)"
    return (
        f"--{option} {name} is no task{' (near: ' + ', '.join(dict.fromkeys(near)) + ')' if near else ''}; there are "
        f"{STDLIB}; {local}; from the hub {', '.join(KNOWN_TASKS)}; {others}"
    )
