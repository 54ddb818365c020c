"""Runs of one model that are trained together, each as it would be alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import evaluate
from jaxlin.training.state import Row
from jaxlin.training.step import strengths
from jaxlin.training.trainer import TrainResult, predict
from jaxlin.tunable import Tunable


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """What runs that are trained together give.

    Attributes:
        results: One for each run, as `train` gives it; of one that diverged, what it was before, and θ as it became.
        diverged: By number, the runs whose loss became NaN or infinite, with the error that says at which step. The
            others are not touched by them.
    """

    results: list[TrainResult]
    diverged: Mapping[int, TrainingDivergedError]


def configs_of(
    config: TrainConfig, runs: int, lams: Sequence[float] | None, learning_rates: Sequence[float] | None
) -> list[TrainConfig]:
    """Returns the configuration of each run, checked.

    Args:
        config: Of all.
        runs: How many there are.
        lams: λ of each; `None`: the configuration's.
        learning_rates: Learning rate of each, likewise.

    Raises:
        InputError: If values are not as many as runs, a rate is given to an optimizer that has its own, or a
            configuration cannot be.
    """
    if learning_rates is not None and not isinstance(config.optimizer, str):
        raise InputError("learning_rates need an optimizer by name; the steps of this one have a rate of their own")
    for name, values in {"lams": lams, "learning_rates": learning_rates}.items():
        if values is not None and len(values) != runs:
            raise InputError(f"{name} has {len(values)} values; expected one for each of {runs} runs")
    out = []
    for k in range(runs):
        lam = config.lam if lams is None else float(lams[k])
        rate = config.learning_rate if learning_rates is None else float(learning_rates[k])
        out.append(dataclasses.replace(config, lam=lam, learning_rate=rate))
        out[-1].check()
    return out


def starts(
    tun: Tunable, tx: optax.GradientTransformation, configs: Sequence[TrainConfig], n: int
) -> tuple[PyTree, PyTree]:
    """Returns theta and the optimizer's state of every run, stacked; λ and the rate are in the state."""

    def each(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(jnp.asarray(leaf)[None], len(configs), axis=0)

    theta = jax.tree.map(each, tun.theta0)
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    pulls, rates = zip(*(strengths(config, n) for config in configs), strict=True)
    state = jax.tree.map(each, tx.init(tun.theta0))
    return theta, state._replace(lam=jnp.asarray(pulls, dtype), rate=jnp.asarray(rates, dtype))


def one_of(tree: PyTree, k: int) -> PyTree:
    """Returns run k of what is stacked."""
    return jax.tree.map(lambda leaf: leaf[k], tree)


def steps_evaluated(config: TrainConfig, total: int) -> list[int]:
    """Returns the steps after which held-out examples are evaluated, as `train` does."""
    return [*range(config.eval_steps or total, total, config.eval_steps or total), total]


class Histories:
    """The rows of every run, up to where it diverges.

    Attributes:
        rows: Of each run.
        diverged: Runs that have, with the error.
    """

    def __init__(self, configs: Sequence[TrainConfig], names: Sequence[str], n: int) -> None:
        """Begins before the first step.

        Args:
            configs: Of each run.
            names: What each is called in its error.
            n: Training examples.
        """
        self._configs, self._names = configs, names
        self._total, self._per_epoch = configs[0].total_steps(n), configs[0].steps_per_epoch(n)
        self.rows: list[list[Row]] = [[] for _ in configs]
        self.diverged: dict[int, TrainingDivergedError] = {}

    def add(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds a step (from 1) of all runs: metrics `[runs]`."""
        for k, config in enumerate(self._configs):
            if k in self.diverged:
                continue
            row: Row = {"step": step, "epoch": step / self._per_epoch}
            row |= {name: float(values[k]) for name, values in metrics.items()}
            if math.isfinite(row["loss"]) and math.isfinite(row["distance"]):
                self.rows[k].append(row)
                continue
            self.diverged[k] = TrainingDivergedError(
                f"{self._names[k]} (λ = {config.lam:g}, learning rate {config.learning_rate:g}): the loss is "
                f"{row['loss']} and ‖θ−θ₀‖ {row['distance']} at step {step} of {self._total}; lower the learning rate"
            )

    def evaluate(self, tun: Tunable, theta: PyTree, held_out: Dataset) -> None:
        """Adds to the last rows what held-out examples say of `theta`, that of all runs; not of those that diverged."""
        for k, config in enumerate(self._configs):
            if k not in self.diverged:
                scores = evaluate(predict(tun, one_of(theta, k), held_out), held_out["labels"], config.loss)
                self.rows[k][-1].update({f"eval_{name}": value for name, value in scores.items()})
