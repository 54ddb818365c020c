"""Models that jaxlin did not build: a user's Linen module, transformers' Flax classes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.tunable import Batch


@dataclasses.dataclass(frozen=True)
class LinenFunction:
    """A Linen module as a function of a batch; compared by value.

    Attributes:
        module: The module.
        inputs: Batch to the module's positional arguments (a tuple) or keyword arguments (a dict); `None`: the
            batch itself is the one argument.
        logits: The module's output to logits `[B, C]`; `None`: the output itself.
        transposed: Paths of dense modules whose kernel is `[d_out, d_in]`.
    """

    module: nn.Module
    inputs: Callable[[Batch], tuple[Any, ...] | dict[str, Any]] | None = None
    logits: Callable[[Any], Array] | None = None
    transposed: tuple[str, ...] = ()

    def apply(self, variables: Mapping[str, PyTree], batch: Batch) -> Array:
        """Returns logits `[B, C]` of the module applied to `variables`."""
        given = (batch,) if self.inputs is None else self.inputs(batch)
        if isinstance(given, Mapping):
            out: Any = self.module.apply(variables, **given)
        else:
            out = self.module.apply(variables, *given)
        return out if self.logits is None else self.logits(out)


def from_linen(
    module: nn.Module,
    params: PyTree,
    *,
    logits: Callable[[Any], Array] | None = None,
    inputs: Callable[[Batch], tuple[Any, ...] | dict[str, Any]] | None = None,
) -> Model:
    """Makes a `Model` of any Linen module, for every PEFT method, kernel and trainer here.

    LoRA and its like find their targets by the module's own names; a top-level module named `classifier` is the
    classification head, other modules to tune whole are named by `modules_to_save`. Layers are told by paths such
    as `layer_3`, `layers/3`, `block_3`, `h/3`.

    Args:
        module: A module without mutable state that treats examples independently, dropout off.
        params: Its parameters, a nested dict.
        logits: Takes logits `[B, C]` from its output; `None` if that is what it returns. Give a function, not a
            fresh lambda a call: it is compared by identity, and another one compiles anew.
        inputs: Takes the module's arguments (a tuple, or a dict of keywords) from a batch; `None` if it takes the
            batch, a dict of arrays.

    Returns:
        The model.

    Raises:
        InputError: If `params` is no nested dict of arrays.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxlin as jl
        >>> net = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
        >>> batch = {"x": jnp.ones((5, 4))}
        >>> params = net.init(jax.random.key(0), batch["x"])["params"]
        >>> model = jl.from_linen(net, params, inputs=lambda batch: (batch["x"],))
        >>> tun = jl.lora(model, rank=2, targets=("layers_0",), modules_to_save=("layers_2",))
        >>> tun.apply(tun.theta0, batch).shape, tun.num_params
        ((5, 3), 51)
    """
    if not isinstance(params, Mapping) or not all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
        raise InputError(
            f"params is a {type(params).__name__}; expected the nested dict of arrays in variables['params']"
        )
    return Model(jax.tree.map(jnp.asarray, dict(params)), LinenFunction(module, inputs, logits))


@dataclasses.dataclass(frozen=True)
class _HfInputs:
    """Arguments of a module of transformers' Flax classes, made of a batch."""

    names: tuple[str, ...]
    padding_id: int | None

    def __call__(self, batch: Batch) -> dict[str, Any]:
        ids = jnp.asarray(batch["input_ids"])
        live = jnp.not_equal(ids, -1 if self.padding_id is None else self.padding_id).astype(ids.dtype)
        known = {
            "input_ids": ids,
            "attention_mask": jnp.asarray(batch["attention_mask"]),
            "token_type_ids": jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(ids))),
            "position_ids": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            if self.padding_id is None
            else jnp.cumsum(live, axis=1) * live + self.padding_id,
            "head_mask": None,
        }
        return {name: value for name, value in known.items() if name in self.names} | {"deterministic": True}


def _hf_logits(output: Any) -> Array:
    return output.logits if hasattr(output, "logits") else output[0]


def from_hf_flax(hf_model: Any, *, logits: Callable[[Any], Array] | None = None) -> Model:
    """Makes a `Model` of one of transformers' Flax classes (4.57 is the last version with them).

    Args:
        hf_model: Such as `FlaxRobertaForSequenceClassification.from_pretrained(...)`.
        logits: Takes logits `[B, C]` from its output; `None`: the output's `logits`.

    Returns:
        The model; its parameters are `hf_model.params`, paths as transformers names them.

    Raises:
        InputError: If it is no such model.
    """
    module, config = getattr(hf_model, "module", None), getattr(hf_model, "config", None)
    if not isinstance(module, nn.Module) or config is None or not hasattr(hf_model, "params"):
        raise InputError(
            f"from_hf_flax got a {type(hf_model).__name__}; expected a Flax model of transformers 4.57, such as "
            "FlaxRobertaForSequenceClassification"
        )
    names = tuple(inspect.signature(type(module).__call__).parameters)
    offset = config.pad_token_id if config.model_type in ("roberta", "xlm-roberta", "roberta-prelayernorm") else None
    inputs = _HfInputs(names, offset)
    flipped: list[str] = []

    def note(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if type(context.module).__name__ == "FlaxConv1D" and context.method_name == "__call__":
            flipped.append("/".join(context.module.path))
        return next_fun(*args, **kwargs)

    ids = jnp.ones((1, 2), jnp.int32)
    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda p: module.apply({"params": p}, **inputs({"input_ids": ids, "attention_mask": ids})), hf_model.params
        )
    function = LinenFunction(module, inputs, logits or _hf_logits, tuple(flipped))
    return Model(jax.tree.map(jnp.asarray, hf_model.params), function)
