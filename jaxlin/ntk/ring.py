"""Kernels over many devices: the rows of J are split over them by example, and passed round in a ring.

Every device computes and keeps the rows of J of its own examples. A copy of another device's rows visits it, the
product of the two is a tile of the kernel, and the visitor goes on to the next device: after a round each device has
met all of J, and held no more of it than its own rows and two visitors (one is here while the next arrives). A kernel
of examples with themselves takes half a round: the tiles on one side of the diagonal are the others, transposed.
Where that does not fit the devices, or the kernel is stored tile by tile, the examples are cut into parts, and a round
is of one part's rows and another's.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import DeviceMemoryError, InputError
from jaxlin.mesh import Share, fetch, place
from jaxlin.ntk.jacobian import MAX_CHUNK, outputs_and_jacobian
from jaxlin.ntk.on_device import COPIED_COLUMNS, summed_gram
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import PASSES, TILES, Cost, PhaseProgress, Plan, Work, is_out_of_memory
from jaxlin.tunable import Batch, leaf_paths

_ENOUGH_ROWS = 16
"""Examples of a part on each device with which rounds are worth their while."""

_Part = tuple[int, range]
"""Which of the data sets, and which of its examples."""


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


@dataclasses.dataclass(frozen=True, eq=False)
class RingWork(Work):
    """One kernel to be computed by the devices of a mesh, all of them together at every tile.

    One forward and k backward passes an example, on the device that keeps its rows of J. Every process of the mesh
    calls `run` with the same arguments and is given the same tiles. Weights that already lie on the mesh stay as they
    lie; others are copied to every device.

    Attributes:
        mesh: The devices (`jaxlin.mesh.make_mesh`); examples are split over its first axis.
    """

    mesh: Mesh

    @classmethod
    def over(cls, mesh: Mesh, work: Work) -> RingWork:
        """Returns work of the Jacobian engine as that of a mesh; the budget is of each device.

        Raises:
            InputError: If it is to be in float64, with weights of which no process has all.
        """
        made = cls(**{field.name: getattr(work, field.name) for field in dataclasses.fields(Work)}, mesh=mesh)
        if made.dtype == "float64" and made._is_split:
            raise InputError('dtype="float64" needs weights that every process has; these are split over several')
        return made

    @property
    def devices(self) -> int:
        """Number of them round the ring."""
        return self._ring.size

    @property
    def several_processes(self) -> bool:
        """Whether other processes take part."""
        return self.mesh.is_multi_process

    @functools.cached_property
    def _ring(self) -> _Ring:
        paths, sizes = leaf_paths(self.theta), [math.prod(leaf.shape) for leaf in jax.tree.leaves(self.theta)]
        members = [[paths.index(path) for path in block] for block in self.blocks.values()]
        widths = tuple(sum(sizes[i] for i in block) for block in members)
        order = tuple(i for block in members for i in block)
        return _Ring(self.mesh, self.mesh.axis_names[0], order, widths, self.kind.diagonal)

    def _given_bytes(self, chunk: int = 1) -> int:
        """Of files: what the passes give is on the devices only."""
        return 0

    def estimate(self, stored: bool) -> Cost:
        """Times one pass of all devices for each length and one meeting of their rows, and reckons the whole."""
        plan = self.plan()
        pairs, shares, weights, ring = self.pairs(plan), self._shares(plan), self._weights(), self._ring
        seconds: dict[tuple[Any, ...], float] = {}
        passes, rows = 0.0, self._empty(next(iter(shares.values())))
        for part in self._computed(plan, pairs):
            for _, batch in shares[part].data.chunks(ring.size * plan.chunk):
                shapes = tuple(value.shape for value in batch.values())
                if shapes not in seconds:
                    seconds[shapes], rows = self._seconds_of_a_pass(rows, batch, weights)
                passes += seconds[shapes]
        meeting = self._seconds_of_a_meeting(rows)
        kernel = self._kernel_bytes()
        return Cost(
            self.engine,
            plan,
            passes + meeting * sum(self._steps(len(self._meeting(*pair))) for pair in pairs),
            passes,
            self._needed(plan),
            kernel if stored else 0,
            kernel,
            self.devices,
        )

    def _seconds_of_a_pass(
        self, rows: Array, batch: Batch, weights: tuple[Callable, PyTree, Array]
    ) -> tuple[float, Array]:
        """Time of a pass over a batch, once compiled; and the rows, which it takes over."""
        for _ in range(2):
            begin = time.perf_counter()
            rows = self._filled(rows, 0, batch, weights)
        return time.perf_counter() - begin, rows

    def _seconds_of_a_meeting(self, rows: Array) -> float:
        """Time of one step of a round, with its tiles' way to the host, once compiled."""
        for _ in range(2):
            begin = time.perf_counter()
            fetch(self._met(rows, rows, self.devices > 1)[0])
        return time.perf_counter() - begin

    def plan(self) -> Plan:
        """Returns the largest tiles with which what a device holds, and a tile on the host, fit the budget.

        All rows of J stay on the devices if they fit beside tiles that are not too small; else those of a tile's
        columns are computed anew for each tile.

        Raises:
            InputError: If not even tiles of one example fit.
        """
        longest, size = max(map(len, self._both())), self._ring.size
        kept, anew = self._largest(spilled=False), self._largest(spilled=True)
        if kept is not None and (anew is None or kept.row_block >= min(anew.row_block, _ENOUGH_ROWS * size, longest)):
            return kept
        if anew is not None:
            return anew
        needed = self._needed(self._cut(1, True))
        raise InputError(
            f"each of {size} devices has to hold rows of the Jacobian (of {sum(self._ring.widths):,} parameters) and a "
            f"tile of the kernel, at least {needed:,} bytes, more than memory_budget={self.memory_budget:,}; tune "
            "less, or raise the budget"
        )

    def _largest(self, spilled: bool) -> Plan | None:
        """The plan of the largest tiles that fit, if any do."""
        longest, parts, block = max(map(len, self._both())), 1, 0
        while block != 1:
            block = math.ceil(longest / parts)
            if self._needed(plan := self._cut(block, spilled)) <= self.memory_budget:
                return plan
            parts += max(1, parts // 8)
        return None

    def _cut(self, block: int, spilled: bool) -> Plan:
        """The plan with tiles of so many examples a side."""
        lengths = max(1, *(len(data.buckets) for data in self._both()))
        most = max(min(self.memory_budget // 16 // self._row_bytes, MAX_CHUNK), 1)
        # Larger chunks would hold fillers.
        return Plan(min(most, math.ceil(block / (lengths * self._ring.size))), block, 0, spilled)

    @functools.cached_property
    def _row_bytes(self) -> int:
        """Of the rows of J of an example."""
        return self.k * sum(self._ring.widths) * self._dtype.itemsize

    def _needed(self, plan: Plan) -> int:
        """Bytes on one device: rows of J, its own and visitors', what computes them, a tile; or on the host, a tile."""
        size, sides, rows = self._ring.size, self.sides(plan), 0
        for data, parts in zip(self._both(), sides, strict=True):
            group = np.zeros(len(data), int)
            for number, examples in enumerate(data.groups()):
                group[examples] = number
            for part in parts:
                lengths = np.bincount(group[part.start : part.stop])
                rows = max(rows, plan.chunk * int(np.sum(-(-lengths // (size * plan.chunk)))))
        count = sum(map(len, sides))
        one_tile = count == len(sides)
        if one_tile:  # rows that go round are freed where they began
            held = 1 + min(size if self.data2 is not None else size // 2, 2)
        else:
            held = 1 + min(size, 2) if plan.spilled else count + min(size - 1, 2)
        one = 8 * self.k * (1 if self.kind.diagonal else self.k)  # of a pair of examples
        tile, whole = len(self._ring.widths) * rows**2 * one, len(self._ring.widths) * plan.row_block**2 * one
        # Every process fetches all of a tile, for which each of its devices holds that.
        tiles = tile * (1 + size if self.several_processes else 1)
        # Of both sides; what is left of each block beyond whole parts lies there together.
        columns = sum(width % COPIED_COLUMNS for width in self._ring.widths) + COPIED_COLUMNS
        in_float64 = 16 * rows * self.k * min(columns, sum(self._ring.widths))
        return max(
            held * rows * self._row_bytes + tiles + max(in_float64, 2 * plan.chunk * self._row_bytes),
            (whole + 2 * whole // size) // max(1, len(self.mesh.local_devices)),  # as a device's share of the host's
        )

    def _meeting(self, left: range, right: range) -> tuple[_Part, ...]:
        """The parts whose rows of J meet in a tile: one where it meets itself."""
        return tuple(dict.fromkeys(((0, left), (len(self._both()) - 1, right))))

    def _shares(self, plan: Plan) -> dict[_Part, Share]:
        """Splits every part over the devices, with as many rows for each part: programs are compiled once."""
        shares = {}
        for number, (data, sides) in enumerate(zip(self._both(), self.sides(plan), strict=True)):
            for examples in sides:
                some = slice(examples.start, examples.stop)
                columns = {name: value[some] for name, value in data.columns.items()}
                lengths = None if data.lengths is None else data.lengths[some]
                part = Dataset(columns, lengths, data.buckets)  # an example's length is that of the whole
                shares[number, examples] = Share.of(part, self._ring.size, plan.chunk)
        rows = max(share.examples.shape[1] for share in shares.values())
        return {part: share.filled(rows) for part, share in shares.items()}

    def run(
        self,
        plan: Plan,
        write: Callable[[str, range, range, np.ndarray], None],
        *,
        wanted: Callable[[str, range, range], bool],
        folder: Path | None,
        check_examples: int,
        epsilon: float | None,
        changed: Callable[[Plan, float | None], None],
        progress: PhaseProgress | None,
    ) -> float | None:
        """Computes the tiles that are wanted; arguments and result are those of `Work.run`, but no folder is used."""
        if epsilon is None and check_examples and not self._is_split:
            epsilon, _ = self._measure(check_examples, plan, lambda *_: None)
            changed(plan, epsilon)
        pairs = self.pairs(plan)
        todo = [pair for pair in pairs if any(wanted(block, *pair) for block in self.blocks)]
        if not todo:
            return epsilon
        shares = self._shares(plan)
        uses = collections.Counter(part for pair in todo for part in self._meeting(*pair))
        computed = self._computed(plan, todo)
        steps = [sum(self._steps(len(self._meeting(*pair))) for pair in some) for some in (pairs, todo)]
        totals = {PASSES: sum(len(examples) for _, examples in computed), TILES: steps[0]}
        done = {PASSES: 0, TILES: steps[0] - steps[1]}

        def report(phase: str, count: int) -> None:
            done[phase] += count
            if progress is not None:
                progress(phase, done[phase], totals[phase])

        weights = self._weights()
        held: dict[_Part, Array] = {}

        def rows_of(part: _Part, last: bool) -> Array:
            rows = held[part] if part in held else self._rows(shares[part], weights, functools.partial(report, PASSES))
            if last:
                held.pop(part, None)
            else:
                held[part] = rows
            return rows

        with self._explained(plan):
            if not plan.spilled:
                for part in uses:
                    rows_of(part, last=False)
            for pair in todo:
                meeting = self._meeting(*pair)
                uses.subtract(meeting)
                if plan.spilled:
                    held = {part: rows for part, rows in held.items() if part == meeting[0]}
                last = [uses[part] == 0 or (plan.spilled and part != meeting[0]) for part in meeting]
                rows = [rows_of(*given) for given in zip(meeting, last, strict=True)]
                found = self._round(rows, [shares[part] for part in meeting], functools.partial(report, TILES))
                for block, tile in zip(self.blocks, found, strict=True):
                    if wanted(block, *pair):
                        write(block, *pair, self.kind.finish(tile))
        return epsilon

    @contextlib.contextmanager
    def _explained(self, plan: Plan) -> Iterator[None]:
        """Says what to do where a device's memory runs out: all of them together cannot go on with other parts.

        Raises:
            DeviceMemoryError: If it does.
            jax.errors.JaxRuntimeError: Any other error of a device, as it came.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                f"out of memory on a device of the mesh, with passes of {plan.chunk} examples on each and tiles of "
                f"{plan.row_block}: lower memory_budget={self.memory_budget:,} (a store keeps the plan that it was "
                f"made with: take a new one), or take more devices. The device said: {str(error).splitlines()[0]}"
            ) from error

    def _computed(self, plan: Plan, pairs: Sequence[tuple[range, range]]) -> list[_Part]:
        """The parts whose rows of J are computed, as often as they are, for tiles of these examples."""
        if plan.spilled:  # columns for every tile, unless they are its rows
            columns = [part for pair in pairs for part in self._meeting(*pair)[1:]]
            return [*{(0, left) for left, _ in pairs}, *columns]
        return [*dict.fromkeys(part for pair in pairs for part in self._meeting(*pair))]

    def _weights(self) -> tuple[Callable, PyTree, Array]:
        """What `_fill` takes, on the devices."""
        with self._precisely():
            return place((*self._function, self.kind.seeds(self.c)), self.mesh)

    @property
    def _is_split(self) -> bool:
        """Whether no process has all of the weights."""
        leaves = [leaf for leaf in jax.tree.leaves((self.tun.apply, self.theta)) if isinstance(leaf, jax.Array)]
        return any(not leaf.is_fully_addressable and not leaf.is_fully_replicated for leaf in leaves)

    def _rows(
        self, share: Share, weights: tuple[Callable, PyTree, Array], report: Callable[[int], None]
    ) -> Float[Array, "N k P"]:
        """Rows of J of a part of the examples, on the devices; `weights` as `_fill` takes them."""
        rows = self._empty(share)
        for slot, (indices, batch) in enumerate(share.data.chunks(self.devices * share.chunk)):
            rows = self._filled(rows, slot * share.chunk, batch, weights)
            report(len(indices))
        return rows

    def _empty(self, share: Share) -> Float[Array, "N k P"]:
        """Rows of J of a part, zeros still."""
        shape = (share.examples.size, self.k, sum(self._ring.widths))
        with self._precisely():
            return jnp.zeros(shape, self._dtype, device=NamedSharding(self.mesh, self._ring.split))

    def _filled(
        self, rows: Float[Array, "N k P"], start: int, batch: Batch, weights: tuple[Callable, PyTree, Array]
    ) -> Float[Array, "N k P"]:
        """The rows, which it takes over, with those of a batch from `start` of every device."""
        with self._precisely():
            batch = place(batch, self.mesh, self._ring.axis)
            rows = _fill(rows, place(np.int32(start), self.mesh), batch, weights, ring=self._ring)
            return rows.block_until_ready()  # what was only queued is not done

    def _met(self, rows: Array, visitor: Array, passes: bool) -> tuple[Array, Any]:
        """The tiles of all devices; and the visitors at the next ones, if they are passed on."""
        with jax.enable_x64(True):
            return _meet(rows, visitor, ring=self._ring, passes=passes)

    def _steps(self, parts: int) -> int:
        """Of a round in which one part or two meet."""
        return self._ring.size if parts > 1 else self._ring.size // 2 + 1

    def _round(
        self, rows: list[Array], shares: list[Share], report: Callable[[int], None]
    ) -> list[Float[np.ndarray, "n1 n2 ..."]]:
        """Sends the last of `rows` round the ring; returns a tile of every block."""
        ring, symmetric, visitor = self._ring, len(rows) == 1, rows.pop()
        own = visitor if symmetric else rows.pop()  # popped, so that a visitor may be freed when it has gone on
        k = (self.k,) if ring.diagonal else (self.k, self.k)
        tiles = [np.zeros((len(shares[0].data), len(shares[-1].data), *k)) for _ in ring.widths]
        steps = self._steps(len(shares))
        for step in range(steps):
            products, visitor = self._met(own, visitor, step + 1 < steps)
            met = fetch(products)
            for device in range(ring.size):
                rows1, examples1 = shares[0].on(device)
                rows2, examples2 = shares[-1].on((device - step) % ring.size)
                rows1 = rows1 + device * shares[0].examples.shape[1]
                for tile, part in zip(tiles, met[:, rows1][:, :, rows2], strict=True):
                    if symmetric and step == 0:
                        part = (part + transposed(part)) / 2
                    tile[np.ix_(examples1, examples2)] = part
                    if symmetric:
                        tile[np.ix_(examples2, examples1)] = transposed(part)
            report(1)
        return tiles
