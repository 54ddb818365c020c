"""Meshes of devices, and what lies where on them: the same for one device, several, and several processes."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError


def make_mesh(axes: Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh whose axes are all `AxisType.Auto`.

    `jax.make_mesh` makes explicit axes unless told otherwise, on which Flax's `Embed` fails.

    Args:
        axes: Name to size; the product of the sizes is the number of devices. Default: one axis, `"data"`, of all.
        devices: The devices; default all, of every process.

    Returns:
        The mesh.

    Raises:
        InputError: If a size is not positive, or their product is not the number of devices.

    Example:
        >>> import jaxlin.mesh
        >>> dict(jaxlin.mesh.make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1]).shape)
        {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    axes = {"data": len(devices)} if axes is None else dict(axes)
    if any(size < 1 for size in axes.values()):
        raise InputError(f"sizes of a mesh's axes are {axes}; expected positive ones")
    if not axes or math.prod(axes.values()) != len(devices):
        raise InputError(
            f"a mesh of axes {axes} takes {math.prod(axes.values()) if axes else 'at least 1'} devices and "
            f"{len(devices)} were given; change the sizes, or name the devices to use by devices="
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def place(tree: PyTree, mesh: Mesh, axis: str | PartitionSpec | None = None) -> PyTree:
    """Puts arrays on the devices of a mesh.

    Args:
        tree: A pytree of arrays, the same in every process; float64 and int64 become 32 bits wide where x64 is off.
        mesh: The mesh.
        axis: Axis of the mesh that the leading axis of every array is split over, or how every array is split;
            `None`: every device has all of it, but what already lies on this mesh stays as it lies (parameters
            split over an axis for models).

    Returns:
        The tree of global arrays.
    """
    spec = axis if isinstance(axis, PartitionSpec) else PartitionSpec() if axis is None else PartitionSpec(axis)
    sharding = NamedSharding(mesh, spec)

    def put(leaf: Any) -> jax.Array:
        if axis is None and isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == mesh:
            return leaf
        if not mesh.is_multi_process or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return jax.device_put(leaf, sharding)  # from device to device, where it is on one
        value = np.asarray(leaf)
        value = value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)


def fetch(array: jax.Array) -> np.ndarray:
    """Returns a global array on the host of every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def everywhere(here: bool) -> bool:
    """Returns whether something holds in every process; each must ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def from_first(find: Callable[[], Any]) -> Any:
    """Calls a function in process 0, and returns what it found in every process.

    Args:
        find: Returns what JSON can hold.

    Returns:
        That; no process returns before process 0 has found it.

    Raises:
        InputError: In the other processes, where `find` raises anything; in process 0 that is raised itself.
    """
    if jax.process_count() == 1:
        return find()
    found: dict[str, Any] = {}
    failure: Exception | None = None
    if jax.process_index() == 0:
        try:
            found = {"value": find()}
        except Exception as error:  # whatever it is, the others must not wait for ever
            failure, found = error, {"error": str(error) if isinstance(error, InputError) else repr(error)}
    text = np.frombuffer(json.dumps(found).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.resize(text, size)  # where it is not that of process 0, of any content
    found = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))))
    if failure is not None:
        raise failure
    if "error" in found:
        raise InputError(found["error"])
    return found["value"]


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """Which examples of a data set go to which device.

    Attributes:
        data: The examples.
        chunk: How many of them a device computes at a time: batch t of `data.chunks(devices * chunk)`, split over the
            devices, is rows `t * chunk` to `(t + 1) * chunk` of each.
        examples: Index of the example in every row of every device, `[devices, rows]`; -1 for a filler.
    """

    data: Dataset
    chunk: int
    examples: np.ndarray

    @classmethod
    def of(cls, data: Dataset, devices: int, chunk: int) -> Share:
        """Splits every length bucket over the devices, so that short examples are computed at their length."""
        size, slots = devices * chunk, []
        for group in data.groups():
            for start in range(0, len(group), size):
                rows = np.full(size, -1)
                rows[: len(group) - start] = group[start : start + size]
                slots.append(rows.reshape(devices, chunk))
        return cls(data, chunk, np.concatenate(slots, axis=1))

    def filled(self, rows: int) -> Share:
        """Returns the same split with fillers up to a number of rows of every device."""
        more = rows - self.examples.shape[1]
        return dataclasses.replace(self, examples=np.pad(self.examples, ((0, 0), (0, more)), constant_values=-1))

    def on(self, device: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns which rows of a device hold an example, and which example that is."""
        rows = np.flatnonzero(self.examples[device] >= 0)
        return rows, self.examples[device, rows]
