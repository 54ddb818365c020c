"""Tasks from data sets of the Hugging Face hub, by the `datasets` library."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxlin.data.columns import Columns, make_table_task
from jaxlin.data.known import KnownTask
from jaxlin.data.readers import Table
from jaxlin.data.task import Task
from jaxlin.errors import InputError


def load_hub_task(
    dataset: str,
    config: str | None = None,
    *,
    name: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    validation_split: str = "validation",
    columns: Columns | None = None,
    known: KnownTask | None = None,
) -> Task:
    """Builds a task from a data set of the hub, or of the hub's cache on this machine.

    The libraries' own settings hold: `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`. No code of a data set is
    ever run.

    Args:
        dataset: Its id, such as `"nyu-mll/glue"`.
        config: Its configuration; may be left out where there is one only.
        name: Of the task; `None`: made of the two above.
        revision: Branch, tag or commit; `None`: the newest.
        train_split: Name of the training split.
        validation_split: Name of the split to evaluate on.
        columns: Names of columns that are given.
        known: The known task that this is.

    Returns:
        The task; see `make_table_task` for columns and labels, and a `ClassLabel` column declares its classes.

    Raises:
        InputError: If there is no such data set, configuration, revision or split, the hub cannot be reached and the
            data are not in the cache, or as for `make_table_task`.
    """
    in_task_folder = name if known and known.config else None  # GLUE's files lie there as a task folder's do
    found = _load(dataset, config, revision, in_task_folder)
    where = f"data set {dataset}" + (f" ({config})" if config else "")
    for split, option in ((train_split, "--train_split_name"), (validation_split, "--validation_split_name")):
        if split not in found:
            raise InputError(f"{where} has no split {split!r}; it has {', '.join(found)}; name another by {option}")
    tables = [_table(found[split], f"{where}, split {split}") for split in (train_split, validation_split)]
    provenance = {"dataset": dataset, "config": config, "revision": revision or "main"}
    provenance |= {"train_split": train_split, "validation_split": validation_split}
    provenance |= {"commit": _commit(found)}
    name = name or "/".join(filter(None, (dataset, config)))
    return make_table_task(name, tables[0], tables[1], provenance, columns, known)


def _table(split: Any, source: str) -> Table:
    from datasets import ClassLabel, Value

    names = {column: tuple(kind.names) for column, kind in split.features.items() if isinstance(kind, ClassLabel)}
    columns = {
        column: split[column][:] for column, kind in split.features.items() if isinstance(kind, ClassLabel | Value)
    }
    return Table(source, columns, range(1, len(split) + 1), "row", names)


def _commit(found: Any) -> str | None:
    """The commit, which names the folder of the libraries' cache."""
    files = next(iter(found.values())).cache_files
    return Path(files[0]["filename"]).parent.name if files else None


def _load(dataset: str, config: str | None, revision: str | None, task: str | None) -> Any:
    """All splits of a data set, from the hub or, where that cannot be reached, from the cache."""
    if Path(dataset).exists():
        raise InputError(
            f"--dataset_name {dataset} is a local path; give its files as --train_file and --validation_file"
        )
    unreachable = None
    try:
        commit = _resolve(dataset, revision)
    except _UnreachableError as error:
        commit, unreachable = None, str(error)
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()  # what it warns of is said here
    with _offline(datasets.config) if unreachable else contextlib.nullcontext():
        try:
            found = datasets.load_dataset(dataset, config, revision=commit)
        except Exception as error:
            if unreachable:
                raise InputError(_how_to_get(dataset, config, task, unreachable)) from error
            raise InputError(_reason(error, dataset, config)) from error
    if unreachable and revision and not (_commit(found) or "").startswith(revision):
        raise InputError(
            f"data set {dataset} is in the cache at commit {_commit(found)}, which cannot be compared with "
            f"--dataset_revision {revision} since {unreachable}; give that commit, or leave the revision out"
        )
    return found


class _UnreachableError(Exception):
    """The hub does not answer; says why."""


def _resolve(dataset: str, revision: str | None) -> str:
    """Commit of a data set on the hub: one short question, where `datasets` would retry for minutes."""
    from huggingface_hub import HfApi, errors

    try:
        return str(HfApi().dataset_info(dataset, revision=revision, timeout=10).sha)
    except errors.HFValidationError as error:
        raise InputError(f"--dataset_name {dataset} is not a valid hub id, such as nyu-mll/glue: {error}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"data set {dataset} has no revision {revision!r}; name a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no data set {dataset!r} that can be read (misspelt, or private and HF_TOKEN is not set)"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise _UnreachableError("HF_HUB_OFFLINE is set") from error
    except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise _UnreachableError(f"{endpoint} cannot be reached ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def _offline(config: Any) -> Iterator[None]:
    """Has `datasets` look into its cache at once."""
    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _reason(error: Exception, dataset: str, config: str | None) -> str:
    """Says in one sentence why the hub's data set cannot be loaded, and what to do."""
    said = " ".join(str(error).split())[:400]
    if isinstance(error, ValueError) and "onfig" in said:
        what = f"has no configuration {config!r}" if config else "has several configurations"
        return f"data set {dataset} {what}; name one by --dataset_config_name ({said})"
    if "scripts are no longer supported" in said:
        return (
            f"data set {dataset} is a program, which is never run; --dataset_revision refs/convert/parquet may hold "
            "the hub's own copy as files"
        )
    if "gated" in said:
        return f"data set {dataset} is gated: ask for access at its page on the hub, then set HF_TOKEN ({said})"
    return f"data set {dataset} cannot be loaded: {type(error).__name__}: {said}"


def _how_to_get(dataset: str, config: str | None, task: str | None, unreachable: str) -> str:
    """Says in one sentence how to get a data set that is neither in the cache nor to be reached."""
    include = f" --include {shlex.quote(f'{config}/*')}" if config else ""
    then = f"--data_dir FOLDER --task_name {task}" if task else "its files as --train_file and --validation_file"
    what = f"data set {dataset} ({config})" if config else f"data set {dataset}"
    return (
        f"{what} is not in the hub's cache here, and {unreachable}; where there is a network run "
        f"`hf download {dataset} --repo-type dataset{include} --local-dir FOLDER`, then give {then}"
    )
