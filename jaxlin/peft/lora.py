"""Low-rank adaptation and its relatives: LoRA, rsLoRA, LoRA-FA, DoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from jaxlin.errors import InputError
from jaxlin.models.model import Model, named_key
from jaxlin.peft.function import PeftFunction, split_params
from jaxlin.peft.select import require_live_head
from jaxlin.peft.targets import by_pattern, saved_modules, target_modules
from jaxlin.tunable import Tunable, in_head


def lora(
    model: Model,
    rank: int = 8,
    alpha: float = 8,
    targets: str | Sequence[str] = ("query", "value"),
    layers: int | Collection[int] | None = None,
    rng: int | Array = 0,
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    freeze_A: bool = False,
    train_head: bool = True,
    modules_to_save: Sequence[str] = (),
) -> Tunable:
    r"""Adapts dense modules as `x·W + s·(x·A)·B`, W frozen, s = alpha/rank.

    A is drawn from U(−1/√d_in, 1/√d_in) and B is zero, as in the peft library: at the start the outputs
    are the pretrained model's and the gradient to A vanishes, so the *linearized* model never moves A
    (theory 1). The key of each A depends on `rng` and its path only: the same A whatever else is tuned.

    With DoRA the weight is `m ⊙ (W + s·A·B)/‖W + s·A·B‖`, the norm over the inputs of each output, m tuned and
    `‖W‖` at the start. The derivative here is that of this function; the peft library holds the norm constant in
    it, as the DoRA paper proposes to save memory.

    LoRA+ is a learning rate for B of its own: `TrainConfig(learning_rate_blocks={"lora_B": 16})`.

    Args:
        model: The pretrained model.
        rank: Rank r of the factors, 1 to min(d_in, d_out).
        alpha: Scale α.
        targets: See `jaxlin.peft.targets.target_modules`.
        layers: Layer indices; `None` for all.
        rng: Seed or key of A.
        rank_pattern: Another rank for some modules: regular expression for the end of the path to rank.
        alpha_pattern: Likewise another α.
        use_rslora: s = alpha/√rank (rsLoRA, Kalajdzievski 2023).
        use_dora: DoRA (Liu et al. 2024).
        freeze_A: Keep A fixed (LoRA-FA, Zhang et al. 2023).
        train_head: Whether the classification head is part of theta.
        modules_to_save: Names of modules that are tuned whole beside it, by the end of their path.

    Returns:
        A Tunable whose theta has `lora_A` `[d_in, r]` (unless frozen), `lora_B` `[r, d_out]` and, with DoRA,
        `dora_magnitude` `[d_out]` under each module's path, and the head. Each is a block of its own.

    Raises:
        InputError: If a rank does not fit, nothing matches, the head is zero and frozen, or, with DoRA, a weight
            has an output with all weights zero.

    References:
        Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    modules = target_modules(model, targets, layers)
    ranks = by_pattern(modules, rank_pattern or {}, rank, "rank_pattern")
    alphas = by_pattern(modules, alpha_pattern or {}, float(alpha), "alpha_pattern")
    for path, shape in modules.items():
        if not 1 <= ranks[path] <= min(shape):
            raise InputError(f"LoRA rank {ranks[path]}: expected 1 to {min(shape)}, the smallest side of {path}")
        if not math.isfinite(alphas[path]):
            raise InputError(f"LoRA alpha {alphas[path]}; expected a finite number")
    saved = saved_modules(model, modules_to_save)
    if not train_head:
        require_live_head(model)
    params = flatten_dict(model.params, sep="/")
    transposed = getattr(model.module, "transposed", ())
    factors: dict[str, tuple[Array, Array]] = {}
    magnitudes: dict[str, Array] = {}
    for path, (d_in, d_out) in modules.items():
        kernel, bound = params[f"{path}/kernel"], d_in**-0.5
        # Drawn in float32: the same A with x64 on and off.
        draw = jax.random.uniform(named_key(rng, f"lora:{path}"), (d_in, ranks[path]), jnp.float32, -bound, bound)
        factors[path] = draw.astype(kernel.dtype), jnp.zeros((ranks[path], d_out), kernel.dtype)
        if use_dora:
            norm = jnp.linalg.norm(kernel, axis=1 if path in transposed else 0)
            if not bool(jnp.all(norm > 0)):
                raise InputError(f"DoRA: {path} has an output with all weights zero, which has no direction")
            magnitudes[path] = norm
    scales = {path: alphas[path] / (ranks[path] ** 0.5 if use_rslora else ranks[path]) for path in modules}
    return adapted(
        model, lambda path: (train_head and in_head(path)) or path in saved, factors, scales, freeze_A, magnitudes
    )


def adapted(
    model: Model,
    tuned: Callable[[str], bool],
    factors: Mapping[str, tuple[Array, Array]],
    scales: Mapping[str, float],
    freeze_A: bool = False,
    magnitudes: Mapping[str, Array] | None = None,
) -> Tunable:
    """Returns a model with low-rank factors as they are given.

    Args:
        model: The pretrained model.
        tuned: Whether a parameter of its own, by path, is tuned too.
        factors: Path of a dense module to A `[d_in, r]` and B `[r, d_out]`.
        scales: Likewise to s.
        freeze_A: Keep every A fixed.
        magnitudes: Likewise to DoRA's m `[d_out]`; `None`: LoRA.
    """
    whole, frozen = split_params(model.params, tuned)
    theta, rest = flatten_dict(whole, sep="/"), flatten_dict(frozen, sep="/")
    for path, (a, b) in factors.items():
        (rest if freeze_A else theta)[f"{path}/lora_A"] = a
        theta[f"{path}/lora_B"] = b
    theta |= {f"{path}/dora_magnitude": m for path, m in (magnitudes or {}).items()}
    function = PeftFunction(unflatten_dict(rest, sep="/"), model.module, tuple(scales.items()))
    return Tunable(function, unflatten_dict(theta, sep="/"))
