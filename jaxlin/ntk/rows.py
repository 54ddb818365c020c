"""What passes over a data set gave, chunk by chunk of examples: in memory, or in files that outlive the process."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_INDICES = "examples"


@functools.cache
def _writer() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="jaxlin-files")


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

    def __init__(self, folder: Path | None, *, lasting: bool = True) -> None:
        """Takes up what a folder already holds.

        Args:
            folder: For the chunks, or `None`.
            lasting: Whether another process may take the files up, which they then hold a checksum for.
        """
        self.folder, self._lasting = folder, lasting
        self._writing: Future[None] | None = None
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

    def put(self, position: int, examples: np.ndarray, arrays: Mapping[str, Any], *, at_once: bool = False) -> None:
        """Adds a chunk, whole or not at all; to files while the next is computed.

        Args:
            position: That orders the chunks.
            examples: Which ones, ascending.
            arrays: By name, an example on the leading axis; one that is zero everywhere may be left out. Those on a
                device stay there, unless they go to files, and more than the examples may follow.
            at_once: Whether a file is written before this returns; then a failure is of this chunk alone.
        """
        arrays = {
            name: value if self.folder is None and isinstance(value, jax.Array) else _storable(np.asarray(value))
            for name, value in arrays.items()
        }
        examples = np.asarray(examples)
        if self.folder is None:
            self._held[position] = dict(arrays)
            self._examples[position] = examples
        elif at_once:
            self._write(position, examples, arrays)
        else:
            self.wait()
            self._writing = _writer().submit(self._write, position, examples, arrays)

    def wait(self) -> None:
        """Waits until what was put is in its file; raises, from then on, what kept it from that."""
        if self._writing is not None:
            self._writing.result()

    def settle(self) -> None:
        """Waits until nothing is being written, whether or not that went well."""
        if self._writing is not None:
            wait([self._writing])

    def _write(self, position: int, examples: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        file = self._file(position)
        content = {**arrays, _INDICES: examples.astype(np.int64)}
        partial = file.with_suffix(".partial")
        try:
            save_file(content, partial, metadata={"crc32": _checksum(content)} if self._lasting else None)
            os.replace(partial, file)
        except SafetensorError as error:  # says what the system said in words only
            if number := re.search(r"(?:os error|code:) (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(partial)) from error
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._examples[position] = examples

    def chunks(
        self, names: tuple[str, ...], start: int, stop: int
    ) -> Iterator[tuple[np.ndarray, int, tuple[Any, ...]]]:
        """Yields examples of a chunk from `start` to `stop`, where they begin in it, its arrays if all are there."""
        for position, first, last in self._between(start, stop):
            if arrays := self.arrays(position, names):
                yield self._examples[position][first:last], first, arrays

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Chunks with examples from `start` to `stop`, and where those begin and end in them."""
        self.wait()
        for position in sorted(self._examples):
            first, last = np.searchsorted(self._examples[position], (start, stop)).tolist()
            if first < last:
                yield position, first, last

    def read(self, names: tuple[str, ...], start: int, stop: int) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Yields the arrays of every example from `start` to `stop` that has all of them."""
        for position, first, last in self._between(start, stop):
            on_host = jax.device_get(self.arrays(position, names, slice(first, last)))
            for i, example in enumerate(self._examples[position][first:last].tolist() if on_host else ()):
                yield example, tuple(array[i] for array in on_host)

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

    def arrays(self, position: int, names: tuple[str, ...], some: slice = slice(None)) -> tuple[Any, ...]:
        """Arrays of some of a chunk's examples; none where one of them is not there."""
        if self.folder is None:
            held = self._held[position]
            return tuple(held[name][some] for name in names) if all(name in held for name in names) else ()
        with safe_open(self._file(position), framework="numpy") as file:
            there = set(file.keys())
            return tuple(file.get_slice(name)[some] for name in names) if there.issuperset(names) else ()


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
