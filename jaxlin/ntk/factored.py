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
from jaxlin.ntk.jacobian import MAX_CHUNK, Progress, gram, jacobian, jacobian_bytes, num_outputs, to_float64
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
    """

    path: str
    module: nn.Module
    rows: tuple[str, ...]
    factored: str | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def numbers(self, c: int) -> int:
        """How many numbers its input and the cotangents of C outputs are, an example."""
        return math.prod(self.inputs) + c * math.prod(self.outputs)


def _traced_calls(apply: PeftFunction, theta: PyTree, batch: Batch) -> dict[str, list[tuple[nn.Module, Any, Any]]]:
    """Every call of every module, by path: the module, its arguments' and its result's shapes."""
    calls: dict[str, list[tuple[nn.Module, Any, Any]]] = {}

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kwargs)
        if context.method_name == "setup":
            return out
        module = context.module
        given = jax.tree.map(jax.typeof, (args, kwargs)) if context.method_name == "__call__" else None
        entry = (module.clone(parent=None), given, jax.tree.map(jax.typeof, out))
        calls.setdefault("/".join(module.path), []).append(entry)
        return out

    def traced(theta: PyTree, batch: Batch) -> Array:
        with nn.intercept_methods(record):  # around that of the adapters: it sees what they make of a module
            return apply(theta, batch)

    jax.eval_shape(traced, theta, batch)
    return calls


def _used_elsewhere(apply: PeftFunction, theta: PyTree, batch: Batch, outputs: Mapping[str, Any]) -> set[str]:
    """Paths of leaves of theta that matter beside the calls of the modules in `outputs` (tied weights)."""

    def without(theta: PyTree, batch: Batch, stand_ins: Mapping[str, Array]) -> Array:
        def replace(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = "/".join(context.module.path)
            replaced = context.method_name == "__call__" and path in stand_ins
            return stand_ins[path] if replaced else next_fun(*args, **kwargs)

        params, _ = apply.variables(theta)
        with nn.intercept_methods(replace):
            return apply.module.apply({"params": unflatten_dict(params, sep="/")}, batch)

    traced = jax.make_jaxpr(without)(theta, batch, dict(outputs)).jaxpr
    used = {id(var) for eqn in traced.eqns for var in eqn.invars} | {id(var) for var in traced.outvars}
    own = traced.invars[: len(jax.tree.leaves(theta))]
    return {path for path, var in zip(leaf_paths(theta), own, strict=True) if id(var) in used}


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
    calls, tuned = _traced_calls(apply, theta, batch), flatten_dict(theta, sep="/")
    owners: dict[str, list[str]] = {}
    for path in tuned:
        module, _, name = path.rpartition("/")
        owners.setdefault(module, []).append(name)
    for path in owners:
        met = calls.get(path, ())
        if len(met) != 1 or not _is_plain(met[0]):
            what = f"{len(met)} times" if len(met) != 1 else "with other than one array, examples first"
            raise InputError(
                f'engine="factored" needs {path or "the module"}, which owns tuned parameters, to be called once on '
                f'one array; it is called {what}; use engine="jacobian"'
            )
    elsewhere = _used_elsewhere(apply, theta, batch, {path: calls[path][0][2] for path in owners})
    if elsewhere:
        raise InputError(
            f'{sorted(elsewhere)[0]} is used outside of its module\'s call, which engine="factored" does not see; use '
            'engine="jacobian"'
        )
    c, sites = num_outputs(tun, data), []
    for path in (path for path in calls if path in owners):
        module, ((x,), _), y = calls[path][0]
        names = sorted(owners[path])
        if "lora_B" in names and not np.any(tuned[f"{path}/lora_B"]):
            names = [name for name in names if name != "lora_A"]
        site = Site(path, module, tuple(names), None, x.shape[1:], y.shape[1:])
        large = {nn.Dense: "kernel", nn.Embed: "embedding"}.get(type(module))
        adapted = any(f"{path}/{name}" in (*tuned, *flatten_dict(apply.frozen, sep="/")) for name in ADAPTER_NAMES)
        if large in names and not adapted and site.numbers(c) < c * tuned[f"{path}/{large}"].size:
            site = dataclasses.replace(site, rows=tuple(name for name in names if name != large), factored=large)
        if site.rows or site.factored:
            sites.append(site)
    return tuple(sites)


def _is_plain(call: tuple[nn.Module, Any, Any]) -> bool:
    _, given, out = call
    if given is None or not hasattr(out, "shape"):
        return False
    args, kwargs = given
    if len(args) != 1 or kwargs or not hasattr(args[0], "shape"):
        return False
    # The examples of a batch of two, or what they share, such as positions.
    return args[0].shape[:1] == out.shape[:1] and out.shape[0] in (1, 2)


@functools.partial(jax.jit, static_argnames=("sites",))
def _pass(
    apply: PeftFunction, theta: PyTree, batch: Batch, sites: tuple[Site, ...]
) -> tuple[Array, dict[str, Array], dict[str, tuple[Array, Array]]]:
    """Outputs `[B, C]`, small derivatives by leaf `[B, C, size]`, inputs `[B, T, d]` and cotangents `[B, C, T, k]`."""
    size = next(iter(batch.values())).shape[0]

    def outputs_and_inputs(taps: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        inputs: dict[str, Array] = {}

        def tap(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out, path = next_fun(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__" or path not in taps:
                return out
            inputs[path] = jnp.broadcast_to(args[0], (size, *args[0].shape[1:]))
            return out + taps[path]  # one row an example, also where they share the output

        with nn.intercept_methods(tap):
            return apply(theta, batch), inputs

    calls = _traced_calls(apply, theta, batch)
    shapes = {site.path: calls[site.path][0][2] for site in sites}
    taps = {path: jnp.zeros((size, *shape.shape[1:]), shape.dtype) for path, shape in shapes.items()}
    outputs, pullback, inputs = jax.vjp(outputs_and_inputs, taps, has_aux=True)
    c = outputs.shape[1]
    seeds = jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype)[:, None], (c, size, c))
    (cotangents,) = jax.vmap(pullback)(seeds)
    params, adapters = apply.variables(theta)
    leaves = {**params, **adapters}
    rows: dict[str, Array] = {}
    factors: dict[str, tuple[Array, Array]] = {}
    for site in sites:
        x, delta = inputs[site.path], jnp.swapaxes(cotangents[site.path], 0, 1)
        own = {path.rpartition("/")[2]: leaf for path, leaf in leaves.items() if path.rpartition("/")[0] == site.path}

        def one(x: Array, delta: Array, site: Site = site, own: Mapping[str, Array] = own) -> dict[str, Array]:
            def local(small: Mapping[str, Array]) -> Array:
                return apply.module_output(site.path, site.module, {**own, **small}, x[None])[0]

            _, back = jax.vjp(local, {name: own[name] for name in site.rows})
            return jax.vmap(lambda d: back(d)[0])(delta)

        for name, derivative in jax.vmap(one)(x, delta).items() if site.rows else ():
            rows[f"{site.path}/{name}".lstrip("/")] = derivative.reshape(size, c, -1)
        if site.factored == "kernel":
            x = x.reshape(size, -1, x.shape[-1])
        elif site.factored:
            x = x.reshape(size, -1)
        if site.factored:
            factors[site.path] = (x, delta.reshape(size, c, -1, delta.shape[-1]))
    return outputs, rows, factors


@functools.partial(jax.jit, static_argnames=("precision",))
def _derivative(x: Float[Array, "B T d"], delta: Float[Array, "B C T k"], precision: str) -> Float[Array, "B C _"]:
    out = jnp.einsum("btd,bctk->bcdk", x, delta, precision=precision)
    return out.reshape(*out.shape[:2], -1)


class _Pass:
    """What a pass over a data set gave: small derivatives whole, and the factors of large ones by chunk."""

    def __init__(self, tun: Tunable, data: Dataset, theta: PyTree, sites: tuple[Site, ...], chunk: int) -> None:
        self.tun, self.data, self.theta, self.sites, self.chunk = tun, data, theta, sites, chunk
        self.rows: dict[str, np.ndarray] = {}
        self.factors: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def run(self) -> Iterator[int]:
        """Fills `rows` and `factors`; yields the examples done after each chunk."""
        done = 0
        for indices, batch in self.data.chunks(self.chunk):
            _, rows, factors = jax.device_get(_pass(self.tun.apply, self.theta, batch, self.sites))
            for path, value in rows.items():
                if path not in self.rows:
                    self.rows[path] = np.zeros((len(self.data), *value.shape[1:]), value.dtype)
                self.rows[path][indices] = value[: len(indices)]
            for path, (x, delta) in factors.items():
                self.factors.setdefault(path, []).append((indices, x, delta))
            done += len(indices)
            yield done

    def vocabulary(self, path: str) -> np.ndarray:
        """The ids that an embedding was read at."""
        return np.unique(np.concatenate([np.unique(x[: len(indices)]) for indices, x, _ in self.factors[path]]))

    def derivatives(self, path: str, wanted: np.ndarray, ids: bool, precision: str) -> Float[np.ndarray, "N C _"]:
        """Derivatives of all outputs with respect to some rows of the weight at `path`."""
        out: np.ndarray | None = None
        for indices, x, delta in self.factors[path]:
            part = (x[..., None] == wanted).astype(delta.dtype) if ids else x[..., wanted[0] : wanted[-1] + 1]
            value = np.asarray(_derivative(part, delta, precision))[: len(indices)]
            if out is None:
                out = np.zeros((len(self.data), *value.shape[1:]), value.dtype)
            out[indices] = value
        assert out is not None  # a Dataset is never empty
        return out


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
    check = _Check(tun, data1, theta, check_examples, precision, memory_budget)
    if dtype == "float64":
        apply, theta = to_float64((tun.apply, theta))
        tun = dataclasses.replace(tun, apply=apply)
    itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(theta))
    tuned = flatten_dict(theta, sep="/")
    small = n * c * itemsize * sum(tuned[f"{s.path}/{name}".lstrip("/")].size for s in sites for name in s.rows)
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
                check.compare(path, slice(None), rows)
            for site in group:
                if site.factored is None:
                    continue
                path, ids = f"{site.path}/{site.factored}".lstrip("/"), site.factored == "embedding"
                wanted = first.vocabulary(site.path) if ids else np.arange(site.inputs[-1])
                width = max(1, _BLOCK_BYTES // (4 * n * c * site.outputs[-1]))
                for start in range(0, len(wanted), width):
                    some = wanted[start : start + width]
                    rows1 = first.derivatives(site.path, some, ids, precision)
                    rows2 = rows1 if last is first else last.derivatives(site.path, some, ids, precision)
                    parts[block_of[path]] += gram(rows1, rows2)
                    check.compare(path, some, rows1)
    return parts, check.epsilon()


class _Check:
    """Compares the derivatives of a few examples with float64, as they are formed (theory 6)."""

    def __init__(
        self, tun: Tunable, data: Dataset, theta: PyTree, examples: int, precision: str, memory_budget: int
    ) -> None:
        examples = min(examples, len(data), memory_budget // (2 * jacobian_bytes(tun, data) // len(data)))
        self.chosen = np.unique(np.linspace(0, len(data) - 1, examples).astype(int)) if examples else np.zeros(0, int)
        self.reference: dict[str, np.ndarray] = {}
        self.sizes = {path: leaf.shape for path, leaf in flatten_dict(theta, sep="/").items()}
        self.error = self.scale = 0.0
        if examples:
            options: dict[str, Any] = {"dtype": "float64", "precision": precision, "memory_budget": memory_budget}
            self.reference = dict(jacobian(tun, data.take(self.chosen), theta, **options).rows)
            self.scale = sum(float(np.sum(rows**2)) for rows in self.reference.values())

    def compare(self, path: str, wanted: Any, rows: np.ndarray) -> None:
        """Adds the error of the derivatives with respect to some rows of the leaf at `path`."""
        if len(self.chosen):
            exact = self.reference.get(path, np.zeros((*rows.shape[:0], len(self.chosen), rows.shape[1], 1)))
            if path in self.reference:
                whole = exact.reshape(*exact.shape[:2], *(self.sizes[path] or (1,)))
                exact = whole[:, :, wanted].reshape(len(self.chosen), rows.shape[1], -1)
            self.error += float(np.sum((rows[self.chosen].astype(np.float64) - exact) ** 2))

    def epsilon(self) -> float | None:
        """ε_J, at least float64's own rounding; `None` if nothing was compared."""
        if not len(self.chosen):
            return None
        floor = float(np.finfo(np.float64).eps) * 10
        return max((self.error / self.scale) ** 0.5, floor) if self.scale else floor
