"""Going on with a run: which one, and whether it is the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlin.errors import InputError
from jaxlin.experiments import config_file
from jaxlin.experiments.run_arguments import CheckpointArguments, OutputArguments
from jaxlin.hashing import differences

LATEST = "latest"
_FREE = (
    *("save_steps", "save_total_limit", "metric_for_best_model", "profile", "quiet"),
    *("mesh", "coordinator_address", "num_processes", "per_device_train_batch_size", "gradient_checkpointing"),
)
"""Options that change nothing of what is computed; devices do to rounding, and the batch of a step is checked."""


def _run_of(path: Path) -> Path | None:
    """Returns the folder of the run that a path lies in, or is."""
    return next((folder for folder in (path, *path.absolute().parents) if (folder / "config.json").is_file()), None)


def run_to_resume(checkpoints: CheckpointArguments, output: OutputArguments) -> Path | None:
    """Returns the folder of the run to go on with, if there is one.

    Args:
        checkpoints: `resume_from_checkpoint` is the folder of a run, what lies in it, or `latest`: the run in the
            output folder, or a new one if there is none.
        output: Where the run is written.

    Raises:
        InputError: If options contradict each other, or there is no such run.
    """
    given = checkpoints.resume_from_checkpoint
    if given is None:
        return None
    if output.overwrite_output_dir:
        raise InputError("--resume_from_checkpoint and --overwrite_output_dir contradict each other")
    if given == LATEST:
        if output.output_dir is None:
            raise InputError("--resume_from_checkpoint latest needs the --output_dir to go on in")
        return output.output_dir if (output.output_dir / "config.json").is_file() else None
    folder = _run_of(Path(given).expanduser())
    if folder is None:
        raise InputError(f"--resume_from_checkpoint {given} is no run; expected the --output_dir of one, or latest")
    if output.output_dir is not None and output.output_dir.absolute() != folder.absolute():
        raise InputError(f"--resume_from_checkpoint {given} is not of the run in --output_dir {output.output_dir}")
    return folder


def options_of_resumed(words: Sequence[str]) -> Path | None:
    """Returns the file of options of the run that a command line goes on with, if it names one that is there."""
    given = config_file.find(words, "resume_from_checkpoint")
    if given == Path(LATEST):
        given = config_file.find(words, "output_dir")
    folder = None if given is None else _run_of(given.expanduser())
    file = None if folder is None else folder / config_file.NAME
    return file if file is not None and file.is_file() else None


def check_same(folder: Path, record: dict[str, Any], options: str, free: Sequence[str] = ()) -> str | None:
    """Compares a run with the one to go on with.

    Args:
        folder: Of the one that was begun.
        record: Of `record.resolved`, now.
        options: Of `record.options_file`, now.
        free: Options that may differ, beside those that may for every command.

    Returns:
        What else differs, such as versions, so that it can be said that results agree to rounding only.

    Raises:
        InputError: If options or data differ; names them, with both values.
    """
    try:
        was = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        was_options = yaml.safe_load((folder / config_file.NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"the configuration of the run in {folder} cannot be read: {error}") from error
    if was.get("command") != record["command"]:
        raise InputError(f"{folder} is of `jaxlin {was.get('command')}`; only the same command goes on with it")

    def what(values: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        named = {f"--{name}": value for name, value in values.items() if name not in {*_FREE, *free}}
        data = {f"hash of {name} data": value for name, value in run["tokenized_sha256"].items()}
        return named | data

    other = differences(what(was_options, was), what(yaml.safe_load(options), json.loads(json.dumps(record))))
    if other:
        raise InputError(f"the run in {folder} is another ({other}); go on with the same, or give another --output_dir")
    return differences(*({**run["versions"], "device": run["device"]} for run in (was, record))) or None


def check_resume(resume: bool, output: OutputArguments, name: str, what: str) -> None:
    """Checks `--resume` of a command that goes on by what it finds in its output folder.

    Args:
        resume: Whether it is given.
        output: Where the command writes.
        name: The command's.
        what: That it goes on with, in words.

    Raises:
        InputError: If there is no folder to go on in, it is of another command, or it is to be replaced.
    """
    if not resume:
        return
    if output.output_dir is None:
        raise InputError("--resume needs the --output_dir to go on in")
    if (record := output.output_dir / "config.json").exists():
        was = json.loads(record.read_text(encoding="utf-8")).get("command")
        if was != name:
            raise InputError(f"--output_dir {output.output_dir} is of `jaxlin {was}`; --resume goes on with {what}")
    if output.overwrite_output_dir:
        raise InputError("--resume and --overwrite_output_dir contradict each other")


def command(name: str, folder: Path) -> str:
    """Returns the command line that goes on with a run of a command that has checkpoints."""
    return f"jaxlin {name} --resume_from_checkpoint {shlex.quote(str(folder))}"


def resume_command(name: str, folder: Path) -> str:
    """Returns the command line that goes on with a run of a command that has `--resume`, with the same options."""
    file, output = (shlex.quote(str(path)) for path in (folder / config_file.NAME, folder))
    return f"jaxlin {name} --config {file} --output_dir {output} --resume"
