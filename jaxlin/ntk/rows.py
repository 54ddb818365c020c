"""What passes over a data set gave, chunk by chunk of examples: in memory, or in files that outlive the process."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

_INDICES = "examples"


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """CRC-32 of the arrays in the order of their names."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, value)
    return f"{value:08x}"


class Rows:
    """Arrays of every example, in chunks.

    Attributes:
        folder: Where the chunks are, a safetensors file each; `None`: in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        """Takes up what a folder already holds.

        Args:
            folder: For the chunks, or `None`.
        """
        self.folder = folder
        self._held: dict[int, dict[str, Any]] = {}
        self._examples: dict[int, np.ndarray] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.partial")):  # of a process that was killed
                file.unlink()
            for file in sorted(folder.glob("*.safetensors")):
                if (examples := _intact(file)) is None:
                    file.unlink()
                else:
                    self._examples[int(file.stem)] = examples

    def done(self, position: int) -> int:
        """Returns how many examples the chunk at a position holds; 0 where there is none."""
        return len(self._examples.get(position, ()))

    def put(self, position: int, examples: np.ndarray, arrays: Mapping[str, Any]) -> None:
        """Adds a chunk, whole or not at all.

        Args:
            position: That orders the chunks.
            examples: Which ones, ascending.
            arrays: By name, an example on the leading axis; one that is zero everywhere may be left out. Those on a
                device stay there, unless they go to files, and more than the examples may follow.
        """
        arrays = {
            name: value if self.folder is None and isinstance(value, jax.Array) else _storable(np.asarray(value))
            for name, value in arrays.items()
        }
        if self.folder is None:
            self._held[position] = dict(arrays)
        else:
            file = self._file(position)
            content = {**arrays, _INDICES: np.asarray(examples, np.int64)}
            # Not by save_file, whose errors do not say that the disk is full.
            file.with_suffix(".partial").write_bytes(save(content, metadata={"crc32": _checksum(content)}))
            os.replace(file.with_suffix(".partial"), file)
        self._examples[position] = np.asarray(examples)

    def chunks(
        self, names: tuple[str, ...], start: int, stop: int
    ) -> Iterator[tuple[np.ndarray, int, tuple[Any, ...]]]:
        """Yields examples of a chunk from `start` to `stop`, where they begin in it, its arrays if all are there."""
        for position in sorted(self._examples):
            examples = self._examples[position]
            first, last = np.searchsorted(examples, (start, stop)).tolist()
            if first < last and (arrays := self._arrays(position, names)):
                yield examples[first:last], first, arrays

    def read(self, names: tuple[str, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Yields the arrays of every example from `start` to `stop` that has all of them; from files, copies."""
        for examples, first, arrays in self.chunks(names, start, stop):
            on_host = jax.device_get(arrays)
            for i, example in enumerate(examples.tolist(), start=first):
                own = tuple(array[i] for array in on_host)
                # From files: a view would hold the whole chunk.
                yield example, own if self.folder is None else tuple(array.copy() for array in own)

    def stacked(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Returns an array of the examples from `start` to `stop`; `None` where it vanishes for all of them."""
        out: np.ndarray | None = None
        for i, (value,) in self.read((name,), start, stop):
            if out is None:
                out = np.zeros((stop - start, *value.shape), value.dtype)
            out[i - start] = value
        return out

    def _file(self, position: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{position:010d}.safetensors"

    def _arrays(self, position: int, names: tuple[str, ...]) -> tuple[Any, ...]:
        """Arrays of a chunk; none where one of them is not there."""
        if self.folder is None:
            held = self._held[position]
            return tuple(held[name] for name in names) if all(name in held for name in names) else ()
        with safe_open(self._file(position), framework="numpy") as file:
            there = set(file.keys())
            return tuple(file.get_tensor(name) for name in names) if there.issuperset(names) else ()


def _storable(value: np.ndarray) -> np.ndarray:
    """The array, or a wider one of the same numbers where NumPy itself has no such dtype (bfloat16)."""
    return np.ascontiguousarray(value if value.dtype.kind in "biuf" else value.astype(np.float32))


def _intact(file: Path) -> np.ndarray | None:
    """The examples of a chunk's file, or `None` where it is truncated or corrupt."""
    try:
        with safe_open(file, framework="numpy") as opened:
            content = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return content[_INDICES] if metadata.get("crc32") == _checksum(content) else None
