"""The bridge to neural-tangents 0.6.5 on today's JAX, and its kernels as an engine.

The library's last release predates the removal of several JAX names and requires TensorFlow for a part
(`neural_tangents.experimental`) that its kernels never use. `load_neural_tangents()` supplies those names from
public JAX API, keeps that part out, and replaces three private functions whose JAX counterparts changed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import numpy as np
from jax.interpreters import ad
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, halved
from jaxlin.ntk.jacobian import (
    MEMORY_BUDGET,
    Progress,
    check_deviation,
    gram,
    jacobian,
    jacobian_bytes,
    num_outputs,
)
from jaxlin.tunable import Batch, Tunable, leaf_paths

IMPLEMENTATIONS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES", "AUTO")
_NESTED = ("remat2", "checkpoint", "remat", "pjit", "jit", "closed_call")


def _supply_names() -> None:
    """Puts back what neural-tangents imports and JAX no longer has."""
    sys.modules.setdefault("neural_tangents.experimental", types.ModuleType("neural_tangents.experimental"))
    for name in ("Jaxpr", "JaxprEqn", "Literal", "Var", "Primitive"):
        if name not in vars(jax.core):
            setattr(jax.core, name, getattr(jex, name))
    if "DShapedArray" not in vars(jax.core):  # only ever compared with a type
        jax.core.DShapedArray = type("DShapedArray", (), {})  # type: ignore[attr-defined]
    if "jax.util" not in sys.modules:
        util = types.ModuleType("jax.util")
        util.safe_zip = lambda *xs: list(zip(*xs, strict=True))  # type: ignore[attr-defined]
        util.safe_map = lambda f, *xs: [f(*args) for args in zip(*xs, strict=True)]  # type: ignore[attr-defined]
        sys.modules["jax.util"] = util
    supplied = {
        "zeros_like_p": jex.Primitive("zeros_like"),  # a key of a table, never met
        "config": types.SimpleNamespace(jax_enable_checks=False),
        "source_info_util": types.SimpleNamespace(transform_name_stack=lambda *_: contextlib.nullcontext()),
    }
    for name, value in supplied.items():
        if name not in vars(ad):
            setattr(ad, name, value)


class _Linear:
    """Stands for a value that depends linearly on the tangents."""


def _run(eqn: Any, values: list[Any]) -> list[Any]:
    if eqn.primitive.name == "split":  # several outputs, which the library's rules do not know: slices
        axis, ends = eqn.params["axis"], np.cumsum(eqn.params["sizes"])
        return [
            jax.lax.slice_in_dim(values[0], int(end - size), int(end), axis=axis)
            for size, end in zip(eqn.params["sizes"], ends, strict=True)
        ]
    out = eqn.primitive.bind(*values, **eqn.params)
    return out if eqn.primitive.multiple_results else [out]


def _walk(closed: Any, args: list[Any], program: list[Any]) -> list[Any]:
    """Opens nested calls, runs what is known, and lists the linear equations in `program`."""
    jaxpr = getattr(closed, "jaxpr", closed)
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, jex.Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [read(var) for var in eqn.invars]
        if eqn.primitive.name in _NESTED:
            inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
            outs = _walk(inner if hasattr(inner, "consts") else jex.ClosedJaxpr(inner, ()), values, program)
        elif any(isinstance(value, _Linear) for value in values):
            outs = [_Linear() for _ in eqn.outvars]
            program.append((eqn, values, outs))
        else:
            outs = _run(eqn, values)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _linear_jaxpr(f_jvp: Callable[..., Any], flat: list[Array]) -> Any:
    """Traces a linear map as one flat jaxpr, without nested calls."""
    args: list[_Linear] = [_Linear() for _ in flat]
    program: list[Any] = []
    outs = _walk(jax.make_jaxpr(f_jvp)(*flat), args, program)

    def replay(*tangents: Array) -> list[Any]:
        env: dict[Any, Any] = dict(zip(args, tangents, strict=True))

        def get(value: Any) -> Any:
            return env[value] if isinstance(value, _Linear) else value

        for eqn, values, results in program:
            env.update(zip(results, _run(eqn, [get(value) for value in values]), strict=True))
        return [get(value) for value in outs]

    return jax.make_jaxpr(replay)(*flat)


def _replace_functions(empirical: Any) -> None:
    """Replaces the private functions of neural-tangents that meet a changed JAX, by public API."""

    def primals_out_and_pullback(
        fn: Callable[..., Any], mode: Any, j_rules: bool, s_rules: bool, fwd: Any, *primals_in: Any
    ) -> tuple[Any, Callable[..., Any]]:
        flat, tree = jax.tree.flatten(primals_in)
        with jax.disable_jit():
            primals_out, f_jvp = jax.linearize(lambda *xs: fn(*jax.tree.unflatten(tree, xs)), *flat)
            closed = _linear_jaxpr(f_jvp, flat)

        def pullback(*cts_in: Any) -> Any:
            outs = empirical._backward_pass(
                closed.jaxpr,
                mode=mode,
                consts=closed.consts,
                primals_in=[ad.UndefinedPrimal(var.aval) for var in closed.jaxpr.invars],
                cotangents_in=tuple(jax.tree.leaves(cts_in)),
                _j_rules=j_rules,
                _s_rules=s_rules,
                _fwd=fwd,
            )
            return jax.tree.unflatten(tree, outs)

        return primals_out, pullback

    def eqn_vjp_fn(eqn: Any, cts_in: Any, *invals: Any) -> tuple[Any, ...]:
        if eqn is None:
            return (cts_in,)
        linear = [i for i, value in enumerate(invals) if ad.is_undefined_primal(value)]
        outs: list[Any] = [None] * len(invals)
        if not linear or isinstance(cts_in, ad.Zero):
            return tuple(outs)

        def f(*xs: Any) -> Any:
            args = list(invals)
            for i, x in zip(linear, xs, strict=True):
                args[i] = x
            return eqn.primitive.bind(*args, **eqn.params)

        cts = jax.linear_transpose(f, *(invals[i].aval for i in linear))(
            [cts_in] if eqn.primitive.multiple_results else cts_in
        )
        for i, ct in zip(linear, cts, strict=True):
            outs[i] = ct
        return tuple(outs)

    def get_flops(f: Callable[..., Any], optimize: bool, *args: Any, **kwargs: Any) -> float:
        lowered = jax.jit(f).lower(*args, **kwargs)
        analysis = (lowered.compile() if optimize else lowered).cost_analysis()
        first: Any = analysis[0] if isinstance(analysis, list | tuple) else analysis
        return first["flops"]

    empirical._get_primals_out_and_pullback = primals_out_and_pullback
    empirical._eqn_vjp_fn = eqn_vjp_fn
    empirical._get_flops = get_flops


def _try_out(nt: Any) -> None:
    """Computes a small kernel by the implementation that uses most of JAX: what a changed JAX breaks, breaks here.

    Raises:
        AssertionError: If it is wrong.
    """

    def f(theta: Array, x: Array) -> Array:
        return jax.nn.tanh(x @ theta) @ theta.T

    theta, x = jax.numpy.arange(4.0).reshape(2, 2) / 8, jax.numpy.eye(2)
    rows = jax.jacobian(f)(theta, x).reshape(4, 4)
    exact = np.asarray(rows @ rows.T).reshape(2, 2, 2, 2).transpose(0, 2, 1, 3)
    structured = nt.NtkImplementation.STRUCTURED_DERIVATIVES
    found = jax.jit(nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0, implementation=structured))(x, None, theta)
    if np.abs(found - exact).max() > 1e-4:
        raise AssertionError("its kernel of a function of four parameters is wrong")


@functools.cache
def load_neural_tangents() -> types.ModuleType:
    """Returns the module `neural_tangents`, made to run on the installed JAX.

    A `Tunable`'s `apply(theta, batch)` is its `apply_fn(params, x)`, with `vmap_axes=({name: 0 for name in batch}, 0,
    {})`; the array `[N, N, C, C]` of a `Kernel` is what its `predict` functions take, with `trace_axes=()`.

    Raises:
        ImportError: If it cannot be imported, or does not work there; says which versions met.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> nt = jl.load_neural_tangents()
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((2, 1))})
        >>> K = jl.ntk(tun, {"x": np.eye(2, dtype=np.float32)})
        >>> fn = nt.predict.gradient_descent_mse(K.array, np.array([[1.0], [-1.0]]), trace_axes=())
        >>> fn(None, np.zeros((2, 1))).round(4).tolist()  # at the end of training
        [[1.0], [-1.0]]
    """
    try:
        _supply_names()
        import neural_tangents
        from neural_tangents._src import empirical

        _replace_functions(empirical)
        with warnings.catch_warnings(), jax.default_matmul_precision("highest"):
            warnings.simplefilter("ignore", DeprecationWarning)  # the library's own use of JAX
            _try_out(neural_tangents)
    except Exception as error:  # whatever a changed JAX makes of it
        raise ImportError(
            f"neural-tangents cannot be bridged to JAX {jax.__version__}: {type(error).__name__}: {error}. Install "
            'neural-tangents 0.6.5 with a JAX from 0.10 to 0.12, or use engine="jacobian"'
        ) from error
    return neural_tangents


@functools.partial(jax.jit, static_argnames=("chosen", "implementation"))
def _kernel_tile(
    apply: Callable[[PyTree, Batch], Array],
    theta: PyTree,
    batch1: Batch,
    batch2: Batch | None,
    chosen: tuple[int, ...],
    implementation: str,
) -> Array:
    """Kernel `[B1, B2, C, C]` of the leaves at positions `chosen`; `batch2=None` for that of batch1 with itself."""
    nt = load_neural_tangents()
    leaves, tree = jax.tree.flatten(theta)

    def f(tuned: list[Array], batch: Batch) -> Array:
        full = list(leaves)
        for i, leaf in zip(chosen, tuned, strict=True):
            full[i] = leaf
        return apply(jax.tree.unflatten(tree, full), batch)

    kernel_fn = nt.empirical_ntk_fn(
        f,
        trace_axes=(),
        vmap_axes=(dict.fromkeys(batch1, 0), 0, {}),
        implementation=nt.NtkImplementation[implementation],
    )
    return kernel_fn(batch1, batch2, [leaves[i] for i in chosen])


_TILE = 8
"""Examples a side of a tile."""


def _check_entries(
    tun: Tunable,
    data1: Dataset,
    data2: Dataset,
    theta: PyTree,
    total: np.ndarray,
    implementation: str,
    precision: str,
    budget: int,
) -> None:
    """Compares the first and last example's entries with float64."""
    ends1, ends2 = (np.unique([0, len(data) - 1]) for data in (data1, data2))
    options: dict[str, Any] = {"dtype": "float64", "memory_budget": budget}
    exact1 = jacobian(tun, data1.take(ends1), theta, **options).rows
    exact2 = exact1 if data2 is data1 else jacobian(tun, data2.take(ends2), theta, **options).rows
    exact = sum(gram(exact1[path], exact2[path]) for path in exact1 if path in exact2)
    deviation = np.abs(total[np.ix_(ends1, ends2)] - exact).max() / max(np.abs(exact).max(), 1e-300)
    what = f"neural-tangents' {implementation} kernel, in entries checked,"
    check_deviation(float(deviation), theta, precision, what, 'a compiler bug is likely: use engine="jacobian"')


def neural_tangents_parts(
    tun: Tunable,
    data1: Dataset,
    data2: Dataset | None,
    theta: PyTree,
    blocks: Mapping[str, tuple[str, ...]],
    implementation: str,
    precision: str = "highest",
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
) -> tuple[dict[str, Float[np.ndarray, "N1 N2 C C"]], tuple[str, ...]]:
    """Computes block kernels by neural-tangents, one pass a block.

    Before it returns, the entries of the first and last example are compared with float64: products of
    jvp and vjp meet a bug of XLA's CPU compiler (jaxlib <= 0.10.2) that is wrong by 1e-3 and silent. Tiles are of 8
    examples a side; where memory runs out, of half as many from that block on.

    Args:
        tun: The model.
        data1: Rows.
        data2: Columns; `None` for the rows again, then only the upper triangle is computed.
        theta: Where.
        blocks: Block name to leaf paths.
        implementation: One of `IMPLEMENTATIONS`.
        precision: Of matrix products.
        memory_budget: Bytes for the float64 Jacobian of the two examples that are checked.
        progress: Called after each tile, with tiles in the place of examples.

    Returns:
        Block name to kernel, float64 `[N1, N2, C, C]`; and what was changed on the way.

    Raises:
        InputError: If the implementation is unknown, or the check does not fit the budget.
        FloatingPointError: If the check fails.
        MemoryError: If memory runs out for one example, too; a device's is a `JaxRuntimeError`.
        jax.errors.JaxRuntimeError: Likewise.
    """
    load_neural_tangents()  # tried out here, and not within a trace
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation={implementation!r} is unknown; expected one of {', '.join(IMPLEMENTATIONS)}")
    other, c = data1 if data2 is None else data2, num_outputs(tun, data1)
    needed = 2 * jacobian_bytes(tun, data1, "float64") // len(data1)
    if needed > memory_budget:
        raise InputError(
            f"checking a kernel against float64 takes {needed / 2**30:.1f} GiB for two examples, more than "
            f"memory_budget={memory_budget / 2**30:.1f} GiB; raise it, or tune less"
        )
    position = {path: i for i, path in enumerate(leaf_paths(theta))}
    parts: dict[str, np.ndarray] = {}
    size, events = min(_TILE, max(len(data1), len(other))), []
    for b, (name, paths) in enumerate(blocks.items()):
        chosen = tuple(position[path] for path in paths)

        def report(done: int, total: int, before: int = b) -> None:
            if progress is not None:
                progress(before * total + done, len(blocks) * total)

        while name not in parts:
            try:
                parts[name] = _block(tun, data1, data2, theta, chosen, implementation, size, c, report)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                size, event = halved(size, "a tile of {} examples a side", error)
                events.append(event)
    _check_entries(
        tun, data1, other, theta, np.sum(list(parts.values()), axis=0), implementation, precision, memory_budget
    )
    return parts, tuple(events)


def _block(
    tun: Tunable,
    data1: Dataset,
    data2: Dataset | None,
    theta: PyTree,
    chosen: tuple[int, ...],
    implementation: str,
    size: int,
    c: int,
    report: Progress,
) -> np.ndarray:
    """The kernel of the leaves at positions `chosen`, in tiles of `size` examples a side; tells each tile."""
    chunks1 = list(data1.chunks(min(size, len(data1))))
    chunks2 = chunks1 if data2 is None else list(data2.chunks(min(size, len(data2))))
    tiles = [(i, j) for i in range(len(chunks1)) for j in range(len(chunks2)) if data2 is not None or j >= i]
    out = np.zeros((len(data1), len(data1 if data2 is None else data2), c, c))
    for done, (i, j) in enumerate(tiles, start=1):
        (rows, batch1), (columns, batch2) = chunks1[i], chunks2[j]
        diagonal = data2 is None and i == j
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the library's own use of JAX
            tile = _kernel_tile(tun.apply, theta, batch1, None if diagonal else batch2, chosen, implementation)
        tile = np.asarray(tile, np.float64)[: len(rows), : len(columns)]
        out[np.ix_(rows, columns)] = tile
        if data2 is None and not diagonal:
            out[np.ix_(columns, rows)] = tile.transpose(1, 0, 3, 2)
        report(done, len(tiles))
    # Rounding leaves tiles on the diagonal symmetric to 1e-7 only; a symmetric kernel is so exactly.
    return out if data2 is not None else (out + out.transpose(1, 0, 3, 2)) / 2
