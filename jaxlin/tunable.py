"""The one thing that is fine-tuned: a function of its trainable parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxlin.errors import InputError

Batch = Mapping[str, Any]
"""Arrays by name (`input_ids`, `attention_mask`, `labels`, …); the leading axis of each is the example."""

Blocks = Mapping[str, tuple[str, ...]]
"""Names of disjoint groups of parameters; each is a tuple of paths of leaves of theta."""

ADAPTER_NAMES = ("lora_A", "lora_B", "dora_magnitude", "ia3_in", "ia3_out")
"""Names of leaves that an adapter adds to a module; each is a block of its own."""

CLASSIFIER = "classifier"
"""Name of the top-level module that maps pooled features to logits."""

CLASSIFIER_DENSE = "classifier_dense"
"""Name of the dense map that is part of the classification head in front of it, where a model has one."""


_LAYER = re.compile(r"(?:^|/)(?:layers?|blocks?|h)[_/]?(\d+)(?:/|$)")


def layer_index(path: str) -> int | None:
    """Returns the index of the layer that a path lies in (`layer_3`, `layers/3`, `h/3`, `block_3`, …), if any."""
    found = _LAYER.search(path)
    return None if found is None else int(found.group(1))


def module_in_layer(block: str) -> str | None:
    """Returns the module that a block of `group_paths(…, "module")` is of, its path within its layer, if any.

    `"attention/query"` for `encoder/layer_3/attention/query/lora_B`; empty where the layer itself is the module.
    """
    found = _LAYER.search(block)
    if found is None:
        return None
    module, _, name = block[found.end() :].rpartition("/")
    return module if name in ADAPTER_NAMES else "/".join(filter(None, (module, name)))


def first_match(
    paths: Collection[str], matches: Mapping[str, Callable[[str], object]], what: str, noun: str
) -> dict[str, str | None]:
    """Returns for every path the first pattern that matches it, or `None`.

    Args:
        paths: What is matched.
        matches: Pattern, as it was given, to the test that it stands for.
        what: Name of the option, for messages.
        noun: What the paths are, for messages.

    Raises:
        InputError: If a pattern is behind others for every path.
    """
    chosen = {path: next((pattern for pattern, match in matches.items() if match(path)), None) for path in paths}
    unused = [pattern for pattern in matches if pattern not in chosen.values()]
    if unused:
        raise InputError(
            f"{what}: {unused[0]!r} never counts, since patterns before it match the same {noun}; "
            "put the narrower one first"
        )
    return chosen


def block_factors(paths: Sequence[str], patterns: Mapping[str, float] | None, what: str) -> dict[str, float]:
    """Returns a factor for every leaf: that of the first pattern found in its path, or 1.

    Args:
        paths: Paths of the leaves.
        patterns: Regular expression, searched for in a path (`"lora_B"`, `"layer_[01]/"`, `"^classifier"`), to factor.
        what: Name of the option, for messages.

    Raises:
        InputError: If a pattern is no regular expression, is found nowhere or behind others only, or a factor is
            negative or infinite.
    """
    factors: dict[str, float] = {}
    matches: dict[str, Callable[[str], object]] = {}
    for pattern, factor in (patterns or {}).items():
        try:
            matches[pattern], factors[pattern] = re.compile(pattern).search, float(factor)
        except (re.error, TypeError, ValueError) as error:
            raise InputError(f"{what}: {pattern!r}={factor!r} is no regular expression and number: {error}") from error
        if not any(map(matches[pattern], paths)):
            raise InputError(f"{what}: {pattern!r} is found in no tuned parameter, such as {paths[0]}")
        if not 0 <= factors[pattern] < math.inf:
            raise InputError(f"{what}: {pattern!r}={factor}; expected a finite factor, at least 0")
    chosen = first_match(paths, matches, what, "parameters")
    return {path: 1.0 if pattern is None else factors[pattern] for path, pattern in chosen.items()}


def in_head(path: str) -> bool:
    """Returns whether a parameter belongs to the classification head."""
    return path.partition("/")[0] in (CLASSIFIER, CLASSIFIER_DENSE, "pre_classifier")  # the last: transformers' Flax


def leaf_paths(tree: PyTree) -> tuple[str, ...]:
    """Returns the `/`-joined path of every leaf, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)


def parameter_role(path: str) -> str:
    """Returns what a leaf is in a comparison: LoRA's `"A"` or `"B"`, the `"head"`, or `"other"`."""
    name = path.rpartition("/")[2]
    if name in ("lora_A", "lora_B"):
        return name.removeprefix("lora_")
    return "head" if in_head(path) else "other"


def group_paths(paths: tuple[str, ...], by: str) -> dict[str, tuple[str, ...]]:
    """Groups leaf paths into blocks.

    Args:
        paths: Paths of the leaves, `/`-joined.
        by: `"leaf"`: each by itself; `"module"`: the leaves of one module; `"layer"`: the leaves of one layer
            (`layer_<i>`), what lies in no layer by its top-level module. LoRA's A and B are apart in each, and so
            is what other adapters add.

    Returns:
        Block name to paths, in the order in which the blocks are met.

    Raises:
        InputError: If `by` is none of the three.
    """
    if by not in ("leaf", "module", "layer"):
        raise InputError(f'blocks={by!r} is unknown; expected "leaf", "module" or "layer"')
    groups: dict[str, list[str]] = {}
    for path in paths:
        module, _, name = path.rpartition("/")
        suffix = f"/{name}" if name in ADAPTER_NAMES else ""
        if by == "leaf":
            key = path
        elif by == "module":
            key = (module or name) + (suffix if module else "")
        else:
            layer = layer_index(path)
            key = (path.split("/")[0] if layer is None else f"layer_{layer}") + suffix
        groups.setdefault(key, []).append(path)
    return {key: tuple(members) for key, members in groups.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainFunction:
    """A Python function as a pytree without leaves, so that it can cross a `jit` boundary."""

    fn: Callable[[PyTree, Batch], Array] = dataclasses.field(metadata={"static": True})

    def __call__(self, theta: PyTree, batch: Batch) -> Array:
        """Returns `fn(theta, batch)`."""
        return self.fn(theta, batch)


def check_inputs(apply: Callable[[PyTree, Batch], Array], batch: Batch) -> None:
    """Checks inputs on the host, where a function has a `check_batch` of its own."""
    check = getattr(apply, "check_batch", None)
    if check is not None:
        check(batch)


def text_config(apply: Any) -> Any:
    """Returns the configuration of the text model that a function applies, linearized or not; `None` if there is none.

    It is an `EncoderConfig` or `DecoderConfig` for models of jaxlin's own.
    """
    return getattr(getattr(getattr(apply, "apply", apply), "module", None), "config", None)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Tunable:
    """A function of its trainable parameters, its start, and a partition of them into blocks.

    A registered pytree: `theta0` and whatever frozen weights `apply` holds are leaves, so a `jit` that
    takes a `Tunable` (or its `apply`) as an argument compiles no weight in as a constant.

    Attributes:
        apply: `apply(theta, batch) -> outputs [B, C]`: a plain function, or a callable pytree whose
            leaves are frozen weights. It must treat examples independently of one another.
        theta0: The parameters at the start, a pytree of floating-point arrays.
        blocks: Disjoint groups of leaves of theta that cover it, by name; `None` stands for one block
            a module (see `group_paths`). Paths are `/`-joined keys.

    Raises:
        InputError: If `theta0` has no leaves, or `blocks` does not name each of them once.
    """

    apply: Callable[[PyTree, Batch], Array]
    theta0: PyTree
    blocks: Blocks = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # Not run by unflattening, which may hold anything: tracers, None, shape structs.
        if jax.tree_util.all_leaves([self.apply]):
            object.__setattr__(self, "apply", PlainFunction(self.apply))
        paths = leaf_paths(self.theta0)
        if not paths:
            raise InputError("theta0 has no leaves: there is nothing to tune")
        if self.blocks is None:
            object.__setattr__(self, "blocks", group_paths(paths, "module"))
            return
        listed = [path for members in self.blocks.values() for path in members]
        if sorted(listed) != sorted(paths):
            wrong = sorted(set(listed) ^ set(paths)) or sorted({p for p in listed if listed.count(p) > 1})
            raise InputError(
                f"blocks must name every leaf of theta0 once; these are missing, unknown or repeated: {wrong[:5]}"
            )

    @property
    def num_params(self) -> int:
        """Number of trainable parameters."""
        return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(self.theta0))

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs on the host, where `apply` has a `check_batch` of its own (text models do)."""
        check_inputs(self.apply, batch)

    def check_theta(self, theta: PyTree, what: str = "theta") -> None:
        """Checks that parameters have the structure and shapes of theta0.

        Args:
            theta: Parameters.
            what: They are, for the message.

        Raises:
            InputError: If they do not.
        """
        want, got = (jax.tree.map(np.shape, tree) for tree in (self.theta0, theta))
        if want != got:
            raise InputError(f"{what} must have the structure and shapes of theta0, {want}; got {got}")

    def grouped(self, blocks: str | Blocks | None) -> dict[str, tuple[str, ...]]:
        """Returns a partition of theta: the Tunable's own (`None`), one of `group_paths`, or the one given."""
        if blocks is None:
            return dict(self.blocks)
        if isinstance(blocks, str):
            return group_paths(leaf_paths(self.theta0), blocks)
        return dict(dataclasses.replace(self, blocks=blocks).blocks)

    def tree_flatten(self) -> tuple[tuple[Any, Any], tuple[tuple[str, tuple[str, ...]], ...]]:
        """Leaves and static data, for JAX."""
        return (self.apply, self.theta0), tuple((k, tuple(v)) for k, v in self.blocks.items())

    @classmethod
    def tree_unflatten(cls, blocks: tuple[tuple[str, tuple[str, ...]], ...], children: tuple[Any, Any]) -> Tunable:
        """The inverse of `tree_flatten`, without checks."""
        self = object.__new__(cls)
        for name, value in zip(("apply", "theta0", "blocks"), (*children, dict(blocks)), strict=True):
            object.__setattr__(self, name, value)
        return self
