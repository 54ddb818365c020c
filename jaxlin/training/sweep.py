"""A sweep over λ or learning rates of the cached linearized model, trained all at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.training.cached import CachedLinear, all_column
from jaxlin.training.config import TrainConfig
from jaxlin.training.input import StepSource
from jaxlin.training.losses import evaluate
from jaxlin.training.state import Row, TrainState, copied
from jaxlin.training.step import step_of, strengths
from jaxlin.training.trainer import TrainResult, check_blocks, check_data, predict
from jaxlin.tunable import Tunable

_STEPS = 256
"""Steps that one call of the device takes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What `train_sweep` gives.

    Attributes:
        results: One for each run, as `train` gives it; of one that diverged, what it was before, and θ as it became.
        diverged: By number, the runs whose loss became NaN or infinite, with the error that says at which step. The
            others are not touched by them.
    """

    results: list[TrainResult]
    diverged: Mapping[int, TrainingDivergedError]


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
    configs = _configs(config, lams, learning_rates)
    if not isinstance(tun.apply, CachedLinear):
        raise InputError(
            "train_sweep trains cached linearized models, such as prepare(linearize(tun), data, mode='cached') makes; "
            f"the apply of this one is a {type(tun.apply).__name__}"
        )
    for part in (train, eval):
        if part is not None:
            check_data(tun, part, config.loss)
    check_blocks(tun, config)
    n = len(train)
    total = config.total_steps(n)
    beyond = [k for k in keep if not 0 <= k <= total]
    if beyond:
        raise InputError(f"step {beyond[0]} to keep is none of this run, which has {total}")
    tx, step = step_of(dataclasses.replace(config, gradient_accumulation_steps=1), n)  # no activations to be held
    run = _compiled(step)

    def each(leaf: Any) -> Any:
        return jnp.repeat(jnp.asarray(leaf)[None], len(configs), axis=0)

    theta = jax.tree.map(each, tun.theta0)
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    pulls, rates = zip(*(strengths(c, n) for c in configs), strict=True)
    state = jax.tree.map(each, tx.init(tun.theta0))._replace(
        lam=jnp.asarray(pulls, dtype), rate=jnp.asarray(rates, dtype)
    )
    evaluated = [] if eval is None else [*range(config.eval_steps or total, total, config.eval_steps or total), total]
    source = StepSource(train, config)
    whole = _whole(train, config)
    histories: list[list[Row]] = [[] for _ in configs]
    states: list[dict[int, TrainState]] = [{} for _ in configs]
    diverged: dict[int, TrainingDivergedError] = {}

    def one(tree: PyTree, k: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[k], tree)

    def kept(i: int) -> None:
        for k in range(len(configs)):
            states[k][i] = TrainState(copied(one(theta, k)), copied(one(state, k)), i)

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
        for (at, i), k in itertools.product(enumerate(steps, start=0), range(len(configs))):
            if k in diverged:
                continue
            row: Row = {"step": i + 1, "epoch": (i + 1) / config.steps_per_epoch(n)}
            row |= {name: float(values[at, k]) for name, values in found.items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["distance"])):
                diverged[k] = TrainingDivergedError(
                    f"run {k} of the sweep (λ = {configs[k].lam:g}, learning rate {configs[k].learning_rate:g}): the "
                    f"loss is {row['loss']} and ‖θ−θ₀‖ {row['distance']} at step {i + 1} of {total}; lower the "
                    "learning rate"
                )
                continue
            histories[k].append(row)
        last = steps.stop
        if last in evaluated and eval is not None:
            for k in set(range(len(configs))) - set(diverged):
                scores = evaluate(predict(tun, one(theta, k), eval), eval["labels"], config.loss)
                histories[k][-1].update({f"eval_{name}": value for name, value in scores.items()})
        if last in keep:
            kept(last)
    results = [TrainResult(one(theta, k), histories[k], states[k]) for k in range(len(configs))]
    return Sweep(results, diverged)


def _configs(
    config: TrainConfig, lams: Sequence[float] | None, learning_rates: Sequence[float] | None
) -> list[TrainConfig]:
    """Returns the configuration of each run.

    Raises:
        InputError: If there is none, or one cannot be.
    """
    if learning_rates is not None and not isinstance(config.optimizer, str):
        raise InputError("learning_rates need an optimizer by name; the steps of this one have a rate of their own")
    given = [values for values in (lams, learning_rates) if values is not None]
    if not given or not len(given[0]) or len({len(values) for values in given}) > 1:
        sizes = {"lams": lams and len(lams), "learning_rates": learning_rates and len(learning_rates)}
        raise InputError(
            f"train_sweep got {sizes}; expected at least one value, and as many of both where both are given"
        )
    out = []
    for k in range(len(given[0])):
        lam = config.lam if lams is None else float(lams[k])
        rate = config.learning_rate if learning_rates is None else float(learning_rates[k])
        out.append(dataclasses.replace(config, lam=lam, learning_rate=rate))
        out[-1].check()
    return out


def _whole(data: Dataset, config: TrainConfig) -> dict[str, np.ndarray]:
    """The batch of full-batch descent, without row numbers; nothing where batches are smaller."""
    if config.batch_size < len(data):
        return {}
    (part,) = [int(name.partition(":")[2]) for name in data.columns if name != "labels"]
    ones = np.ones(len(data), np.float32)
    return {all_column(part): ones, "labels": data["labels"], "weight": ones}
