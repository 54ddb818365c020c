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

from jaxlin.errors import InputError
from jaxlin.models.model import check_text_batch
from jaxlin.tunable import ADAPTER_NAMES, Batch, Tunable

ADAPTERS = "adapters"
"""Name of the variable collection that holds what adapters add to a module."""


def _adapted(
    call: Callable[[Any], Array],
    x: Any,
    leaves: Mapping[str, Array],
    kernel: Array,
    bias: Array | float,
    scale: float,
) -> Array:
    """Output of one dense module with its adapters; `call` is the module as it was, `kernel` `[d_in, d_out]`."""
    if "ia3_in" in leaves:
        x = x * leaves["ia3_in"]
    y = call(x)
    if "lora_A" in leaves:
        update = scale * ((x @ leaves["lora_A"]) @ leaves["lora_B"])
        if "dora_magnitude" in leaves:
            direction = kernel + scale * (leaves["lora_A"] @ leaves["lora_B"])
            gain = leaves["dora_magnitude"] / jnp.linalg.norm(direction, axis=0)
            y = (y - bias + update) * gain + bias
        else:
            y = y + update
    return y * leaves["ia3_out"] if "ia3_out" in leaves else y


@contextlib.contextmanager
def _adapters_added(scales: Mapping[str, float], transposed: tuple[str, ...]) -> Iterator[Callable[[], int]]:
    """Changes the output of every dense module that has adapter leaves; yields the hit counter."""
    hits = 0

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal hits
        module = context.module
        names = [name for name in ADAPTER_NAMES if module.has_variable(ADAPTERS, name)]
        if context.method_name != "__call__" or not names:
            return next_fun(*args, **kwargs)
        hits += 1
        path = "/".join(module.path)
        kernel = jnp.asarray(module.get_variable("params", "kernel"))
        bias = jnp.asarray(module.get_variable("params", "bias")) if module.has_variable("params", "bias") else 0.0
        return _adapted(
            lambda x: next_fun(x, *args[1:], **kwargs),
            args[0],
            {name: jnp.asarray(module.get_variable(ADAPTERS, name)) for name in names},
            kernel.T if path in transposed else kernel,
            bias,
            scales.get(path, 1.0),
        )

    with nn.intercept_methods(interceptor):
        yield lambda: hits


def _modules(adapters: Mapping[str, Any]) -> set[str]:
    return {path.rpartition("/")[0] for path in adapters}


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a network is entered in place of its inputs; see `jaxlin.trunk`.

    Attributes:
        path: Of the module whose output is read from the batch instead of being computed.
        column: Name of the batch's array that holds it; says by a hash which weights and which module it is of.
    """

    path: str
    column: str

    def holds(self, path: str) -> bool:
        """Whether a module is the one that is not called, or part of it."""
        return path == self.path or path.startswith(f"{self.path}/")

    @contextlib.contextmanager
    def made(self, output: Array) -> Iterator[None]:
        """Returns `output` from the module's call, without what is in it; what led to it is then dead code."""

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            called = context.method_name == "__call__" and "/".join(context.module.path) == self.path
            return output if called else next_fun(*args, **kwargs)

        with nn.intercept_methods(interceptor):
            yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PeftFunction:
    """`(theta, batch) -> logits` of a Linen module, whatever part of it is theta.

    The frozen weights are leaves; module and scales are static and compared by value. What adapters add
    travels in a variable collection of its own, `adapters`, so that it passes through Flax's lifted
    transformations, and the frozen weight is never merged with it.

    Attributes:
        frozen: Nested dict of the weights that are not tuned.
        module: The Linen module, or what applies one (`jaxlin.models.linen.LinenFunction`).
        scales: LoRA's α/r of every module that has factors, path and value.
        cut: Where activations are read from the batch; what is below is not computed, under a `jit`.
    """

    frozen: PyTree
    module: Any = dataclasses.field(metadata={"static": True})
    scales: tuple[tuple[str, float], ...] = dataclasses.field(default=(), metadata={"static": True})
    cut: Cut | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def transposed(self) -> tuple[str, ...]:
        """Paths of dense modules whose kernel is `[d_out, d_in]`."""
        return getattr(self.module, "transposed", ())

    def variables(self, theta: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns flat dicts of the parameters and of the adapter leaves that `theta` and `frozen` make up."""
        leaves = {**flatten_dict(self.frozen, sep="/"), **flatten_dict(theta, sep="/")}
        adapters = {path: leaf for path, leaf in leaves.items() if path.rpartition("/")[2] in ADAPTER_NAMES}
        return {path: leaf for path, leaf in leaves.items() if path not in adapters}, adapters

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`.

        Raises:
            RuntimeError: If the module did not call every dense module that has adapters exactly once.
        """
        params, adapters = self.variables(theta)
        variables = {"params": unflatten_dict(params, sep="/")}
        if adapters:
            variables[ADAPTERS] = unflatten_dict(adapters, sep="/")
        adapted = {path for path in _modules(adapters) if self.cut is None or not self.cut.holds(path)}
        # Entered inside the traced function: outside of it a cached trace would ignore the context. The first is the
        # outer one: what is cut off has no adapters added.
        with contextlib.ExitStack() as stack:
            if self.cut is not None:
                stack.enter_context(self.cut.made(jnp.asarray(batch[self.cut.column])))
                batch = {name: value for name, value in batch.items() if name != self.cut.column}
            hits = stack.enter_context(_adapters_added(dict(self.scales), self.transposed)) if adapted else lambda: 0
            logits = cast(Array, self.module.apply(variables, batch))
        if hits() != len(adapted):
            raise RuntimeError(
                f"{len(adapted)} modules have adapters, but {hits()} calls met one; the module must call "
                f"each of them once, outside lifted loops that do not carry the {ADAPTERS!r} collection"
            )
        return logits

    def module_output(self, path: str, module: nn.Module, leaves: Mapping[str, Array], x: Array) -> Array:
        """Returns the output of one module, adapters included, as a function of its leaves by name.

        Args:
            path: Of the module.
            module: The module, unbound.
            leaves: All its parameters and adapter leaves.
            x: Its input.
        """
        params = {name: leaf for name, leaf in leaves.items() if name not in ADAPTER_NAMES}
        adapters = {name: leaf for name, leaf in leaves.items() if name in ADAPTER_NAMES}

        def call(x: Any) -> Array:
            return cast(Array, module.apply({"params": params}, x))

        if not adapters:
            return call(x)
        kernel = params["kernel"].T if path in self.transposed else params["kernel"]
        return _adapted(call, x, adapters, kernel, params.get("bias", 0.0), dict(self.scales).get(path, 1.0))

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs on the host; see `jaxlin.models.model.check_text_batch`.

        Args:
            batch: Host arrays.

        Raises:
            InputError: If they do not fit, or the activations that the network is entered with are not among them.
        """
        check_text_batch(self.module, batch)
        if self.cut is not None and self.cut.column not in batch:
            raise InputError(
                f"the batch has no {self.cut.column!r}, the output of {self.cut.path!r} that this Tunable reads (it "
                f"has {sorted(batch)}); use the data that cache_trunk returned with it"
            )


def merge(tun: Tunable, theta: PyTree | None = None) -> dict[str, Any]:
    """Returns the module's parameters with `theta` put in and adapters merged into their weights.

    Args:
        tun: A Tunable made of a `Model` (`lora`, `ia3`, `full`, `select`, …).
        theta: Its parameters; default `tun.theta0`.

    Returns:
        Nested dict of parameters, for `model.apply(params, batch)`; outputs agree with `tun.apply` to rounding.
        A weight W becomes `W + scale · A B`, with DoRA `m ⊙ (W + scale · A B)/‖W + scale · A B‖`, with IA³ its
        rows or columns scaled.

    Raises:
        InputError: If `tun` was not made of a `Model`.
    """
    if not isinstance(tun.apply, PeftFunction):
        raise InputError(f"merge needs a Tunable made of a Model; its apply is a {type(tun.apply).__name__}")
    params, adapters = tun.apply.variables(tun.theta0 if theta is None else theta)
    scales = dict(tun.apply.scales)
    for module in _modules(adapters):
        leaves = {name: adapters[f"{module}/{name}"] for name in ADAPTER_NAMES if f"{module}/{name}" in adapters}
        flipped = module in tun.apply.transposed
        kernel = params[f"{module}/kernel"].T if flipped else params[f"{module}/kernel"]
        if "lora_A" in leaves:
            kernel = kernel + scales[module] * jnp.matmul(leaves["lora_A"], leaves["lora_B"], precision="highest")
        if "dora_magnitude" in leaves:
            kernel = kernel * (leaves["dora_magnitude"] / jnp.linalg.norm(kernel, axis=0))
        if "ia3_in" in leaves:
            kernel = kernel * leaves["ia3_in"][:, None]
        if "ia3_out" in leaves:
            kernel = kernel * leaves["ia3_out"]
            if f"{module}/bias" in params:
                params[f"{module}/bias"] = params[f"{module}/bias"] * leaves["ia3_out"]
        params[f"{module}/kernel"] = kernel.T if flipped else kernel
    return unflatten_dict(params, sep="/")


def split_params(params: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[PyTree, PyTree]:
    """Splits a nested dict of parameters into those whose path is chosen and the rest."""
    flat = flatten_dict(params, sep="/")
    picked = {path: leaf for path, leaf in flat.items() if chosen(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in picked}
    return unflatten_dict(picked, sep="/"), unflatten_dict(rest, sep="/")
