"""Activations below the lowest tuned parameter: they never change, so they are computed once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.tracers import current_trace
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, PyTree

from jaxlin.data.dataset import TRUNK, Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.hashing import add_array, without_addresses
from jaxlin.linearize import Linearized, Remainder
from jaxlin.ntk.jacobian import MEMORY_BUDGET, Progress, to_float64
from jaxlin.peft.function import Cut, PeftFunction
from jaxlin.tunable import Batch, Tunable, leaf_paths

_CHUNK = 16
"""Examples of a pass."""

_LEAST_SHARE = 0.1
"""Share of a forward pass below which there is nothing to be won."""


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What of a network lies below everything that is tuned.

    Attributes:
        cut: Where the rest is entered.
        share: Of a forward pass's arithmetic, what lies below.
        shape: Of its output for one example at full length, `[T, …]` where every token has its own.
        dtype: Of its output.
    """

    cut: Cut
    share: float
    shape: tuple[int, ...]
    dtype: np.dtype

    def nbytes(self, num_examples: int) -> int:
        """Bytes that the activations of examples take."""
        return num_examples * math.prod(self.shape) * self.dtype.itemsize


def _innermost(apply: Any) -> Any:
    """Returns what a linearization is of, and anything else as it is."""
    while isinstance(apply, Linearized | Remainder):
        apply = apply.apply
    return apply


def _network(tun: Tunable) -> PeftFunction:
    """Returns the network of a Tunable, or of the one that it is the linearization of.

    Raises:
        InputError: If it has none whose modules can be told apart, or it is entered above its inputs already.
    """
    apply = _innermost(tun.apply)
    if not isinstance(apply, PeftFunction):
        raise InputError(
            f"a trunk can be cached for Tunables made of a Model; this one's apply is a {type(apply).__name__}"
        )
    if apply.cut is not None:
        raise InputError(f"the trunk of this Tunable is cached already: it is entered after {apply.cut.path!r}")
    return apply


def _entered(apply: Any, cut: Cut) -> Any:
    """Returns `apply` with its network entered at `cut`."""
    if isinstance(apply, PeftFunction):
        return dataclasses.replace(apply, cut=cut)
    return dataclasses.replace(apply, apply=_entered(apply.apply, cut))


@contextlib.contextmanager
def _recorded(batch_size: int) -> Iterator[dict[str, Array]]:
    """Yields the outputs of modules by path, of those that are called once, on arrays with the examples first."""
    found: dict[str, Array] = {}
    calls: dict[str, int] = {}
    outer = current_trace()

    def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = next_fun(*args, **kwargs)
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and path:
            calls[path] = calls.get(path, 0) + 1
            # Of a module within a lifted transformation (a scan, a remat) the array exists in there only.
            plain = hasattr(out, "shape") and out.shape[:1] == (batch_size,) and current_trace() == outer
            found.pop(path, None)
            if plain and calls[path] == 1 and jnp.issubdtype(out.dtype, jnp.floating):
                found[path] = out
        return out

    with nn.intercept_methods(record):
        yield found


def _operations(jaxpr: Any) -> int:
    """Multiplications of matrix products, and elements of everything else's results."""
    return sum(map(_cost, jaxpr.eqns))


def _cost(eqn: Any) -> int:
    if eqn.primitive.name == "dot_general":
        (left, _), _ = eqn.params["dimension_numbers"]
        return eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in left)
    inner = [jaxpr for value in eqn.params.values() for jaxpr in _jaxprs(value)]
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return times * sum(map(_operations, inner)) if inner else sum(var.aval.size for var in eqn.outvars)


def _jaxprs(value: Any) -> list[Any]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if hasattr(value, "eqns"):
        return [value]
    return [jaxpr for part in value for jaxpr in _jaxprs(part)] if isinstance(value, tuple | list) else []


def _needed(jaxpr: Any, outputs: list[Any], given: Any = None) -> tuple[set[Any], int]:
    """Returns the variables that `outputs` are computed from, where `given` is known, and the work that it is."""
    wanted, work = {var for var in outputs if var is not given}, 0
    for eqn in reversed(jaxpr.eqns):
        if any(var in wanted for var in eqn.outvars):
            work += _cost(eqn)
            wanted |= {var for var in eqn.invars if not isinstance(var, Literal) and var is not given}
    return wanted, work


def _traced(apply: PeftFunction, theta: PyTree, batch: Batch) -> tuple[Any, list[str | None]]:
    """The program for logits and the outputs of modules, and the paths of these."""
    names: list[str | None] = []

    def traced(theta: PyTree, apply: PeftFunction, batch: Batch) -> tuple[Array, list[Array]]:
        with _recorded(2) as found:
            logits = apply(theta, batch)
        names[:] = found
        return logits, list(found.values())

    return jax.make_jaxpr(traced)(theta, apply, batch).jaxpr, names


def _is_cut_rightly(shape: tuple[int, ...], shorter: tuple[int, ...], width: int) -> bool:
    """Whether a `Dataset` cuts an output to a length as the module would: of T tokens, of one, or of none."""
    if len(shape) == len(shorter) == 2:
        return shape == shorter
    return shape[2:] == shorter[2:] and (shape[1], shorter[1]) in ((width, max(1, width - 1)), (1, 1))


def find_trunk(tun: Tunable, data: Dataset | Mapping[str, Any]) -> Trunk:
    """Finds the module whose output is all that the tuned part needs of what lies below it.

    From the traced program: of all modules that are called once and whose output depends on no tuned parameter, the
    one that leaves the least to be computed; of equals the one with the smaller output.

    Args:
        tun: A Tunable made of a `Model`, or its linearization.
        data: Examples.

    Returns:
        The trunk.

    Raises:
        InputError: If there is none: parameters of the lowest modules are tuned, or `tun` was not made of a `Model`.
    """
    data, apply = as_dataset(data), _network(tun)
    tun.check_batch(data.columns)
    batch = {name: value[:1].repeat(2, axis=0) for name, value in data.columns.items() if not name.startswith(TRUNK)}
    jaxpr, names = _traced(apply, tun.theta0, batch)
    if data.lengths is not None:
        # An array of other than the tokens' rows would be cut by the length of the text: seen at another length.
        width = batch["attention_mask"].shape[1]
        shorter = dataclasses.replace(data, lengths=np.ones(len(data), int), buckets=(max(1, width - 1),))
        less, _ = _traced(apply, tun.theta0, shorter.batch(np.zeros(2, int)))
        shapes = [dict(zip(names, (var.aval.shape for var in j.outvars[1:]), strict=True)) for j in (jaxpr, less)]
        names = [name if _is_cut_rightly(shapes[0][name], shapes[1][name], width) else None for name in names]
    num_theta, num_frozen = len(jax.tree.leaves(tun.theta0)), len(jax.tree.leaves(apply))
    depends = set(jaxpr.invars[:num_theta])
    for eqn in jaxpr.eqns:
        if any(not isinstance(var, Literal) and var in depends for var in eqn.invars):
            depends.update(eqn.outvars)
    logits, *outputs = jaxpr.outvars
    _, whole = _needed(jaxpr, [logits])
    left: list[tuple[int, int, str, Any]] = []
    for name, var in zip(names, outputs, strict=True):
        if isinstance(var, Literal) or var in depends or name is None:
            continue
        left.append((_needed(jaxpr, [logits], var)[1], var.aval.size, name, var))
    least = min((work for work, *_ in left), default=whole)
    if not left or whole - least < _LEAST_SHARE * whole:
        raise InputError(
            f"there is no trunk to cache: what does not depend on tuned parameters (such as {leaf_paths(tun.theta0)[0]}"
            f") is {(whole - least) / whole:.0%} of a forward pass; tune higher layers alone, or go without"
        )
    # Some multiplications more or less are not worth a larger array.
    near = [choice for choice in left if choice[0] - least <= 0.01 * whole]
    work, _, name, var = min(near, key=lambda choice: (choice[1], choice[0], len(choice[2])))
    below, _ = _needed(jaxpr, [var])
    invars = jaxpr.invars[num_theta : num_theta + num_frozen]
    paths = leaf_paths(apply.frozen)
    weights = {
        path: leaf for path, leaf, var in zip(paths, jax.tree.leaves(apply), invars, strict=True) if var in below
    }
    scales = [(path, scale) for path, scale in apply.scales if f"{path}/lora_B" in weights]
    digest = hashlib.sha256(without_addresses(f"{name} {apply.module} {scales}").encode())
    for path, leaf in weights.items():
        add_array(digest, path, leaf)
    cut = Cut(name, f"{TRUNK}{name}:{digest.hexdigest()[:16]}")
    return Trunk(cut, (whole - work) / whole, var.aval.shape[1:], var.aval.dtype)


@functools.partial(jax.jit, static_argnames=("path",))
def _activations(apply: PeftFunction, theta: PyTree, batch: Batch, path: str) -> Array:
    """The output of a module; what is above it is dead code."""
    with _recorded(next(iter(batch.values())).shape[0]) as found:
        apply(theta, batch)
    return found[path]


def cache_trunk(
    tun: Tunable,
    *data: Dataset | Mapping[str, Any],
    memory_budget: int = MEMORY_BUDGET,
    folder: str | Path | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    progress: Progress | None = None,
) -> tuple[Tunable, *tuple[Dataset, ...]]:
    """Computes what lies below the tuned parameters once, for all training, linearization and kernels that follow.

    Everything that takes a Tunable and data takes the pair that is returned, with the same results to rounding. With
    the top 2 of 12 layers tuned, a step then takes 2/7 (LoRA) to 1/2 (all weights, linearized) of its time.

    An example's activations must not depend on padding, as all of jaxlin assumes: each is computed at the length of its
    bucket, and rows beyond it are zero. The error ε_J of a kernel is then that of the layers above: activations are
    taken as given. Of modules under `nn.remat` or `nn.scan` nothing can be kept.

    Args:
        tun: A Tunable made of a `Model`, or its linearization.
        *data: Data sets, such as training and evaluation examples.
        memory_budget: Bytes for all activations; where they take more, they go to a file.
        folder: For that file, which stays there and serves the next call with the same weights and data; `None`: a
            temporary file, gone when nothing reads it any more.
        dtype: `"float64"` computes and keeps them in float64, as a kernel in float64 needs; `None` as the parameters.
        precision: Of matrix products on the device.
        progress: Called with examples done and in all.

    Returns:
        The Tunable that reads the activations, and the data sets with a column of them.

    Raises:
        InputError: If nothing lies below what is tuned, inputs do not fit, the disk has too little space, or `dtype`
            is unknown.

    Example:
        >>> import jax, numpy as np, flax.linen as nn, jaxlin as jl
        >>> net = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(2)])
        >>> params = net.init(jax.random.key(0), np.ones((1, 8)))["params"]
        >>> model = jl.from_linen(net, params, inputs=lambda batch: (batch["x"],))
        >>> top = jl.select(model, "layers_2")
        >>> fast, data = jl.cache_trunk(top, {"x": np.ones((5, 8), np.float32)})
        >>> fast.apply.cut.path, [value.shape for value in data.columns.values()]
        ('layers_0', [(5, 8), (5, 64)])
    """
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    sets = [as_dataset(part) for part in data]
    if not sets:
        raise InputError("cache_trunk needs the data whose activations are to be kept")
    for part in sets:
        tun.check_batch(part.columns)
    trunk = find_trunk(tun, sets[0])
    if dtype == "float64":
        trunk = dataclasses.replace(trunk, dtype=np.dtype(np.float64))
    fast, held = cache_found(tun, trunk, sets, memory_budget, folder, precision, progress)
    return (fast, *held)


def cache_found(
    tun: Tunable,
    trunk: Trunk,
    sets: Sequence[Dataset],
    memory_budget: int = MEMORY_BUDGET,
    folder: str | Path | None = None,
    precision: str = "highest",
    progress: Progress | None = None,
) -> tuple[Tunable, list[Dataset]]:
    """Does what `cache_trunk` does, with the trunk that `find_trunk` found: its weights are hashed once.

    Args:
        tun: The Tunable.
        trunk: Of it.
        sets: Data sets that fit it.
        memory_budget: As in `cache_trunk`; so are the others.
        folder: For a file.
        precision: Of matrix products on the device.
        progress: Called with examples done and in all.

    Returns:
        The Tunable that reads the activations, and the data sets with them.

    Raises:
        InputError: If the disk has too little space.
    """
    total = sum(map(len, sets))
    in_memory = trunk.nbytes(total) <= memory_budget
    if not in_memory:
        _check_disk(trunk.nbytes(total), folder)
    out, done = [], 0
    for part in sets:
        report = None if progress is None else (lambda now, base=done: progress(base + now, total))
        fill = functools.partial(_fill, tun, trunk, part, precision, report)
        column = _held(trunk, part, fill) if in_memory else _on_disk(trunk, part, folder, fill)
        out.append(dataclasses.replace(part, columns={**part.columns, trunk.cut.column: column}))
        done += len(part)
    return dataclasses.replace(tun, apply=_entered(tun.apply, trunk.cut)), out


def entered_alike(tun: Tunable, data: Dataset, like: Tunable) -> Tunable:
    """Returns another Tunable of the same model entered where `like` is, if its own trunk is the same; else itself.

    Args:
        tun: Such as LoRA with A frozen.
        data: Examples.
        like: What `cache_trunk` returned.
    """
    entered = _innermost(like.apply)
    with contextlib.suppress(InputError):
        if (cut := find_trunk(tun, data).cut) == entered.cut:
            return dataclasses.replace(tun, apply=_entered(tun.apply, cut))
    return tun


Put = Callable[[np.ndarray, np.ndarray], None]
"""Takes examples and their activations."""


def _fill(
    tun: Tunable, trunk: Trunk, data: Dataset, precision: str, report: Callable[[int], None] | None, put: Put
) -> None:
    """Computes the activations of all examples."""
    apply, theta, done = _network(tun), tun.theta0, 0
    wide = trunk.dtype == np.float64
    if wide:
        apply, theta = to_float64((apply, theta))
    with (
        jax.enable_x64(wide or jax.config.read("jax_enable_x64")),
        jax.default_matmul_precision(precision),
    ):
        for indices, batch in data.chunks(min(_CHUNK, len(data))):
            found = np.asarray(_activations(apply, theta, batch, trunk.cut.path))[: len(indices)]
            put(indices, found.astype(trunk.dtype, copy=False))
            done += len(indices)
            if report is not None:
                report(done)


def _held(trunk: Trunk, data: Dataset, fill: Callable[[Put], None]) -> np.ndarray:
    out = np.zeros((len(data), *trunk.shape), trunk.dtype)

    def put(indices: np.ndarray, found: np.ndarray) -> None:
        where: Any = (indices, *map(slice, found.shape[1:]))
        out[where] = found

    fill(put)
    return out


def _check_disk(size: int, folder: str | Path | None) -> None:
    """Refuses activations that do not fit.

    Raises:
        InputError: If they do not.
    """
    where = Path(tempfile.gettempdir() if folder is None else folder).absolute()
    there = next(parent for parent in (where, *where.parents) if parent.is_dir())
    if size > (free := shutil.disk_usage(there).free):
        raise InputError(
            f"the activations take {size / 2**30:.1f} GiB, more than memory_budget, and {there} has "
            f"{free / 2**30:.1f} GiB free; use fewer examples, or give a folder on another disk"
        )


def _on_disk(trunk: Trunk, data: Dataset, folder: str | Path | None, fill: Callable[[Put], None]) -> np.ndarray:
    shape = (len(data), *trunk.shape)
    if folder is None:
        with tempfile.TemporaryFile(prefix="jaxlin-trunk-") as file:  # the map keeps it, and nothing else does
            offset = _write(file, shape, trunk.dtype, fill)
            return np.memmap(file, trunk.dtype, "r", offset, shape)
    of = hashlib.sha256(f"{trunk.cut.column} {trunk.dtype} {data.buckets} {data.sha256()}".encode()).hexdigest()[:32]
    path = Path(folder) / f"trunk-{of}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("w+b") as file:
                _write(file, shape, trunk.dtype, fill)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    # A dtype that NumPy does not know by itself (bfloat16) is in the file as bytes of its width.
    return np.load(path, mmap_mode="r").view(trunk.dtype)


def _write(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, fill: Callable[[Put], None]) -> int:
    """Writes an array in NumPy's format, row by row: a full disk is an error then, and not the end of the process.

    Args:
        file: Open for writing.
        shape: Of the array.
        dtype: Of the array.
        fill: Puts the rows.

    Returns:
        Where the array begins.
    """
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, about)
    begin, row = file.tell(), math.prod(shape[1:]) * dtype.itemsize
    file.truncate(begin + shape[0] * row)  # rows beyond an example's tokens are holes, which read as zero

    def put(indices: np.ndarray, found: np.ndarray) -> None:
        for i, value in zip(indices.tolist(), found, strict=True):
            file.seek(begin + i * row)
            file.write(value.tobytes())

    fill(put)
    file.flush()
    return begin
