"""A sweep over λ or learning rates of the cached linearized model, trained all at once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.training.cached import CachedLinear, all_column
from jaxlin.training.config import TrainConfig
from jaxlin.training.input import StepSource
from jaxlin.training.state import TrainState, copied
from jaxlin.training.step import step_of
from jaxlin.training.together import Histories, Sweep, configs_of, one_of, starts, steps_evaluated
from jaxlin.training.trainer import TrainResult, check_run
from jaxlin.tunable import Tunable

_STEPS = 256
"""Steps that one call of the device takes."""


@functools.lru_cache(maxsize=32)
def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    """Several steps of several runs as one program; `step` is one of one run."""

    @functools.partial(jax.jit, donate_argnums=(1, 2), static_argnames=("length",))
    def run(
        apply: Any, theta: PyTree, state: Any, same: Mapping[str, Any], batches: Mapping[str, Any], length: int
    ) -> tuple[PyTree, Any, dict[str, Any]]:
        every = jax.vmap(step, in_axes=(None, 0, 0, None))

        def body(carry: tuple[PyTree, Any], batch: Mapping[str, Any]) -> tuple[tuple[PyTree, Any], dict[str, Any]]:
            theta, state, metrics = every(apply, *carry, {**same, **batch})
            return (theta, state), metrics

        (theta, state), metrics = jax.lax.scan(body, (theta, state), batches, length=length)
        return theta, state, metrics

    return run


def _stretches(first: int, total: int, stops: Collection[int]) -> Iterator[range]:
    """Yields steps that are taken together: none is behind a stop."""
    while first < total:
        last = min([stop for stop in stops if stop > first] + [total, first + _STEPS])
        yield range(first, last)
        first = last


def train_sweep(
    tun: Tunable,
    train: Dataset,
    eval: Dataset | None = None,
    config: TrainConfig | None = None,
    *,
    lams: Sequence[float] | None = None,
    learning_rates: Sequence[float] | None = None,
    keep: Collection[int] = (),
) -> Sweep:
    """Trains the cached linearized model for several λ or learning rates at once, each as `train` would.

    A step of all of them reads the Jacobian once, as one matrix product, and the steps between two evaluations are one
    program on the device. Numbers are those of one run at a time, to rounding.

    Args:
        tun: A cached linearized model: `prepare(linearize(…), …, mode="cached")`.
        train: Its training examples.
        eval: Its examples to evaluate on, or `None`.
        config: How; its λ or learning rate is replaced by each of those given.
        lams: λ of each run; `None`: the configuration's.
        learning_rates: Learning rate of each run; `None`: the configuration's. With both, they go in pairs.
        keep: Steps after which the states are kept.

    Returns:
        Results in the order given.

    Raises:
        InputError: If `tun` is not a cached model, nothing is swept, lengths differ, an optimizer of its own rate meets
            learning rates, or anything `train` would refuse.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((2, 1))})
        >>> data = {"x": np.eye(2, dtype=np.float32), "labels": np.array([1.0, -1.0])}
        >>> ready = jl.prepare(jl.linearize(tun), data, mode="cached")
        >>> config = jl.TrainConfig(optimizer="sgd", learning_rate=1.0, max_steps=200, batch_size=2)
        >>> sweep = jl.train_sweep(ready.tun, *ready.data, config=config, lams=[0.0, 1.0])
        >>> [round(float(result.theta["w"][0, 0]), 4) for result in sweep.results]  # 1/(1 + λ)
        [1.0, 0.5]
    """
    config = config or TrainConfig()
    given = [len(values) for values in (lams, learning_rates) if values is not None]
    if len(set(given)) != 1 or not given[0]:
        raise InputError(
            f"train_sweep got {' and '.join(map(str, given)) or 'no'} values of λ and learning rate; expected at least "
            "one value, and as many of both where both are given"
        )
    configs = configs_of(config, given[0], lams, learning_rates)
    if not isinstance(tun.apply, CachedLinear):
        raise InputError(
            "train_sweep trains cached linearized models, such as prepare(linearize(tun), data, mode='cached') makes; "
            f"the apply of this one is a {type(tun.apply).__name__}"
        )
    check_run(tun, train, eval, config)
    n = len(train)
    total = config.total_steps(n)
    beyond = [k for k in keep if not 0 <= k <= total]
    if beyond:
        raise InputError(f"step {beyond[0]} to keep is none of this run, which has {total}")
    tx, step = step_of(dataclasses.replace(config, gradient_accumulation_steps=1), n)  # no activations to be held
    run = _compiled(step)
    theta, state = starts(tun, tx, configs, n)
    evaluated = [] if eval is None else steps_evaluated(config, total)
    source = StepSource(train, config)
    whole = _whole(train, config)
    histories = Histories(configs, [f"run {k} of the sweep" for k in range(len(configs))], n)
    states: list[dict[int, TrainState]] = [{} for _ in configs]

    def kept(i: int) -> None:
        for k in range(len(configs)):
            states[k][i] = TrainState(copied(one_of(theta, k)), copied(one_of(state, k)), i)

    if 0 in keep:
        kept(0)
    for steps in _stretches(0, total, {*evaluated, *keep}):
        same, batches = whole, {}
        if not whole:
            made = [source[i][1][0] for i in steps]  # its columns are no tokens: one batch
            same, batches = {}, {name: np.stack([batch[name] for batch in made]) for name in made[0]}
        with jax.default_matmul_precision(config.precision):
            theta, state, metrics = run(tun.apply, theta, state, same, batches, len(steps))
        found = {name: np.asarray(values) for name, values in metrics.items()}
        for at, i in enumerate(steps):
            histories.add(i + 1, {name: values[at] for name, values in found.items()})
        last = steps.stop
        if last in evaluated and eval is not None:
            histories.evaluate(tun, theta, eval)
        if last in keep:
            kept(last)
    results = [TrainResult(one_of(theta, k), rows, states[k]) for k, rows in enumerate(histories.rows)]
    return Sweep(results, histories.diverged)


def _whole(data: Dataset, config: TrainConfig) -> dict[str, np.ndarray]:
    """The batch of full-batch descent, without row numbers; nothing where batches are smaller."""
    if config.batch_size < len(data):
        return {}
    (part,) = [int(name.partition(":")[2]) for name in data.columns if name != "labels"]
    ones = np.ones(len(data), np.float32)
    return {all_column(part): ones, "labels": data["labels"], "weight": ones}
