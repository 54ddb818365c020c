"""Checkpoints of a sweep: each run's in a folder of its own, beside a record of what the sweep is."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxlin.errors import InputError
from jaxlin.hashing import differences
from jaxlin.training.checkpoint import Checkpoints

NAME = "sweep.json"


class SweepCheckpoints:
    """Where the runs of a sweep are saved, and its grid of λ, which is that of its first process for ever."""

    def __init__(self, config: Checkpoints, sweep: Mapping[str, Any], resume: bool) -> None:
        """Looks at the folder; nothing is written before `grid`.

        Args:
            config: Where and when; its folder is the sweep's.
            sweep: What the sweep is, as JSON holds it.
            resume: Whether it may be there already.

        Raises:
            InputError: If it is and may not, is another one, or the folder holds something else.
        """
        self._config, self._sweep, self._path = config, dict(sweep), Path(config.folder)
        self._lams: list[float] | None = None
        if not (self._path / NAME).exists():
            if self._path.is_file() or (self._path.is_dir() and any(self._path.iterdir())):
                raise InputError(f"{self._path} holds something that is no sweep; give another folder for checkpoints")
            return
        if not resume:
            raise InputError(f"{self._path} holds a sweep already; go on with resume=True, or give another folder")
        try:
            record = json.loads((self._path / NAME).read_text())
            was, self._lams = record["sweep"], record["lams"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{self._path / NAME} cannot be read: {error}; give another folder") from error
        other = differences(was, self._sweep)
        if other:
            raise InputError(
                f"{self._path} is of another sweep ({other}); resume with the same, or give another folder"
            )

    def grid(self, lams: Sequence[float]) -> list[float]:
        """Returns the λ of the sweep: those that it began with, or these, which are recorded."""
        if self._lams is None:
            self._lams = list(lams)
            if jax.process_index() == 0:
                self._path.mkdir(parents=True, exist_ok=True)
                partial = self._path.with_name(f".{self._path.name}.{NAME}.partial")
                partial.write_text(json.dumps({"sweep": self._sweep, "lams": self._lams}, indent=2))
                os.replace(partial, self._path / NAME)
        return self._lams

    def run(self, index: int, arm: str, inputs: Mapping[str, str]) -> Checkpoints:
        """Returns where one run is saved.

        Args:
            index: Of its λ in the grid.
            arm: Its name.
            inputs: What it is of.
        """
        folder = self._path / f"lam_{index}" / arm
        return dataclasses.replace(self._config, folder=folder, inputs={"arm": arm, **inputs})
