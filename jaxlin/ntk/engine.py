"""`ntk`: the empirical NTK of any Tunable, by any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.ntk.factored import factored_parts
from jaxlin.ntk.jacobian import (
    MEMORY_BUDGET,
    Jacobian,
    Progress,
    gram,
    jacobian,
    jacobian_bytes,
    measure_epsilon,
)
from jaxlin.ntk.kernel import Kernel, KernelInfo
from jaxlin.ntk.neural_tangents import neural_tangents_parts
from jaxlin.peft.function import PeftFunction
from jaxlin.tunable import Blocks, Tunable


def ntk(
    tun: Tunable,
    x1: Dataset | Mapping[str, Any],
    x2: Dataset | Mapping[str, Any] | None = None,
    *,
    blocks: str | Blocks | None = None,
    engine: str = "auto",
    theta: PyTree | None = None,
    dtype: str | None = None,
    precision: str = "highest",
    implementation: str = "JACOBIAN_CONTRACTION",
    keep_jacobian: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    check_examples: int = 2,
    progress: Progress | None = None,
) -> Kernel:
    """Computes the empirical neural tangent kernel `K = J(x1) J(x2)ᵀ`, unnormalised (theory 0).

    Args:
        tun: The model; the kernel is of exactly its theta.
        x1: Examples: a `Dataset` or a dict of arrays (an example's result does not depend on the batch
            it was computed in).
        x2: Other examples, for a train-test kernel; `None` for x1 itself.
        blocks: Which block kernels to keep apart: `"layer"`, `"module"`, `"leaf"`, a mapping of names to
            leaf paths, or `None` for the Tunable's own.
        engine: `"jacobian"`: per-example Jacobians held in memory, Gram in float64, every block from one
            pass; `"factored"`: the same of what every module read and what flowed back to it, so that derivatives
            with respect to large weights are never held whole (models of Linen modules); `"neural_tangents"`: that
            library, one pass a block; `"auto"`: `"jacobian"` where the Jacobian fits the budget, else `"factored"`.
        theta: Where; default `tun.theta0`.
        dtype: `"float64"` computes the Jacobian in float64 (not by neural-tangents); `None` as the parameters.
        precision: Of matrix products on the device: `"highest"` is true float32.
        implementation: Of neural-tangents; see `jaxlin.ntk.neural_tangents.IMPLEMENTATIONS`.
        keep_jacobian: Keep the Jacobian on the kernel (x2 = None, engine jacobian), so that `spectrum`
            takes eigenvalues from its singular values.
        memory_budget: Largest size of a Jacobian in bytes, or of what stands for it.
        check_examples: Number of examples whose Jacobian rows are recomputed in float64 to measure ε_J
            (theory 6); 0 for none.
        progress: Called with examples (tiles, for neural-tangents) done and in all.

    Returns:
        The kernel, float64; `K.info` records engine, dtype, precision and measured error.

    Raises:
        InputError: If an argument is not one of those listed or an input does not fit the model.
        FloatingPointError: If neural-tangents' result fails its check against float64.
    """
    if engine not in ("auto", "jacobian", "factored", "neural_tangents"):
        raise InputError(f'engine={engine!r} is unknown; expected "auto", "jacobian", "factored" or "neural_tangents"')
    if dtype not in (None, "float64"):
        raise InputError(f'dtype={dtype!r} is unknown; expected "float64", or None for that of the parameters')
    data1, data2 = as_dataset(x1), None if x2 is None else as_dataset(x2)
    groups, theta = tun.grouped(blocks), tun.theta0 if theta is None else theta
    if engine == "auto":
        engine = _choose(tun, data1, dtype, memory_budget) if not keep_jacobian else "jacobian"
    if engine == "factored":
        if keep_jacobian:
            raise InputError('keep_jacobian is an option of engine="jacobian"; engine="factored" never holds it')
        parts, epsilon = factored_parts(
            tun,
            data1,
            data2,
            theta,
            groups,
            dtype=dtype,
            precision=precision,
            memory_budget=memory_budget,
            check_examples=check_examples,
            progress=progress,
        )
        name = dtype or str(jnp.result_type(*jax.tree.leaves(theta)))
        info = KernelInfo("factored", name, "float64", precision, jax.default_backend(), epsilon)
        return Kernel(parts, data2 is None, info, groups)
    if engine == "neural_tangents":
        if dtype is not None or keep_jacobian:
            raise InputError('dtype and keep_jacobian are no options of engine="neural_tangents"')
        for data in (data1, data2):
            if data is not None:
                tun.check_batch(data.columns)
        with jax.default_matmul_precision(precision):
            parts = neural_tangents_parts(
                tun, data1, data2, theta, groups, implementation, memory_budget=memory_budget, progress=progress
            )
        name = str(jnp.result_type(*jax.tree.leaves(theta)))
        info = KernelInfo(f"neural_tangents:{implementation}", name, name, precision, jax.default_backend(), None)
        return Kernel(parts, data2 is None, info, groups)
    options: dict[str, Any] = {"dtype": dtype, "precision": precision, "memory_budget": memory_budget}
    jac1 = jacobian(tun, data1, theta, **options, progress=progress)
    jac2 = jac1 if data2 is None else jacobian(tun, data2, theta, **options)
    epsilon = measure_epsilon(tun, data1, theta, jac1, check_examples, precision, memory_budget)
    return kernel_from_jacobian(jac1, jac2, groups, precision, epsilon, keep_jacobian and data2 is None)


def _choose(tun: Tunable, data: Dataset, dtype: str | None, memory_budget: int) -> str:
    """Returns the engine for `"auto"`: the one that holds the Jacobian, unless it does not fit and need not be."""
    fits = jacobian_bytes(tun, data, dtype) <= memory_budget
    return "jacobian" if fits or not isinstance(tun.apply, PeftFunction) else "factored"


def kernel_from_jacobian(
    jac1: Jacobian, jac2: Jacobian, blocks: Blocks, precision: str, epsilon: float | None, keep: bool
) -> Kernel:
    """Returns the kernel, with its blocks, of Jacobians that were computed by `jacobian`.

    Args:
        jac1: Of the rows.
        jac2: Of the columns; the same object for a symmetric kernel.
        blocks: Block name to leaf paths.
        precision: That the Jacobians were computed at, for the record.
        epsilon: Measured ε_J, or `None`.
        keep: Whether the kernel keeps `jac1`'s rows.
    """
    (n1, c), n2 = jac1.outputs.shape, jac2.outputs.shape[0]
    parts = {}
    for name, paths in blocks.items():
        part = np.zeros((n1, n2, c, c))
        for path in paths:
            if path in jac1.rows and path in jac2.rows:
                part += gram(jac1.rows[path], jac2.rows[path])
        parts[name] = part
    info = KernelInfo("jacobian", str(jac1.outputs.dtype), "float64", precision, jax.default_backend(), epsilon)
    return Kernel(parts, jac1 is jac2, info, dict(blocks), dict(jac1.rows) if keep else None)
