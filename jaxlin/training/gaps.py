"""How far apart two fine-tuned models are: in parameters, outputs, decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree

from jaxlin.theory.drift import relative
from jaxlin.training.losses import evaluate
from jaxlin.training.metrics import predicted
from jaxlin.tunable import leaf_paths, parameter_role

ROLES = ("A", "B", "head", "other")
"""Parts that a parameter distance is split into: LoRA's factors, the head, everything else."""


def distances(theta: PyTree, other: PyTree) -> dict[str, float]:
    """Returns ‖θ−θ′‖ in all (key `""`) and by role (`"_A"`, `"_B"`, `"_head"`, `"_other"`), in float64.

    A leaf that only one of the two has (LoRA's A, frozen in one arm) counts as at the same value in both.
    """
    a, b = (dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)) for tree in (theta, other))
    squares = dict.fromkeys(sorted({parameter_role(path) for path in {*a, *b}}, key=ROLES.index), 0.0)
    for path in a.keys() & b.keys():
        gap = np.asarray(a[path], np.float64) - np.asarray(b[path], np.float64)
        squares[parameter_role(path)] += float(np.sum(gap**2))
    return {"": sum(squares.values()) ** 0.5, **{f"_{role}": value**0.5 for role, value in squares.items()}}


def kl_divergence(p: Float[np.ndarray, "N C"], q: Float[np.ndarray, "N C"]) -> float | None:
    """Returns the mean over examples of KL(softmax(p) ‖ softmax(q)), in nats; `None` for C = 1."""
    if p.shape[1] < 2:
        return None
    from scipy.special import log_softmax

    log_p, log_q = log_softmax(p, axis=1), log_softmax(q, axis=1)
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))


def agreement(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the share of examples with the same predicted class; `None` where labels are scores."""
    return None if labels.dtype.kind == "f" else float(np.mean(predicted(a) == predicted(b)))


def scores(outputs: np.ndarray, f0: np.ndarray, labels: np.ndarray, loss: str) -> dict[str, Any]:
    """Returns loss, metrics and agreement with the start of one split's outputs."""
    return {**evaluate(outputs, labels, loss), "agreement_f0": agreement(outputs, f0, labels)}


def gaps(outputs: np.ndarray, linear: np.ndarray, f0: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns how far one split's outputs are from the linearized model's; see `compare`."""
    gap = float(np.linalg.norm(outputs - linear))
    return {
        "output_gap": gap,
        "output_gap_relative": relative(gap, float(np.linalg.norm(outputs - f0))),
        "kl": kl_divergence(outputs, linear),
        "agreement": agreement(outputs, linear, labels),
    }


def by_split(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Flattens `{split: {name: value}}` to `{name_split: value}`."""
    return {f"{name}_{split}": value for split, row in values.items() for name, value in row.items()}
