"""Kernel tiles on a GPU: what the passes gave stays there, and so do the products, in float64.

One H200 multiplies 55 TFLOP/s in float64, where two cores of a host do 0.15 (benchmarks/gpu.py, benchmarks/ntk.py).
Elsewhere (`tiles`) the host multiplies: a CPU is the host, and a TPU has no float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from jaxlin.ntk.factored import summed_in
from jaxlin.ntk.rows import Rows
from jaxlin.ntk.tiles import Derivatives

COPIED_NUMBERS = 1 << 26
"""Of the rows of J of a side that are converted to float64 at a time: 512 MiB of them."""

COPIED_COLUMNS = 1 << 12
"""Of J at a time, where nothing else is said."""

PINNED_BYTES = 1 << 32
"""Of kernels at most that stay in the host memory which a GPU writes itself; the system cannot swap it out."""


def multiplies_on_device() -> bool:
    """Returns whether kernels are multiplied where the network runs: on a GPU."""
    return jax.default_backend() == "gpu"


def on_its_way(found: Array, pinned: bool) -> Array:
    """Starts the way of a tile to the host, where `np.asarray` then finds it.

    Args:
        found: The tile.
        pinned: Whether into memory that the device writes itself, and that a later tile can use again. Memory that the
            system has yet to give takes thirty times as long (docs/benchmarks.md).

    Returns:
        The tile, in that memory or where it was.
    """
    if pinned:
        (device,) = found.devices()
        with jax.enable_x64(True):
            return jax.device_put(found, SingleDeviceSharding(device, memory_kind="pinned_host"))
    found.copy_to_host_async()
    return found


def rows_of_a_slab(count: int, slab_bytes: int, one: int) -> int:
    """Returns how many of a leaf's rows derivatives are formed of at a time: all slabs of one size, if one is near.

    Args:
        count: Rows of the leaf.
        slab_bytes: That the derivatives may take; those of one row are formed in any case.
        one: Bytes of those of one row.
    """
    most = int(np.clip(slab_bytes // one, 1, count))
    return next((rows for rows in range(most, most // 2, -1) if count % rows == 0), most)  # one size: compiled once


def over_slabs(count: int, width: int, add: Callable[[Array | int, int, Array], Array], total: Array) -> Array:
    """Returns `total` after `add(start, rows, total)` for `count` rows, `width` at a time; within a `jit`."""
    loops, rest = divmod(count, width)
    if loops:
        total = jax.lax.fori_loop(0, loops, lambda i, t: add(i * width, width, t), total)
    return add(loops * width, rest, total) if rest else total


def summed_gram(
    rows1: Float[Array, "n1 k P"],
    rows2: Float[Array, "n2 k P"],
    *,
    diagonal: bool = False,
    at_a_time: int = COPIED_COLUMNS,
) -> Float[Array, "n1 n2 ..."]:
    """Returns `J1 J2ᵀ`, converted to and summed in float64 part by part: J is never held in it; within a `jit`.

    Args:
        rows1: On the left.
        rows2: On the right.
        diagonal: Whether only rows of equal index are multiplied: `[n1, n2, k]`, else `[n1, n2, k, k]`.
        at_a_time: How many columns are converted at a time.
    """
    (n1, k, size), n2 = rows1.shape, rows2.shape[0]
    formula, shape = ("ikp,jkp->kij", (k, n1, n2)) if diagonal else ("iap,jbp->iajb", (n1, k, n2, k))

    def add(begin: Array | int, columns: int, total: Array) -> Array:
        some = [jax.lax.dynamic_slice_in_dim(rows, begin, columns, axis=2) for rows in (rows1, rows2)]
        return total + jnp.einsum(formula, *(part.astype(jnp.float64) for part in some), precision="highest")

    total = over_slabs(size, at_a_time, add, jnp.zeros(shape, jnp.float64))
    return total.transpose(1, 2, 0) if diagonal else total.transpose(0, 2, 1, 3)


Held = tuple[list[Array], np.ndarray | Array]
"""Rows of J as the passes gave them, and where among them the wanted examples stand; out of range for zero."""


@functools.partial(jax.jit, static_argnames=("diagonal",), donate_argnames=("total",))
def _add_gram(total: Array, left: Held, right: Held | None, diagonal: bool) -> Array:
    """Adds the products of some columns of J; without `right`, of those on the left with themselves."""
    rows1, *others = (
        jnp.take(jnp.concatenate(parts), where, axis=0, mode="fill", fill_value=0)
        for parts, where in ([left] if right is None else [left, right])
    )
    rows2 = others[0] if others else rows1
    at_a_time = max(COPIED_COLUMNS, COPIED_NUMBERS // (max(len(rows1), len(rows2)) * rows1.shape[1]))
    return total + summed_gram(rows1, rows2, diagonal=diagonal, at_a_time=at_a_time)


@functools.partial(jax.jit, donate_argnames=("total",))
def _symmetric(total: Array) -> Array:
    """The same without rounding's asymmetry."""
    return (total + total.transpose((1, 0, *range(2, total.ndim)[::-1]))) / 2


def gram_on_device(
    leaves: Iterable[Shaped[np.ndarray, "N C _"]], num_rows: int, num_outputs: int
) -> Float[np.ndarray, "N N C C"]:
    """Returns `J Jᵀ` of Jacobians that the host holds, a leaf on the device at a time.

    Args:
        leaves: Rows of J by leaf.
        num_rows: N.
        num_outputs: C.
    """
    with jax.enable_x64(True):
        total = jnp.zeros((num_rows, num_rows, num_outputs, num_outputs))
        for rows in leaves:
            total = _add_gram(total, ([jnp.asarray(rows)], np.arange(num_rows)), None, diagonal=False)
        return np.asarray(_symmetric(total))


@functools.partial(jax.jit, static_argnames=("width", "dtype"))
def slab_of_columns(x: Array, delta: Array, start: Array, width: int, dtype: Any) -> Float[Array, "n k size"]:
    """Derivatives of some examples with respect to `width` rows of a dense kernel from `start`."""
    n, k, d_out = len(x), delta.shape[1], delta.shape[-1]
    some = jax.lax.dynamic_slice_in_dim(x.reshape(n, -1, x.shape[-1]), start, width, axis=2).astype(dtype)
    flowed = delta.reshape(n, k, -1, d_out).astype(dtype)
    return jnp.einsum("nti,nkto->nkio", some, flowed, precision="highest").reshape(n, k, -1)


@functools.partial(jax.jit, static_argnames=("width", "dtype"))
def slab_of_words(ids: Array, delta: Array, start: Array, width: int, dtype: Any) -> Float[Array, "n k size"]:
    """Derivatives of some examples with respect to `width` rows of an embedding from `start`."""
    n, k, d = len(ids), delta.shape[1], delta.shape[-1]
    read = ids.reshape(n, -1) - start
    elsewhere = (read < 0) | (read >= width)
    flowed = delta.reshape(n, k, -1, d).swapaxes(1, 2).astype(dtype)
    rows = jnp.zeros((n, width, k, d), dtype)
    found = rows.at[jnp.arange(n)[:, None], jnp.where(elsewhere, width, read)].add(flowed, mode="drop")
    return found.swapaxes(1, 2).reshape(n, k, -1)


class DeviceDerivatives(Derivatives):
    """Derivatives, not of signs, that are formed and multiplied on the device, except for embeddings."""

    def tile(self, paths: Sequence[str], left: range, right: range, slab_bytes: int) -> Array | np.ndarray:
        """Returns the kernel of some leaves and examples, in the shape of its kind, float64."""
        words = [path for path in paths if path in self.sites and self.sites[path].factored == "embedding"]
        if len(words) == len(paths):
            return super().tile(paths, left, right, slab_bytes)
        shape = (len(left), len(right)) + ((self.k,) if self.kind.diagonal else (self.k, self.k))
        mirrored = self.last is self.first and left == right
        with jax.enable_x64(True):
            total = jnp.zeros(shape)
            for path in paths:
                if path not in words:
                    for parts in self._formed(path, [left] if mirrored else [left, right], slab_bytes):
                        total = _add_gram(total, parts[0], None if mirrored else parts[1], self.kind.diagonal)
            found = self.kind.finish(_symmetric(total) if mirrored else total)
        return np.asarray(found) + super().tile(words, left, right, slab_bytes) if words else found

    def _formed(self, path: str, sides: Sequence[range], slab_bytes: int) -> Iterator[list[Held]]:
        """Yields the derivatives of each side with respect to a leaf, some of its rows at a time where it is large."""
        site, dtype = self.sites.get(path), summed_in(self.dtype)
        names = (path,) if site is None else site.names
        held = [_held(rows, names, side) for rows, side in zip((self.first, self.last), sides, strict=False)]
        if not all(chunks for chunks, _ in held):
            return
        if site is None:
            yield [([part for (part,) in chunks], where) for chunks, where in held]
            return
        d_in, d_out = site.inputs[-1], site.outputs[-1]
        width = rows_of_a_slab(d_in, slab_bytes, np.dtype(dtype).itemsize * self.k * d_out * sum(map(len, sides)))
        for start in range(0, d_in, width):
            size = min(width, d_in - start)
            yield [([slab_of_columns(*chunk, start, size, dtype) for chunk in chunks], where) for chunks, where in held]


def _held(rows: Rows, names: tuple[str, ...], side: range) -> tuple[list[tuple[Array, ...]], np.ndarray]:
    """The chunks that hold the examples of a side, on the device, and where those stand in them."""
    chunks, examples, places, count = [], [], [], 0
    for some, first, arrays in rows.chunks(names, side.start, side.stop):
        # asarray of what is there already takes longer than to look.
        chunks.append(tuple(array if isinstance(array, jax.Array) else jnp.asarray(array) for array in arrays))
        examples.append(some - side.start)
        places.append(count + first + np.arange(len(some)))
        count += len(arrays[0])
    where = np.full(len(side), count)
    if chunks:
        where[np.concatenate(examples)] = np.concatenate(places)
    return chunks, where
