"""Kernels over many devices: the rows of J are split over them by example, and passed round in a ring.

Every device computes and keeps the rows of J of its own examples. A copy of another device's rows visits it, the
product of the two is a tile of the kernel, and the visitor goes on to the next device: after a round each device has
met all of J, and held no more of it than its own rows and two visitors (one is here while the next arrives). A kernel
of examples with themselves takes half a round: the tiles on one side of the diagonal are the others, transposed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.mesh import Share, fetch, place
from jaxlin.ntk.jacobian import MAX_CHUNK, MEMORY_BUDGET, num_outputs, outputs_and_jacobian, to_float64
from jaxlin.ntk.on_device import summed_gram
from jaxlin.ntk.work import PASSES, TILES, PhaseProgress
from jaxlin.tunable import Batch, Blocks, Tunable, leaf_paths


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The devices, and what the columns of J on them are.

    Attributes:
        mesh: The devices.
        axis: Axis of the mesh that examples are split over.
        order: Leaves of theta by position, those of one block together.
        widths: Number of parameters of every block.
        diagonal: Whether only products of rows of equal index are wanted.
    """

    mesh: Mesh
    axis: str
    order: tuple[int, ...]
    widths: tuple[int, ...]
    diagonal: bool

    @property
    def size(self) -> int:
        """Number of devices round it."""
        return self.mesh.shape[self.axis]

    @property
    def split(self) -> PartitionSpec:
        """Of an array whose leading axis is split over the devices."""
        return PartitionSpec(self.axis)

    def map(self, local: Callable, in_specs: tuple[PartitionSpec, ...], out_specs: PyTree) -> Callable:
        """Returns `shard_map` over the ring's axis; other axes, such as one for models, are left to the compiler."""
        # Unchecked: under the check, a pullback to weights that every device has is summed over the devices.
        options: dict[str, Any] = {"axis_names": {self.axis}, "check_vma": False}
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, **options)


@functools.partial(jax.jit, static_argnames=("ring",), donate_argnames=("rows",))
def _fill(
    rows: Float[Array, "N k P"], start: Array, batch: Batch, weights: tuple[Callable, PyTree, Array], *, ring: _Ring
) -> Float[Array, "N k P"]:
    """Writes `seeds @ J` of a batch into every device's rows from `start`; `weights` are apply, theta and seeds."""

    def local(rows: Array, start: Array, batch: Batch, weights: tuple[Callable, PyTree, Array]) -> Array:
        apply, theta, seeds = weights
        leaves = jax.tree.leaves(outputs_and_jacobian(apply, theta, batch, seeds)[1])
        flat = [leaves[i].reshape(*leaves[i].shape[:2], -1).astype(rows.dtype) for i in ring.order]
        return jax.lax.dynamic_update_slice_in_dim(rows, jnp.concatenate(flat, axis=2), start, axis=0)

    specs = (ring.split, PartitionSpec(), ring.split, PartitionSpec())
    return ring.map(local, specs, ring.split)(rows, start, batch, weights)


@functools.partial(jax.jit, static_argnames=("ring", "passes"))
def _meet(
    rows: Float[Array, "N1 k P"], visitor: Float[Array, "N2 k P"], *, ring: _Ring, passes: bool
) -> tuple[Float[Array, "blocks N1 n2 ..."], Float[Array, "N2 k P"] | None]:
    """Returns the tiles of all devices and, in one program so that it takes no time of its own, passes visitors on."""

    def local(rows: Array, visitor: Array) -> tuple[Array, Array | None]:
        starts = np.cumsum((0, *ring.widths[:-1])).tolist()
        tiles = [
            summed_gram(rows, visitor, diagonal=ring.diagonal, start=start, width=width)
            for start, width in zip(starts, ring.widths, strict=True)
        ]
        onwards = [(i, (i + 1) % ring.size) for i in range(ring.size)]
        return jnp.stack(tiles), jax.lax.ppermute(visitor, ring.axis, onwards) if passes else None

    out_specs = (PartitionSpec(None, ring.axis), ring.split)
    return ring.map(local, (ring.split, ring.split), out_specs)(rows, visitor)


def ring_parts(
    tun: Tunable,
    data1: Dataset,
    data2: Dataset | None,
    theta: PyTree | None,
    blocks: Blocks,
    *,
    mesh: Mesh,
    seeds: Float[np.ndarray, "k C"],
    axis: str = "data",
    diagonal: bool = False,
    dtype: str | None = None,
    precision: str = "highest",
    memory_budget: int = MEMORY_BUDGET,
    progress: PhaseProgress | None = None,
) -> dict[str, Float[np.ndarray, "N1 N2 ..."]]:
    """Computes block kernels `G1 G2ᵀ` of `G = seeds @ J` (theory 0), unnormalised, over the devices of a mesh.

    One forward and k backward passes an example, on the device that keeps its rows. Every process calls this with the
    same arguments and gets the same result.

    Args:
        tun: The model. Weights that already lie on `mesh` stay as they lie; others are copied to every device.
        data1: Examples of the rows.
        data2: Examples of the columns; `None`: `data1`, and the result is exactly symmetric.
        theta: Where; default `tun.theta0`.
        blocks: Block name to the paths of its leaves.
        mesh: The devices (`jaxlin.mesh.make_mesh`).
        seeds: Output cotangents that are pulled back; the identity for J itself.
        axis: Axis of the mesh that the examples are split over.
        diagonal: Only products of rows of equal index in `seeds`.
        dtype: `"float64"` computes everything in float64; `None` keeps the parameters' dtypes for the network. Products
            of rows of J are summed in float64 in either case.
        precision: Of the network's matrix products.
        memory_budget: Bytes on one device for rows of J and tiles of the kernel.
        progress: Called with phase, units done and in all, after each chunk of examples (those of `data1` first) and
            each step of the round.

    Returns:
        Block name to its kernel `[N1, N2, k, k]` (`[N1, N2, k]` with `diagonal`), float64, on the host.

    Raises:
        InputError: If the mesh has no such axis, the seeds do not fit the outputs, or the budget is too small.
    """
    if axis not in mesh.shape:
        raise InputError(f"axis={axis!r} is not one of the mesh's, which are {dict(mesh.shape)}")
    data = [data1] if data2 is None else [data1, data2]
    for one in data:
        tun.check_batch(one.columns)
    k, c = len(seeds), num_outputs(tun, data1)
    if seeds.shape != (k, c):
        raise InputError(f"seeds have shape {seeds.shape}; expected [k, C] with C = {c} outputs")
    apply, theta = tun.apply, tun.theta0 if theta is None else theta
    if dtype == "float64":
        apply, theta = to_float64((apply, theta))
    paths, sizes = leaf_paths(theta), [math.prod(leaf.shape) for leaf in jax.tree.leaves(theta)]
    members = [[paths.index(path) for path in block] for block in blocks.values()]
    widths = tuple(sum(sizes[i] for i in block) for block in members)
    ring = _Ring(mesh, axis, tuple(i for block in members for i in block), widths, diagonal)
    with (
        jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")),
        jax.default_matmul_precision(precision),
    ):
        row_dtype = jnp.result_type(*jax.tree.leaves(theta))
        shares = _shares(ring, data, k, k * sum(widths) * row_dtype.itemsize, memory_budget)
        weights, total, done, rows = place((apply, theta, seeds), mesh), sum(map(len, data)), 0, []
        for share in shares:
            shape = (share.examples.size, k, sum(widths))
            rows.append(jnp.zeros(shape, row_dtype, device=NamedSharding(mesh, ring.split)))
            for slot, (indices, batch) in enumerate(share.data.chunks(ring.size * share.chunk)):
                start = place(np.int32(slot * share.chunk), mesh)
                rows[-1] = _fill(rows[-1], start, place(batch, mesh, axis), weights, ring=ring)
                done += len(indices)
                if progress is not None:
                    rows[-1].block_until_ready()  # what was only queued is not done
                    progress(PASSES, done, total)
    shape = (len(data[0]), len(data[-1]), *((k,) if diagonal else (k, k)))
    parts = {name: np.zeros(shape) for name in blocks}
    _round(ring, rows, shares, list(parts.values()), progress)
    return parts


def _shares(ring: _Ring, data: list[Dataset], k: int, row_bytes: int, memory_budget: int) -> list[Share]:
    """Splits the data sets over the devices, unless what one must hold is over the budget."""
    chunk = max(min(memory_budget // 16 // row_bytes, MAX_CHUNK), 1)
    shares = [Share.of(one, ring.size, chunk) for one in data]
    n1, n2 = (share.examples.shape[1] for share in (shares[0], shares[-1]))
    visitors = min(ring.size if len(data) > 1 else ring.size // 2, 2)
    tiles = 8 * len(ring.widths) * n1 * n2 * k * (1 if ring.diagonal else k)
    if ring.mesh.is_multi_process:
        tiles *= 1 + ring.size  # every process fetches all of them, for which each of its devices holds them
    needed = (n1 + visitors * n2) * row_bytes + tiles
    if needed > memory_budget:
        raise InputError(
            f"each of {ring.size} devices has to hold {n1} + {visitors} × {n2} examples' rows of the Jacobian (of "
            f"{sum(ring.widths):,} parameters) and tiles of the kernel, {needed / 2**30:.3g} GiB, more than "
            f"memory_budget={memory_budget / 2**30:.3g} GiB; use fewer examples or more devices, tune less, or raise "
            "the budget"
        )
    return shares


def _round(
    ring: _Ring, rows: list[Array], shares: list[Share], parts: list[np.ndarray], progress: PhaseProgress | None
) -> None:
    """Sends the last of `rows` round the ring and writes the tiles into `parts` as they come."""
    symmetric, visitor = len(rows) == 1, rows.pop()
    own = visitor if symmetric else rows.pop()  # popped, so that a visitor is freed when it has gone on
    mirrored = (1, 0, 2) if ring.diagonal else (1, 0, 3, 2)
    steps = ring.size // 2 + 1 if symmetric else ring.size
    for step in range(steps):
        with jax.enable_x64(True):
            tiles, visitor = _meet(own, visitor, ring=ring, passes=step + 1 < steps)
        met = fetch(tiles)
        for device in range(ring.size):
            rows1, examples1 = shares[0].on(device)
            rows2, examples2 = shares[-1].on((device - step) % ring.size)
            rows1 += device * shares[0].examples.shape[1]
            for part, tile in zip(parts, met[:, rows1][:, :, rows2], strict=True):
                if symmetric and step == 0:
                    tile = (tile + tile.transpose(mirrored)) / 2
                part[np.ix_(examples1, examples2)] = tile
                if symmetric:
                    part[np.ix_(examples2, examples1)] = tile.transpose(mirrored)
        if progress is not None:
            progress(TILES, (step + 1) * ring.size, steps * ring.size)
