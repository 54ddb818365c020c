"""Which modules an adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from flax.traverse_util import flatten_dict

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.select import near_matches
from jaxlin.tunable import first_match, in_head, layer_index

Value = TypeVar("Value")


def dense_modules(model: Model) -> dict[str, tuple[int, int]]:
    """Returns the dense modules of the body, path to `(d_in, d_out)`; the classification head is none of them."""
    transposed = getattr(model.module, "transposed", ())
    return {
        path: tuple(leaf.shape[::-1] if path in transposed else leaf.shape)
        for name, leaf in flatten_dict(model.params, sep="/").items()
        if name.endswith("/kernel") and leaf.ndim == 2 and not in_head(path := name.removesuffix("/kernel"))
    }


def _compiled(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{what}={pattern!r} is not a regular expression: {error}") from error


def target_modules(
    model: Model, targets: str | Sequence[str], layers: int | Collection[int] | None
) -> dict[str, tuple[int, int]]:
    """Returns the dense modules that an adapter is put on, path to `(d_in, d_out)`.

    Args:
        model: The pretrained model.
        targets: Module names, each matching the end of a path (`"query"`, `"mlp/up"`); or one regular
            expression for whole paths (as in the peft library). The classification head never matches.
        layers: Indices of layers; `None` for all.

    Raises:
        InputError: If a target or a layer matches nothing.
    """
    shapes = dense_modules(model)
    present = {index for path in shapes if (index := layer_index(path)) is not None}
    if isinstance(layers, int):
        layers = (layers,)
    if layers is not None:
        if set(layers) - present or not layers:
            some = f"some of {min(present)} to {max(present)}" if present else "None: the model has no numbered layers"
            raise InputError(f"layers={sorted(layers)}: expected {some}")
        shapes = {path: shape for path, shape in shapes.items() if layer_index(path) in layers}
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if isinstance(targets, str):
            expression = _compiled(target, "targets")
            hits = {path for path in shapes if expression.fullmatch(path)}
        else:
            hits = {path for path in shapes if f"/{path}".endswith(f"/{target}")}
        if not hits:
            raise InputError(f"target {target!r} matches no dense module; near: {near_matches(target, list(shapes))}")
        chosen |= hits
    if not chosen:
        raise InputError("an adapter needs at least one target module")
    return {path: shapes[path] for path in shapes if path in chosen}


def by_pattern(paths: Collection[str], patterns: Mapping[str, Value], default: Value, what: str) -> dict[str, Value]:
    """Returns a value for every path: that of the first pattern that matches its end, or the default.

    Args:
        paths: Module paths.
        patterns: Regular expression for the end of a path, such as `"query"` or `"layer_[01]/.*"`, to value.
        default: Value where none matches.
        what: Name of the option, for messages.

    Raises:
        InputError: If a pattern is no regular expression, or matches nothing or behind others only.
    """
    matches = {pattern: _compiled(rf"(?:.*/)?(?:{pattern})", what).fullmatch for pattern in patterns}
    for pattern, match in matches.items():
        if not any(map(match, paths)):
            raise InputError(
                f"{what}: {pattern!r} matches none of the adapted modules; near: {near_matches(pattern, list(paths))}"
            )
    chosen = first_match(paths, matches, what, "modules")
    return {path: default if pattern is None else patterns[pattern] for path, pattern in chosen.items()}


def saved_modules(model: Model, names: Sequence[str]) -> set[str]:
    """Returns the parameters of modules that are tuned whole beside an adapter, by the end of the module's path.

    Raises:
        InputError: If a name matches no module.
    """
    paths = list(flatten_dict(model.params, sep="/"))
    out: set[str] = set()
    for name in names:
        hits = {path for path in paths if f"/{name}/" in f"/{path}"}
        if not hits:
            raise InputError(f"modules_to_save: {name!r} matches no module; near: {near_matches(name, paths)}")
        out |= hits
    return out
