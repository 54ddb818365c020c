"""Per-example Jacobians in chunks, and their Gram matrices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, halved
from jaxlin.ntk.threads import in_parallel, num_threads, split
from jaxlin.tunable import Batch, Tunable, leaf_paths

Progress = Callable[[int, int], None]
"""Called with examples done and in all."""

MAX_CHUNK = 16

MEMORY_BUDGET = 4 << 30
"""Default limit of a Jacobian's size, in bytes."""

CHECK_TOLERANCE = 1e-4
"""Largest relative deviation from float64 at which what was computed in float32 (or float64) is returned."""

_SMALLEST_PRODUCT = 1 << 22
"""Multiplications that a thread of its own is worth."""


_CPU_TOKENS = 512
"""Tokens that a network works on together on a CPU, whose caches hold no more; measured by benchmarks/ntk.py."""
_CPU_WIDTH = 768
"""Width of the network that this is best for; MiniLM's, half as wide, is best with half of it."""
_CPU_TOKENS_A_ROUND = 20
"""What each time costs beside its tokens, in tokens: 10 to 26 for MiniLM at lengths of 16 to 64."""


def power_of_two(most: int) -> int:
    """Returns the greatest that is not above a number; 1 for 0."""
    return 1 << max(most.bit_length() - 1, 0)


def at_a_time(batch: Batch, count: int | None = None, width: int | None = None) -> int:
    """Returns how many examples of a batch the network works on together within a program.

    On a CPU a few, again and again in the same temporary memory, which XLA asks the system for anew at each call.

    Args:
        batch: The examples, and what fills them up.
        count: How many examples of this length there are, in this batch and others of its size, where the last few of
            them are not filled up to a whole batch: then no more together than leaves little of it to fillers.
        width: Of the network; `None` where it is not known.

    Returns:
        The number; on a CPU a power of two, or the batch's size if that is less.
    """
    size = len(next(iter(batch.values())))
    if jax.default_backend() != "cpu":
        return size
    tokens = max((value.shape[1] for value in batch.values() if value.ndim > 1), default=1)
    fitting = _CPU_TOKENS * min(max((width or _CPU_WIDTH) / _CPU_WIDTH, 1 / 4), 2)
    most = min(size, power_of_two(int(fitting) // tokens))
    if count is None:
        return most

    def cost(together: int) -> int:
        return -(-count // together) * (together * tokens + _CPU_TOKENS_A_ROUND)

    return min((most, *(1 << i for i in reversed(range(most.bit_length())))), key=cost)


@jax.jit
def outputs_and_jacobian(
    apply: Callable[[PyTree, Batch], Array],
    theta: PyTree,
    batch: Batch,
    seeds: Float[Array, "k C"] | None = None,
) -> tuple[Float[Array, "B C"], PyTree]:
    """Returns outputs and, for every leaf, `[B, k, …]`: each example's `seeds @ J`; J itself without seeds."""

    def one(example: Batch) -> tuple[Array, PyTree]:
        single = {name: value[None] for name, value in example.items()}
        outputs, pullback = jax.vjp(lambda p: apply(p, single)[0], theta)
        along = jnp.eye(outputs.shape[0]) if seeds is None else seeds
        (rows,) = jax.vmap(pullback)(along.astype(outputs.dtype))
        return outputs, rows

    size, together = len(next(iter(batch.values()))), at_a_time(batch)
    return jax.vmap(one)(batch) if together == size else jax.lax.map(one, batch, batch_size=together)


def to_float64(tree: PyTree) -> PyTree:
    """Returns `tree` with its floating-point leaves as float64 host arrays, for use under `jax.enable_x64`."""

    def cast(leaf: Any) -> Any:
        return np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


@dataclasses.dataclass(frozen=True, eq=False)
class Jacobian:
    """Outputs and their derivatives with respect to theta, of every example.

    Attributes:
        outputs: `f(theta)`, `[N, C]`.
        rows: Leaf path to `[N, C, size]`; leaves whose Jacobian is exactly zero everywhere are left out
            (LoRA's A where B = 0).
        storage_error: Relative Frobenius error of `rows` by the narrower dtype that they are kept in, measured on all
            of them; 0 where they are kept as computed.
        events: What was changed on the way, where memory ran out.
    """

    outputs: Float[np.ndarray, "N C"]
    rows: Mapping[str, Shaped[np.ndarray, "N C _"]]
    storage_error: float = 0.0
    events: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory held by `rows`."""
        return sum(rows.nbytes for rows in self.rows.values())


@jax.jit  # never run: the shape of a jitted function is found in a third of the time
def _apply(apply: Callable[[PyTree, Batch], Array], theta: PyTree, batch: Batch) -> Array:
    return apply(theta, batch)


def num_outputs(tun: Tunable, data: Dataset) -> int:
    """Returns C, without computing anything.

    Raises:
        InputError: If the outputs of `tun` are not `[B, C]`.
    """
    # The model is an argument: a float64 leaf that is traced as a constant while x64 is off is float32 ever after.
    shape = jax.eval_shape(_apply, tun.apply, tun.theta0, data.batch(np.zeros(1, int))).shape
    if len(shape) != 2 or shape[0] != 1:
        raise InputError(f"apply must return outputs [B, C]; for one example it returned shape {shape}")
    return shape[1]


def jacobian_bytes(tun: Tunable, data: Dataset, dtype: str | None = None) -> int:
    """Returns the size of the Jacobian in theta0's dtypes, or in another, vanishing leaves counted."""
    leaves = map(jnp.asarray, jax.tree.leaves(tun.theta0))
    row = sum(leaf.size * jnp.dtype(leaf.dtype if dtype is None else dtype).itemsize for leaf in leaves)
    return len(data) * num_outputs(tun, data) * row


def jacobian(
    tun: Tunable,
    data: Dataset,
    theta: PyTree | None = None,
    *,
    dtype: str | None = None,
    precision: str = "highest",
    memory_budget: int = MEMORY_BUDGET,
    storage: str | None = None,
    progress: Progress | None = None,
) -> Jacobian:
    """Computes the Jacobian of the outputs of every example with respect to theta.

    One forward and C backward passes an example, in chunks of at most 16 examples of one length; of half as many from
    where memory runs out.

    Args:
        tun: The model.
        data: The examples.
        theta: Where; default `tun.theta0`.
        dtype: `"float64"` computes everything in float64; `None` keeps the parameters' dtypes.
        precision: Of matrix products on the device.
        memory_budget: Largest size of the whole Jacobian in bytes.
        storage: `"bfloat16"` keeps the Jacobian in half the memory, with a relative error of some 2e-3, which is
            measured; `None` as computed.
        progress: Called after each chunk.

    Returns:
        Outputs and Jacobian on the host, in the dtype of the computation or of `storage`.

    Raises:
        InputError: If the Jacobian does not fit the budget.
    """
    tun.check_batch(data.columns)
    size = jacobian_bytes(tun, data, storage or dtype)
    if size > memory_budget:
        raise InputError(
            f"the Jacobian of {len(data)} examples with respect to {tun.num_params:,} parameters takes "
            f"{size / 2**30:.1f} GiB, more than memory_budget={memory_budget / 2**30:.1f} GiB; use fewer examples, "
            "tune less, or raise the budget (kernels do without it, unless keep_jacobian)"
        )
    chunk = int(np.clip(memory_budget // 16 // max(size // len(data), 1), 1, min(MAX_CHUNK, len(data))))
    apply, theta = tun.apply, tun.theta0 if theta is None else theta
    if dtype == "float64":
        apply, theta = to_float64((apply, theta))
    outputs: np.ndarray | None = None
    buffers: list[np.ndarray | None] = []
    done, error, scale = 0, 0.0, 0.0
    events: list[str] = []
    with (
        jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")),
        jax.default_matmul_precision(precision),
    ):
        for indices, f, leaves in _passes(apply, theta, data, chunk, events):
            n = len(indices)
            if outputs is None:
                outputs = np.zeros((len(data), f.shape[1]), f.dtype)
                buffers = [None] * len(leaves)
            outputs[indices] = f[:n]
            for i, leaf in enumerate(leaves):
                flat = leaf[:n].reshape(n, f.shape[1], -1)
                if buffers[i] is None and flat.any():
                    buffers[i] = np.zeros((len(data), *flat.shape[1:]), jnp.dtype(storage or flat.dtype))
                if (buffer := buffers[i]) is not None:
                    kept = flat.astype(buffer.dtype, copy=False)
                    buffer[indices] = kept
                    if storage is not None:
                        error += float(np.sum((kept.astype(flat.dtype) - flat) ** 2, dtype=np.float64))
                        scale += float(np.sum(flat**2, dtype=np.float64))
            done += n
            if progress is not None:
                progress(done, len(data))
    assert outputs is not None  # a Dataset is never empty
    named = zip(leaf_paths(theta), buffers, strict=True)
    rows = {path: buffer for path, buffer in named if buffer is not None}
    return Jacobian(outputs, rows, (error / scale) ** 0.5 if scale else 0.0, tuple(events))


def _passes(
    apply: Callable[[PyTree, Batch], Array], theta: PyTree, data: Dataset, most: int, events: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Yields examples, their outputs and derivatives by leaf; adds to `events` that memory ran out, and takes less."""
    for indices, batch in data.chunks(most):
        start = 0
        while start < len(indices):
            part = {name: value[start : start + most] for name, value in batch.items()}
            try:
                f, derivatives = jax.device_get(outputs_and_jacobian(apply, theta, part))
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                most, event = halved(most, "a pass of {} examples", error)
                events.append(event)
                continue
            yield indices[start : start + most], f, jax.tree.leaves(derivatives)
            start += most


def gram(
    rows1: Float[np.ndarray, "N1 C size"], rows2: Float[np.ndarray, "N2 C size"]
) -> Float[np.ndarray, "N1 N2 C C"]:
    """Returns `J1 J2ᵀ` of one leaf, summed in float64; exactly symmetric where both are one array."""
    (n1, c, size), n2, same = rows1.shape, rows2.shape[0], rows1 is rows2
    width = gram_columns(max(n1, n2) * c)

    def product(columns: range) -> np.ndarray:
        buffer1 = np.empty((n1, c, min(width, len(columns))))
        buffer2 = buffer1 if same else np.empty((n2, *buffer1.shape[1:]))  # the same: then NumPy calls syrk
        total = np.zeros((n1 * c, n2 * c))
        for start in range(columns.start, columns.stop, width):
            stop = min(start + width, columns.stop)
            for buffer, rows in ((buffer1, rows1),) if same else ((buffer1, rows1), (buffer2, rows2)):
                buffer[..., : stop - start] = rows[..., start:stop]
            part1 = buffer1[..., : stop - start].reshape(n1 * c, -1)
            part2 = part1 if same else buffer2[..., : stop - start].reshape(n2 * c, -1)
            total += part1 @ part2.T
        return total

    parts = min(num_threads(), n1 * n2 * c**2 * size // _SMALLEST_PRODUCT)
    total = sum(in_parallel(product, split(size, parts)))
    return np.ascontiguousarray(np.reshape(total, (n1, c, n2, c)).transpose(0, 2, 1, 3))


def gram_columns(num_rows: int) -> int:
    """Returns how many columns of J a thread of `gram` converts to float64 at a time: what a cache holds."""
    return int(np.clip((1 << 21) // num_rows, 1 << 10, 1 << 13))


def gram_of_equal(
    rows1: Float[np.ndarray, "N1 C size"], rows2: Float[np.ndarray, "N2 C size"]
) -> Float[np.ndarray, "N1 N2 C"]:
    """Returns the entries of `gram` for equal outputs, without the others."""
    out = np.empty((len(rows1), len(rows2), rows1.shape[1]))
    for c in range(rows1.shape[1]):
        one = rows1[:, c : c + 1]
        out[:, :, c] = gram(one, one if rows1 is rows2 else rows2[:, c : c + 1])[:, :, 0, 0]
    return out


def evenly_spread(size: int, count: int) -> np.ndarray:
    """Returns at most `count` of the numbers below `size`, ascending and evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int))


def measure_epsilon(
    tun: Tunable,
    data: Dataset,
    theta: PyTree | None,
    computed: Jacobian,
    examples: int,
    precision: str,
    memory_budget: int = MEMORY_BUDGET,
) -> float | None:
    """Returns the relative Frobenius error of some rows of a Jacobian, recomputed in float64 (theory 6).

    Args:
        tun: The model.
        data: The examples.
        theta: Where; default `tun.theta0`.
        computed: Their Jacobian.
        examples: How many examples, spread evenly; 0 measures nothing.
        precision: Of the recomputation's matrix products.
        memory_budget: Bytes for the recomputed rows; fewer examples are taken where they need more.

    Returns:
        ε_J, at least float64's own rounding; `None` if nothing was measured.
    """
    check = EpsilonCheck(tun, data, theta, examples, precision, memory_budget)
    for path, rows in computed.rows.items():
        check.compare(path, rows)
    return check.epsilon()


class EpsilonCheck:
    """Compares a Jacobian, leaf by leaf or in parts, with rows of a few examples in float64 (theory 6)."""

    def __init__(
        self,
        tun: Tunable,
        data: Dataset,
        theta: PyTree | None,
        examples: int,
        precision: str,
        memory_budget: int = MEMORY_BUDGET,
        seeds: Float[np.ndarray, "k C"] | None = None,
        transform: Callable[[str, np.ndarray], np.ndarray | None] | None = None,
    ) -> None:
        """Computes the reference.

        Args:
            tun: The model.
            data: The examples.
            theta: Where; default `tun.theta0`.
            examples: How many of them, spread evenly.
            precision: Of the reference's matrix products.
            memory_budget: Bytes for the reference; fewer examples, or none, are taken where they need more.
            seeds: What the rows compared are of: `seeds @ J`; default J.
            transform: Maps the path of a leaf and its rows to what is compared in their place, or to `None`.
        """
        fitting = memory_budget // (jacobian_bytes(tun, data, "float64") // len(data))
        examples = min(examples, len(data), fitting // 2)  # half: it is copied on its way
        self.chosen = evenly_spread(len(data), examples)
        theta = tun.theta0 if theta is None else theta
        self.expected = np.inf if transform else _expected_deviation(theta, precision)
        self.shapes = dict(zip(leaf_paths(theta), map(jnp.shape, jax.tree.leaves(theta)), strict=True))
        self.reference: Mapping[str, np.ndarray] = {}
        self.compared: set[str] = set()
        self.error = 0.0
        if examples:
            options: dict[str, Any] = {"dtype": "float64", "precision": precision, "memory_budget": memory_budget}
            self.reference = jacobian(tun, data.take(self.chosen), theta, **options).rows
            if seeds is not None and not np.array_equal(seeds, np.eye(seeds.shape[1])):
                self.reference = {path: np.matmul(seeds, rows) for path, rows in self.reference.items()}
            if transform is not None:
                changed = {path: transform(path, rows) for path, rows in self.reference.items()}
                self.reference = {path: rows for path, rows in changed.items() if rows is not None}

    def compare(
        self, path: str, rows: np.ndarray, examples: np.ndarray | None = None, part: slice = slice(None)
    ) -> None:
        """Adds the error of some derivatives.

        Args:
            path: Of the leaf.
            rows: `[n, C, size]`.
            examples: Which examples they are of, ascending; `None` for all.
            part: Which rows of the leaf they are with respect to.
        """
        self.compared.add(path)
        examples = np.arange(len(rows)) if examples is None else examples
        _, here, there = np.intersect1d(examples, self.chosen, return_indices=True)
        if here.size:
            found, exact = rows[here].astype(np.float64), np.zeros(())
            if path in self.reference:
                whole = self.reference[path][there]
                exact = whole.reshape(*whole.shape[:2], *(self.shapes[path] or (1,)))[:, :, part].reshape(found.shape)
            self.error += float(np.sum((found - exact) ** 2))

    def epsilon(self) -> float | None:
        """Returns ε_J; warns where it is more than dtype and precision explain (of signs, any share may flip).

        Returns:
            At least float64's own rounding; what was not compared counts as zero. `None` without examples.
        """
        if not self.chosen.size:
            return None
        squares = {path: float(np.sum(rows**2)) for path, rows in self.reference.items()}
        scale = sum(squares.values())
        error = self.error + sum(square for path, square in squares.items() if path not in self.compared)
        floor = float(np.finfo(np.float64).eps) * 10
        found = max((error / scale) ** 0.5, floor) if scale else floor
        if not found <= self.expected:
            warnings.warn(
                f"the Jacobian deviates by {found:.1e} relative from the same rows in float64 (at most "
                f"{self.expected:.0e} is expected): do not trust the kernel; compare with another engine, or with "
                'dtype="float64"',
                RuntimeWarning,
                stacklevel=3,
            )
        return found


def _expected_deviation(theta: PyTree, precision: str = "highest") -> float:
    """Returns the largest relative error of derivatives that rounding explains."""
    eps = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(theta))).eps)
    if precision not in ("highest", "float32"):
        eps = max(eps, float(jnp.finfo(jnp.bfloat16).eps))
    return CHECK_TOLERANCE if eps <= jnp.finfo(jnp.float32).eps else 20 * eps


def check_precision(precision: str) -> None:
    """Refuses what is no precision of matrix products.

    Raises:
        InputError: If it is none.
    """
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise InputError(
            f'precision={precision!r} is unknown; expected "highest", "high", "default", or another name of JAX\'s'
        ) from error


def check_deviation(deviation: float, theta: PyTree, precision: str, what: str, remedy: str) -> None:
    """Refuses a result that deviates from float64 by more than its dtype and precision explain.

    Args:
        deviation: Relative.
        theta: Parameters, in the dtype of the computation.
        precision: Of its matrix products.
        what: Deviates.
        remedy: What to do.

    Raises:
        FloatingPointError: If it does, or the deviation is NaN.
    """
    tolerance = _expected_deviation(theta, precision)
    if not deviation <= tolerance:
        raise FloatingPointError(
            f"{what} deviates by {deviation:.1e} relative from what it was checked against in float64 (at most "
            f"{tolerance:.0e} is expected of {jnp.result_type(*jax.tree.leaves(theta))}); {remedy}"
        )
