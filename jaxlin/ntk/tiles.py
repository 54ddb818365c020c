"""Kernels tile by tile: derivatives of one leaf for some examples at a time, and their products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from jaxlin.ntk.factored import Site, columns, readers, summed_in
from jaxlin.ntk.jacobian import gram, gram_of_equal
from jaxlin.ntk.kinds import Kind, signs, thresholds
from jaxlin.ntk.rows import Rows

Slab = tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Some rows of a leaf; the examples on the left that they matter to, `[n]`, and their derivatives `[n, k, size]`; the
same on the right. Examples are counted from the first of the range."""

_CACHED_BYTES, _SLAB_ROWS = 1 << 26, 64


@dataclasses.dataclass(eq=False)
class Derivatives:
    """Rows of the Jacobians of two data sets, formed leaf by leaf from what the passes gave.

    Attributes:
        first: Of the rows of the kernel.
        last: Of its columns; the same object for examples with themselves.
        sites: Path of a leaf whose derivatives are kept as factors, to its module.
        k: Rows of J an example.
        kind: Of the kernel.
        dtype: That J was computed in.
    """

    first: Rows
    last: Rows
    sites: Mapping[str, Site]
    k: int
    kind: Kind
    dtype: np.dtype
    _buffer: np.ndarray = dataclasses.field(init=False, repr=False, default_factory=lambda: np.empty(0))

    def slabs(self, path: str, left: range, right: range, slab_bytes: int) -> Iterator[Slab]:
        """Yields the derivatives with respect to a leaf, some of its rows at a time where it is large."""
        same = self.last is self.first and left == right
        site = self.sites.get(path)
        if site is None:
            rows1 = self.first.stacked(path, left.start, left.stop)
            rows2 = rows1 if same else self.last.stacked(path, right.start, right.stop)
            if rows1 is not None and rows2 is not None:
                yield slice(None), np.arange(len(left)), rows1, np.arange(len(right)), rows2
            return
        factors1 = dict(self.first.read(site.names, left.start, left.stop))
        factors2 = factors1 if same else dict(self.last.read(site.names, right.start, right.stop))
        if site.factored == "embedding":
            yield from self._words(site, factors1, left.start, factors2, right.start)
        else:
            yield from self._columns(site, factors1, left, factors2, right, slab_bytes)

    def _words(self, site: Site, factors1: Mapping, start1: int, factors2: Mapping, start2: int) -> Iterator[Slab]:
        """One word at a time: only examples that hold it have a derivative with respect to its embedding."""
        mine = readers(factors1)
        others = mine if factors2 is factors1 else readers(factors2)
        # A word of one side only has no product; it has a say in what counts as 0, though.
        words = mine.keys() | others.keys() if self.kind.of_signs else mine.keys() & others.keys()
        for word in sorted(words):
            nobody = [(start1, np.zeros((self.k, site.outputs[-1])))]
            examples1, rows1 = _stacked(mine.get(word, nobody))
            nobody = [(start2, nobody[0][1])]
            examples2, rows2 = (examples1, rows1) if others is mine else _stacked(others.get(word, nobody))
            yield slice(word, word + 1), examples1 - start1, rows1, examples2 - start2, rows2

    def _columns(
        self, site: Site, factors1: Mapping, left: range, factors2: Mapping, right: range, slab_bytes: int
    ) -> Iterator[Slab]:
        """Some rows of a dense kernel at a time."""
        d_in, d_out = site.inputs[-1], site.outputs[-1]
        sides = [(factors1, left)] if factors2 is factors1 else [(factors1, left), (factors2, right)]
        dtype = summed_in(self.dtype)
        one = np.dtype(dtype).itemsize * self.k * d_out * sum(len(side) for _, side in sides)
        # No more at a time than a cache holds, unless products of few rows would be slow.
        width = int(np.clip(min(slab_bytes, max(_CACHED_BYTES, _SLAB_ROWS * one)) // one, 1, d_in))
        sizes = [len(side) * self.k * width * d_out for _, side in sides]
        if len(self._buffer) < sum(sizes):
            self._buffer = np.empty(sum(sizes), dtype)
        starts = (0, sizes[0])
        out = [
            self._buffer[start : start + size].reshape(len(side), self.k, -1)
            for start, size, (_, side) in zip(starts, sizes, sides, strict=False)
        ]
        for start in range(0, d_in, width):
            stop = min(start + width, d_in)
            rows = [
                columns(site, factors, start, stop, side.start, into)
                for (factors, side), into in zip(sides, out, strict=True)
            ]
            yield slice(start, stop), np.arange(len(left)), rows[0], np.arange(len(right)), rows[-1]

    def release(self) -> None:
        """Gives back the memory that derivatives of large leaves are formed in."""
        self._buffer = np.empty(0)

    def tile(self, paths: Sequence[str], left: range, right: range, slab_bytes: int) -> np.ndarray | jax.Array:
        """Returns the kernel of some leaves and examples, in the shape of its kind, float64."""
        shape = (len(left), len(right)) + ((self.k,) if self.kind.diagonal else (self.k, self.k))
        product, total = gram_of_equal if self.kind.diagonal else gram, np.zeros(shape)
        for path in paths:
            for _, examples1, rows1, examples2, rows2 in self.rows(path, left, right, slab_bytes):
                if len(examples1) == len(left) and len(examples2) == len(right):
                    total += product(rows1, rows2)
                else:
                    total[np.ix_(examples1, examples2)] += product(rows1, rows2)
        return self.kind.finish(total)

    def rows(self, path: str, left: range, right: range, slab_bytes: int) -> Iterator[Slab]:
        """Yields what enters the kernel of a leaf: its derivatives, or signs in their place where the kind says so."""
        if not self.kind.of_signs:
            yield from self.slabs(path, left, right, slab_bytes)
            return
        if self.kind.without_sign(path):
            return
        largest = [np.zeros((len(side), self.k)) for side in (left, right)]
        # What counts as 0 depends on a row's largest entry, so a large leaf is formed twice.
        for _, *sides in self.slabs(path, left, right, slab_bytes):
            for found, examples, rows in zip(largest, sides[::2], sides[1::2], strict=True):
                found[examples] = np.maximum(found[examples], np.abs(rows).max(axis=-1))
        limits = [thresholds(found, self.dtype) for found in largest]
        for some, examples1, rows1, examples2, rows2 in self.slabs(path, left, right, slab_bytes):
            signed1 = signs(rows1, limits[0][examples1]) if self.kind.signs[0] else rows1
            if rows2 is rows1 and self.kind.symmetric:
                signed2 = signed1
            else:
                signed2 = signs(rows2, limits[1][examples2]) if self.kind.signs[1] else rows2
            yield some, examples1, signed1, examples2, signed2


def _stacked(found: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Examples, ascending, and their derivatives."""
    examples, derivatives = zip(*sorted(found, key=lambda pair: pair[0]), strict=True)
    return np.array(examples), np.stack(derivatives)


def transposed(tile: np.ndarray) -> np.ndarray:
    """Returns a tile with its examples swapped, and its outputs where it has two."""
    return tile.transpose(1, 0, 3, 2) if tile.ndim == 4 else tile.swapaxes(0, 1)
