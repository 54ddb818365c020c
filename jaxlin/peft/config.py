"""A choice of layers and modules in the words of the `peft` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxlin.models.families import FAMILIES
from jaxlin.tunable import in_head


def peft_lora_config(
    layers: Sequence[int],
    modules: Sequence[str],
    rank: int,
    alpha: float,
    model_type: str | None,
    head: bool = True,
) -> dict[str, Any] | None:
    """Returns the content of an `adapter_config.json`, for `peft.LoraConfig`.

    Names are ends of Hugging Face's module paths, with `layers_to_transform`, where these pick exactly the modules
    meant; else (BERT's `output.dense` is also the end of `attention.output.dense`) each with its layer.

    Args:
        layers: Indices.
        modules: Paths within a layer, such as `"attention/query"`.
        rank: r.
        alpha: α.
        model_type: Of the checkpoint's `config.json`, a name of `jaxlin.models.families.FAMILIES`.
        head: Whether the classification head is tuned too.

    Returns:
        The configuration; `None` where the names are not known: another `model_type`, or a module that it has not.
    """
    family = FAMILIES.get(model_type or "")
    theirs = {} if family is None else {ours: name for name, ours in family.modules.items()}
    of_layer = "decoder/layer_{i}/" if family and family.is_decoder else "encoder/layer_{i}/"
    if family is None or any(of_layer + module not in theirs for module in modules):
        return None
    stem = next(name for name in family.modules if "{i}" in name).split("{i}")[0]
    within = {ours: name.split("{i}.")[1] for ours, name in theirs.items() if "{i}" in name}
    wanted = [within[of_layer + module] for module in modules]
    ends = [_shortest(name) for name in wanted]
    hit = {name for name in within.values() if any(f".{name}".endswith(f".{end}") for end in ends)}
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": rank, "lora_alpha": alpha}
    if hit == set(wanted):
        pattern = stem.rstrip(".").rpartition(".")[2]
        config |= {"target_modules": ends, "layers_to_transform": list(layers), "layers_pattern": pattern}
    else:
        config["target_modules"] = [f"{stem}{layer}.{name}" for layer in layers for name in wanted]
    heads = {name.split(".")[0] for ours, name in theirs.items() if in_head(ours)}
    return {**config, "modules_to_save": sorted(heads) if head else None, "lora_dropout": 0.0, "bias": "none"}


def _shortest(name: str) -> str:
    """The last part of a module's name, or all of it where that is the `dense` of many."""
    last = name.rpartition(".")[2]
    return name if last == "dense" else last
