"""Tunables of Flax NNX modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from jaxlin.errors import InputError
from jaxlin.tunable import Batch, Tunable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NnxFunction:
    """`(theta, batch) -> outputs` of an NNX module; what is not in theta is a leaf.

    Attributes:
        rest: State of everything that is not tuned.
        graph: The module's graph definition.
        tuned: Tree definition of the state that is tuned.
        order: For each leaf of that state, its place among the leaves of theta.
        call: `call(module, batch)`; `None`: `module(batch)`.
    """

    rest: PyTree
    graph: Any = dataclasses.field(metadata={"static": True})
    tuned: Any = dataclasses.field(metadata={"static": True})
    order: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    call: Callable[[Any, Batch], Array] | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns the module's outputs `[B, C]`; changes that the call makes to the module's state are dropped."""
        leaves = jax.tree.leaves(theta)
        state = jax.tree.unflatten(self.tuned, [leaves[i] for i in self.order])
        module = nnx.merge(self.graph, state, self.rest)
        return module(batch) if self.call is None else self.call(module, batch)


def from_nnx(module: nnx.Module, wrt: Any = nnx.Param, call: Callable[[Any, Batch], Array] | None = None) -> Tunable:
    """Makes a `Tunable` of a Flax NNX module.

    Args:
        module: The module, in evaluation mode (`module.eval()`), treating examples independently.
        wrt: An NNX filter for what is tuned: a variable type (`nnx.Param`, `nnx.LoRAParam`), a path filter, a
            predicate of path and value.
        call: `call(module, batch) -> outputs [B, C]`; `None` if the module takes the batch, a dict of arrays.

    Returns:
        A Tunable whose theta is the nested dict of what `wrt` selects; everything else of the module is frozen.

    Raises:
        InputError: If the filter selects nothing, or something that is not floating point.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp, jaxlin as jl
        >>> net = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> tun = jl.from_nnx(net, call=lambda module, batch: module(batch["x"]))
        >>> tun.apply(tun.theta0, {"x": jnp.ones((3, 4))}).shape, sorted(tun.theta0)
        ((3, 2), ['bias', 'kernel'])
    """
    graph, *states = nnx.split(module, wrt, ...)
    tuned, rest = states
    leaves, structure = jax.tree.flatten(tuned)
    if not leaves:
        raise InputError(f"the filter {wrt!r} selects nothing of the {type(module).__name__}")
    wrong = [leaf.dtype for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if wrong:
        raise InputError(f"the filter {wrt!r} selects leaves of dtype {wrong[0]}; expected floating point")
    numbered = nnx.to_pure_dict(jax.tree.unflatten(structure, range(len(leaves))))
    places = jax.tree.leaves(numbered)
    theta = jax.tree.map(lambda i: jnp.asarray(leaves[i]), numbered)
    order = tuple(places.index(i) for i in range(len(leaves)))
    return Tunable(NnxFunction(rest, graph, structure, order, call), theta)
