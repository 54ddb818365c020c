"""Kernels from what every module read and what flowed back to it, so that no large Jacobian is ever held.

The derivative of one output with respect to a dense module's weight is `xᵀ δ`, x the module's input and δ the
output's cotangent at the module. One forward and C backward passes give x and δ of every module with tuned parameters,
all examples of a chunk at once. Small derivatives (LoRA factors, biases, norms) are formed there and then; of a large
weight x and δ are kept, and `xᵀ δ` is formed for some of its columns at a time, only to enter the Gram matrix; or, of
short texts, not even that: `⟨xᵀδ, x′ᵀδ′⟩ = Σ (x_t·x′_s)(δ_t·δ′_s)` over their tokens t and s.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.models.encoder import set_remat
from jaxlin.ntk.threads import in_parallel, num_threads, split
from jaxlin.peft.function import PeftFunction
from jaxlin.tunable import ADAPTER_NAMES, Batch, Tunable, leaf_paths


@dataclasses.dataclass(frozen=True)
class Site:
    """A module that owns tuned parameters and is called once.

    Attributes:
        path: Of the module.
        module: The module, unbound.
        rows: Names of its leaves whose derivatives are formed in the pass.
        factored: Name of its leaf whose derivative is kept as input and cotangent, if any.
        inputs: Shape of its input, without the example.
        outputs: Shape of its output, likewise.
        source: Name of the first call that reads the same array: the path of its module, numbered if called again.
        idle: Whether its adapters change nothing where the derivatives are taken (LoRA's B is zero), so that the
            pass runs without them.
    """

    path: str
    module: nn.Module
    rows: tuple[str, ...]
    factored: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: str
    idle: bool = False

    def leaf(self, name: str) -> str:
        """Path of one of its leaves."""
        return f"{self.path}/{name}".lstrip("/")

    @property
    def names(self) -> tuple[str, str]:
        """Names of what it read, one for all sites that read the same, and of the cotangents at it."""
        return f"{self.source}:input", f"{self.path}:cotangent"

    def numbers(self, k: int) -> int:
        """How many numbers its input and k cotangents are, an example."""
        return math.prod(self.inputs) + k * math.prod(self.outputs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a module: the module, its arguments' and its result's shapes, and who first read the same array."""

    module: nn.Module
    given: Any
    out: Any
    source: str

    @property
    def is_plain(self) -> bool:
        """Whether it maps one array to one array, examples first."""
        if self.given is None or not hasattr(self.out, "shape"):
            return False
        args, kwargs = self.given
        if len(args) != 1 or kwargs or not hasattr(args[0], "shape"):
            return False
        # The examples of a batch of two, or what they share, such as positions.
        return args[0].shape[:1] == self.out.shape[:1] and self.out.shape[0] in (1, 2)


def _kept(apply: PeftFunction) -> PeftFunction:
    """The same function without rematerialised layers: what modules read in those cannot be had from outside."""
    return dataclasses.replace(apply, module=set_remat(apply.module, False))


def _types(tree: Any) -> Any:
    """Arrays as their types; what else a method may take or return, as it is."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf) if hasattr(leaf, "shape") else leaf, tree)


def _traced_calls(apply: PeftFunction, theta: PyTree, batch: Batch) -> dict[str, list[_Call]]:
    """Every call of every module, by path."""
    calls: dict[str, list[_Call]] = {}
    readers: list[tuple[Any, str]] = []

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kwargs)
        if context.method_name == "setup":
            return out
        path, given = "/".join(context.module.path), None
        if context.method_name == "__call__":
            given = _types((args, kwargs))
            reader = f"{path}#{len(calls[path])}" if path in calls else path  # such as a dropout called again
            readers.append((args[0] if args else None, reader))
        source = next((other for x, other in readers if args and x is args[0]), path)
        call = _Call(context.module.clone(parent=None), given, _types(out), source)
        calls.setdefault(path, []).append(call)
        return out

    def traced(apply: PeftFunction, theta: PyTree, batch: Batch) -> Array:
        with nn.intercept_methods(record):  # around that of the adapters: it sees what they make of a module
            return apply(theta, batch)

    jax.eval_shape(traced, apply, theta, batch)
    return calls


def _used_elsewhere(apply: PeftFunction, theta: PyTree, batch: Batch, outputs: Mapping[str, Any]) -> set[str]:
    """Paths of leaves of theta that matter beside the calls of the modules in `outputs` (tied weights)."""

    def without(theta: PyTree, apply: PeftFunction, batch: Batch, stand_ins: Mapping[str, Array]) -> Array:
        def replace(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = "/".join(context.module.path)
            replaced = context.method_name == "__call__" and path in stand_ins
            return stand_ins[path] if replaced else next_fun(*args, **kwargs)

        params, _ = apply.variables(theta)
        with nn.intercept_methods(replace):
            return apply.module.apply({"params": unflatten_dict(params, sep="/")}, batch)

    traced = jax.make_jaxpr(without)(theta, apply, batch, dict(outputs)).jaxpr
    used = {id(var) for eqn in traced.eqns for var in eqn.invars} | {id(var) for var in traced.outvars}
    own = traced.invars[: len(jax.tree.leaves(theta))]
    return {path for path, var in zip(leaf_paths(theta), own, strict=True) if id(var) in used}


@functools.lru_cache(maxsize=64)
def _owners(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> dict[str, _Call]:
    """Returns the call of every module that owns tuned parameters, in order.

    Of shapes alone, so that it is kept: tracing a model takes a while.

    Raises:
        InputError: As `find_sites`.
    """
    apply, theta, batch = jax.tree.unflatten(structure, shapes)
    traced = jax.make_jaxpr(lambda *given: given[0](*given[1:]))(apply, theta, batch)
    if any(eqn.primitive.name in ("remat2", "checkpoint") for eqn in traced.jaxpr.eqns):  # the name has changed
        raise InputError(
            'engine="factored" does not see into modules under nn.remat or jax.checkpoint; use engine="jacobian"'
        )
    calls = _traced_calls(apply, theta, batch)
    owners = {path.rpartition("/")[0] for path in leaf_paths(theta)}
    for path in sorted(owners):
        met = calls.get(path, [])
        if len(met) != 1 or not met[0].is_plain:
            what = f"{len(met)} times" if len(met) != 1 else "with other than one array, examples first"
            raise InputError(
                f'engine="factored" needs {path or "the module"}, which owns tuned parameters, to be called once on '
                f'one array; it is called {what}; use engine="jacobian"'
            )
    elsewhere = _used_elsewhere(apply, theta, batch, {path: calls[path][0].out for path in owners})
    if elsewhere:
        raise InputError(
            f'{min(elsewhere)} is used outside of its module\'s call, which engine="factored" does not see; use '
            'engine="jacobian"'
        )
    return {path: met[0] for path, met in calls.items() if path in owners}


def _own_dtype(call: _Call, x: Any, frozen: Mapping[str, Array], path: str) -> Any:
    """The dtype of a dense module's output without adapters, which may promote it."""
    declared = getattr(call.module, "dtype", None)
    kernel = frozen.get(f"{path}/kernel")
    return declared or (None if kernel is None else jnp.result_type(x.dtype, kernel.dtype))


def _is_zero(leaf: Any) -> bool:
    """Whether it is known to be zero everywhere: what is split over processes is not known."""
    known = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return known and not np.any(leaf)


def find_sites(tun: Tunable, data: Dataset, theta: PyTree, k: int) -> tuple[Site, ...]:
    """Finds the modules that own the tuned parameters, in the order of their calls.

    LoRA's A is left out where B is zero: its derivative is exactly zero there.

    Args:
        tun: The model.
        data: The examples.
        theta: Where the derivatives are taken.
        k: How many rows of the Jacobian an example has.

    Returns:
        The sites; together they own every tuned leaf whose derivative is not left out.

    Raises:
        InputError: If `tun` was not made of a `Model`, or a tuned leaf does not belong to a module that is called
            once on one array, examples first.
    """
    if not isinstance(tun.apply, PeftFunction):
        given = type(tun.apply).__name__
        raise InputError(f'engine="factored" needs a Tunable made of a Model; its apply is a {given}')
    apply = _kept(tun.apply)
    batch = data.batch(np.array([0 if data.lengths is None else np.argmax(data.lengths)]), 2)
    leaves, structure = jax.tree.flatten((apply, theta, batch))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf)) for leaf in leaves)
    tuned, frozen = (flatten_dict(tree, sep="/") for tree in (theta, apply.frozen))
    owned: dict[str, list[str]] = {}
    for leaf in tuned:
        module, _, name = leaf.rpartition("/")
        owned.setdefault(module, []).append(name)
    sites = []
    for path, call in _owners(structure, shapes).items():
        names = sorted(owned[path])
        adapters = {name for name in ADAPTER_NAMES for leaves in (tuned, frozen) if f"{path}/{name}" in leaves}
        without_effect = "lora_B" in names and _is_zero(tuned[f"{path}/lora_B"])
        if without_effect:
            names = [name for name in names if name != "lora_A"]
        (x,), _ = call.given
        promoted = _own_dtype(call, x, frozen, path) != call.out.dtype
        idle = without_effect and adapters == {"lora_A", "lora_B"} and not promoted
        site = Site(path, call.module, tuple(names), None, x.shape[1:], call.out.shape[1:], call.source, idle)
        large = {nn.Dense: "kernel", nn.Embed: "embedding"}.get(type(call.module))
        if large is not None and large in names and not adapters and site.numbers(k) < k * tuned[site.leaf(large)].size:
            site = dataclasses.replace(site, rows=tuple(name for name in names if name != large), factored=large)
        if site.rows or site.factored:
            sites.append(site)
    return tuple(sites)


@functools.partial(jax.jit, static_argnames=("sites", "at_a_time"))
def derivatives_and_factors(
    apply: PeftFunction,
    theta: PyTree,
    batch: Batch,
    seeds: Float[Array, "k C"],
    sites: tuple[Site, ...],
    wanted: int | np.integer | Array,
    at_a_time: int,
) -> dict[str, Array]:
    """Returns what one pass gives, with the example on every leading axis.

    The examples go through the network a few at a time, within one program: its temporary memory, which XLA asks the
    system for anew at each call, is then used again.

    Args:
        apply: The model.
        theta: Where.
        batch: The examples.
        seeds: Output cotangents that are pulled back.
        sites: As `find_sites` found them.
        wanted: How many of the examples; what comes of the others is not defined.
        at_a_time: Examples that the network works on together; it divides the batch's size, or is not less.

    Returns:
        Small derivatives `[B, k, size]` by the path of their leaf; of sites with a large one, what the module read
        `[B, …]` and the cotangents at it `[B, k, …]`, by `Site.names`.
    """
    size = next(iter(batch.values())).shape[0]
    if at_a_time >= size:
        return _together(apply, theta, batch, seeds, sites)

    @jax.jit  # so that the network is traced once
    def part(start: Array) -> dict[str, Array]:
        some = {name: jax.lax.dynamic_slice_in_dim(value, start, at_a_time) for name, value in batch.items()}
        return _together(apply, theta, some, seeds, sites)

    def add(i: Array, found: dict[str, Array]) -> dict[str, Array]:
        start = i * at_a_time
        new = part(start)
        return {name: jax.lax.dynamic_update_slice_in_dim(found[name], new[name], start, 0) for name in found}

    first = jnp.zeros_like(wanted)
    shapes = jax.eval_shape(part, first)
    found = {name: jnp.zeros((size, *shape.shape[1:]), shape.dtype) for name, shape in shapes.items()}
    return jax.lax.fori_loop(first, (wanted + at_a_time - 1) // at_a_time, add, found)


def _together(
    apply: PeftFunction, theta: PyTree, batch: Batch, seeds: Float[Array, "k C"], sites: tuple[Site, ...]
) -> dict[str, Array]:
    """What one forward and k backward passes give for all examples of a batch at once."""
    size = next(iter(batch.values())).shape[0]
    network = _without_adapters(_kept(apply), theta, {site.path for site in sites if site.idle})

    def outputs_and_inputs(taps: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        inputs: dict[str, Array] = {}

        def tap(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out, path = next_fun(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or path not in taps:
                return out
            # One array where modules read the same: what is kept of it is then kept once.
            inputs[path] = args[0] if args[0].shape[0] == size else jnp.repeat(args[0], size, axis=0)
            return out + taps[path]  # one row an example, also where they share the output

        with nn.intercept_methods(tap):
            return network[0](network[1], batch), inputs

    calls = _traced_calls(*network, batch)
    shapes = {site.path: calls[site.path][0].out for site in sites}
    taps = {path: jnp.zeros((size, *shape.shape[1:]), shape.dtype) for path, shape in shapes.items()}
    outputs, pullback, inputs = jax.vjp(outputs_and_inputs, taps, has_aux=True)
    k, c = seeds.shape
    along = jnp.broadcast_to(seeds.astype(outputs.dtype)[:, None], (k, size, c))
    (cotangents,) = jax.vmap(pullback)(along)
    params, adapters = apply.variables(theta)
    leaves = {**params, **adapters}
    found: dict[str, Array] = {}
    for site in sites:
        own = {path.rpartition("/")[2]: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] == site.path}
        if site.rows:
            one = functools.partial(_small_derivatives, apply, site, own)
            for name, derivative in jax.vmap(one, in_axes=(0, 1))(inputs[site.path], cotangents[site.path]).items():
                found[site.leaf(name)] = derivative.reshape(size, k, -1)
        if site.factored:
            x, delta = site.names
            found[x], found[delta] = inputs[site.path], cotangents[site.path].swapaxes(0, 1)
    return found


def _without_adapters(apply: PeftFunction, theta: PyTree, modules: set[str]) -> tuple[PeftFunction, PyTree]:
    """Returns the function and its argument without the adapters of some modules."""

    def stays(path: str) -> bool:
        module, _, name = path.rpartition("/")
        return module not in modules or name not in ADAPTER_NAMES

    def kept(tree: PyTree) -> PyTree:
        flat = flatten_dict(tree, sep="/")
        return unflatten_dict({path: leaf for path, leaf in flat.items() if stays(path)}, sep="/")

    return dataclasses.replace(apply, frozen=kept(apply.frozen)), kept(theta)


def _small_derivatives(
    apply: PeftFunction, site: Site, own: Mapping[str, Array], x: Array, delta: Array
) -> dict[str, Array]:
    """Derivatives `[k, …]` of one example's outputs with respect to the small leaves of a site."""
    found, names = {}, site.rows
    if site.idle:
        # By hand, and by `map`: the forms of vjp and of vmap would transpose all of delta.
        inner = (dict(apply.scales).get(site.path, 1.0) * (x @ own["lora_A"])).reshape(-1, own["lora_A"].shape[1])
        found["lora_B"] = jax.lax.map(lambda d: inner.T @ d.reshape(len(inner), -1), delta)
        names = tuple(name for name in names if name != "lora_B")

    def local(small: Mapping[str, Array]) -> Array:
        return apply.module_output(site.path, site.module, {**own, **small}, x[None])[0]

    _, back = jax.vjp(local, {name: own[name] for name in names})
    return {**found, **jax.vmap(lambda d: back(d)[0])(delta)}


def summed_in(dtype: np.dtype) -> type[np.floating]:
    """Returns the dtype that products of activations and cotangents are summed in: at least float32."""
    return np.float64 if dtype == np.float64 else np.float32


Factors = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""Example to what a module read and the cotangents `[k, …]` at it."""


def columns(factors: Factors, d_out: int, start: int, stop: int, first: int, out: np.ndarray) -> np.ndarray:
    """Forms derivatives with respect to some rows of a dense kernel.

    Args:
        factors: Of the examples.
        d_out: Size of a row of the kernel.
        start: First row of the kernel.
        stop: One past the last.
        first: The example that comes first in `out`.
        out: Buffer `[N, k, ≥ size]`.

    Returns:
        The derivatives `[N, k, size]`, in `out`; of examples without factors, zero.
    """
    some = out[..., : (stop - start) * d_out].reshape(*out.shape[:2], stop - start, -1)
    if len(factors) < len(out):
        some[:] = 0

    there = list(factors)

    def form(part: range) -> None:
        for i in there[part.start : part.stop]:
            x, delta = factors[i]
            delta = delta.astype(out.dtype, copy=False)
            x = np.ascontiguousarray(x.reshape(-1, x.shape[-1])[:, start:stop].T, out.dtype)
            np.matmul(x[None], delta.reshape(len(delta), x.shape[1], -1), out=some[i - first])

    in_parallel(form, split(len(there), num_threads()))
    return some.reshape(*out.shape[:2], -1)


def readers(factors: Factors) -> dict[int, list[tuple[int, np.ndarray]]]:
    """Returns for every id the examples that read it and their derivatives `[k, d]` with respect to its embedding."""
    found: dict[int, list[tuple[int, np.ndarray]]] = {}
    for i, (ids, delta) in factors.items():
        delta = delta.reshape(len(delta), ids.size, -1)
        unique, where = np.unique(ids, return_inverse=True)
        sums = np.zeros((len(unique), len(delta), delta.shape[-1]), summed_in(delta.dtype))
        np.add.at(sums, where.reshape(-1), delta.swapaxes(0, 1))
        for word, derivative in zip(unique.tolist(), sums, strict=True):
            found.setdefault(word, []).append((i, derivative))
    return found
