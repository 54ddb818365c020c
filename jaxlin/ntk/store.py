"""Kernels on disk: a Zarr group that any Zarr reader opens, which grows tile by tile and survives being killed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import filelock
import numpy as np
from jaxtyping import Float

from jaxlin.errors import NO_SPACE, InputError
from jaxlin.hashing import differences
from jaxlin.ntk.kernel import Kernel, KernelInfo
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import Plan
from jaxlin.tunable import Blocks

if TYPE_CHECKING:
    import zarr

_FORMAT = 1
_ARRAY, _ATTRIBUTE = "blocks", "jaxlin"
ROWS = "rows"
"""Name of a store's folder of what the passes gave, until the kernel is complete."""

_DIMENSIONS = ("block", "example_1", "example_2", "output_1", "output_2")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Keeps other processes from a store while this one makes it or goes on with it.

    Raises:
        InputError: If another process is at it, or the disk is full.
        OSError: If the store cannot be written for another reason.
    """
    lock = path.absolute().with_name(f".{path.absolute().name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except filelock.Timeout as error:
        raise InputError(f"store {path} is being computed by another process; wait for it") from error
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise InputError(
            f"no space is left for the store {path}; what is done is kept: free some and go on (resume=True, --resume)"
        ) from error


class KernelStore:
    """Block kernels of one `ntk` call on disk.

    Attributes:
        path: Folder.
        group: The Zarr group; its array `blocks` is `[block, N1, N2, …]`, float64, NaN where not computed yet.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path, self.group = path, group

    @classmethod
    def create(
        cls,
        path: Path,
        inputs: Mapping[str, Any],
        blocks: Blocks,
        shape: Sequence[int],
        plan: Plan,
        *,
        symmetric: bool,
        of_two_sets: bool,
        note: str,
    ) -> KernelStore:
        """Makes a store, with its plan, before anything is computed.

        Args:
            path: Folder; it must not hold anything.
            inputs: What the kernel is of.
            blocks: Block name to leaf paths.
            shape: Of one block's kernel.
            plan: How it will be computed.
            symmetric: Whether it is.
            of_two_sets: Whether its rows and columns are of different examples.
            note: For its record.

        Returns:
            The store.

        Raises:
            InputError: If the folder holds something, or cannot be made.
            OSError: If the disk is full.
        """
        import zarr
        import zarr.codecs

        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise InputError(f"store {path} is there already; resume it (resume=True, --resume), or give another path")
        making = path.with_name(f".{path.name}.partial")  # so that a store is there whole or not at all
        shutil.rmtree(making, ignore_errors=True)
        try:
            group = zarr.open_group(making, mode="w-")
        except OSError as error:
            if error.errno in NO_SPACE:
                raise
            raise InputError(f"store {path} cannot be made: {error.strerror or error}") from error
        tile = (1, min(plan.row_block, shape[0]), min(plan.row_block, shape[1]), *shape[2:])
        group.create_array(
            _ARRAY,
            shape=(len(blocks), *shape),
            chunks=tile,
            dtype=np.float64,
            fill_value=np.nan,
            compressors=[zarr.codecs.Crc32cCodec()],
            dimension_names=_DIMENSIONS[: len(shape) + 1],
        )
        group.attrs[_ATTRIBUTE] = {
            "format": _FORMAT,
            "inputs": dict(inputs),
            "leaves": {name: list(paths) for name, paths in blocks.items()},
            "symmetric": symmetric,
            "of_two_sets": of_two_sets,
            "note": note,
            "plan": _as_json(plan),
            "epsilon_J": None,
        }
        os.replace(making, path)
        return cls(path, zarr.open_group(path, mode="r+"))

    @classmethod
    def open(cls, path: Path, mode: str = "r") -> KernelStore:
        """Opens a store.

        Args:
            path: Folder.
            mode: `"r"`, or `"r+"` to go on; then what a process that was killed left half-written is removed.

        Returns:
            The store.

        Raises:
            InputError: If there is none.
        """
        import zarr
        import zarr.errors

        try:
            group = zarr.open_group(path, mode=mode)  # type: ignore[arg-type]
            about = group.attrs[_ATTRIBUTE]
            known = about["format"] == _FORMAT and _ARRAY in group  # type: ignore[call-overload,index]
        except (OSError, KeyError, TypeError, ValueError, zarr.errors.BaseZarrError) as error:
            raise InputError(f"{path} holds no kernel of jaxlin: {error}") from error
        if not known:
            raise InputError(f"{path} holds a kernel of another version of jaxlin; compute it anew")
        if mode == "r+":
            for file in path.rglob("*.partial"):
                file.unlink()
        return cls(path, group)

    @property
    def about(self) -> dict[str, Any]:
        """Metadata: what the kernel is of, its blocks, its plan, ε_J where it is measured."""
        return cast(dict[str, Any], self.group.attrs[_ATTRIBUTE])

    @property
    def plan(self) -> Plan:
        """How it is computed."""
        return Plan.from_json(self.about["plan"])

    @property
    def array(self) -> Any:
        """The Zarr array `[block, N1, N2, …]`."""
        return self.group[_ARRAY]

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Compares what it was made with.

        Raises:
            InputError: If that is something else; says what.
        """
        other = differences(self.about["inputs"], inputs)
        if other:
            raise InputError(f"store {self.path} is of other inputs ({other}); give another path")

    def update(self, plan: Plan, epsilon: float | None) -> None:
        """Records the plan and the measured ε_J."""
        self.group.attrs[_ATTRIBUTE] = {**self.about, "plan": _as_json(plan), "epsilon_J": epsilon}

    def write(self, block: str, left: range, right: range, tile: np.ndarray) -> None:
        """Writes a tile; of a symmetric kernel, its mirror image first."""
        import zarr

        index = self._names.index(block)
        with zarr.config.set({"array.write_empty_chunks": True}):  # a tile of NaN is computed, too
            if self.about["symmetric"] and left != right:
                self.array[index, right.start : right.stop, left.start : left.stop] = transposed(tile)
            self.array[index, left.start : left.stop, right.start : right.stop] = tile

    def has(self, block: str, left: range, right: range) -> bool:
        """Whether a tile is there and intact, with its mirror image; what is corrupt is removed."""
        index, mirrored = self._names.index(block), self.about["symmetric"] and left != right
        there = self._intact(index, left, right)
        return (not mirrored or self._intact(index, right, left)) and there

    def _intact(self, index: int, left: range, right: range) -> bool:
        file = self._file(index, left.start, right.start)
        if not file.exists():
            return False
        try:
            self.array[index, left.start : left.stop, right.start : right.stop]
        except (ValueError, OSError):  # its checksum, or its size
            file.unlink()
            return False
        return True

    def is_complete(self, block: str) -> bool:
        """Whether every tile of a block is there."""
        _, n1, n2, *_ = self.array.shape
        _, rows, columns, *_ = self.array.chunks
        index = self._names.index(block)
        return all(self._file(index, i, j).exists() for i in range(0, n1, rows) for j in range(0, n2, columns))

    def is_finished(self) -> bool:
        """Whether every block is complete."""
        return all(self.is_complete(name) for name in self._names)

    @property
    def _names(self) -> list[str]:
        return list(self.about["leaves"])

    def _file(self, index: int, row: int, column: int) -> Path:
        _, rows, columns, *rest = self.array.chunks
        at = (index, row // rows, column // columns, *(0 for _ in rest))
        return self.path / _ARRAY / self.array.metadata.encode_chunk_key(at)

    def finish(self) -> None:
        """Removes what only the computation needed."""
        shutil.rmtree(self.path / ROWS, ignore_errors=True)

    def kernel(self) -> Kernel:
        """Returns the kernel, its blocks read when they are asked for."""
        about = self.about
        inputs = about["inputs"]
        leaves = {name: tuple(paths) for name, paths in about["leaves"].items()}
        engine, dtype, precision, device = (inputs[name] for name in ("engine", "dtype", "precision", "device"))
        note = "; ".join(filter(None, (about["note"], *self.plan.events)))
        info = KernelInfo(engine, dtype, "float64", precision, device, about["epsilon_J"], note)
        return Kernel(
            _StoredParts(self, list(leaves)),
            about["symmetric"],
            info,
            leaves,
            kind=inputs["kind"],
            of_two_sets=about["of_two_sets"],
        )


@dataclasses.dataclass(frozen=True)
class _StoredParts(Mapping[str, np.ndarray]):
    """Block kernels, read from the store each time."""

    store: KernelStore
    names: list[str]

    def __getitem__(self, name: str) -> Float[np.ndarray, "N1 N2 ..."]:
        """Returns one block.

        Raises:
            InputError: If it is corrupt, or not there yet.
            KeyError: If there is none of that name.
        """
        if name not in self.names:
            raise KeyError(name)
        if not self.store.is_complete(name):
            raise InputError(f"block {name!r} of the store {self.store.path} is not complete; resume=True goes on")
        try:
            block = np.asarray(self.store.array[self.names.index(name)])
        except (ValueError, OSError) as error:
            raise InputError(
                f"block {name!r} of the store {self.store.path} is corrupt: {error}; resume=True computes it again"
            ) from error
        return block

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _as_json(plan: Plan) -> dict[str, Any]:
    return {**dataclasses.asdict(plan), "events": list(plan.events)}


def load_kernel(path: str | Path) -> Kernel:
    """Opens a kernel that `ntk(store=...)` or `jaxlin ntk` wrote, also while it is being written.

    Args:
        path: The store's folder.

    Returns:
        The kernel; a block is read when it is asked for, and must be complete then.

    Raises:
        InputError: If there is no store, or (when a block is read) it is corrupt or not complete.
    """
    return KernelStore.open(Path(path)).kernel()
