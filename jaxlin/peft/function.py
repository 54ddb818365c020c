"""A model as a function of the parameters that are tuned."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from jaxlin.models.model import check_text_batch
from jaxlin.tunable import LORA_NAMES, Batch, Tunable

LORA = "lora"
"""Name of the variable collection that holds the LoRA factors."""


@contextlib.contextmanager
def _lora_added(scale: float) -> Iterator[Callable[[], int]]:
    """Adds `scale · (x A) B` to the output of every dense module that has factors; yields the hit counter."""
    hits = 0

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal hits
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable(LORA, "lora_A"):
            hits += 1
            a: Array = module.get_variable(LORA, "lora_A")
            b: Array = module.get_variable(LORA, "lora_B")
            y = y + scale * ((args[0] @ a) @ b)
        return y

    with nn.intercept_methods(interceptor):
        yield lambda: hits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PeftFunction:
    """`(theta, batch) -> logits` of a Linen module, whatever part of it is theta.

    The frozen weights are leaves; module and scale are static and compared by value. LoRA factors
    travel in a variable collection of their own, `lora`, so that they pass through Flax's lifted
    transformations, and the frozen weight is never merged with them.

    Attributes:
        frozen: Nested dict of the weights that are not tuned.
        module: The Linen module.
        scale: LoRA's α/r; not used where there are no factors.
    """

    frozen: PyTree
    module: nn.Module = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def variables(self, theta: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns flat dicts of the parameters and of the LoRA factors that `theta` and `frozen` make up."""
        leaves = {**flatten_dict(self.frozen, sep="/"), **flatten_dict(theta, sep="/")}
        factors = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] in LORA_NAMES}
        return {path: leaf for path, leaf in leaves.items() if path not in factors}, factors

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`.

        Raises:
            RuntimeError: If the module did not call every dense module that has LoRA factors exactly once.
        """
        params, factors = self.variables(theta)
        variables = {"params": unflatten_dict(params, sep="/")}
        if not factors:
            return cast(Array, self.module.apply(variables, batch))
        variables[LORA] = unflatten_dict(factors, sep="/")
        # Entered inside the traced function: outside of it a cached trace would ignore the context.
        with _lora_added(self.scale) as hits:
            logits = cast(Array, self.module.apply(variables, batch))
        if 2 * hits() != len(factors):
            raise RuntimeError(
                f"{len(factors) // 2} modules have LoRA factors, but {hits()} calls met one; "
                "the module must call each of them once, outside lifted loops that do not carry the 'lora' collection"
            )
        return logits

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs on the host; see `jaxlin.models.model.check_text_batch`."""
        check_text_batch(self.module, batch)


def merge(tun: Tunable, theta: PyTree | None = None) -> dict[str, Any]:
    """Returns the module's parameters with `theta` put in and LoRA factors added to their weights.

    Args:
        tun: A Tunable made of a `Model` (`lora`, `full`, `select`, …).
        theta: Its parameters; default `tun.theta0`.

    Returns:
        Nested dict of parameters `W + scale · A B`, for `model.apply(params, batch)`; outputs agree with
        `tun.apply` to rounding.

    Raises:
        TypeError: If `tun` was not made of a `Model`.
    """
    if not isinstance(tun.apply, PeftFunction):
        raise TypeError(f"merge needs a Tunable made of a Model; its apply is a {type(tun.apply).__name__}")
    params, factors = tun.apply.variables(tun.theta0 if theta is None else theta)
    for path in [path for path in factors if path.endswith("lora_A")]:
        module = path.rpartition("/")[0]
        product = jnp.matmul(factors[path], factors[f"{module}/lora_B"], precision="highest")
        params[f"{module}/kernel"] = params[f"{module}/kernel"] + tun.apply.scale * product
    return unflatten_dict(params, sep="/")


def split_params(params: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Splits a nested dict of parameters into those whose path is chosen and the rest."""
    flat = flatten_dict(params, sep="/")
    picked = {path: leaf for path, leaf in flat.items() if chosen(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in picked}
    return unflatten_dict(picked, sep="/"), unflatten_dict(rest, sep="/")
