"""Parameters split over a mesh by rules on their paths, and batches split over its axis `data`.

One program (GSPMD): what lies where is said of parameters and batches alone, and XLA derives the rest, so that the
same compiled step serves one device, several, and several processes, full and linearized.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxlin.errors import InputError
from jaxlin.mesh import place
from jaxlin.tunable import Batch, Tunable, leaf_paths

DATA = "data"
"""Axis of a mesh that the examples of a batch are split over."""

Rules = Sequence[tuple[str, PartitionSpec]]
"""Regular expression, searched for in the `/`-joined path of a parameter, and how such a parameter is split; the first
that matches counts, and what none matches is whole on every device."""

ENCODER_RULES: Rules = (
    (r"attention/(query|key|value)/(kernel|lora_B)$|mlp/up/(kernel|lora_B)$", PartitionSpec(None, "model")),
    (r"attention/(query|key|value)/bias$|mlp/up/bias$", PartitionSpec("model")),
    (r"attention/output/(kernel|lora_A)$|mlp/down/(kernel|lora_A)$", PartitionSpec("model", None)),
    (r"embeddings/(word|position|token_type)/embedding$", PartitionSpec(None, "model")),
)
"""Rules for this package's encoders on a mesh with an axis `model`: the first map of a pair is split by its outputs,
the second by its inputs, so that a layer takes two sums over the axis (Megatron-LM, Shoeybi et al. 2019, section 3).
Embeddings are split by their width, not by the vocabulary: RoBERTa's has 50,265 words, an odd number, and a look-up in
a table split by width needs no exchange."""

DECODER_RULES: Rules = (
    (r"attention/(query|key|value)/(kernel|lora_B)$|mlp/(gate|up)/(kernel|lora_B)$", PartitionSpec(None, "model")),
    (r"attention/(query|key|value)/bias$|mlp/(gate|up)/bias$", PartitionSpec("model")),
    (r"attention/output/(kernel|lora_A)$|mlp/down/(kernel|lora_A)$", PartitionSpec("model", None)),
    (r"embeddings/(word|position)/embedding$", PartitionSpec(None, "model")),
    (r"lm_head/kernel$", PartitionSpec("model", None)),
)
"""Rules for this package's decoders, likewise; with grouped heads the axis `model` should divide the number of key and
value heads, else a head is split. The untied head is split by its inputs, as a tied one is with the embedding."""


_WRAPPING = re.compile(r"^(?:(?:apply|frozen|at|theta0)/)+")
"""What stands before a parameter's own path in that of a leaf of a Tunable."""

_CACHE = re.compile(r"^(?:rows|outputs)(?:/|$)")
"""Leaves that are no parameters but what was computed of examples, under the names of parameters."""


def _check_spec(path: str, shape: tuple[int, ...], spec: PartitionSpec, sizes: Mapping[str, int]) -> None:
    what = f"the rule for {path}, of shape {shape}, is {spec}"
    if len(spec) > len(shape):
        raise InputError(f"{what}, which names {len(spec)} dimensions; expected at most {len(shape)}")
    for size, names in zip(shape, spec, strict=False):
        axes = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        for axis in axes:
            if axis not in sizes:
                raise InputError(f"{what}, but the mesh has no axis {axis!r}; its axes are {dict(sizes)}")
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts:
            raise InputError(
                f"{what}, but its dimension of size {size} cannot be split evenly over {parts} devices (axis "
                f"{', '.join(axes)}); make that axis a divisor of {size}, or put a rule for this parameter before"
            )


def specs_of(tun: Tunable, sizes: Mapping[str, int], rules: Rules) -> list[PartitionSpec | None]:
    """Returns how the rules split each leaf of `(tun.apply, tun.theta0)`, in order; `None` where none matches.

    Args:
        tun: The model.
        sizes: Axes of the mesh and their sizes.
        rules: The rules.

    Raises:
        InputError: If a rule is no regular expression, none matches anything, or one names an axis that the mesh has
            not, or a dimension cannot be split evenly.
    """
    compiled = []
    for pattern, spec in rules:
        try:
            compiled.append((re.compile(pattern), spec))
        except re.error as error:
            raise InputError(f"the rule {pattern!r} is no regular expression: {error}") from error
    given = {"apply": tun.apply, "theta0": tun.theta0}
    paths = [_WRAPPING.sub("", path) for path in leaf_paths(given)]
    specs: list[PartitionSpec | None] = [
        None if _CACHE.match(path) else next((spec for pattern, spec in compiled if pattern.search(path)), None)
        for path in paths
    ]
    if rules and all(how is None for how in specs):
        patterns = ", ".join(pattern for pattern, _ in rules)
        raise InputError(f"no rule ({patterns}) matches a parameter; their paths are such as {paths[-1]}")
    for path, leaf, how in zip(paths, jax.tree.leaves(given), specs, strict=True):
        if how is not None:
            _check_spec(path, np.shape(leaf), how, sizes)
    return specs


def shard(tun: Tunable, mesh: Mesh, rules: Rules = ()) -> Tunable:
    """Puts the parameters of a Tunable, tuned and frozen ones, on a mesh.

    Weights may lie on the host (NumPy arrays, or arrays of JAX's CPU device): each device then takes its part from
    there, and a model that is larger than one device never lies on one.

    Args:
        tun: A model, or its linearization: `linearize(shard(tun))` and `shard(linearize(tun))` are the same.
        mesh: The mesh (`make_mesh`), of the devices of every process.
        rules: How parameters are split, by their paths in the model (`encoder/layer_0/mlp/up/kernel`), such as
            `ENCODER_RULES`. A parameter that no rule matches stays as it lies where it lies on this mesh, and else
            each device has all of it.

    Returns:
        The same function with its parameters on the mesh; its theta0 gives the optimizer's state its layout.

    Raises:
        InputError: If the mesh has no axis `data`, a rule is no regular expression, matches nothing or names an axis
            that the mesh has not, or a dimension cannot be split evenly; before anything is moved.

    Example:
        >>> import jax, jaxlin as jl
        >>> from jax.sharding import PartitionSpec
        >>> mesh = jl.make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1])
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jax.numpy.ones((4, 2))})
        >>> jl.shard(tun, mesh, [("w$", PartitionSpec(None, "model"))]).theta0["w"].sharding.spec
        P(None, 'model')
    """
    require_data_axis(mesh)
    specs = specs_of(tun, mesh.shape, rules)
    leaves, tree = jax.tree.flatten((tun.apply, tun.theta0))
    placed = [place(leaf, mesh, how) for leaf, how in zip(leaves, specs, strict=True)]
    apply, theta0 = jax.tree.unflatten(tree, placed)
    return dataclasses.replace(tun, apply=apply, theta0=theta0)


def require_data_axis(mesh: Mesh) -> None:
    """Checks that a mesh has the axis that batches are split over.

    Raises:
        InputError: If it has not.
    """
    if DATA not in mesh.shape:
        raise InputError(
            f"the mesh has axes {dict(mesh.shape)} and none named {DATA!r}, which the batch is split over; "
            f"add it, of size 1 where only parameters are to be split"
        )


def mesh_of(tree: PyTree) -> Mesh | None:
    """Returns the mesh that parameters lie on, `None` where they lie on one device, as arrays do by default."""
    meshes = (getattr(getattr(leaf, "sharding", None), "mesh", None) for leaf in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and DATA in mesh.shape), None)


def share_of(owners: Sequence[set[int]], process: int) -> tuple[int, int]:
    """Returns which share of a batch a process needs, and of how many.

    Args:
        owners: Processes that hold each device's part of the batch, along the axis `data`.
        process: Which process.

    Returns:
        Number of the share and of shares; 0 and 1, all of it, where processes do not hold as many successive parts
        each, and no part in common (an axis `model` that goes over processes).
    """
    order = list(dict.fromkeys(min(part) for part in owners))
    each = len(owners) // len(order)
    if list(owners) != [{owner} for owner in order for _ in range(each)]:
        return 0, 1
    return order.index(process), len(order)


def process_share(mesh: Mesh | None) -> tuple[int, int]:
    """Returns `share_of` this process on a mesh; all of the batch where there is none."""
    if mesh is None:
        return 0, 1
    rows = np.moveaxis(mesh.devices, mesh.axis_names.index(DATA), 0).reshape(mesh.shape[DATA], -1)
    return share_of([{device.process_index for device in row} for row in rows], jax.process_index())


def spread(batch: Batch, mesh: Mesh | None, parts: int = 1, shares: int = 1) -> dict[str, Any]:
    """Puts a batch on the devices that compute it, its examples split over the axis `data`.

    Args:
        batch: Host arrays, with `weight`: the whole batch, the same in every process, or this process's share of it.
        mesh: The mesh; `None` for one device, which JAX puts the batch on when it is used.
        parts: Number of parts, of equal size, that each device's examples are to be cut into.
        shares: Number of shares of equal size that the batch came in; see `process_share`.

    Returns:
        The batch; rows are added that make its size a multiple of the devices and parts. They repeat the first
        example and have weight 0.
    """
    size = len(batch["weight"])
    missing = -size % (parts * (1 if mesh is None else mesh.shape[DATA] // shares))
    rows = np.concatenate([np.arange(size), np.zeros(missing, int)])
    out = {name: value[rows] if missing else value for name, value in batch.items()}
    out["weight"] = np.where(np.arange(len(rows)) < size, out["weight"], 0).astype(np.float32)
    if mesh is None or shares == 1:
        return out if mesh is None else place(out, mesh, DATA)
    along = NamedSharding(mesh, PartitionSpec(DATA))
    local = {name: value.astype(jax.dtypes.canonicalize_dtype(value.dtype), copy=False) for name, value in out.items()}
    return {name: jax.make_array_from_process_local_data(along, value) for name, value in local.items()}
