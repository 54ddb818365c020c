"""IA³: activations scaled by learned vectors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.function import PeftFunction, split_params
from jaxlin.peft.select import require_live_head
from jaxlin.peft.targets import target_modules
from jaxlin.tunable import Tunable, in_head


def ia3(
    model: Model,
    targets: str | Sequence[str] = ("key", "value"),
    feedforward: str | Sequence[str] = ("mlp/down",),
    layers: int | Collection[int] | None = None,
    *,
    train_head: bool = True,
) -> Tunable:
    """Scales the outputs of some dense modules and the inputs of others by vectors that start at 1 (IA³).

    Args:
        model: The pretrained model.
        targets: Modules whose output, bias included, is scaled; see `jaxlin.peft.targets.target_modules`.
        feedforward: Modules whose input is scaled; `()` for none.
        layers: Layer indices; `None` for all.
        train_head: Whether the classification head is part of theta.

    Returns:
        A Tunable whose theta has `ia3_out` `[d_out]` and `ia3_in` `[d_in]` under the modules' paths, and the head.

    Raises:
        InputError: If nothing matches, a module is in both lists, or the head is zero and frozen.

    References:
        Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning".
    """
    outward = target_modules(model, targets, layers)
    inward = target_modules(model, feedforward, layers) if feedforward else {}
    both = sorted(set(outward) & set(inward))
    if both:
        raise InputError(f"{both[0]} is among targets and feedforward; expected it in one of them")
    if not train_head:
        require_live_head(model)
    params = flatten_dict(model.params, sep="/")
    head, frozen = split_params(model.params, lambda path: train_head and in_head(path))
    theta = flatten_dict(head, sep="/")
    sizes = {f"{path}/ia3_out": d_out for path, (_, d_out) in outward.items()}
    sizes |= {f"{path}/ia3_in": d_in for path, (d_in, _) in inward.items()}
    for path, size in sizes.items():
        theta[path] = jnp.ones(size, params[f"{path.rpartition('/')[0]}/kernel"].dtype)
    return Tunable(PeftFunction(frozen, model.module), unflatten_dict(theta, sep="/"))
