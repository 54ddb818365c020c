"""Choices of what is tuned, trained all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.peft.part import Masked, mask_of
from jaxlin.sharding import mesh_of
from jaxlin.training.config import TrainConfig
from jaxlin.training.failure import explained
from jaxlin.training.groups import spread_groups
from jaxlin.training.input import StepSource
from jaxlin.training.precision import in_dtype
from jaxlin.training.step import step_of
from jaxlin.training.together import Histories, Sweep, configs_of, one_of, starts, steps_evaluated
from jaxlin.training.trainer import TrainResult, check_run
from jaxlin.tunable import Tunable


@functools.lru_cache(maxsize=32)
def _every(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step of several choices as one program; `step` is one of one choice."""

    def one(apply: Any, theta0: PyTree, mask: PyTree, theta: PyTree, state: Any, batch: Any) -> Any:
        theta, state, metrics = step(Masked(apply, theta0, mask), theta, state, batch)
        # An optimizer may move what has no gradient, as weight decay does.
        theta = jax.tree.map(lambda p, p0, on: jnp.where(on > 0, p, p0), theta, theta0, mask)
        distance = optax.tree.norm(jax.tree.map(jnp.subtract, theta, theta0))
        return theta, state, {**metrics, "distance": distance}

    return jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0, 0, None)), donate_argnums=(3, 4))


def train_choices(
    tun: Tunable,
    train: Dataset | Mapping[str, Any],
    eval: Dataset | Mapping[str, Any] | None = None,
    config: TrainConfig | None = None,
    *,
    choices: Sequence[Collection[str]],
    lams: Sequence[float] | None = None,
    learning_rates: Sequence[float] | None = None,
) -> Sweep:
    """Trains several choices of a model's blocks at once, each as `train` would train those blocks alone.

    All of them are one program, compiled once for each length of text, in which the activations of all meet a frozen
    weight in one product. Activations, theta and the optimizer's state, those of blocks that a choice leaves out too,
    take the memory of one run times the number of choices. Numbers are those of one run at a time, to rounding, with
    every optimizer that has a name; one of optax's that moves what has no gradient may differ (weight decay within a
    norm that is clipped).

    Args:
        tun: What is tuned in part.
        train: Training examples with `labels` `[N]`, as for `train`.
        eval: Examples to evaluate on, or `None`.
        config: How; λ and learning rate are replaced by those given.
        choices: Names of the blocks that each run tunes; the rest of theta stays at its start. One may be given twice.
        lams: λ of each run; `None`: the configuration's.
        learning_rates: Learning rate of each run, likewise.

    Returns:
        Results in the order of the choices; each has the whole theta.

    Raises:
        InputError: If there are no choices, a choice is empty or names a block that there is not, lengths differ, an
            optimizer of its own rate meets learning rates, `tun` lies on a mesh, or anything `train` would refuse.
        DeviceMemoryError: If a step does not fit the device's memory; says what to lower.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> apply = lambda theta, batch: batch["x"] * (theta["a"] + theta["b"])
        >>> tun = jl.Tunable(apply, {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": ("a",), "b": ("b",)})
        >>> data = {"x": np.ones((2, 1), np.float32), "labels": np.array([1.0, 1.0])}
        >>> config = jl.TrainConfig(optimizer="sgd", learning_rate=0.25, max_steps=100, batch_size=2)
        >>> sweep = jl.train_choices(tun, data, config=config, choices=[["a"], ["a", "b"]])
        >>> [[round(float(result.theta[name][0]), 3) for name in "ab"] for result in sweep.results]
        [[1.0, 0.0], [0.5, 0.5]]
    """
    config = config or TrainConfig()
    choices = _checked(tun, choices)
    configs = configs_of(config, len(choices), lams, learning_rates)
    if mesh_of((tun.apply, tun.theta0)) is not None:
        raise InputError("the model lies on a mesh; choices are trained on one device, or by `train` one at a time")
    data, held_out = as_dataset(train), None if eval is None else as_dataset(eval)
    check_run(tun, data, held_out, config)
    n = len(data)
    total = config.total_steps(n)
    tx, step = step_of(config, n)
    theta, state = starts(tun, tx, configs, n)
    masks = jax.tree.map(lambda *on: jnp.stack(on), *(mask_of(tun, blocks) for blocks in choices))
    apply = tun.apply if config.compute_dtype == "float32" else in_dtype(tun, config.compute_dtype).apply
    every = _every(step)
    evaluated = [] if held_out is None else steps_evaluated(config, total)
    source, waiting = StepSource(data, config), []
    histories = Histories(configs, [f"choice {k}, {_listed(blocks)}" for k, blocks in enumerate(choices)], n)
    for i in range(1, total + 1):
        batch = spread_groups(source[i - 1][1], None, config.gradient_accumulation_steps)
        with (
            jax.default_matmul_precision(config.precision),
            explained(i, config, tun, batch, None, runs=len(choices)),
        ):
            theta, state, metrics = every(apply, tun.theta0, masks, theta, state, batch)
            waiting.append(metrics)  # not fetched, so that the device goes on
            if i not in evaluated and i < total:
                continue
            fetched = jax.device_get(waiting)
        for at, found in enumerate(fetched, start=i + 1 - len(waiting)):
            histories.add(at, {name: np.asarray(values) for name, values in found.items()})
        waiting = []
        if held_out is not None:
            histories.evaluate(tun, theta, held_out)
    return Sweep([TrainResult(one_of(theta, k), rows) for k, rows in enumerate(histories.rows)], histories.diverged)


def _listed(names: Collection[str]) -> str:
    """The first few names."""
    return ", ".join(list(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _checked(tun: Tunable, choices: Sequence[Collection[str]]) -> list[tuple[str, ...]]:
    """The names of every choice, where there is something and all are blocks."""
    if not choices:
        raise InputError("choices is empty; expected at least one, the names of the blocks that a run tunes")
    checked = []
    for k, blocks in enumerate(choices):
        names = (blocks,) if isinstance(blocks, str) else tuple(blocks)
        if isinstance(blocks, str) or not names:
            raise InputError(f"choice {k} is {blocks!r}; expected names of blocks, some of {_listed(tun.blocks)}")
        if unknown := [name for name in names if name not in tun.blocks]:
            raise InputError(f"choice {k} has {unknown[0]!r}, which is no block; there are {_listed(tun.blocks)}")
        checked.append(names)
    return checked
