"""A kernel as work to be done: its plan under a memory budget, the passes over the data, the tiles."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, halved, is_out_of_memory
from jaxlin.ntk.factored import Site, columns, derivatives_and_factors, find_sites, summed_in
from jaxlin.ntk.jacobian import (
    MAX_CHUNK,
    EpsilonCheck,
    at_a_time,
    gram,
    gram_columns,
    gram_of_equal,
    num_outputs,
    outputs_and_jacobian,
    power_of_two,
    to_float64,
)
from jaxlin.ntk.kinds import Kind, signs, thresholds
from jaxlin.ntk.on_device import COPIED_NUMBERS, PINNED_BYTES, DeviceDerivatives, multiplies_on_device, on_its_way
from jaxlin.ntk.rows import Rows
from jaxlin.ntk.threads import num_threads
from jaxlin.ntk.tiles import Derivatives, multiply_adds, slab_width, transposed
from jaxlin.tunable import Batch, Blocks, Tunable, leaf_paths

PhaseProgress = Callable[[str, int, int], None]
"""Called with a phase's name, and units done and in all."""

PASSES, TILES = "Jacobians", "kernel tiles"
"""Phases of the work: examples, and tiles of the kernel."""

_SLAB_BYTES = 1 << 28
"""Largest size of the derivatives that are formed at a time on the host."""

SMALLEST_SLAB = 1 << 20

_CPU_CHUNK = 32
"""Examples of a pass that keeps factors on a CPU, a few of which are in the network at a time."""

_TIMED = 32
"""Examples at most whose derivatives are formed for an estimate."""

_TILES_ON_THEIR_WAY = 4
"""Tiles that are fetched from a device while the next is computed, where none is to survive the process."""

_GPU_TOKENS, _GPU_CHUNK = 1 << 13, 256
"""Tokens of a pass on a GPU, whose matrix products are then large, and examples at most."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut. The same plan on the same machine, with as many cores, gives the same kernel to the bit.

    Attributes:
        chunk: Examples of a pass.
        row_block: Examples of a side of a tile.
        slab_bytes: Size of the derivatives with respect to a large leaf that are formed at a time.
        spilled: Whether what the passes give is kept in files though the kernel is not stored; over a mesh, whether
            it is computed anew for every tile, or read from the store's files.
        events: What was changed on the way, and why.
    """

    chunk: int
    row_block: int
    slab_bytes: int
    spilled: bool
    events: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """Returns the plan that `dataclasses.asdict` made JSON of."""
        return cls(**{**fields, "events": tuple(fields["events"])})

    def after(self, event: str, **changed: Any) -> Plan:
        """Returns the plan as it goes on after an event, which is told once."""
        if event in self.events and not changed:
            return self
        return dataclasses.replace(self, **changed, events=tuple(dict.fromkeys((*self.events, event))))

    def with_half_slabs(self) -> Plan:
        """Returns the plan as it goes on where memory ran out in a tile."""
        event = f"out of memory in a tile with slabs of {self.slab_bytes} bytes: half of it from then on"
        return self.after(event, slab_bytes=self.slab_bytes // 2)

    def in_parts(self, left: range, right: range) -> Plan:
        """Returns the plan as it goes on where memory ran out in a tile of these examples, with the least slabs."""
        return self.after(f"out of memory in a tile of {len(left)} × {len(right)} examples: computed in parts")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel will take (`ntk_estimate`).

    Attributes:
        engine: That would compute it.
        plan: How the work would be cut.
        seconds: Time of the passes and of the products, from a pass over one chunk and products that were timed.
        pass_seconds: Of the passes alone.
        compile_seconds: Of compiling the programs, beside that: a process does so once for texts of each length.
        memory_bytes: Of what is held at a time, beside the model; of a mesh: by each device.
        disk_bytes: While it runs: the kernel's blocks where they are stored, and what passes give where it is spilled.
        kernel_bytes: Of all blocks.
        devices: That compute it together.
    """

    engine: str
    plan: Plan
    seconds: float
    pass_seconds: float
    compile_seconds: float
    memory_bytes: int
    disk_bytes: int
    kernel_bytes: int
    devices: int = 1


class Timed(NamedTuple):
    """Time of some work, and by how much longer it took where its programs were compiled."""

    seconds: float
    compile_seconds: float

    @classmethod
    def of_two(cls, start: float, between: float, end: float) -> Timed:
        """Returns those of work that was done twice, of which the first time compiled what had not been."""
        return cls(end - between, max(0.0, (between - start) - (end - between)))


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """One kernel to be computed, by the Jacobian or the factored engine.

    Attributes:
        tun: The model.
        data1: Rows.
        data2: Columns; `None` for the rows again.
        theta: Where.
        blocks: Block name to leaf paths.
        kind: Of kernel.
        engine: `"jacobian"` or `"factored"`.
        dtype: `"float64"`, or `None` for that of the parameters.
        precision: Of matrix products on the device.
        memory_budget: Bytes.
        c: Number of outputs.
        sites: Of the factored engine.
    """

    tun: Tunable
    data1: Dataset
    data2: Dataset | None
    theta: PyTree
    blocks: Blocks
    kind: Kind
    engine: str
    dtype: str | None
    precision: str
    memory_budget: int
    c: int
    sites: tuple[Site, ...]

    @classmethod
    def of(
        cls,
        tun: Tunable,
        data1: Dataset,
        data2: Dataset | None,
        theta: PyTree,
        blocks: Blocks,
        kind: Kind,
        *,
        engine: str,
        dtype: str | None,
        precision: str,
        memory_budget: int,
    ) -> Work:
        """Finds out what there is to do, without computing anything.

        Returns:
            The work; arguments as its attributes.

        Raises:
            InputError: If the model's outputs do not fit the kind, or the engine does not see how leaves are used.
        """
        c = num_outputs(tun, data1)
        both = [data for data in (data1, data2) if data is not None]
        longest = max(both, key=lambda data: 0 if data.lengths is None else int(data.lengths.max()))
        sites = find_sites(tun, longest, theta, len(kind.seeds(c))) if engine == "factored" else ()
        return cls(tun, data1, data2, theta, blocks, kind, engine, dtype, precision, memory_budget, c, sites)

    @functools.cached_property
    def k(self) -> int:
        """Rows of J an example."""
        return len(self.kind.seeds(self.c))

    @property
    def several_processes(self) -> bool:
        """Whether other processes take part."""
        return False

    @property
    def _mirrored(self) -> bool:
        """Whether tiles on one side of the diagonal are the others, transposed."""
        return self.data2 is None and self.kind.symmetric

    @functools.cached_property
    def on_device(self) -> bool:
        """Whether what the passes give stays on the device and is multiplied there; without a mesh not of signs."""
        return multiplies_on_device() and not self.kind.of_signs

    @functools.cached_property
    def _in_parts(self) -> bool:
        """Whether a pass takes its examples a few at a time; their number is a power of two then."""
        return self.engine == "factored" and jax.default_backend() == "cpu" and not self.on_device

    def _together(self, batch: Batch, count: int) -> int:
        """Examples of a pass that are in the network at a time; last digits depend on `count`, all of this length."""
        if not self._in_parts:
            return len(batch["weight"])
        ends = [(site.inputs, site.outputs) for site in self.sites]
        widths = [min(read[-1], wrote[-1]) for read, wrote in ends if min(len(read), len(wrote)) > 1]  # of a token
        return at_a_time(batch, count, max(widths, default=None))

    @functools.cached_property
    def _function(self) -> tuple[Callable[..., Any], PyTree]:
        """The model and theta, in the precision that is computed in."""
        both = self.tun.apply, self.theta
        return to_float64(both) if self.dtype == "float64" else both

    @functools.cached_property
    def _dtype(self) -> np.dtype:
        return np.dtype(self.dtype or jnp.result_type(*jax.tree.leaves(self.theta)))

    @functools.cached_property
    def _large(self) -> dict[str, Site]:
        return {site.leaf(site.factored): site for site in self.sites if site.factored}

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Number of entries of every leaf whose derivatives are formed."""
        sizes = dict(zip(leaf_paths(self.theta), map(np.size, jax.tree.leaves(self.theta)), strict=True))
        if self.engine == "jacobian":
            return sizes
        kept = {site.leaf(name) for site in self.sites for name in (*site.rows, site.factored) if name}
        return {path: size for path, size in sizes.items() if path in kept}

    def _example_bytes(self) -> int:
        """Of what the passes give for one example, at the greatest length."""
        item = max(4, self._dtype.itemsize)
        small = sum(size for path, size in self._sizes.items() if path not in self._large)
        read = {site.source: math.prod(site.inputs) for site in self._large.values()}
        flowed = sum(math.prod(site.outputs) for site in self._large.values())
        return item * (self.k * small + sum(read.values()) + self.k * flowed)

    def _both(self) -> list[Dataset]:
        return [self.data1] if self.data2 is None else [self.data1, self.data2]

    def _most_examples(self) -> int:
        """Of a pass."""
        if self.engine == "factored" and self.on_device:
            texts = [int(data.lengths.max()) for data in self._both() if data.lengths is not None]
            tokens = max([1, *texts, *(math.prod(site.inputs[:-1]) for site in self.sites)])
            # No more than are of one length: the rest would be padding.
            largest = max(len(group) for data in self._both() for group in data.groups())
            return max(1, min(_GPU_TOKENS // tokens, _GPU_CHUNK, largest))
        longest = max(map(len, self._both()))
        return min(_CPU_CHUNK, power_of_two(2 * longest - 1)) if self._in_parts else min(MAX_CHUNK, longest)

    def _tile_bytes(self, block: int, slab: int, spilled: bool) -> int:
        """Held while a tile of `block` examples a side is computed."""
        item, rows = max(4, self._dtype.itemsize), block * self.k
        whole = max((size for path, size in self._sizes.items() if path not in self._large), default=0)
        copied = self.k * whole  # of the examples of each side: a small leaf, or from files what is kept of a large one
        large = [site for site in self._large.values() if spilled or site.factored == "embedding"]
        copied = max([copied, *(site.numbers(self.k) for site in large)])
        widest = max((site.outputs[-1] for site in self._large.values()), default=0)
        slab = max(slab, 2 * rows * widest * item) if self._large else 0
        tile = 8 * rows * block * (1 if self.kind.diagonal else self.k)
        if self.on_device:  # as formed (twice: the last are there too), put together, and in order; in float64; tiles
            formed = max(slab, 2 * rows * whole * item)
            in_float64 = 16 * min(max(COPIED_NUMBERS, rows << 12), max(rows * whole, slab // item))
            return 2 * block * copied * item + 4 * formed + in_float64 + (2 + _TILES_ON_THEIR_WAY) * tile
        signed = 2 * self.kind.of_signs * (slab + 2 * rows * whole * item)
        # Every thread has its columns in float64, and a sum.
        columns = min(num_threads() * gram_columns(rows), max(whole, slab // (item * 2 * rows)))
        sums = tile * (2 * num_threads() + 3)
        return 2 * block * copied * item + slab + signed + 8 * 2 * rows * columns + sums

    def plan(self) -> Plan:
        """Returns how to cut the work so that what is held fits the budget.

        Raises:
            InputError: If not even one example does.
        """
        budget, one, longest = self.memory_budget, self._example_bytes(), max(map(len, self._both()))
        # On a CPU a few together are faster than one or two; a GPU pads what it keeps to them.
        chunk = int(np.clip(budget // (16 if self.on_device else 4) // max(one, 1), 1, self._most_examples()))
        chunk = power_of_two(chunk) if self._in_parts else chunk
        given = self._given_bytes(chunk if self.on_device else 1)
        slab = budget // 32 if self.on_device else int(np.clip(budget // 8, 1, _SLAB_BYTES))
        # In memory if all of it, or half of the budget, is enough for what the passes give.
        beside = max(self._tile_bytes(longest, slab, False), 2 * chunk * one)
        spilled = given > budget // 2 and given + beside > budget
        most_a_tile, parts = budget // 2 if spilled else budget - given, 1
        while (block := math.ceil(longest / parts)) > 1 and self._tile_bytes(block, slab, spilled) > most_a_tile:
            parts += max(1, parts // 8)
        needed = max(self._tile_bytes(block, slab, spilled), 2 * chunk * one) + (0 if spilled else given)
        if needed > budget:
            raise InputError(
                f"derivatives of one example and a tile of the kernel take {needed / 2**30:.2g} GiB, more than "
                f"memory_budget={budget / 2**30:.2g} GiB; tune less, or raise the budget"
            )
        return Plan(chunk, block, slab, spilled)

    def check_disk(self, folder: Path, *, stored: bool) -> None:
        """Refuses work whose files do not fit.

        Args:
            folder: For what the passes give, and for the kernel where that is stored; what is there already counts.
            stored: Whether it is.

        Raises:
            InputError: If they do not.
        """
        needed = self._given_bytes() + (self._kernel_bytes() if stored else 0)
        self._check_room(folder, needed, f"what the passes give{' and the kernel take' if stored else ' takes'}")

    def _check_room(self, folder: Path, needed: int, what: str) -> None:
        free, there = free_bytes(folder)
        if needed > free:
            raise InputError(
                f"{what} {needed / 2**30:.1f} GiB in {there}, which has {free / 2**30:.1f} GiB free; use fewer "
                "examples, tune less, or give a folder on another disk"
            )

    def _kernel_bytes(self) -> int:
        """Of all blocks."""
        return 8 * math.prod(self.shape()) * len(self.blocks)

    def _given_bytes(self, chunk: int = 1) -> int:
        """Of what the passes give, with what fills up chunks."""
        sizes = [len(group) for data in self._both() for group in data.groups()]
        return sum(math.ceil(size / chunk) * chunk for size in sizes) * self._example_bytes()

    @contextlib.contextmanager
    def precisely(self) -> Iterator[None]:
        """Has JAX compute in the dtype and precision that are asked for."""
        with (
            jax.enable_x64(self.dtype == "float64" or jax.config.read("jax_enable_x64")),
            jax.default_matmul_precision(self.precision),
        ):
            yield

    def _pass(self, batch: Batch, wanted: int, count: int) -> dict[str, Any]:
        """What one pass gives for the first examples of a batch, of `count` of this length; on its way on a device."""
        fetch = (lambda found: found) if self.on_device else jax.device_get
        seeds = self.kind.seeds(self.c).astype(np.float64 if self._dtype == np.float64 else np.float32)
        with self.precisely():
            if self.engine == "factored":
                given = *self._function, batch, seeds, self.sites, np.int32(wanted), self._together(batch, count)
                return fetch(derivatives_and_factors(*given))
            _, rows = fetch(outputs_and_jacobian(*self._function, batch, seeds))
        leaves = zip(leaf_paths(self.theta), jax.tree.leaves(rows), strict=True)
        return {path: leaf.reshape(*leaf.shape[:2], -1) for path, leaf in leaves}

    def _run_passes(
        self,
        data: Dataset,
        rows: Rows,
        plan: Plan,
        changed: Callable[[Plan], None],
        report: Callable[[int], None] = lambda _: None,
        only: np.ndarray | None = None,
    ) -> Plan:
        """Fills `rows`, of all examples or of some; returns the plan, with smaller chunks where memory ran out."""
        base = 0
        for group in data.groups():
            count = len(group)
            group = group if only is None else group[np.isin(group, only)]
            start = 0
            running: collections.deque[tuple[int, np.ndarray, Any]] = collections.deque()
            while running or start < len(group):
                oldest = running[0][0] if running else start
                try:
                    done = rows.done(base + start) if start < len(group) else 0
                    if start < len(group) and not done:
                        examples = group[start : start + plan.chunk]
                        found = self._pass(data.batch(examples, plan.chunk), len(examples), count)
                        running.append((start, examples, found))
                        start += len(examples)
                    ahead = 1 if self.on_device else 0  # there a pass runs while the next is prepared
                    if running and (len(running) > ahead or done or start == len(group)):
                        position, examples, found = running[0]
                        self._keep(rows, base + position, examples, found)
                        running.popleft()
                        report(len(examples))
                    elif done:
                        start += done
                        report(done)
                except (MemoryError, jax.errors.JaxRuntimeError) as error:
                    rows.wait()  # what a file failed for is no matter of the pass
                    chunk, event = halved(plan.chunk, "a pass of {} examples", error)
                    plan = plan.after(event, chunk=chunk)
                    changed(plan)
                    start = oldest
                    running.clear()
            base += len(group)
        rows.wait()
        return plan

    def _keep(self, rows: Rows, position: int, examples: np.ndarray, found: Mapping[str, Any]) -> None:
        if self.on_device and rows.folder is None:  # as it is: slices would be copies of other sizes
            rows.put(position, examples, jax.block_until_ready(found))
            return
        whole = jax.device_get(found)
        # Of a pass that was filled up a copy: a view would hold what filled it.
        own = {n: v if len(v) == len(examples) else v[: len(examples)].copy() for n, v in whole.items()}
        # LoRA's A where B = 0: its zeros are neither kept nor multiplied.
        rows.put(position, examples, {n: v for n, v in own.items() if n not in self._sizes or v.any()})

    def _measure(
        self, examples: int, plan: Plan, changed: Callable[[Plan, float | None], None]
    ) -> tuple[float | None, Plan]:
        """Compares derivatives of some examples with float64: of those alone, before anything else is held."""
        options = (self.precision, self.memory_budget, self.kind.seeds(self.c))
        signed = self._signed_reference if self.kind.of_signs else None
        try:
            check = EpsilonCheck(self.tun, self.data1, self.theta, examples, *options, signed)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None, plan.after("out of memory in the float64 rows that ε_J is measured by: it is not measured")
        rows = Rows(None)
        plan = self._run_passes(self.data1, rows, plan, lambda new: changed(new, None), only=check.chosen)
        derivatives = self._derivatives(rows, rows)
        for example in check.chosen.tolist():
            own = range(example, example + 1)
            for path in self._sizes:
                for part, *_, found in derivatives.rows(path, own, own, plan.slab_bytes):  # on the right: signs, if any
                    check.compare(path, found, np.array([example]), part)
        return check.epsilon(), plan

    def _signed_reference(self, path: str, rows: np.ndarray) -> np.ndarray | None:
        """What takes the place of the derivatives in a kernel of signs."""
        if self.kind.without_sign(path):
            return None
        return signs(rows, thresholds(np.abs(rows).max(axis=-1), self._dtype))

    def _derivatives(self, first: Rows, last: Rows) -> Derivatives:
        made = DeviceDerivatives if self.on_device else Derivatives
        return made(first, last, self._large, self.k, self.kind, self._dtype)

    def sides(self, plan: Plan) -> list[list[range]]:
        """Returns the examples of the sides of tiles, by data set."""
        return [
            [range(start, min(start + plan.row_block, len(data))) for start in range(0, len(data), plan.row_block)]
            for data in self._both()
        ]

    def pairs(self, plan: Plan) -> list[tuple[range, range]]:
        """Returns rows and columns of the tiles of a block; above the diagonal only where symmetric."""
        sides, half = self.sides(plan), self._mirrored
        return [(left, right) for left in sides[0] for right in sides[-1] if not half or right.start >= left.start]

    def tiles(self, plan: Plan) -> list[tuple[str, range, range]]:
        """Returns block, rows and columns of every tile, block by block."""
        pairs = self.pairs(plan)
        return [(block, *pair) for block in self.blocks for pair in pairs]

    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the kernel."""
        one = self.kind.finish(np.zeros((1, 1) + ((self.k,) if self.kind.diagonal else (self.k, self.k))))
        return (len(self.data1), len(self._both()[-1]), *one.shape[2:])

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
        """Computes the tiles that are wanted.

        Args:
            plan: How.
            write: Takes a tile, and its mirror image where the kernel is symmetric.
            wanted: Whether a tile is still to be computed.
            folder: For what the passes give; `None` for memory, or for a temporary folder where the plan spills.
            check_examples: Examples whose derivatives are compared with float64; 0 for none.
            epsilon: ε_J where it was measured before.
            changed: Called when the plan or ε_J is another.
            progress: Called with phase, units done and in all.

        Returns:
            The measured ε_J.
        """
        tiles = self.tiles(plan)
        todo = [tile for tile in tiles if wanted(*tile)]
        if epsilon is None and check_examples:
            epsilon, plan = self._measure(check_examples, plan, changed)
            changed(plan, epsilon)
        if not todo:
            return epsilon
        with contextlib.ExitStack() as stack:
            lasting = folder is not None
            if folder is None and plan.spilled:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxlin-ntk-")))
                self.check_disk(folder, stored=False)
            rows, done, total = [], 0, sum(map(len, self._both()))

            def report(count: int) -> None:
                nonlocal done
                done += count
                if progress is not None:
                    progress(PASSES, done, total)

            def replanned(new: Plan) -> None:
                changed(new, epsilon)

            for name, data in zip(("rows", "columns"), self._both(), strict=False):
                rows.append(Rows(folder and folder / name, lasting=lasting))
                stack.callback(rows[-1].settle)  # before the folder, or the store's lock, is given up
                plan = self._run_passes(data, rows[-1], plan, replanned, report)
            derivatives = self._derivatives(rows[0], rows[-1])
            count = len(tiles) - len(todo)
            on_their_way: collections.deque[tuple[tuple[str, range, range], Any]] = collections.deque()
            pinned = folder is not None or self._kernel_bytes() <= PINNED_BYTES

            def write_first() -> None:
                nonlocal count
                tile, found = on_their_way.popleft()
                write(*tile, np.asarray(found))
                count += 1
                if progress is not None:
                    progress(TILES, count, len(tiles))

            for tile in todo:
                before_it, (found, plan) = plan, self._tile(derivatives, *tile, plan)
                if plan is not before_it:
                    changed(plan, epsilon)
                on_their_way.append((tile, on_its_way(found, pinned) if isinstance(found, jax.Array) else found))
                while len(on_their_way) > (_TILES_ON_THEIR_WAY if self.on_device and folder is None else 0):
                    write_first()
            while on_their_way:
                write_first()
        return epsilon

    def _tile(self, derivatives: Derivatives, block: str, left: range, right: range, plan: Plan) -> tuple[Any, Plan]:
        """One tile, perhaps still on its way from the device; where memory runs out with smaller slabs, or in parts."""
        paths = [path for path in self.blocks[block] if path in self._sizes]
        while True:
            try:
                return jax.block_until_ready(derivatives.tile(paths, left, right, plan.slab_bytes)), plan
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                in_slabs = bool(self._large) and plan.slab_bytes > SMALLEST_SLAB
                if not is_out_of_memory(error) or not (in_slabs or len(left) > 1 or len(right) > 1):
                    raise
            derivatives.release()
            if not in_slabs:
                return self._from_halves(derivatives, block, left, right, plan)
            plan = plan.with_half_slabs()

    def _from_halves(
        self, derivatives: Derivatives, block: str, left: range, right: range, plan: Plan
    ) -> tuple[np.ndarray, Plan]:
        """A tile from those of the halves of its examples."""
        plan = plan.in_parts(left, right)
        rows: list[np.ndarray] = []
        for some in halves(left):
            parts = []
            for others in halves(right):
                if self._mirrored and left == right and others.start < some.start:
                    part = transposed(rows[0][:, len(halves(left)[0]) :])
                else:
                    part, plan = self._tile(derivatives, block, some, others, plan)
                parts.append(np.asarray(part))
            rows.append(np.concatenate(parts, axis=1))
        return np.concatenate(rows), plan

    def estimate(self, stored: bool) -> Cost:
        """Times one pass and two products, and reckons what the whole will take.

        Args:
            stored: Whether the kernel is written to disk.

        Returns:
            Time, memory and disk.
        """
        plan = self.plan()
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxlin-ntk-")))
            rows = Rows(folder if plan.spilled or stored else None, lasting=stored)
            stack.callback(rows.settle)
            timed = [self._timed_passes(data, rows, plan) for data in self._both()]
            reading = 0.0 if rows.folder is None else self._read_bytes(plan) * self._seconds_a_byte_read(rows)
        seconds, compiling = map(sum, zip(*timed, strict=True))
        kernel = self._kernel_bytes()
        given = self._given_bytes(plan.chunk if self.on_device else 1)
        fetching = kernel * _seconds_a_fetched_byte() if self.on_device else 0.0
        return Cost(
            self.engine,
            plan,
            seconds + self._seconds_of_products(plan) + reading + fetching,
            seconds,
            compiling,
            self._tile_bytes(plan.row_block, plan.slab_bytes, plan.spilled or stored)
            + (2 * plan.chunk * self._example_bytes() if plan.spilled or stored else given)
            + (0 if stored else kernel),
            (kernel if stored else 0) + (given if stored or plan.spilled else 0),
            kernel,
        )

    def _seconds_of_products(self, plan: Plan) -> float:
        """Time of forming and multiplying derivatives for all tiles, from that of some products."""
        # Of an embedding only words that two examples share are multiplied: next to nothing.
        dense = [site for site in self._large.values() if site.factored == "kernel"]
        small = [size for path, size in self._sizes.items() if path not in self._large]
        in_a_tile = self._seconds_on_device if self.on_device else self._seconds_on_host
        return sum(count * in_a_tile(dense, small, plan, *tile) for tile, count in self._alike(plan).items())

    def _seconds_on_device(
        self, dense: Sequence[Site], small: Sequence[int], plan: Plan, n1: int, n2: int, same: bool
    ) -> float:
        """Of a tile, whole also where it is its own mirror image."""
        products, formed = n1 * n2 * self._paired * sum(small), 0.0
        for site in dense:
            size, tokens = site.inputs[-1] * site.outputs[-1], math.prod(site.inputs[:-1]) * self._mean_tokens()
            formed += (1 + self.kind.of_signs) * self.k * tokens * (n1 if same else n1 + n2) * size
            products += n1 * n2 * self._paired * size
        return formed * _seconds_a_product(np.float32, True) + products * _seconds_a_product(np.float64, True)

    def _seconds_on_host(
        self, dense: Sequence[Site], small: Sequence[int], plan: Plan, n1: int, n2: int, same: bool
    ) -> float:
        """Of a tile, from products with as many rows: those of few examples run at a fraction of the rate."""
        a_call, a_column = _seconds_of_gram(self.k, self.kind.diagonal, n1, n2, same and self._mirrored)
        seconds = sum(a_call + a_column * size for size in small)
        for site in dense:
            (*_, d_in), (*_, d_out), tokens = site.inputs, site.outputs, math.prod(site.inputs[:-1])
            tokens = max(1, round(tokens * self._mean_tokens()))
            sides = [n1, n2], [tokens * n1, tokens * n2]
            options: dict[str, Any] = {"same": same and self._mirrored, "slab_bytes": plan.slab_bytes}
            by_tokens, cost = multiply_adds(site, self.k, self.kind.diagonal, *sides, **options)
            if by_tokens and not self.kind.of_signs:
                seconds += cost * _seconds_a_product(np.float64, False)
                continue
            formed = n1 if same else n1 + n2
            width, dtype = slab_width(site, self.k, formed, self._dtype, plan.slab_bytes), summed_in(self._dtype)
            an_entry = _seconds_of_forming(d_in, d_out, self.k, tokens, min(formed, _TIMED), width, np.dtype(dtype))
            seconds += (1 + self.kind.of_signs) * formed * d_in * d_out * an_entry
            seconds += math.ceil(d_in / width) * a_call + d_in * d_out * a_column
        return seconds

    @property
    def _paired(self) -> int:
        """Entries of the kernel for two examples."""
        return self.k * (1 if self.kind.diagonal else self.k)

    def _mean_tokens(self) -> float:
        """Tokens of an example as it is computed, in the mean, as a share of those of the longest."""
        tokens = [np.repeat(data.buckets, [*map(len, data.groups())]) for data in self._both() if data.buckets]
        return float(np.concatenate(tokens).mean() / np.concatenate(tokens).max()) if tokens else 1.0

    def _alike(self, plan: Plan) -> collections.Counter[tuple[int, int, bool]]:
        """Numbers of examples on both sides of a tile, and whether they are the same, to how many such tiles."""
        pairs = self.pairs(plan)
        return collections.Counter(
            (len(left), len(right), self.data2 is None and left == right) for left, right in pairs
        )

    def _read_bytes(self, plan: Plan) -> int:
        """Of all that tiles read from files."""
        item = max(4, self._dtype.itemsize)
        small = sum(size for path, size in self._sizes.items() if path not in self._large)
        one = item * (self.k * small + sum(site.numbers(self.k) for site in self._large.values()))
        read = sum((n1 if same else n1 + n2) * count for (n1, n2, same), count in self._alike(plan).items())
        return int(read * one * self._mean_tokens() * (1 + self.kind.of_signs))

    def _seconds_a_byte_read(self, rows: Rows) -> float:
        """Time of reading what the passes gave from files, by what is there."""
        size, begin = 0, time.perf_counter()
        for path in self._sizes:
            names = self._large[path].names if path in self._large else (path,)
            for _, arrays in rows.read(names, 0, max(map(len, self._both()))):
                size += sum(array.nbytes for array in arrays)
        return (time.perf_counter() - begin) / size if size else 0.0

    def _timed_passes(self, data: Dataset, rows: Rows, plan: Plan) -> Timed:
        """Time of all passes over a data set, from one for each length, with what is done with its results."""
        seconds = compiling = 0.0
        for group in data.groups():
            if len(group):
                examples = group[: plan.chunk]
                batch = data.batch(examples, plan.chunk)
                first = time.perf_counter()
                jax.block_until_ready(self._pass(batch, len(examples), len(group)))
                begin = time.perf_counter()
                self._keep(rows, 0, examples, self._pass(batch, len(examples), len(group)))
                rows.wait()
                together = self._together(batch, len(group))
                timed = Timed.of_two(first, begin, time.perf_counter())
                compiling += timed.compile_seconds
                rounds = math.ceil(len(group) / together) / math.ceil(len(examples) / together)
                seconds += timed.seconds * rounds
        return Timed(seconds, compiling)


def _seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@functools.cache
def _seconds_a_product(dtype: type[np.floating], on_device: bool) -> float:
    """Time of a multiplication and addition within a large matrix product."""
    size = 1 << 12 if on_device else 512
    wide = np.ones((size, 1 << 13), dtype)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        product = jax.jit(lambda a, b: a @ b.T) if on_device else lambda a, b: a @ b.T
        sides = jax.device_put((wide, wide)) if on_device else (wide, wide.copy())
        return _seconds_of(lambda: product(*sides)) / (size * size * (1 << 13))


@functools.cache
def _seconds_of_gram(k: int, diagonal: bool, n1: int, n2: int, mirrored: bool) -> tuple[float, float]:
    """Times of multiplying the derivatives of two sides' examples: of a call, and of each of their columns."""
    product, few = gram_of_equal if diagonal else gram, 1 << 8
    # So many that they come from memory, as derivatives do, or take a while.
    many = int(np.clip((1 << 32) // (n1 * n2 * k**2), 1 << 10, (1 << 23) // (n1 * k) + (1 << 10)))

    def seconds(columns: int) -> float:
        rows1 = np.ones((n1, k, columns), np.float32)
        rows2 = rows1 if mirrored else np.ones((n2, k, columns), np.float32)
        return _seconds_of(lambda: product(rows1, rows2))

    short, long = seconds(few), seconds(many)
    a_column = max(0.0, long - short) / (many - few)
    return max(0.0, short - few * a_column), a_column


@functools.cache
def _seconds_of_forming(
    d_in: int, d_out: int, k: int, tokens: int, examples: int, width: int, dtype: np.dtype
) -> float:
    """Time of one entry of the derivatives of an example, some rows of a dense kernel at a time."""
    factors = {i: (np.ones((tokens, d_in), dtype), np.ones((k, tokens, d_out), dtype)) for i in range(examples)}
    out = np.empty((examples, k, width * d_out), dtype)
    return _seconds_of(lambda: columns(factors, d_out, 0, width, 0, out)) / (examples * width * d_out)


def _seconds_a_fetched_byte() -> float:
    """Time of a byte of a tile's way to the host."""
    tile = jax.block_until_ready(jnp.zeros(1 << 23, jnp.float32))
    begin = time.perf_counter()
    size = np.asarray(on_its_way(tile, pinned=True)).nbytes
    return (time.perf_counter() - begin) / size


def halves(examples: range) -> list[range]:
    """The two halves of some examples; one example is not cut."""
    middle = examples.start + (len(examples) + 1) // 2
    return [half for half in (range(examples.start, middle), range(middle, examples.stop)) if half]


def free_bytes(folder: Path) -> tuple[int, Path]:
    """Returns what a folder's files may take, with those that are there; and the folder that its disk is known by."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    held = 0
    for file in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process's, that it has just renamed
            held += file.stat().st_size if file.is_file() else 0
    return shutil.disk_usage(there).free + held, there
