"""Kernels tile by tile: derivatives of one leaf for some examples at a time, and their products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from jaxlin.ntk.factored import Factors, Site, columns, readers, summed_in
from jaxlin.ntk.jacobian import gram, gram_of_equal
from jaxlin.ntk.kinds import Kind, signs, thresholds
from jaxlin.ntk.rows import Rows

Slab = tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Some rows of a leaf; the examples on the left that they matter to, `[n]`, and their derivatives `[n, k, size]`; the
same on the right. Examples are counted from the first of the range."""

_FORMED, _ENTRY = 1.5, 64
"""What a multiply-add in forming derivatives costs, where memory is what bounds it, and what a product of two products
of tokens does, in multiply-adds of a large product in float64; by the lengths at which the two ways take as long."""


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
        site = self.sites.get(path)
        if site is None:
            rows1 = self.first.stacked(path, left.start, left.stop)
            rows2 = rows1 if self._same(left, right) else self.last.stacked(path, right.start, right.stop)
            if rows1 is not None and rows2 is not None:
                yield slice(None), np.arange(len(left)), rows1, np.arange(len(right)), rows2
            return
        factors1, factors2 = self._factors(site, left, right)
        if site.factored == "embedding":
            yield from self._words(site, factors1, left.start, factors2, right.start)
        else:
            yield from self._columns(site, factors1, left, factors2, right, slab_bytes)

    def _same(self, left: range, right: range) -> bool:
        return self.last is self.first and left == right

    def _factors(self, site: Site, left: range, right: range) -> tuple[Mapping, Mapping]:
        """The factors of both sides; one object where they are the same."""
        factors = dict(self.first.read(site.names, left.start, left.stop))
        if self._same(left, right):
            return factors, factors
        return factors, dict(self.last.read(site.names, right.start, right.stop))

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
        width = slab_width(site, self.k, sum(len(side) for _, side in sides), self.dtype, slab_bytes)
        sizes = [len(side) * self.k * width * d_out for _, side in sides]
        if len(self._buffer) < sum(sizes):
            self._buffer = np.empty(sum(sizes), summed_in(self.dtype))
        starts = (0, sizes[0])
        out = [
            self._buffer[start : start + size].reshape(len(side), self.k, -1)
            for start, size, (_, side) in zip(starts, sizes, sides, strict=False)
        ]
        for start in range(0, d_in, width):
            stop = min(start + width, d_in)
            rows = [
                columns(factors, d_out, start, stop, side.start, into)
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
            site = self.sites.get(path)
            if site is not None and site.factored != "embedding" and not self.kind.of_signs:
                factors1, factors2 = self._factors(site, left, right)
                if by_tokens(site, self.k, self.kind.diagonal, factors1, factors2, slab_bytes):
                    _add_by_tokens(total, self.kind.diagonal, factors1, left.start, factors2, right.start)
                else:
                    for _, _, rows1, _, rows2 in self._columns(site, factors1, left, factors2, right, slab_bytes):
                        total += product(rows1, rows2)
                continue
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


def slab_width(site: Site, k: int, examples: int, dtype: np.dtype, slab_bytes: int) -> int:
    """Returns how many rows of a dense kernel are differentiated at a time, for the examples of both sides."""
    one = np.dtype(summed_in(dtype)).itemsize * k * site.outputs[-1] * examples
    return int(np.clip(slab_bytes // one, 1, site.inputs[-1]))


def multiply_adds(
    site: Site, k: int, diagonal: bool, examples: Sequence[int], tokens: Sequence[int], *, same: bool, slab_bytes: int
) -> tuple[bool, float]:
    """Finds the faster way to the product of a dense module's derivatives, and what it takes.

    Products of activations and cotangents take less than those of derivatives for short texts: they grow with the
    square of the tokens, and not with the size of the kernel.

    Args:
        site: The module.
        k: Rows of J an example.
        diagonal: Whether only rows of equal index are multiplied.
        examples: How many there are on the left and on the right.
        tokens: Of all of these together.
        same: Whether those are the same examples.
        slab_bytes: That derivatives, or products of tokens, may take.

    Returns:
        Whether tokens are to be multiplied, and the cost in multiply-adds of a large product in float64.
    """
    d_in, d_out = site.inputs[-1], site.outputs[-1]
    (n1, n2), (tokens1, tokens2) = examples, tokens
    pairs, half = k if diagonal else k**2, 2 if same else 1
    formed = _FORMED * k * (tokens1 if same else tokens1 + tokens2) * d_in * d_out
    multiplied = pairs * n1 * n2 * d_in * d_out / half
    of_tokens = tokens1 * tokens2 * (d_in + pairs * d_out + _ENTRY * pairs) / half
    held = 24 * tokens1 * tokens2 + 12 * (tokens1 + tokens2) * (d_in + k * d_out)
    if of_tokens < formed + multiplied and held <= slab_bytes:
        return True, of_tokens
    return False, formed + multiplied


def by_tokens(site: Site, k: int, diagonal: bool, factors1: Factors, factors2: Factors, slab_bytes: int) -> bool:
    """Returns whether the products of tokens are the faster way; one object twice for examples with themselves."""
    both = (factors1, factors2)
    tokens = [sum(x.size // site.inputs[-1] for x, _ in factors.values()) for factors in both]
    same = factors2 is factors1
    return multiply_adds(site, k, diagonal, [*map(len, both)], tokens, same=same, slab_bytes=slab_bytes)[0]


def _add_by_tokens(
    total: np.ndarray, diagonal: bool, factors1: Factors, start1: int, factors2: Factors, start2: int
) -> None:
    """Adds `Σ_{t,s} (x_{it}·x_{js})(δ_{iat}·δ_{jbs})` to the tile, in float64: no derivative is formed."""
    if not (factors1 and factors2):
        return
    mirrored = factors2 is factors1
    x1, delta1, begins1, there1 = _tokens(factors1)
    x2, delta2, begins2, there2 = (x1, delta1, begins1, there1) if mirrored else _tokens(factors2)
    where = np.ix_(there1 - start1, there2 - start2)
    similar = x1 @ x2.T
    for a, b in np.ndindex(len(delta1), len(delta2)):
        if (diagonal and a != b) or (mirrored and a > b):
            continue
        products = delta1[a] @ delta2[b].T
        products *= similar
        found = np.add.reduceat(np.add.reduceat(products, begins2, axis=1), begins1, axis=0)
        if diagonal:
            total[(*where, a)] += (found + found.T) / 2 if mirrored else found
        elif a == b and mirrored:
            total[(*where, a, b)] += (found + found.T) / 2
        else:
            total[(*where, a, b)] += found
            if mirrored:
                total[(*where, b, a)] += found.T


def _tokens(factors: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Activations `[tokens, d_in]`, cotangents `[k, tokens, d_out]`, where each example's begin, and which they are."""
    xs = [x.reshape(-1, x.shape[-1]) for x, _ in factors.values()]
    deltas = [delta.reshape(len(delta), len(x), -1) for x, (_, delta) in zip(xs, factors.values(), strict=True)]
    begins = np.cumsum([0, *map(len, xs[:-1])])
    x, delta = np.concatenate(xs).astype(np.float64), np.concatenate(deltas, axis=1).astype(np.float64)
    return x, delta, begins, np.array(list(factors))


def _stacked(found: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Examples, ascending, and their derivatives."""
    examples, derivatives = zip(*sorted(found, key=lambda pair: pair[0]), strict=True)
    return np.array(examples), np.stack(derivatives)


def transposed(tile: np.ndarray) -> np.ndarray:
    """Returns a tile with its examples swapped, and its outputs where it has two."""
    return tile.transpose(1, 0, 3, 2) if tile.ndim == 4 else tile.swapaxes(0, 1)
