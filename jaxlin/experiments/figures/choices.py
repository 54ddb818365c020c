"""Which layers and which of query, key and value get LoRA factors: what several studies vary."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.lora import lora
from jaxlin.tunable import Tunable, layer_index, leaf_paths

MODULES = {"q": "query", "k": "key", "v": "value"}
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layers and modules that get LoRA factors; the modules are letters of `MODULES`."""

    layers: tuple[int, ...]
    modules: str

    @property
    def name(self) -> str:
        """Such as `0,1:qv`."""
        return f"{','.join(map(str, self.layers))}:{self.modules}"

    @classmethod
    def parse(cls, name: str) -> Choice:
        """Returns the choice of a name."""
        layers, modules = name.split(":")
        return cls(tuple(map(int, layers.split(","))), modules)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks of `tunable` that it is made of."""
        return tuple(f"layer_{layer}/{MODULES[m]}" for layer in self.layers for m in self.modules)


def choices_of(layer_sets: Sequence[str], module_sets: Sequence[str]) -> tuple[Choice, ...]:
    """Returns every layer set with every module set.

    Args:
        layer_sets: Sets of layers, each as digits joined by commas.
        module_sets: Sets of modules, letters of q, k and v.

    Raises:
        InputError: If one is none, one is given twice, or there are fewer than three.
    """
    found = []
    for words in layer_sets:
        for letters in module_sets:
            parts = words.split(",")
            if not all(part.isdecimal() for part in parts) or not letters or set(letters) - set(MODULES):
                raise InputError(f"{words}:{letters} is no choice; expected layers such as 0,1 and letters of q, k, v")
            found.append(Choice(tuple(sorted(map(int, parts))), letters))
    names = [choice.name for choice in found]
    if len(set(names)) < len(names) or len(names) < 3:
        raise InputError(f"{len(names)} choices, {len(set(names))} of them different; expected at least 3, each once")
    return tuple(found)


def tunable(model: Model, rank: int, seed: int) -> Tunable:
    """Returns LoRA on every query, key and value, and the head; a block each, α the rank."""
    tun = lora(model, rank, float(rank), tuple(MODULES.values()), rng=seed)
    blocks: dict[str, tuple[str, ...]] = {}
    for path in leaf_paths(tun.theta0):
        layer = layer_index(path)
        name = HEAD if layer is None else f"layer_{layer}/{path.split('/')[-2]}"
        blocks[name] = (*blocks.get(name, ()), path)
    return dataclasses.replace(tun, blocks=blocks)


def depth_of(tun: Tunable) -> int:
    """Returns the number of layers of `tunable`."""
    return 1 + max(layer for path in leaf_paths(tun.theta0) if (layer := layer_index(path)) is not None)


def num_params(tun: Tunable, blocks: Sequence[str]) -> int:
    """Returns how many parameters some blocks have."""
    sizes = dict(zip(leaf_paths(tun.theta0), (leaf.size for leaf in jax.tree.leaves(tun.theta0)), strict=True))
    return sum(sizes[path] for block in blocks for path in tun.blocks[block])
