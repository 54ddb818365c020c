"""`ntk`: the empirical NTK of any Tunable, by any engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import TRUNK, Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.hashing import fingerprint
from jaxlin.mesh import from_first
from jaxlin.ntk.factored import find_sites
from jaxlin.ntk.jacobian import (
    MEMORY_BUDGET,
    Jacobian,
    check_precision,
    gram,
    jacobian,
    measure_epsilon,
)
from jaxlin.ntk.kernel import Kernel, KernelInfo
from jaxlin.ntk.kinds import Kind, kind_of
from jaxlin.ntk.neural_tangents import IMPLEMENTATIONS, neural_tangents_parts
from jaxlin.ntk.ring import RingWork
from jaxlin.ntk.store import ROWS, KernelStore, writing
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import PASSES, TILES, Cost, PhaseProgress, Plan, Work
from jaxlin.tunable import Blocks, Tunable, text_config
from jaxlin.versions import versions

ENGINES = ("auto", "jacobian", "factored", "neural_tangents")


def ntk(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    kind: str = "full",
    blocks: str | Blocks | None = None,
    engine: str = "auto",
    theta: PyTree | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    implementation: str | None = None,
    keep_jacobian: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    check_examples: int = 2,
    store: str | Path | None = None,
    resume: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    progress: PhaseProgress | None = None,
) -> Kernel:
    """Computes the empirical neural tangent kernel `K = J(x1) J(x2)ᵀ`, unnormalised (theory 0).

    One forward and C backward passes an example give the kernels of all blocks; one backward pass for the kinds
    `"logit_difference"` and `"pseudo"`.

    Args:
        tun: The model; the kernel is of exactly its theta.
        x1: Examples: a `Dataset` or a dict of arrays (an example's result does not depend on the batch
            it was computed in).
        x2: Other examples, for a train-test kernel; `None` for x1 itself.
        kind: Of kernel (theory 9): `"full"` `[N1, N2, C, C]`; `"trace"`, the mean over outputs of its diagonal, and
            `"pseudo"`, of the sum of the logits over √C, `[N1, N2]`; `"diagonal"`, equal outputs only, `[N1, N2, C]`;
            `"logit_difference"`, for C = 2, `[N1, N2]`; `"signgd"`, `sign(J) sign(J)ᵀ`, and `"asymmetric_signgd"`,
            `J sign(J)ᵀ`, `[N1, N2, C, C]`, where entries of at most 1e-6 of their row's largest in the same leaf
            (in float32) count as 0 and key biases of attention, whose derivative is rounding (but not with rotary
            positions), are left out.
        blocks: Which block kernels to keep apart: `"layer"`, `"module"`, `"leaf"`, a mapping of names to
            leaf paths, or `None` for the Tunable's own.
        engine: `"jacobian"`: per-example Jacobians; `"factored"`: what every module read and what flowed back to it,
            so that derivatives with respect to large weights are never held whole (models of Linen modules);
            `"neural_tangents"`: that library, one pass a block; `"auto"`: `"factored"` where it sees how every tuned
            parameter is used, else `"jacobian"`; `K.info.note` says why. Gram in float64 for the first two.
        theta: Where; default `tun.theta0`.
        dtype: `"float64"` computes the Jacobian in float64 (not by neural-tangents); `None` as the parameters.
        precision: Of matrix products on the device: `"highest"` is true float32.
        implementation: Of `engine="neural_tangents"`: one of `jaxlin.ntk.neural_tangents.IMPLEMENTATIONS`; default the
            first, `"JACOBIAN_CONTRACTION"`.
        keep_jacobian: Keep the Jacobian on the kernel (x2 = None, kind full, engine jacobian), so that `spectrum`
            takes eigenvalues from its singular values.
        memory_budget: Bytes to be held at a time, beside the model and the kernel itself; on a GPU, of its memory.
            What does not fit goes to files: in the store, or in a temporary folder.
        check_examples: Number of examples whose Jacobian rows are recomputed in float64 to measure ε_J
            (theory 6); 0 for none. neural-tangents' result is compared in entries of two examples always.
        store: Folder for the kernel, a Zarr group that can be read while it grows; the kernel returned reads its
            blocks from there. Passes and tiles already done survive whatever ends the process (of a mesh: passes where
            every process has room on its disk for them beside the kernel; one tile of every block at most is lost).
        resume: Go on with a store that is there, if it is of the same inputs, and number of devices of a mesh; the
            result is the same to the bit.
        mesh: Devices to share the work (`jaxlin.make_mesh`): examples by its first axis; what the passes give is
            passed round a ring, all of it held if the budget, of each device, allows. Of several processes each
            calls this with the same arguments; process 0 writes the store, which all must see. Weights that are
            split over several processes are taken as they lie; ε_J is not measured then.
        progress: Called with a phase's name, and units done and in all.

    Returns:
        The kernel, float64; `K.info` records engine, dtype, precision and measured error.

    Raises:
        InputError: If an argument is not one of those listed, an input does not fit the model, the budget is too
            small for one example, or a store is there already (without `resume`), is of other inputs, is being
            computed by another process, or has no space left.
        DeviceMemoryError: If a device of a mesh of several processes has too little memory for the plan; within one
            process, which goes on with less, if it has for one example.
        FloatingPointError: If neural-tangents' result fails its check against float64.
        ImportError: If neural-tangents does not work with the JAX that is installed.
    """
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r} is unknown; expected one of {', '.join(ENGINES)}")
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    if check_examples < 0:
        raise InputError(f"check_examples={check_examples}; expected 0 (no check) or more")
    check_precision(precision)
    chosen_kind = _kind_for(kind, tun)
    check_options(
        engine,
        kind,
        dtype,
        implementation=implementation,
        keep_jacobian=keep_jacobian,
        store=store,
        resume=resume,
        mesh=mesh,
    )
    data1, data2 = _datasets(tun, x1, x2, dtype)
    groups, theta = tun.grouped(blocks), tun.theta0 if theta is None else theta
    tun.check_theta(theta)
    engine, note = _choose(engine, tun, data1, theta, keep_jacobian)
    options: dict[str, Any] = {"dtype": dtype, "precision": precision, "memory_budget": memory_budget}
    name = dtype or str(jnp.result_type(*jax.tree.leaves(theta)))
    note = "; ".join(filter(None, (note, _left_out(chosen_kind, groups))))
    info = KernelInfo(engine, name, "float64", precision, jax.default_backend(), None, note)
    symmetric = data2 is None and chosen_kind.symmetric
    if engine == "neural_tangents":
        report = None if progress is None else functools.partial(progress, TILES)
        implementation = implementation or IMPLEMENTATIONS[0]
        with jax.default_matmul_precision(precision):
            parts, events = neural_tangents_parts(
                tun, data1, data2, theta, groups, implementation, precision, memory_budget, report
            )
        parts = {block: chosen_kind.of_full(part) for block, part in parts.items()}
        note = "; ".join(filter(None, (note, *events)))
        info = dataclasses.replace(info, engine=f"neural_tangents:{implementation}", gram_dtype=name, note=note)
        return Kernel(parts, symmetric, info, groups, kind=kind, of_two_sets=data2 is not None)
    if keep_jacobian:
        if data2 is not None:
            raise InputError("keep_jacobian is for the kernel of examples with themselves; x2 is given")
        report = None if progress is None else functools.partial(progress, PASSES)
        jac = jacobian(tun, data1, theta, **options, progress=report)
        epsilon = measure_epsilon(tun, data1, theta, jac, check_examples, precision, memory_budget)
        return kernel_from_jacobian(jac, jac, groups, precision, epsilon, True, note)
    work = _work_of(mesh, tun, data1, data2, theta, groups, chosen_kind, engine=engine, **options)
    if isinstance(work, RingWork):
        note = "; ".join(filter(None, (note, f"{work.devices} device{'s' * (work.devices > 1)} in a ring")))
        info = dataclasses.replace(info, note=note)
    if store is None:
        return _in_memory(work, info, groups, symmetric, check_examples, progress)
    inputs = _inputs(tun, theta, work)
    return _in_store(work, Path(store), resume, inputs, symmetric, note, check_examples, progress)


def ntk_plan(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    store: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Plan:
    """Says how `ntk` would cut the work, without computing anything; finds what it would refuse.

    Args:
        tun: As for `ntk`, and so are the others.
        x1: Examples.
        x2: Other examples, for a train-test kernel.
        store: Folder for the kernel.
        resume: Whether to go on with it.
        **options: kind, blocks, engine (one of jaxlin's own), theta, dtype, precision, memory_budget, mesh.

    Returns:
        The plan: that of the store, where it goes on.

    Raises:
        InputError: As `ntk`; or if the engine is neural-tangents'.
    """
    work, theta = _work(tun, x1, x2, **options)
    plan = work.plan()
    if store is not None and resume and _is_begun(Path(store)):
        opened = KernelStore.open(Path(store))
        opened.check_inputs(_inputs(tun, theta, work))
        if opened.is_finished():
            return opened.plan
        plan = opened.plan
    if store is not None:
        work.check_disk(Path(store), stored=True)
    return plan


def ntk_estimate(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    stored: bool = False,
    **options: Any,
) -> Cost:
    """Says what a kernel will take, from one timed pass for each length of text and two timed products.

    Args:
        tun: As for `ntk`, and so are the others.
        x1: Examples.
        x2: Other examples.
        stored: Whether the kernel is written to disk.
        **options: kind, blocks, engine (one of jaxlin's own), theta, dtype, precision, memory_budget, mesh.

    Returns:
        Time, memory and disk, and the plan.

    Raises:
        InputError: As `ntk`; or if the engine is neural-tangents'.
    """
    return _work(tun, x1, x2, **options)[0].estimate(stored)


def _work(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None,
    *,
    kind: str = "full",
    blocks: str | Blocks | None = None,
    engine: str = "auto",
    theta: PyTree | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    memory_budget: int = MEMORY_BUDGET,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Work, PyTree]:
    """Returns the work that a kernel is, and where the derivatives are taken.

    Raises:
        InputError: As `Work.of`; or if the engine is neural-tangents'.
    """
    if engine not in ENGINES[:3]:
        raise InputError(f"engine={engine!r} makes no plan; expected one of {', '.join(ENGINES[:3])}")
    check_options(engine, kind, dtype, mesh=mesh)
    data1, data2 = _datasets(tun, x1, x2, dtype)
    groups, theta = tun.grouped(blocks), tun.theta0 if theta is None else theta
    tun.check_theta(theta)
    check_precision(precision)
    engine, _ = _choose(engine, tun, data1, theta, False)
    options: dict[str, Any] = {"dtype": dtype, "precision": precision, "memory_budget": memory_budget}
    return _work_of(mesh, tun, data1, data2, theta, groups, _kind_for(kind, tun), engine=engine, **options), theta


def _kind_for(name: str, tun: Tunable) -> Kind:
    """Returns the kind of a name, as it is of a model."""
    return dataclasses.replace(kind_of(name), rotary=getattr(text_config(tun.apply), "rope", None) is not None)


def _work_of(mesh: jax.sharding.Mesh | None, *args: Any, **options: Any) -> Work:
    """Returns `Work.of` the other arguments, for the devices of a mesh if one is given."""
    work = Work.of(*args, **options)
    return work if mesh is None else RingWork.over(mesh, work)


def _inputs(tun: Tunable, theta: PyTree, work: Work) -> dict[str, Any]:
    """What a stored kernel is of; a store is gone on with only for the same."""
    return {
        "engine": work.engine,
        "kind": work.kind.name,
        "dtype": work.dtype or str(jnp.result_type(*jax.tree.leaves(theta))),
        "precision": work.precision,
        "device": jax.default_backend(),
        **fingerprint(tun, theta),
        "data_sha256": work.data1.sha256(),
        "other_data_sha256": work.data2 and work.data2.sha256(),
        **({"devices": work.devices} if isinstance(work, RingWork) else {}),
        "lengths": [list(data.buckets) for data in (work.data1, work.data2) if data is not None],
        "blocks": {block: list(paths) for block, paths in work.blocks.items()},
        "versions": versions(),
    }


def check_options(
    engine: str,
    kind: str,
    dtype: str | None,
    *,
    implementation: str | None = None,
    keep_jacobian: bool = False,
    store: str | Path | None = None,
    resume: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Refuses options that do not go together.

    Raises:
        InputError: If there are some.
    """
    if engine == "neural_tangents":
        given = {"dtype": dtype, "keep_jacobian": keep_jacobian, "store": store, "mesh": mesh}
        if named := [name for name, value in given.items() if value]:
            raise InputError(f'{" and ".join(named)}: no options of engine="neural_tangents"')
        if kind_of(kind).of_signs:
            raise InputError(f'kind="{kind}" does not follow from the kernels that engine="neural_tangents" computes')
    elif implementation is not None:
        raise InputError(f'implementation={implementation!r} is an option of engine="neural_tangents"')
    if keep_jacobian and (engine == "factored" or kind != "full" or store or mesh):
        raise InputError(
            'keep_jacobian is an option of engine="jacobian" with kind="full", without store and mesh; nothing else '
            "holds the whole Jacobian"
        )
    if resume and store is None:
        raise InputError("resume=True needs the store to go on with")


def _datasets(
    tun: Tunable, x1: Dataset | Mapping[str, Any], x2: Dataset | Mapping[str, Any] | None, dtype: str | None
) -> tuple[Dataset, Dataset | None]:
    """Returns the examples.

    Raises:
        InputError: If they do not fit the model, or hold activations of less precision than the kernel's.
    """
    data1, data2 = as_dataset(x1), None if x2 is None else as_dataset(x2)
    for data in (data1, data2):
        if data is None:
            continue
        tun.check_batch(data.columns)
        narrow = [k for k, v in data.columns.items() if k.startswith(TRUNK) and v.dtype != np.float64]
        if dtype == "float64" and narrow:
            raise InputError(
                f"{narrow[0]!r} holds {data[narrow[0]].dtype}, and the kernel is to be in float64: "
                'give cache_trunk dtype="float64" too'
            )
    return data1, data2


def _choose(engine: str, tun: Tunable, data: Dataset, theta: PyTree, whole: bool) -> tuple[str, str]:
    """Returns the engine, and why where that was left open."""
    if engine != "auto":
        return engine, ""
    if whole:
        return "jacobian", "chosen since the Jacobian is to be held"
    try:
        find_sites(tun, data, theta, 1)
    except InputError as error:
        return "jacobian", f"chosen since {error}"
    return "factored", "chosen since every tuned parameter belongs to a module that is called once"


def _left_out(kind: Kind, blocks: Blocks) -> str:
    """Says which parameters have no part in a kernel of signs."""
    count = sum(kind.without_sign(path) for paths in blocks.values() for path in paths)
    return (
        f"{count} key biases left out: their derivative is rounding and has no sign" if kind.of_signs and count else ""
    )


def _in_memory(
    work: Work, info: KernelInfo, blocks: Blocks, symmetric: bool, check_examples: int, progress: PhaseProgress | None
) -> Kernel:
    parts = {block: np.zeros(work.shape()) for block in blocks}
    plan = work.plan()

    def write(block: str, left: range, right: range, tile: np.ndarray) -> None:
        if tile.shape == parts[block].shape:  # all of it: no copy
            parts[block] = tile
            return
        parts[block][left.start : left.stop, right.start : right.stop] = tile
        if symmetric and left != right:
            parts[block][right.start : right.stop, left.start : left.stop] = transposed(tile)

    def changed(new: Plan, _: float | None) -> None:
        nonlocal plan
        plan = new

    epsilon = work.run(
        plan,
        write,
        wanted=lambda *_: True,
        folder=None,
        check_examples=check_examples,
        epsilon=None,
        changed=changed,
        progress=progress,
    )
    info = dataclasses.replace(info, note="; ".join(filter(None, (info.note, *plan.events))), epsilon_J=epsilon)
    return Kernel(parts, symmetric, info, dict(blocks), kind=work.kind.name, of_two_sets=work.data2 is not None)


def _in_store(
    work: Work,
    path: Path,
    resume: bool,
    inputs: Mapping[str, Any],
    symmetric: bool,
    note: str,
    check_examples: int,
    progress: PhaseProgress | None,
) -> Kernel:
    agreed = from_first if work.several_processes else lambda find: find()
    store: KernelStore | None = None  # of the process that writes it

    with contextlib.ExitStack() as stack:

        def begin() -> dict[str, Any]:
            nonlocal store
            stack.enter_context(writing(path))
            store = _opened(work, path, resume, inputs, symmetric, note)
            plan = store.plan
            missing = [not store.has(*tile) for tile in work.tiles(plan)]
            return {"plan": dataclasses.asdict(plan), "epsilon": store.about["epsilon_J"], "missing": missing}

        def write(block: str, left: range, right: range, tile: np.ndarray) -> None:
            if store is not None:
                store.write(block, left, right, tile)

        def changed(plan: Plan, epsilon: float | None) -> None:
            if store is not None:
                store.update(plan, epsilon)

        begun = agreed(begin)
        plan = Plan.from_json(begun["plan"])
        missing = {tile for tile, absent in zip(work.tiles(plan), begun["missing"], strict=True) if absent}
        work.run(
            plan,
            write,
            wanted=lambda *tile: tile in missing,
            folder=path / ROWS,
            check_examples=check_examples,
            epsilon=begun["epsilon"],
            changed=changed,
            progress=progress,
        )
        if store is not None:
            store.finish()
    agreed(lambda: None)  # the store is complete
    return (store or KernelStore.open(path)).kernel()


def _is_begun(path: Path) -> bool:
    """Whether there is anything where a store is to be."""
    return path.exists() and (path.is_file() or any(path.iterdir()))


def _opened(work: Work, path: Path, resume: bool, inputs: Mapping[str, Any], symmetric: bool, note: str) -> KernelStore:
    """Returns the store to go on with, or a new one.

    Raises:
        InputError: If there is one and it is not to be gone on with, or of other inputs, or the disk is too small.
    """
    if resume and _is_begun(path):
        store = KernelStore.open(path, "r+")
        store.check_inputs(inputs)
        if not store.is_finished():
            work.check_disk(path, stored=True)
        return store
    plan = work.plan()
    work.check_disk(path, stored=True)
    record: dict[str, Any] = {"symmetric": symmetric, "of_two_sets": work.data2 is not None, "note": note}
    return KernelStore.create(path, inputs, work.blocks, work.shape(), plan, **record)


def kernel_from_jacobian(
    jac1: Jacobian, jac2: Jacobian, blocks: Blocks, precision: str, epsilon: float | None, keep: bool, note: str = ""
) -> Kernel:
    """Returns the kernel, with its blocks, of Jacobians that were computed by `jacobian`.

    Args:
        jac1: Of the rows.
        jac2: Of the columns; the same object for a symmetric kernel.
        blocks: Block name to leaf paths.
        precision: That the Jacobians were computed at, for the record.
        epsilon: Measured ε_J, or `None`.
        keep: Whether the kernel keeps `jac1`'s rows.
        note: Why they were computed so, for the record.
    """
    (n1, c), n2 = jac1.outputs.shape, jac2.outputs.shape[0]
    parts = {}
    for name, paths in blocks.items():
        part = np.zeros((n1, n2, c, c))
        for path in paths:
            if path in jac1.rows and path in jac2.rows:
                part += gram(jac1.rows[path], jac2.rows[path])
        parts[name] = part
    note = "; ".join(filter(None, dict.fromkeys((note, *jac1.events, *jac2.events))))
    info = KernelInfo("jacobian", str(jac1.outputs.dtype), "float64", precision, jax.default_backend(), epsilon, note)
    return Kernel(
        parts, jac1 is jac2, info, dict(blocks), dict(jac1.rows) if keep else None, of_two_sets=jac1 is not jac2
    )
