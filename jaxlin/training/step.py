"""One step of descent, compiled once for all of a sweep."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from jaxlin.training.config import OPTIMIZERS, TrainConfig
from jaxlin.training.groups import Groups
from jaxlin.training.losses import LOSSES, to_mean
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


Layout = tuple[NamedSharding, ...] | None
"""How the leaves of theta and of the optimizer's state lie on a mesh; `None` for one device."""

Step = Callable[[Any, PyTree, Any, Batch | Groups, Layout], tuple[PyTree, Any, dict[str, Array]]]


Factors = tuple[tuple[str, float], ...]


def layout_of(theta: PyTree, state: Any) -> Layout:
    """Returns how the leaves lie, so that a step leaves them there."""
    return tuple(leaf.sharding for leaf in jax.tree.leaves((theta, state)))


def _held(tree: PyTree, layout: Layout) -> PyTree:
    """`tree` with its leaves where `layout` has them (its first ones): left to XLA, they might wander."""
    if layout is None:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    held = map(jax.lax.with_sharding_constraint, leaves, layout[: len(leaves)])
    return jax.tree.unflatten(structure, list(held))


def loss_and_gradient(
    loss: str, apply: Any, theta: PyTree, batch: Batch | Groups, accumulation: int = 1, layout: Layout = None
) -> tuple[Array, PyTree]:
    """Returns the mean loss of a batch, its rows counted by `weight`, and the gradient.

    Args:
        loss: A name of `LOSSES`.
        apply: The model.
        theta: Its parameters.
        batch: The batch; its size is a multiple of `accumulation`. Or its groups, with parts of their own.
        accumulation: Parts that the batch is computed in, one after the other, so that the activations of one are
            held; their gradients are summed. Part k has the rows k, k + accumulation, …: consecutive rows lie on one
            device, and every device shall have its share of each part.
        layout: Of theta, on a mesh.
    """
    groups = batch if isinstance(batch, Groups) else Groups((batch,), (accumulation,))
    total = sum(jnp.sum(group["weight"]) for group in groups.batches)

    @jax.value_and_grad
    def part_of_loss(p: PyTree, part: Batch) -> Array:
        return jnp.sum(LOSSES[loss](apply(p, part), part["labels"]) * part["weight"]) / total

    if groups.parts == (1,):
        value, grads = part_of_loss(theta, groups.batches[0])
        return value, _held(grads, layout)

    def add(so_far: tuple[Array, PyTree], part: Batch) -> tuple[tuple[Array, PyTree], None]:
        value, grads = jax.tree.map(jnp.add, so_far, part_of_loss(theta, part))
        return (value, _held(grads, layout)), None

    kinds = jax.eval_shape(part_of_loss, theta, groups.batches[0])
    value, grads = jax.tree.map(lambda kind: jnp.zeros(kind.shape, kind.dtype), kinds)
    so_far = value, _held(grads, layout)
    for group, count in zip(groups.batches, groups.parts, strict=True):
        parts = jax.tree.map(lambda x, k=count: jnp.reshape(x, (-1, k, *x.shape[1:])).swapaxes(0, 1), dict(group))
        so_far, _ = jax.lax.scan(add, so_far, parts)
    return so_far


def step_of(config: TrainConfig, num_examples: int) -> tuple[optax.GradientTransformation, Step]:
    """Returns what `compiled_step` does for a configuration and n."""
    total = config.total_steps(num_examples)
    # The rate of a named optimizer is in the state; that of another is its own, and this the pull's.
    peak = 1.0 if isinstance(config.optimizer, str) else config.learning_rate
    schedule = Schedule(peak, config.lr_scheduler_type, int(config.warmup_ratio * total), total)
    by_block = [tuple((patterns or {}).items()) for patterns in (config.lam_blocks, config.learning_rate_blocks)]
    parts = config.gradient_accumulation_steps
    return compiled_step(config.loss, config.optimizer, schedule, config.pull, *by_block, parts)


def strengths(config: TrainConfig, num_examples: int) -> tuple[float, float]:
    """Returns λ and the rate as the state of a step holds them: of the mean loss over n examples."""
    lam = config.lam if config.pull == "spd" else to_mean(config.lam, num_examples, "lam")
    return lam, config.learning_rate if isinstance(config.optimizer, str) else 1.0


@functools.lru_cache(maxsize=32)
def compiled_step(
    loss: str,
    optimizer: str | optax.GradientTransformation,
    schedule: Schedule,
    pull: str,
    lam_blocks: Factors,
    learning_rate_blocks: Factors,
    accumulation: int,
) -> tuple[optax.GradientTransformation, Step]:
    """Returns the transformation (λ and the rate in its state) and the compiled step, one for all of a sweep."""
    inner = OPTIMIZERS[optimizer](schedule) if isinstance(optimizer, str) else optimizer
    rates = dict(learning_rate_blocks)
    tx = proximal(inner, 0.0, pull, schedule, lam_blocks=dict(lam_blocks), learning_rate_blocks=rates)

    @functools.partial(jax.jit, donate_argnums=(1, 2), static_argnums=4)
    def step(
        apply: Any, theta: PyTree, state: Any, batch: Batch | Groups, layout: Layout = None
    ) -> tuple[PyTree, Any, dict[str, Array]]:
        value, grads = loss_and_gradient(loss, apply, theta, batch, accumulation, layout)
        updates, state = tx.update(grads, state, theta)
        theta, state = _held((jax.tree.map(lambda p, u: p + u.astype(p.dtype), theta, updates), state), layout)
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
