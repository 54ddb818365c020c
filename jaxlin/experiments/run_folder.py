"""The folder that a run writes: logs while it goes, results at its end."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxlin.errors import InputError
from jaxlin.experiments import config_file


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: Any) -> None:
    """Writes JSON at once or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def write_csv(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal keys as CSV; `None` is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)


_FILES = (
    "all_results.json",
    "table.csv",
    "history.csv",
    "by_criterion.csv",
    "linearization.csv",
    "measurements.csv",
    "spectrum.csv",
    "adapter_config.json",
    "report.html",
    "log.jsonl",
    "run.log",
)
"""Files that a run may have left."""

_FOLDERS = ("tensorboard", "figures", "profile", "checkpoints", "parts", "kernel.zarr", "kernel_eval.zarr")
"""Folders, likewise."""


class RunFolder:
    """Output folder of one run, with its per-step log.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path, overwrite: bool, resume: bool = False) -> None:
        """Checks the folder; nothing is made before `open`.

        Args:
            path: Folder.
            overwrite: Whether a run in it may be replaced.
            resume: Whether a run in it goes on.

        Raises:
            InputError: If it is no folder, cannot be written, or holds something and `overwrite` is false, or
                holds what is not a run.
        """
        self.path, self.resume = path, resume
        if path.exists() and not path.is_dir():
            raise InputError(f"--output_dir {path} is a file; expected a folder")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite and not resume:
                raise InputError(
                    f"--output_dir {path} is not empty; give another folder, or --overwrite_output_dir to replace a run"
                )
            if not (path / "config.json").exists():
                what = "nothing to go on with" if resume else "it is not overwritten"
                raise InputError(f"--output_dir {path} holds something that is not a run; {what}")
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        if not os.access(parent, os.W_OK):
            raise InputError(f"--output_dir {path} cannot be written: no permission in {parent}")

    def open(self, config: Mapping[str, Any], options: str) -> None:
        """Makes the folder (emptying an old run's, unless that goes on) and writes the configuration.

        Args:
            config: What was run, with versions and hashes, for `config.json`.
            options: The options alone, for `config.yaml`.

        Raises:
            InputError: If the folder cannot be made.
        """
        try:
            if not self.resume:
                for old in _FILES:
                    (self.path / old).unlink(missing_ok=True)
                for folder in _FOLDERS:
                    if (self.path / folder).is_dir():
                        shutil.rmtree(self.path / folder)
            (self.path / "figures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output_dir {self.path} cannot be made: {error.strerror}") from error
        write_json(self.path / "config.json", config)
        (self.path / config_file.NAME).write_text(options, encoding="utf-8")
        self._steps: TextIO | None = None
        self._lines = (self.path / "run.log").open("a", encoding="utf-8")
        self._boards: dict[str, Any] = {}

    def line(self, text: str) -> None:
        """Adds a line to `run.log`, with the time."""
        self._lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._lines.flush()

    def step(self, row: Mapping[str, Any]) -> None:
        """Adds a training row to `log.jsonl` and to the TensorBoard run of its arm and λ.

        A run that goes on gives the rows it has again, so that none is missing and none stands twice.
        """
        if self._steps is None:
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            self._steps = (self.path / "log.jsonl").open("w", encoding="utf-8")
        self._steps.write(json.dumps(_finite(row)) + "\n")
        self._steps.flush()
        share = row["lam_over_mu1"]
        run = f"{row['arm']}_lam_{row['lam']:.3g}" if share is None else f"{row['arm']}_lam_{share:.3g}_mu1"
        if run not in self._boards:
            from tensorboardX import SummaryWriter

            self._boards[run] = SummaryWriter(str(self.path / "tensorboard" / run))
        for name, value in row.items():
            if name not in ("arm", "lam", "lam_over_mu1", "step") and value is not None:
                self._boards[run].add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Closes the logs."""
        for board in self._boards.values():
            board.close()
        if self._steps is not None:
            self._steps.close()
        self._lines.close()


class SilentFolder(RunFolder):
    """The output folder as all processes but the first have it: they write nothing, and so check nothing."""

    def __init__(self, path: Path, overwrite: bool, resume: bool = False) -> None:
        self.path, self.resume = path, resume

    def open(self, config: Mapping[str, Any], options: str) -> None:
        """Makes nothing."""

    def line(self, text: str) -> None:
        """Writes nothing."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Closes nothing."""
