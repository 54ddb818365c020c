"""Losses per example, their targets, and the one conversion between sum and mean (theory 0)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlin.errors import InputError
from jaxlin.training.metrics import metrics


def targets(labels: Array | np.ndarray, num_outputs: int) -> Array:
    """Returns what the squared loss fits, `[N, C]`: one-hot for C ≥ 2; for C = 1 ±1 of 0/1 classes, or the score.

    Args:
        labels: `[N]`, integer classes or floating-point scores.
        num_outputs: C.
    """
    labels = jnp.asarray(labels)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return labels[:, None]
    return jax.nn.one_hot(labels, num_outputs) if num_outputs > 1 else (2.0 * labels - 1)[:, None]


def squared(outputs: Float[Array, "B C"], labels: Array) -> Float[Array, " B"]:
    """½‖f − y‖² of each example; see `targets` for y."""
    return 0.5 * jnp.sum((outputs - targets(labels, outputs.shape[1]).astype(outputs.dtype)) ** 2, axis=-1)


def cross_entropy(outputs: Float[Array, "B C"], labels: Array) -> Float[Array, " B"]:
    """Softmax cross-entropy of each example, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


LOSSES: dict[str, Callable[[Array, Array], Array]] = {"squared": squared, "cross_entropy": cross_entropy}


def check_labels(labels: np.ndarray, num_outputs: int, loss: str) -> None:
    """Checks that labels fit the outputs and the loss.

    Raises:
        InputError: If the loss is unknown, a class lies outside 0 … C−1, or scores meet a loss or a number
            of outputs that needs classes.
    """
    if loss not in LOSSES:
        raise InputError(f"loss={loss!r} is unknown; expected one of {', '.join(LOSSES)}")
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise InputError(
            f"labels have shape {labels.shape} and dtype {labels.dtype}; expected [N], integer classes or scores"
        )
    if labels.dtype.kind == "f":
        if num_outputs != 1 or loss != "squared":
            raise InputError(
                "floating-point labels (scores) need one output and loss='squared'; classes must be integers"
            )
        if not np.isfinite(labels).all():
            raise InputError("a label is NaN or infinite")
        return
    classes = max(num_outputs, 2)
    if loss == "cross_entropy" and num_outputs < 2:
        raise InputError("loss='cross_entropy' needs at least two outputs")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InputError(f"label {wrong} lies outside the {classes} classes 0 to {classes - 1}")


def evaluate(outputs: Float[np.ndarray, "N C"], labels: np.ndarray, loss: str) -> dict[str, float | None]:
    """Returns the mean `loss` of outputs, and every metric, `None` where it is undefined; see `metrics`."""
    with jax.enable_x64(True):
        value = float(jnp.mean(LOSSES[loss](jnp.asarray(outputs), jnp.asarray(labels))))
    return {"loss": value, **metrics(outputs, np.asarray(labels))}


def to_mean(value: float, num_examples: int, what: str) -> float:
    """Converts between the summed loss of `theory` and the mean loss of a trainer (theory 0).

    Args:
        value: For the summed loss.
        num_examples: n, of the whole training set, whatever the batch size.
        what: `"lam"`: λ/n; `"learning_rate"`: n·η.

    Returns:
        The value that gives the same trajectory on the mean loss.

    Raises:
        ValueError: If `what` is neither.
    """
    if what not in ("lam", "learning_rate"):
        raise ValueError(f"what={what!r}; expected 'lam' or 'learning_rate'")
    return value / num_examples if what == "lam" else value * num_examples
