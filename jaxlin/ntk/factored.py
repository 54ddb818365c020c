"""Kernels from what every module read and what flowed back to it, so that no large Jacobian is ever held.

The derivative of one output with respect to a dense module's weight is `xᵀ δ`, x the module's input and δ the
output's cotangent at the module. One forward and C backward passes give x and δ of every module with tuned parameters,
all examples of a chunk at once. Small derivatives (LoRA factors, biases, norms) are formed there and then; of a large
weight x and δ are kept, and `xᵀ δ` is formed for some of its columns at a time, only to enter the Gram matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.ntk.jacobian import MAX_CHUNK, EpsilonCheck, Progress, gram, num_outputs, to_float64
from jaxlin.peft.function import PeftFunction
from jaxlin.tunable import ADAPTER_NAMES, Batch, Blocks, Tunable, leaf_paths

_BLOCK_BYTES = 1 << 28
"""Size of the derivatives that are formed at a time, in float32."""

_CPU_CHUNK = 4
"""Examples of a pass on a CPU, whose caches hold no more; measured by benchmarks/ntk.py."""


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
        source: Path of the first module that reads the same array.
    """

    path: str
    module: nn.Module
    rows: tuple[str, ...]
    factored: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    source: str

    def leaf(self, name: str) -> str:
        """Path of one of its leaves."""
        return f"{self.path}/{name}".lstrip("/")

    def numbers(self, c: int) -> int:
        """How many numbers its input and the cotangents of C outputs are, an example."""
        return math.prod(self.inputs) + c * math.prod(self.outputs)


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
            given = jax.tree.map(jax.typeof, (args, kwargs))
            readers.append((args[0] if args else None, path))
        source = next((other for x, other in readers if args and x is args[0]), path)
        call = _Call(context.module.clone(parent=None), given, jax.tree.map(jax.typeof, out), source)
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


def find_sites(tun: Tunable, data: Dataset, theta: PyTree) -> tuple[Site, ...]:
    """Finds the modules that own the tuned parameters, in the order of their calls.

    LoRA's A is left out where B is zero: its derivative is exactly zero there.

    Args:
        tun: The model.
        data: The examples.
        theta: Where the derivatives are taken.

    Returns:
        The sites; together they own every tuned leaf whose derivative is not left out.

    Raises:
        InputError: If `tun` was not made of a `Model`, or a tuned leaf does not belong to a module that is called
            once on one array, examples first.
    """
    apply = tun.apply
    if not isinstance(apply, PeftFunction):
        raise InputError(f'engine="factored" needs a Tunable made of a Model; its apply is a {type(apply).__name__}')
    batch = data.batch(np.array([0 if data.lengths is None else np.argmax(data.lengths)]), 2)
    leaves, structure = jax.tree.flatten((apply, theta, batch))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf)) for leaf in leaves)
    tuned, frozen = (flatten_dict(tree, sep="/") for tree in (theta, apply.frozen))
    c, sites = num_outputs(tun, data), []
    for path, call in _owners(structure, shapes).items():
        names = sorted(name for module, _, name in (leaf.rpartition("/") for leaf in tuned) if module == path)
        if "lora_B" in names and not np.any(tuned[f"{path}/lora_B"]):
            names = [name for name in names if name != "lora_A"]
        (x,), _ = call.given
        site = Site(path, call.module, tuple(names), None, x.shape[1:], call.out.shape[1:], call.source)
        large = {nn.Dense: "kernel", nn.Embed: "embedding"}.get(type(call.module))
        adapted = any(site.leaf(name) in leaves for name in ADAPTER_NAMES for leaves in (tuned, frozen))
        if large is not None and large in names and not adapted and site.numbers(c) < c * tuned[site.leaf(large)].size:
            site = dataclasses.replace(site, rows=tuple(name for name in names if name != large), factored=large)
        if site.rows or site.factored:
            sites.append(site)
    return tuple(sites)


@functools.partial(jax.jit, static_argnames=("sites",))
def _pass(
    apply: PeftFunction, theta: PyTree, batch: Batch, sites: tuple[Site, ...]
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Returns small derivatives by leaf `[B, C, size]`; of sites with a large one, inputs and cotangents `[C, B, …]`.

    The inputs are by `Site.source`, so that one that several modules read is there once.
    """
    size = next(iter(batch.values())).shape[0]

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
            return apply(theta, batch), inputs

    calls = _traced_calls(apply, theta, batch)
    shapes = {site.path: calls[site.path][0].out for site in sites}
    taps = {path: jnp.zeros((size, *shape.shape[1:]), shape.dtype) for path, shape in shapes.items()}
    outputs, pullback, inputs = jax.vjp(outputs_and_inputs, taps, has_aux=True)
    c = outputs.shape[1]
    seeds = jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype)[:, None], (c, size, c))
    (cotangents,) = jax.vmap(pullback)(seeds)
    params, adapters = apply.variables(theta)
    leaves = {**params, **adapters}
    rows: dict[str, Array] = {}
    for site in sites:
        own = {path.rpartition("/")[2]: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] == site.path}
        if site.rows:
            one = functools.partial(_small_derivatives, apply, site, own)
            for name, derivative in jax.vmap(one, in_axes=(0, 1))(inputs[site.path], cotangents[site.path]).items():
                rows[site.leaf(name)] = derivative.reshape(size, c, -1)
    large = [site for site in sites if site.factored]
    read = {site.source: inputs[site.path] for site in large}
    return rows, read, {site.path: cotangents[site.path] for site in large}


def _small_derivatives(
    apply: PeftFunction, site: Site, own: Mapping[str, Array], x: Array, delta: Array
) -> dict[str, Array]:
    """Derivatives `[C, …]` of one example's outputs with respect to the small leaves of a site."""

    def local(small: Mapping[str, Array]) -> Array:
        return apply.module_output(site.path, site.module, {**own, **small}, x[None])[0]

    _, back = jax.vjp(local, {name: own[name] for name in site.rows})
    return jax.vmap(lambda d: back(d)[0])(delta)


def _summed_in(dtype: np.dtype) -> type[np.floating]:
    """Dtype that products of activations and cotangents are summed in: at least float32, on the host."""
    return np.float64 if dtype == np.float64 else np.float32


class _Pass:
    """What a pass over a data set gave: small derivatives whole, and the factors of large ones by example."""

    def __init__(self, tun: Tunable, data: Dataset, theta: PyTree, sites: tuple[Site, ...], chunk: int) -> None:
        self.tun, self.data, self.theta, self.sites, self.chunk = tun, data, theta, sites, chunk
        self.rows: dict[str, np.ndarray] = {}
        self.inputs: dict[str, dict[int, np.ndarray]] = {site.path: {} for site in sites if site.factored}
        self.cotangents: dict[str, dict[int, np.ndarray]] = {site.path: {} for site in sites if site.factored}

    def run(self) -> Iterator[int]:
        """Fills `rows`, `inputs` and `cotangents`; yields the examples done after each chunk."""
        done = 0
        for indices, batch in self.data.chunks(self.chunk):
            rows, inputs, cotangents = jax.device_get(_pass(self.tun.apply, self.theta, batch, self.sites))
            for path, value in rows.items():
                if path not in self.rows:
                    self.rows[path] = np.zeros((len(self.data), *value.shape[1:]), value.dtype)
                self.rows[path][indices] = value[: len(indices)]
            for site in self.sites:
                if site.factored:
                    x, delta = inputs[site.source], cotangents[site.path]
                    self.inputs[site.path] |= dict(zip(indices.tolist(), x, strict=False))
                    self.cotangents[site.path] |= dict(zip(indices.tolist(), delta.swapaxes(0, 1), strict=False))
            done += len(indices)
            yield done

    def columns(self, site: Site, start: int, stop: int, out: np.ndarray) -> np.ndarray:
        """Derivatives with respect to rows `start` to `stop` of a dense kernel, into `out` `[N, C, ≥ size]`."""
        some = out[..., : (stop - start) * site.outputs[-1]].reshape(*out.shape[:2], stop - start, -1)
        for i, x in self.inputs[site.path].items():
            delta = self.cotangents[site.path][i].astype(out.dtype, copy=False)
            x = x.reshape(-1, x.shape[-1])[:, start:stop].astype(out.dtype, copy=False)
            np.matmul(x.T[None], delta.reshape(len(delta), len(x), -1), out=some[i])
        return some.reshape(*out.shape[:2], -1)

    def readers(self, site: Site) -> dict[int, list[tuple[int, np.ndarray]]]:
        """Id to the examples that read it and their derivatives `[C, k]` with respect to its embedding."""
        found: dict[int, list[tuple[int, np.ndarray]]] = {}
        for i, ids in self.inputs[site.path].items():
            delta = self.cotangents[site.path][i]
            delta = delta.reshape(len(delta), ids.size, -1)
            unique, where = np.unique(ids, return_inverse=True)
            sums = np.zeros((len(unique), len(delta), delta.shape[-1]), _summed_in(delta.dtype))
            np.add.at(sums, where.reshape(-1), delta.swapaxes(0, 1))
            for word, derivative in zip(unique.tolist(), sums, strict=True):
                found.setdefault(word, []).append((i, derivative))
        return found


def _stacked(found: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    examples, derivatives = zip(*found, strict=True)
    return np.array(examples), np.stack(derivatives)


def _large_blocks(
    first: _Pass, last: _Pass, site: Site, c: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields some rows of a large leaf, the examples that they matter to, and the derivatives of both data sets."""
    if site.factored == "embedding":
        readers = first.readers(site)
        others = readers if last is first else last.readers(site)
        nobody = [(0, np.zeros((c, site.outputs[-1])))]
        for word, mine in readers.items():
            examples1, rows1 = _stacked(mine)
            examples2, rows2 = (examples1, rows1) if last is first else _stacked(others.get(word, nobody))
            yield slice(word, word + 1), examples1, rows1, examples2, rows2
        return
    n, d_in, d_out = len(first.data) + len(last.data), site.inputs[-1], site.outputs[-1]
    width = int(np.clip(_BLOCK_BYTES // (4 * n * c * d_out), 1, d_in))
    dtype = _summed_in(next(iter(first.cotangents[site.path].values())).dtype)
    passes = [first] if last is first else [first, last]
    out = [np.empty((len(one.data), c, width * d_out), dtype) for one in passes]
    for start in range(0, d_in, width):
        stop = min(start + width, d_in)
        rows = [one.columns(site, start, stop, into) for one, into in zip(passes, out, strict=True)]
        yield slice(start, stop), np.arange(len(rows[0])), rows[0], np.arange(len(rows[-1])), rows[-1]


def _groups(sites: tuple[Site, ...], n: int, c: int, itemsize: int, memory_budget: int) -> list[tuple[Site, ...]]:
    """Returns the sites in parts such that what is kept of each part fits half of the budget.

    Raises:
        InputError: If what is kept of one site does not.
    """
    groups: list[list[Site]] = [[]]
    held = 0
    for site in sites:
        size = n * itemsize * site.numbers(c) if site.factored else 0
        if size > memory_budget // 2:
            raise InputError(
                f"activations and cotangents of {site.path} take {size / 2**30:.1f} GiB for {n} examples, more than "
                f"half of memory_budget={memory_budget / 2**30:.1f} GiB; use fewer examples, or raise the budget"
            )
        if held + size > memory_budget // 2:
            groups.append([])
            held = 0
        groups[-1].append(site)
        held += size
    return [tuple(group) for group in groups]


def factored_parts(
    tun: Tunable,
    data1: Dataset,
    data2: Dataset | None,
    theta: PyTree,
    blocks: Blocks,
    *,
    dtype: str | None,
    precision: str,
    memory_budget: int,
    check_examples: int,
    progress: Progress | None = None,
) -> tuple[dict[str, Float[np.ndarray, "N1 N2 C C"]], float | None]:
    """Computes block kernels without ever holding the Jacobian of a large weight.

    Where the activations and cotangents of all modules do not fit half of the budget, the passes are repeated for
    some modules at a time.

    Args:
        tun: The model, made of a `Model`.
        data1: Rows.
        data2: Columns; `None` for the rows again.
        theta: Where.
        blocks: Block name to leaf paths.
        dtype: `"float64"`, or `None` for that of the parameters.
        precision: Of matrix products on the device.
        memory_budget: Bytes for what is kept on the host.
        check_examples: Number of examples whose derivatives are compared with float64; 0 for none.
        progress: Called with examples done and in all, over all passes.

    Returns:
        Block name to kernel, float64, and the measured ε_J (`None` without a check).

    Raises:
        InputError: As `find_sites`; or if the small derivatives, or what is kept of one module, do not fit the budget.
    """
    for data in (data1, data2):
        if data is not None:
            tun.check_batch(data.columns)
    sites, c = find_sites(tun, data1, theta), num_outputs(tun, data1)
    both = [data1] if data2 is None else [data1, data2]
    n = sum(map(len, both))
    shape = (len(data1), len(both[-1]), c, c)
    check = EpsilonCheck(tun, data1, theta, check_examples, precision, memory_budget)
    if dtype == "float64":
        apply, theta = to_float64((tun.apply, theta))
        tun = dataclasses.replace(tun, apply=apply)
    itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(theta))
    tuned = flatten_dict(theta, sep="/")
    small = n * c * itemsize * sum(tuned[s.leaf(name)].size for s in sites for name in s.rows)
    if small > memory_budget:
        raise InputError(
            f"derivatives of {n} examples with respect to the small parameters take {small / 2**30:.1f} GiB, more than "
            f"memory_budget={memory_budget / 2**30:.1f} GiB; use fewer examples, tune less, or raise the budget"
        )
    groups = _groups(sites, n, c, itemsize, memory_budget)
    block_of = {path: name for name, paths in blocks.items() for path in paths}
    parts = {name: np.zeros(shape) for name in blocks}
    done, total = 0, n * len(groups)
    with (
        jax.enable_x64(dtype == "float64" or jax.config.read("jax_enable_x64")),
        jax.default_matmul_precision(precision),
    ):
        for group in groups:
            widest = max(site.numbers(c) for site in group) * len(group) * itemsize
            most = _CPU_CHUNK if jax.default_backend() == "cpu" else MAX_CHUNK
            chunk = int(np.clip(memory_budget // 8 // widest, 1, most))
            passes = [_Pass(tun, data, theta, group, min(chunk, len(data))) for data in both]
            for one in passes:
                for count in one.run():
                    if progress is not None:
                        progress(done + count, total)
                done += len(one.data)
            first, last = passes[0], passes[-1]
            for path, rows in first.rows.items():
                parts[block_of[path]] += gram(rows, last.rows[path])
                check.compare(path, rows)
            for site in group:
                if site.factored is None:
                    continue
                path = site.leaf(site.factored)
                for some, examples1, rows1, examples2, rows2 in _large_blocks(first, last, site, c):
                    parts[block_of[path]][np.ix_(examples1, examples2)] += gram(rows1, rows2)
                    check.compare(path, rows1, examples1, some)
    return parts, check.epsilon()
