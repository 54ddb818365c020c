"""Tuning a subset of a model's own parameters."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.function import PeftFunction, split_params
from jaxlin.tunable import CLASSIFIER, Tunable, in_head


def near_matches(pattern: str, names: list[str]) -> str:
    """Returns the names most like `pattern`, for an error message."""

    def likeness(name: str) -> float:
        return max(difflib.SequenceMatcher(None, pattern, part).ratio() for part in (name, *name.split("/")))

    return ", ".join(sorted(names, key=likeness, reverse=True)[:3])


def require_live_head(model: Model) -> None:
    """Refuses a zero head that stays frozen.

    Raises:
        InputError: If the map to the logits is zero. A head of several modules, or of another name, is not looked into.
    """
    head = model.params.get(CLASSIFIER)
    if isinstance(head, Mapping) and "kernel" in head and not bool(jnp.any(head["kernel"])):
        raise InputError(
            "the head is zero and frozen: every gradient and the kernel would vanish; "
            "train the head, or start it as 'random' or 'probe'"
        )


def _tunable(model: Model, chosen: Callable[[str], bool]) -> Tunable:
    """Tunes the parameters that are chosen by path, at least one."""
    theta, frozen = split_params(model.params, chosen)
    if not chosen(f"{CLASSIFIER}/kernel"):
        require_live_head(model)
    return Tunable(PeftFunction(frozen, model.module), theta)


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
    if not any(expression.search(path) for path in paths):
        raise InputError(f"{pattern!r} matches no parameter; near: {near_matches(pattern, paths)}")
    return _tunable(model, lambda path: expression.search(path) is not None)


def full(model: Model) -> Tunable:
    """Tunes every parameter.

    Returns:
        A Tunable of all of `model.params`, the head among them.
    """
    return select(model, "")


def head_only(model: Model) -> Tunable:
    """Tunes the classification head; where that is one dense map, a linear model, its own linearization.

    Returns:
        A Tunable of the top-level module `classifier`, and of the dense map in front of it that belongs to the head.

    Raises:
        InputError: If the model has no module of that name.
    """
    if not any(in_head(path) for path in flatten_dict(model.params, sep="/")):
        raise InputError(f"the model has no head {CLASSIFIER!r}; its top-level modules: {', '.join(model.params)}")
    return _tunable(model, in_head)


def bias_only(model: Model, train_head: bool = True) -> Tunable:
    """Tunes the biases of all modules (BitFit).

    Args:
        model: The model.
        train_head: Tune the whole head too.

    Returns:
        A Tunable of these parameters, `model` with the others frozen.

    Raises:
        InputError: If there is no bias outside the head, or the head is zero and frozen.
    """
    return _body_part(model, r"/bias$", train_head, "bias")


def layer_norm_only(model: Model, train_head: bool = True) -> Tunable:
    """Tunes scale and bias of every LayerNorm, or the scale of every RMSNorm.

    Args:
        model: The model.
        train_head: Tune the whole head too.

    Returns:
        A Tunable of these parameters, `model` with the others frozen.

    Raises:
        InputError: If there is none outside the head, or the head is zero and frozen.
    """
    return _body_part(model, r"(?i:norm|(?:^|/)ln)[^/]*/(?:scale|bias)$", train_head, "LayerNorm")


def _body_part(model: Model, pattern: str, train_head: bool, what: str) -> Tunable:
    def wanted(path: str) -> bool:
        return not in_head(path) and re.search(pattern, path) is not None

    if not any(wanted(path) for path in flatten_dict(model.params, sep="/")):
        raise InputError(f"the model has no {what} outside its head: there is nothing of that kind to tune")
    return _tunable(model, lambda path: wanted(path) or (train_head and in_head(path)))
