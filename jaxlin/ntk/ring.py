"""Kernels over many devices: what J is made of is split over them by example, and passed round in a ring.

Every device computes and keeps what the passes give for its own examples: rows of J, or of large weights the
activations and cotangents that those are products of (`factored`). A copy of another device's visits it, the product of
the two is a tile of the kernel, and the visitor goes on to the next device: after a round each device has met all of J,
and held no more of it than its own share and two visitors (one is here while the next arrives). A symmetric kernel
of examples with themselves takes half a round: the tiles on one side of the diagonal are the others, transposed.
Where that does not fit the devices, or the kernel is stored tile by tile, the examples are cut into parts, and a round
is of one part's share and another's.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import shutil
import time
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import NO_SPACE, DeviceMemoryError, InputError, halved, is_out_of_memory
from jaxlin.mesh import Share, everywhere, fetch, place
from jaxlin.ntk.factored import Site, derivatives_and_factors, summed_in
from jaxlin.ntk.jacobian import at_a_time, outputs_and_jacobian
from jaxlin.ntk.kinds import Kind, signs, thresholds
from jaxlin.ntk.on_device import COPIED_COLUMNS, over_slabs, rows_of_a_slab, slab_of_columns, slab_of_words, summed_gram
from jaxlin.ntk.rows import Rows
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import (
    PASSES,
    SMALLEST_SLAB,
    TILES,
    Cost,
    PhaseProgress,
    Plan,
    Timed,
    Work,
    free_bytes,
    halves,
)
from jaxlin.tunable import Batch, leaf_paths

_ENOUGH_ROWS = 16
"""Examples of a part on each device with which rounds are worth their while."""

_SLABS = 32
"""The budget is this many times what derivatives with respect to a large leaf may take that are formed at a time."""

_Part = tuple[int, range]
"""Which of the data sets, and which of its examples."""

_Held = dict[str, Array]
"""What the passes gave for the examples of all devices, by name, an example on the leading axis."""

_Weights = tuple[Callable, PyTree, Array]
"""The model as a function, theta, and the output cotangents that are pulled back."""


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf of theta with a derivative.

    Attributes:
        path: Of the leaf.
        size: Number of its entries.
        site: Of a large leaf: the module whose input and cotangents are kept in place of its derivative.
    """

    path: str
    size: int
    site: Site | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of what the passes give for it."""
        return (self.path,) if self.site is None else self.site.names

    def rows_at_a_time(self, slab_bytes: int, one: int) -> int:
        """How many rows of a large leaf derivatives are formed with respect to; `one`: bytes of those for an entry."""
        assert self.site is not None
        width = self.site.outputs[-1]
        return rows_of_a_slab(self.size // width, slab_bytes, one * width)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The devices, and what they compute.

    Attributes:
        mesh: The devices.
        axis: Axis of the mesh that examples are split over.
        blocks: Leaves of every block; of the factored engine without those whose derivative is zero.
        sites: Modules with tuned parameters, of the factored engine.
        kind: Of kernel.
        k: Rows of J an example.
        dtype: That J is computed in.
    """

    mesh: Mesh
    axis: str
    blocks: tuple[tuple[_Leaf, ...], ...]
    sites: tuple[Site, ...]
    kind: Kind
    k: int
    dtype: np.dtype

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

    def given(self, weights: _Weights, batch: Batch) -> _Held:
        """What one pass gives: derivatives `[B, k, size]`, and what modules with large leaves read and got back."""
        apply, theta, seeds = weights
        if self.sites:
            count, together = len(batch["weight"]), at_a_time(batch)
            together = count if count % together else together
            found = derivatives_and_factors(apply, theta, batch, seeds, self.sites, count, together)
        else:
            leaves = jax.tree.leaves(outputs_and_jacobian(apply, theta, batch, seeds)[1])
            rows = [leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves]
            found = dict(zip(leaf_paths(theta), rows, strict=True))
        return {name: found[name] for block in self.blocks for leaf in block for name in leaf.names}

    def tile(self, leaves: Sequence[_Leaf], sides: Sequence[_Held], slab_bytes: int) -> Float[Array, "n1 n2 ..."]:
        """Products of derivatives with respect to some leaves, or of their signs, in float64; within a `jit`."""
        shape = [len(next(iter(held.values()))) for held in sides]
        total = jnp.zeros((*shape, *((self.k,) if self.kind.diagonal else (self.k, self.k))), jnp.float64)
        for leaf in leaves:
            held = [tuple(side[name] for name in leaf.names) for side in sides]
            if leaf.site is None:
                rows = [self._entering(part, right, jnp.abs(part).max(axis=-1)) for right, (part,) in enumerate(held)]
                total += summed_gram(*rows, diagonal=self.kind.diagonal)
            else:
                total = self._add_large(total, leaf, held, slab_bytes)
        return total

    def _add_large(
        self, total: Array, leaf: _Leaf, held: Sequence[tuple[Array, ...]], slab_bytes: int
    ) -> Float[Array, "n1 n2 ..."]:
        """Adds the product with respect to a leaf whose derivatives are formed some of its rows at a time."""
        assert leaf.site is not None
        dtype = summed_in(self.dtype)
        form = slab_of_columns if leaf.site.factored == "kernel" else slab_of_words
        count = leaf.size // leaf.site.outputs[-1]
        examples = sum(len(delta) for _, delta in held)
        width = leaf.rows_at_a_time(slab_bytes, examples * self.k * np.dtype(dtype).itemsize)
        largest: list[Array] = [jnp.zeros((len(delta), self.k), dtype) for _, delta in held]
        for right, signed in enumerate(self.kind.signs):  # what counts as 0 depends on a row's largest entry

            def widen(start: Any, rows: int, found: Array, side: tuple[Array, ...] = held[right]) -> Array:
                return jnp.maximum(found, jnp.abs(form(*side, start, rows, dtype)).max(axis=-1))

            if signed:
                largest[right] = over_slabs(count, width, widen, largest[right])

        def add(start: Any, rows: int, found: Array) -> Array:
            formed = [form(*side, start, rows, dtype) for side in held]
            entering = [self._entering(part, right, largest[right]) for right, part in enumerate(formed)]
            return found + summed_gram(*entering, diagonal=self.kind.diagonal, at_a_time=formed[0].shape[-1])

        return over_slabs(count, width, add, total)

    def _entering(self, rows: Array, right: int, largest: Array) -> Array:
        """The rows on the left or on the right, or their signs."""
        return signs(rows, thresholds(largest, self.dtype)) if self.kind.signs[right] else rows


@functools.partial(jax.jit, static_argnames=("ring",), donate_argnames=("held",))
def _fill(held: _Held, start: Array, batch: Batch, weights: _Weights, *, ring: _Ring) -> _Held:
    """Writes what a pass gives for a batch into what every device holds, from example `start` of it."""

    def local(held: _Held, start: Array, batch: Batch, weights: _Weights) -> _Held:
        found = ring.given(weights, batch)

        def write(into: Array, new: Array) -> Array:  # a shorter text than the longest leaves zeros
            at = (start, *[jnp.zeros_like(start)] * (new.ndim - 1))
            return jax.lax.dynamic_update_slice(into, new.astype(into.dtype), at)

        return {name: write(into, found[name]) for name, into in held.items()}

    specs = (ring.split, PartitionSpec(), ring.split, PartitionSpec())
    written = ring.map(local, specs, ring.split)(held, start, batch, weights)
    # By examples only, whatever other axes weights are split over.
    return jax.lax.with_sharding_constraint(written, NamedSharding(ring.mesh, ring.split))


@functools.partial(jax.jit, static_argnames=("ring", "passes", "slab_bytes"))
def _meet(
    held: _Held, visitor: _Held, *, ring: _Ring, passes: bool, slab_bytes: int
) -> tuple[Float[Array, "blocks N1 n2 ..."], _Held | None]:
    """Returns the tiles of all devices and, in one program so that it takes no time of its own, passes visitors on."""

    def local(held: _Held, visitor: _Held) -> tuple[Array, _Held | None]:
        tiles = [ring.tile(leaves, (held, visitor), slab_bytes) for leaves in ring.blocks]
        onwards = [(i, (i + 1) % ring.size) for i in range(ring.size)]
        return jnp.stack(tiles), jax.lax.ppermute(visitor, ring.axis, onwards) if passes else None

    out_specs = (PartitionSpec(None, ring.axis), ring.split)
    return ring.map(local, (ring.split, ring.split), out_specs)(held, visitor)


@dataclasses.dataclass(frozen=True, eq=False)
class RingWork(Work):
    """One kernel to be computed by the devices of a mesh, all of them together at every tile.

    One forward and k backward passes an example, on the device that keeps what they give. Every process of the mesh
    calls `run` with the same arguments and is given the same tiles. Weights that already lie on the mesh stay as they
    lie; others are copied to every device.

    Attributes:
        mesh: The devices (`jaxlin.mesh.make_mesh`); examples are split over its first axis.
    """

    mesh: Mesh

    @classmethod
    def over(cls, mesh: Mesh, work: Work) -> RingWork:
        """Returns the work as that of a mesh; the budget is of each device.

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

    @property
    def _in_parts(self) -> bool:
        """False: a pass's examples need not be a power of two."""
        return False

    @property
    def _outputs(self) -> tuple[int, ...]:
        """Shape of the products of two examples' rows of J."""
        return (self.k,) if self.kind.diagonal else (self.k, self.k)

    @functools.cached_property
    def _ring(self) -> _Ring:
        blocks = tuple(
            tuple(
                _Leaf(path, self._sizes[path], self._large.get(path))
                for path in paths
                if path in self._sizes and not (self.kind.of_signs and self.kind.without_sign(path))
            )
            for paths in self.blocks.values()
        )
        return _Ring(self.mesh, self.mesh.axis_names[0], blocks, self.sites, self.kind, self.k, self._dtype)

    @functools.cached_property
    def _leaves(self) -> list[_Leaf]:
        return [leaf for block in self._ring.blocks for leaf in block]

    @functools.cached_property
    def types(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of what a pass gives for one example, at the greatest length of either data set."""
        types: dict[str, jax.ShapeDtypeStruct] = {}
        for data in self._both():
            batch = data.batch(np.array([0 if data.lengths is None else np.argmax(data.lengths)]), 1)
            given = (*self._function, self.kind.seeds(self.c), batch)
            with self.precisely():
                found = jax.eval_shape(lambda *given: self._ring.given(given[:3], given[3]), *given)
            for name, value in found.items():
                other = types[name].shape if name in types else value.shape[1:]
                shape = np.maximum(value.shape[1:], other).tolist()
                types[name] = jax.ShapeDtypeStruct(tuple(shape), value.dtype)
        return types

    def estimate(self, stored: bool) -> Cost:
        """Times one pass of all devices for each length and one meeting of what they hold, and reckons the whole."""
        plan = self.plan()
        pairs, shares, weights, ring = self.pairs(plan), self._shares(plan), self._weights(), self._ring
        timed: dict[tuple[Any, ...], Timed] = {}
        passes, held = 0.0, self._empty(next(iter(shares.values())))
        for part in self._computed(plan, pairs, stored):
            for _, batch in shares[part].data.chunks(ring.size * plan.chunk):
                shapes = tuple(value.shape for value in batch.values())
                if shapes not in timed:
                    timed[shapes], held = self._timed_pass(held, batch, weights)
                passes += timed[shapes].seconds
        meeting = self._timed_meeting(held, plan)
        kernel = self._kernel_bytes()
        return Cost(
            self.engine,
            plan,
            passes + meeting.seconds * sum(self._steps(len(self._meeting(*pair))) for pair in pairs),
            passes,
            sum(each.compile_seconds for each in (*timed.values(), meeting)),
            self._needed(plan),
            self.disk_bytes(plan) if stored else 0,
            kernel,
            self.devices,
        )

    def _timed_pass(self, held: _Held, batch: Batch, weights: _Weights) -> tuple[Timed, _Held]:
        """Time of a pass over a batch; and what is held, which it takes over."""
        times = [time.perf_counter()]
        for _ in range(2):
            held = self._filled(held, 0, batch, weights)
            times.append(time.perf_counter())
        return Timed.of_two(*times), held

    def _timed_meeting(self, held: _Held, plan: Plan) -> Timed:
        """Time of one step of a round, with its tiles' way to the host."""
        times = [time.perf_counter()]
        for _ in range(2):
            fetch(self._met(held, held, self.devices > 1, plan)[0])
            times.append(time.perf_counter())
        return Timed.of_two(*times)

    def plan(self) -> Plan:
        """Returns the largest tiles with which what a device holds, and a tile on the host, fit the budget.

        What the passes give stays on the devices if all of it fits beside tiles that are not too small; else that of a
        tile's columns is computed anew, or read from the store's files, for each tile.

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
            f"each of {size} devices has to hold {self._row_bytes:,} bytes for each of its examples (the Jacobian of "
            f"{sum(leaf.size for leaf in self._leaves):,} parameters, or what it is made of), derivatives that are "
            f"formed, and a tile of the kernel: at least {needed:,} bytes, more than memory_budget="
            f"{self.memory_budget:,}; tune less, or raise the budget"
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
        most = max(min(self.memory_budget // 16 // max(self._row_bytes, 1), self._most_examples()), 1)
        # Larger chunks would hold fillers.
        chunk = min(most, math.ceil(block / (lengths * self._ring.size)))
        return Plan(chunk, block, self.memory_budget // _SLABS if self._large else 0, spilled)

    @functools.cached_property
    def _row_bytes(self) -> int:
        """Of what the passes give for an example, on its device."""
        return sum(math.prod(value.shape) * value.dtype.itemsize for value in self.types.values())

    def _example_bytes(self) -> int:
        return self._row_bytes

    def _needed(self, plan: Plan) -> int:
        """Bytes on one device: what the passes gave, its own and visitors', tiles, what is formed; or on the host."""
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
        if one_tile:  # what goes round is freed where it began
            held = 1 + min(size // 2 if self._mirrored else size, 2)
        else:
            held = 1 + min(size, 2) if plan.spilled else count + min(size - 1, 2)
        one = 8 * self.k * (1 if self.kind.diagonal else self.k)  # of a pair of examples
        tile, whole = len(self.blocks) * rows**2 * one, len(self.blocks) * plan.row_block**2 * one
        # Every process fetches all of a tile, for which each of its devices holds that.
        tiles = tile * (1 + size if self.several_processes else 1)
        return max(
            held * rows * self._row_bytes + tiles + max(self._formed(plan, rows), 2 * plan.chunk * self._row_bytes),
            (whole + 2 * whole // size) // max(1, len(self.mesh.local_devices)),  # as a device's share of the host's
        )

    def _formed(self, plan: Plan, rows: int) -> int:
        """Bytes of what is made of both sides' derivatives at a time: copies in float64, and what is formed of them."""
        # What is left of each small leaf beyond whole parts lies there together.
        small = [leaf.size for leaf in self._leaves if leaf.site is None]
        columns = min(sum(size % COPIED_COLUMNS for size in small) + COPIED_COLUMNS, sum(small))
        in_float64 = 2 * 8 * rows * self.k * columns
        if self.kind.of_signs:  # of a whole leaf, and where it is not zero
            in_float64 += 2 * (self._dtype.itemsize + 1) * rows * self.k * max(small, default=0)
        item, largest = np.dtype(summed_in(self._dtype)).itemsize, 0
        for leaf in self._leaves:
            if leaf.site is not None:
                one = 2 * rows * self.k
                width = leaf.rows_at_a_time(plan.slab_bytes, one * item) * leaf.site.outputs[-1]
                # Formed, its signs or their absolute values, in float64; factors in the order of the product.
                formed = one * width * (item * (3 if self.kind.of_signs else 1) + 8)
                largest = max(largest, formed + 2 * rows * leaf.site.numbers(self.k) * item)
        return max(in_float64, largest)

    def _meeting(self, left: range, right: range) -> tuple[_Part, ...]:
        """The parts that meet in a tile: one where it meets itself."""
        return tuple(dict.fromkeys(((0, left), (len(self._both()) - 1, right))))

    def parts(self, plan: Plan) -> list[_Part]:
        """Returns all parts of the examples."""
        return [(number, examples) for number, side in enumerate(self.sides(plan)) for examples in side]

    def _shares(self, plan: Plan, parts: Sequence[_Part] | None = None) -> dict[_Part, Share]:
        """Splits parts, all by default, over the devices, with as many rows for each: programs are compiled once."""
        shares = {}
        for number, examples in self.parts(plan) if parts is None else parts:
            data, some = self._both()[number], slice(examples.start, examples.stop)
            columns = {name: value[some] for name, value in data.columns.items()}
            lengths = None if data.lengths is None else data.lengths[some]
            part = Dataset(columns, lengths, data.buckets)  # an example's length is that of the whole
            shares[number, examples] = Share.of(part, self._ring.size, plan.chunk)
        rows = max(share.examples.shape[1] for share in shares.values())
        return {part: share.filled(rows) for part, share in shares.items()}

    def check_disk(self, folder: Path, *, stored: bool) -> None:
        """Refuses a kernel that does not fit; what the passes give is kept in files only where those fit beside it."""
        self._check_room(folder, self._kernel_bytes() if stored else 0, "the kernel takes")

    def disk_bytes(self, plan: Plan) -> int:
        """Returns what a store takes while it is computed: the kernel, and what the passes give, fillers included."""
        examples = sum(share.examples.size for share in self._shares(plan).values())
        item = {name: max(4, value.dtype.itemsize) for name, value in self.types.items()}  # of bfloat16 float32
        return self._kernel_bytes() + examples * sum(
            math.prod(value.shape) * item[name] for name, value in self.types.items()
        )

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
        """Computes the tiles that are wanted; arguments and result are those of `Work.run`."""
        if epsilon is None and check_examples and not self._is_split:
            epsilon, measured = self._measure(check_examples, plan, lambda *_: None)
            plan = plan if self.several_processes else measured  # of several all go by the same
            changed(plan, epsilon)
        pairs = self.pairs(plan)
        todo = [pair for pair in pairs if any(wanted(block, *pair) for block in self.blocks)]
        if not todo or not self._leaves:  # such as key biases alone, of signs
            for block, left, right in ((block, *pair) for block in self.blocks for pair in todo):
                write(block, left, right, self.kind.finish(np.zeros((len(left), len(right), *self._outputs))))
            return epsilon
        steps = {pair: self._steps(len(self._meeting(*pair))) for pair in pairs}
        computed = self._computed(plan, todo, folder is not None)
        totals = {PASSES: sum(len(examples) for _, examples in computed), TILES: sum(steps.values())}
        done = {PASSES: 0, TILES: totals[TILES] - sum(steps[pair] for pair in todo)}
        most = dict(totals)

        def report(phase: str, count: int) -> None:
            done[phase] = min(done[phase] + count, most[phase])  # what is done a second time counts once
            if progress is not None:
                progress(phase, done[phase], totals[phase])

        files = None if folder is None else _Files.of(self, folder, plan)
        weights = self._weights()
        uses = collections.Counter(part for pair in todo for part in self._meeting(*pair))
        shares = self._shares(plan)
        held: dict[_Part, _Held] = {}
        for pair in todo:
            meeting = self._meeting(*pair)
            uses.subtract(meeting)
            most[TILES] = done[TILES] + steps[pair]
            while True:
                if plan.spilled:
                    held = {part: given for part, given in held.items() if part == meeting[0]}
                given, computing = [], True
                try:
                    for part in meeting:
                        given.append(held.get(part) or self._given(part, shares[part], weights, files, report))
                        if uses[part] and not (plan.spilled and part != meeting[0]):
                            held[part] = given[-1]
                        else:
                            held.pop(part, None)
                    computing = False
                    found = self._round(given, [shares[part] for part in meeting], plan, report)
                    break
                except jax.errors.JaxRuntimeError as error:
                    smaller = self._smaller(plan, computing, held.keys() - set(meeting), error)
                    if smaller is None and not self._can_be_halved(*pair):
                        raise self._explained(error, plan) from error
                given.clear()
                if smaller is None:
                    held.clear()
                    found, plan = self._from_parts(*pair, plan, weights)
                    changed(plan, epsilon)
                    break
                if smaller.chunk != plan.chunk:  # examples stand elsewhere
                    held.clear()
                    shares = self._shares(smaller)
                    files = None if folder is None else _Files.of(self, folder, smaller)
                changed(plan := smaller, epsilon)
            if done[TILES] < most[TILES]:
                report(TILES, most[TILES])
            for block, tile in zip(self.blocks, found, strict=True):
                if wanted(block, *pair):
                    write(block, *pair, self.kind.finish(tile))
        if done[PASSES] < totals[PASSES]:  # of parts that were computed in parts
            report(PASSES, totals[PASSES])
        return epsilon

    def _smaller(
        self, plan: Plan, computing: bool, beside: Set[_Part], error: jax.errors.JaxRuntimeError
    ) -> Plan | None:
        """Finds how to go on where a device's memory ran out.

        Args:
            plan: As it was.
            computing: Whether a pass was running, rather than a product.
            beside: Parts that are held though not of the tile at hand.
            error: What the device said.

        Returns:
            The plan; `None` where only smaller parts are left to try.

        Raises:
            DeviceMemoryError: If there are several processes: the others have not stopped, and wait.
            jax.errors.JaxRuntimeError: If it is another error.
        """
        if not is_out_of_memory(error):
            raise error
        if self.several_processes:
            raise self._explained(error, plan) from error
        if beside and (computing or plan.slab_bytes <= SMALLEST_SLAB):
            event = "out of memory on a device: from then on it holds what the passes give of one tile's examples only"
            return plan.after(event, spilled=True)
        if computing and plan.chunk > 1:
            chunk, event = halved(plan.chunk, "a pass of {} examples a device", error)
            return plan.after(event, chunk=chunk)
        if not computing and plan.slab_bytes > SMALLEST_SLAB:
            return plan.with_half_slabs()
        return None

    def _explained(self, error: Exception, plan: Plan) -> DeviceMemoryError:
        """Says what to do where a device's memory runs out, and this process cannot go on with less."""
        with_what = "of one example on each: tune less, shorten the texts, or take devices with more memory"
        if self.several_processes:
            with_what = (
                f"with passes of {plan.chunk} examples on each and tiles of {plan.row_block}: lower memory_budget="
                f"{self.memory_budget:,} (a store keeps the plan that it was made with: take a new one), or take more "
                "devices"
            )
        said = str(error).splitlines()[0]
        return DeviceMemoryError(f"out of memory on a device of the mesh, {with_what}. The device said: {said}")

    def _can_be_halved(self, left: range, right: range) -> bool:
        """Whether half of a part leaves fewer examples on a device."""
        return max(len(left), len(right)) > self.devices

    def _from_parts(
        self, left: range, right: range, plan: Plan, weights: _Weights
    ) -> tuple[list[Float[np.ndarray, "n1 n2 ..."]], Plan]:
        """A tile of every block from those of the halves of its examples, each computed with nothing else held."""
        plan = plan.in_parts(left, right)
        tiles = [np.zeros((len(left), len(right), *self._outputs)) for _ in self.blocks]
        mirrored = self._mirrored and left == right
        for some in halves(left):
            for others in halves(right):
                if mirrored and others.start < some.start:
                    continue
                found, plan = self._apart(some, others, plan, weights)
                rows, columns = (slice(p.start - w.start, p.stop - w.start) for p, w in ((some, left), (others, right)))
                for tile, part in zip(tiles, found, strict=True):
                    tile[rows, columns] = part
                    if mirrored and others != some:
                        tile[columns, rows] = transposed(part)
        return tiles, plan

    def _apart(
        self, left: range, right: range, plan: Plan, weights: _Weights
    ) -> tuple[list[Float[np.ndarray, "n1 n2 ..."]], Plan]:
        """A tile of every block, computed with nothing else held."""
        meeting = self._meeting(left, right)
        cut = dataclasses.replace(plan, chunk=min(plan.chunk, math.ceil(max(len(left), len(right)) / self.devices)))
        try:
            shares = self._shares(cut, meeting)
            given = [self._given(part, shares[part], weights, None, lambda *_: None) for part in meeting]
            return self._round(given, [shares[part] for part in meeting], cut, lambda *_: None), plan
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not self._can_be_halved(left, right):
                raise self._explained(error, plan) from error
        return self._from_parts(left, right, plan, weights)

    def _computed(self, plan: Plan, pairs: Sequence[tuple[range, range]], stored: bool) -> list[_Part]:
        """The parts that go through the passes, as often as they do, for tiles of these examples."""
        if plan.spilled and not stored:  # columns for every tile, unless they are its rows
            columns = [part for pair in pairs for part in self._meeting(*pair)[1:]]
            return [*{(0, left) for left, _ in pairs}, *columns]
        return [*dict.fromkeys(part for pair in pairs for part in self._meeting(*pair))]

    def _weights(self) -> _Weights:
        """What `_fill` takes, on the devices."""
        with self.precisely():
            return place((*self._function, self.kind.seeds(self.c)), self.mesh)

    def agree(self, here: bool) -> bool:
        """Returns whether something holds in every process that takes part."""
        return everywhere(here) if self.several_processes else here

    @property
    def _is_split(self) -> bool:
        """Whether no process has all of the weights."""
        leaves = [leaf for leaf in jax.tree.leaves((self.tun.apply, self.theta)) if isinstance(leaf, jax.Array)]
        return any(not leaf.is_fully_addressable and not leaf.is_fully_replicated for leaf in leaves)

    def _given(
        self,
        part: _Part,
        share: Share,
        weights: _Weights,
        files: _Files | None,
        report: Callable[[str, int], None],
    ) -> _Held:
        """What the passes give for a part of the examples, on the devices: from files, or computed and kept there."""
        if files is not None and (held := files.get(part)) is not None:
            report(PASSES, len(part[1]))
            return held
        held = self._empty(share)
        for slot, (indices, batch) in enumerate(share.data.chunks(self.devices * share.chunk)):
            held = self._filled(held, slot * share.chunk, batch, weights)
            report(PASSES, len(indices))
        if files is not None:
            files.put(part, held)
        return held

    @property
    def sharding(self) -> NamedSharding:
        """Of what the passes give."""
        return NamedSharding(self.mesh, self._ring.split)

    def _empty(self, share: Share) -> _Held:
        """Place for what the passes give for a part, zeros still."""
        with self.precisely():
            return {
                name: jnp.zeros((share.examples.size, *value.shape), value.dtype, device=self.sharding)
                for name, value in self.types.items()
            }

    def _filled(self, held: _Held, start: int, batch: Batch, weights: _Weights) -> _Held:
        """What is held, which it takes over, with what a pass gives for a batch, from `start` of every device."""
        with self.precisely():
            batch = place(batch, self.mesh, self._ring.axis)
            held = _fill(held, place(np.int32(start), self.mesh), batch, weights, ring=self._ring)
            return jax.block_until_ready(held)  # what was only queued is not done

    def _met(self, held: _Held, visitor: _Held, passes: bool, plan: Plan) -> tuple[Array, Any]:
        """The tiles of all devices; and the visitors at the next ones, if they are passed on."""
        with jax.enable_x64(True):
            return _meet(held, visitor, ring=self._ring, passes=passes, slab_bytes=plan.slab_bytes)

    def _steps(self, parts: int) -> int:
        """Of a round in which one part or two meet."""
        return self._ring.size // 2 + 1 if parts == 1 and self._mirrored else self._ring.size

    def _round(
        self, given: list[_Held], shares: list[Share], plan: Plan, report: Callable[[str, int], None]
    ) -> list[Float[np.ndarray, "n1 n2 ..."]]:
        """Sends the last of what was `given` round the ring, and empties the list; returns a tile of every block."""
        ring, mirrored, visitor = self._ring, len(given) == 1 and self._mirrored, given.pop()
        own = given.pop() if given else visitor  # popped, so that a visitor may be freed when it has gone on
        tiles = [np.zeros((len(shares[0].data), len(shares[-1].data), *self._outputs)) for _ in self.blocks]
        steps = self._steps(len(shares))
        for step in range(steps):
            products, visitor = self._met(own, visitor, step + 1 < steps, plan)
            met = fetch(products)
            for device in range(ring.size):
                rows1, examples1 = shares[0].on(device)
                rows2, examples2 = shares[-1].on((device - step) % ring.size)
                rows1 = rows1 + device * shares[0].examples.shape[1]
                for tile, part in zip(tiles, met[:, rows1][:, :, rows2], strict=True):
                    if mirrored and step == 0:
                        part = (part + transposed(part)) / 2
                    tile[np.ix_(examples1, examples2)] = part
                    if mirrored:
                        tile[np.ix_(examples2, examples1)] = transposed(part)
            report(TILES, 1)
        return tiles


@dataclasses.dataclass(eq=False)
class _Files:
    """What the passes gave for the examples of this process's devices, in files that outlive the process.

    Attributes:
        work: That it is of.
        rows: Position of a device round the ring, to the files of what it holds.
        numbers: Part of the examples to the position of its file.
    """

    work: RingWork
    rows: dict[int, Rows]
    numbers: dict[_Part, int]

    @classmethod
    def of(cls, work: RingWork, folder: Path, plan: Plan) -> _Files | None:
        """Takes up what is there; `None` where a disk has no room for all of it beside the kernel."""
        here, own = jax.process_index(), folder / f"{plan.chunk} at a time"
        room = work.agree(work.disk_bytes(plan) <= free_bytes(folder.parent)[0])
        if here == 0 or not work.several_processes:
            for other in folder.glob("*"):
                if other != own or not room:
                    shutil.rmtree(other, ignore_errors=True)
        if not room:
            return None
        rows = {
            position: Rows(own / f"process {here}, device {position}")
            for position, devices in enumerate(work.mesh.devices.reshape(work.devices, -1))
            if any(device.process_index == here for device in devices)
        }
        return cls(work, rows, {part: i for i, part in enumerate(work.parts(plan))})

    def get(self, part: _Part) -> _Held | None:
        """Returns what is there of a part, on the devices, if every process has its own."""
        number = self.numbers[part]
        counts = [rows.done(number) for rows in self.rows.values()]
        if not self.work.agree(all(counts)):
            return None

        def of_all(name: str, of_one: jax.ShapeDtypeStruct) -> Array:
            def of_device(index: Any) -> np.ndarray:
                rows = self.rows[(index[0].start or 0) // counts[0]]
                return rows.arrays(number, (name,))[0].astype(of_one.dtype)

            shape = (counts[0] * self.work.devices, *of_one.shape)
            return jax.make_array_from_callback(shape, self.work.sharding, of_device)

        with self.work.precisely():
            return {name: of_all(name, of_one) for name, of_one in self.work.types.items()}

    def put(self, part: _Part, held: _Held) -> None:
        """Keeps a part; where the disk is full after all, it goes without."""
        for position, rows in self.rows.items():
            own = {}
            for name, value in held.items():
                count = len(value) // self.work.devices
                shards = {(shard.index[0].start or 0) // count: shard.data for shard in value.addressable_shards}
                own[name] = shards[position]
            try:
                rows.put(self.numbers[part], np.arange(count), own, at_once=True)
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                return
