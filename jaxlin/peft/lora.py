"""Low-rank adaptation (LoRA, Hu et al. 2022)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jaxlin.errors import InputError
from jaxlin.models.model import Model, named_key
from jaxlin.peft.function import PeftFunction, split_params
from jaxlin.peft.select import near_matches, require_live_head
from jaxlin.tunable import Tunable, in_head


def target_modules(
    model: Model, targets: str | Sequence[str], layers: int | Collection[int] | None
) -> dict[str, tuple[int, int]]:
    """Returns the dense modules that LoRA adapts, path to `(d_in, d_out)`.

    Args:
        model: The pretrained model.
        targets: Module names, each matching the end of a path (`"query"`, `"mlp/up"`); or one regular
            expression for whole paths (as in the peft library). The classification head never matches.
        layers: Indices of layers; `None` for all.

    Raises:
        InputError: If a target or a layer matches nothing.
    """
    shapes = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in flatten_dict(model.params, sep="/").items()
        if path.endswith("/kernel") and leaf.ndim == 2 and not in_head(path)
    }
    layer_of = {path: re.search(r"(?:^|/)layer_(\d+)/", path) for path in shapes}
    present = {int(match.group(1)) for match in layer_of.values() if match}
    if isinstance(layers, int):
        layers = (layers,)
    if layers is not None:
        wrong = sorted(set(layers) - present)
        if wrong or not layers:
            raise InputError(f"layers={sorted(layers)}: expected some of {min(present)} to {max(present)}")
        shapes = {p: s for p, s in shapes.items() if (m := layer_of[p]) and int(m.group(1)) in layers}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            try:
                hits = {path for path in shapes if re.fullmatch(target, path)}
            except re.error as error:
                raise InputError(f"targets={target!r} is not a regular expression: {error}") from error
        else:
            hits = {path for path in shapes if f"/{path}".endswith(f"/{target}")}
        if not hits:
            raise InputError(
                f"LoRA target {target!r} matches no dense module; near: {near_matches(target, list(shapes))}"
            )
        chosen |= hits
    if not chosen:
        raise InputError("LoRA needs at least one target module")
    return {path: shapes[path] for path in shapes if path in chosen}


def lora(
    model: Model,
    rank: int = 8,
    alpha: float = 8,
    targets: str | Sequence[str] = ("query", "value"),
    layers: int | Collection[int] | None = None,
    rng: int | Array = 0,
    *,
    train_head: bool = True,
    freeze_A: bool = False,
) -> Tunable:
    """Adapts dense modules as `x·W + (alpha/rank)·(x·A)·B`, W frozen.

    A is drawn from U(−1/√d_in, 1/√d_in) and B is zero, as in the peft library: at the start the outputs
    are the pretrained model's and the gradient to A vanishes, so the *linearized* model never moves A
    (theory 1). The key of each A depends on `rng` and its path only: the same A whatever else is tuned.

    Args:
        model: The pretrained model.
        rank: Rank r of the factors, 1 to min(d_in, d_out).
        alpha: Scale α.
        targets: See `target_modules`.
        layers: Layer indices; `None` for all.
        rng: Seed or key of A.
        train_head: Whether the classification head is part of theta.
        freeze_A: Keep A fixed (LoRA-FA).

    Returns:
        A Tunable whose theta has `lora_A` `[d_in, r]` (unless frozen) and `lora_B` `[r, d_out]` under each
        module's path, and the head. Blocks: A and B of each module apart, and the head.

    Raises:
        InputError: If the rank does not fit, nothing matches, or the head is zero and frozen.
    """
    modules = target_modules(model, targets, layers)
    limit = min(min(shape) for shape in modules.values())
    if not 1 <= rank <= limit:
        raise InputError(f"LoRA rank {rank}: expected 1 to {limit}, the smallest side of the adapted modules")
    if not math.isfinite(alpha):
        raise InputError(f"LoRA alpha {alpha}; expected a finite number")
    if not train_head:
        require_live_head(model)
    params = flatten_dict(model.params, sep="/")
    factors_a, factors_b = {}, {}
    for path, (d_in, d_out) in modules.items():
        dtype, bound = params[f"{path}/kernel"].dtype, d_in**-0.5
        key = named_key(rng, f"lora:{path}")
        # Drawn in float32: the same A with x64 on and off.
        draw = jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound)
        factors_a[f"{path}/lora_A"] = draw.astype(dtype)
        factors_b[f"{path}/lora_B"] = jnp.zeros((rank, d_out), dtype)
    head, frozen = split_params(model.params, lambda path: train_head and in_head(path))
    theta = {**factors_b, **flatten_dict(head, sep="/")}
    rest = flatten_dict(frozen, sep="/")
    (rest if freeze_A else theta).update(factors_a)
    return Tunable(
        PeftFunction(unflatten_dict(rest, sep="/"), model.module, alpha / rank),
        unflatten_dict(theta, sep="/"),
    )
