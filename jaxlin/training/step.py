"""One step of descent, compiled once for all of a sweep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxlin.training.config import OPTIMIZERS
from jaxlin.training.losses import LOSSES
from jaxlin.training.optim import proximal
from jaxlin.tunable import Batch


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate as a function of the step; compared by value, so that equal runs share a compilation.

    Attributes:
        peak: Largest rate.
        kind: One of `SCHEDULES`.
        warmup: Steps with linearly growing rate.
        total: Steps of the run.
    """

    peak: float
    kind: str
    warmup: int
    total: int

    def __call__(self, count: Array | int) -> Array:
        """Returns the rate after `count` steps."""
        count = jnp.asarray(count, jnp.float32)
        left = jnp.clip((count - self.warmup) / max(self.total - self.warmup, 1), 0, 1)
        decay = {"constant": jnp.ones(()), "linear": 1 - left, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * left))}[self.kind]
        return self.peak * decay * jnp.clip((count + 1) / max(self.warmup, 1), 0, 1)


Step = Callable[[Any, PyTree, Any, Batch], tuple[PyTree, Any, dict[str, Array]]]


Factors = tuple[tuple[str, float], ...]


@functools.lru_cache(maxsize=32)
def compiled_step(
    loss: str,
    optimizer: str | optax.GradientTransformation,
    schedule: Schedule,
    pull: str,
    lam_blocks: Factors,
    learning_rate_blocks: Factors,
) -> tuple[optax.GradientTransformation, Step]:
    """Returns the transformation (λ and the rate in its state) and the compiled step, one for all of a sweep."""
    inner = OPTIMIZERS[optimizer](schedule) if isinstance(optimizer, str) else optimizer
    rates = dict(learning_rate_blocks)
    tx = proximal(inner, 0.0, pull, schedule, lam_blocks=dict(lam_blocks), learning_rate_blocks=rates)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(apply: Any, theta: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Any, dict[str, Array]]:
        def objective(p: PyTree) -> Array:
            weight = batch["weight"]
            return jnp.sum(LOSSES[loss](apply(p, batch), batch["labels"]) * weight) / jnp.sum(weight)

        value, grads = jax.value_and_grad(objective)(theta)
        updates, state = tx.update(grads, state, theta)
        theta = jax.tree.map(lambda p, u: p + u.astype(p.dtype), theta, updates)
        delta = jax.tree.map(jnp.subtract, theta, state.theta0)
        return (
            theta,
            state,
            {
                "loss": value,
                "gradient_norm": optax.tree.norm(grads),
                "distance": optax.tree.norm(delta),
            },
        )

    return tx, step
