"""Tuning a subset of a model's own parameters."""

from __future__ import annotations

import difflib
import re

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.function import PeftFunction, split_params
from jaxlin.tunable import CLASSIFIER, CLASSIFIER_DENSE, Tunable

_HEAD = rf"^({CLASSIFIER}|{CLASSIFIER_DENSE})/"


def near_matches(pattern: str, names: list[str]) -> str:
    """Returns the names most like `pattern`, for an error message."""

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in (name, *name.split("/")))

    return ", ".join(sorted(names, key=likeness, reverse=True)[:3])


def require_live_head(model: Model) -> None:
    """Refuses a zero head that stays frozen.

    Raises:
        InputError: If the head's kernel is zero.
    """
    head = model.params.get(CLASSIFIER)
    if head is not None and not bool(jnp.any(head["kernel"])):
        raise InputError(
            "the head is zero and frozen: every gradient and the kernel would vanish; "
            "train the head, or start it as 'random' or 'probe'"
        )


def select(model: Model, pattern: str) -> Tunable:
    """Tunes the parameters whose path matches a regular expression.

    Args:
        model: The pretrained model.
        pattern: Searched for in the `/`-joined paths, such as `encoder/layer_0/attention/query/kernel`.

    Returns:
        A Tunable whose theta is the matching part of `model.params`; one block a module.

    Raises:
        InputError: If nothing matches (near matches are listed), or the pattern is no regular
            expression, or the head is zero and not among what is tuned.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
    paths = list(flatten_dict(model.params, sep="/"))
    theta, frozen = split_params(model.params, lambda path: expression.search(path) is not None)
    if not theta:
        raise InputError(f"{pattern!r} matches no parameter; near: {near_matches(pattern, paths)}")
    if not expression.search(f"{CLASSIFIER}/kernel"):
        require_live_head(model)
    return Tunable(PeftFunction(frozen, model.module), theta)


def full(model: Model) -> Tunable:
    """Tunes every parameter."""
    return select(model, "")


def head_only(model: Model) -> Tunable:
    """Tunes the classification head; where that is one dense map, a linear model, its own linearization."""
    return select(model, _HEAD)


def bias_only(model: Model, train_head: bool = True) -> Tunable:
    """Tunes the biases of all modules (BitFit), and the whole head unless `train_head` is false."""
    return _body_part(model, r"/bias$", train_head)


def layer_norm_only(model: Model, train_head: bool = True) -> Tunable:
    """Tunes scale and bias of every LayerNorm, and the whole head unless `train_head` is false."""
    return _body_part(model, r"(?i:norm)[^/]*/(scale|bias)$", train_head)


def _body_part(model: Model, pattern: str, train_head: bool) -> Tunable:
    return select(model, rf"{pattern}|{_HEAD}" if train_head else rf"^(?!{_HEAD[1:]}).*{pattern}")
