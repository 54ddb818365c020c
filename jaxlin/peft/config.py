"""The configuration of an adapter, in the words of the `peft` library."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlin.errors import InputError
from jaxlin.models.families import FAMILIES
from jaxlin.models.family import Family
from jaxlin.tunable import in_head

CONFIG = "adapter_config.json"

_HEEDED = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights"),
}
_FREE = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("fan_in_fan_out", "lora_dropout", "runtime_config", "ensure_weight_tying", "megatron_core"),
    *("loftq_config", "eva_config", "qalora_group_size"),
}
"""What changes nothing of the function that a stored adapter is: factors are stored alike for `fan_in_fan_out`."""

_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the pretrained weights as they are."""


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` says of LoRA; names are those of modules of transformers' class.

    Attributes:
        content: All of it.
    """

    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Reads it.

        Args:
            folder: Of the adapter.

        Returns:
            What it says.

        Raises:
            InputError: If it cannot be read, or is of something that is not supported; names it.
        """
        file = folder / CONFIG
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read; expected a folder that the peft library wrote: {error}"
            ) from error
        if not isinstance(content, dict):
            raise InputError(f"{file} holds {type(content).__name__}; expected the object that the peft library writes")
        kind = content.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{file}: peft_type={kind!r} is not supported; only 'LORA' is")
        if content.get("bias", "none") != "none":
            raise InputError(f"{file}: bias={content['bias']!r} is not supported; only 'none' is")
        if content.get("init_lora_weights") not in _STARTS:
            raise InputError(
                f"{file}: init_lora_weights={content['init_lora_weights']!r} changes the pretrained weights too, which "
                "is not supported; save it with peft's path_initial_model_for_weight_conversion, as a plain LoRA"
            )
        other = [f"{key}={value!r}" for key, value in content.items() if value and key not in _HEEDED | _FREE]
        if other:
            raise InputError(f"{file}: {', '.join(other)} is not supported; only plain LoRA is")
        self = cls(content)
        try:
            self.check()
        except (TypeError, ValueError, KeyError, re.error, AttributeError, ZeroDivisionError) as error:
            raise InputError(f"{file} is not as the peft library writes it: {error!r}") from error
        return self

    def check(self) -> None:
        """Looks everything up once, for its errors."""
        self.targets("model.layers.0.any")
        self.scale("model.layers.0.any")
        if not all(isinstance(name, str) for name in self.saved):
            raise TypeError(f"modules_to_save={self.saved!r}")

    @property
    def saved(self) -> tuple[str, ...]:
        """Ends of the names of modules that are stored whole."""
        return tuple(self.content.get("modules_to_save") or ())

    def _pattern(self, option: str, name: str, default: Any) -> Any:
        patterns = self.content.get(option) or {}
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", name)), default)

    def rank(self, name: str) -> int:
        """Rank of a module's factors."""
        return int(self._pattern("rank_pattern", name, self.content["r"]))

    def scale(self, name: str) -> float:
        """What a module's product of factors is multiplied by."""
        alpha, rank = float(self._pattern("alpha_pattern", name, self.content["lora_alpha"])), self.rank(name)
        return alpha / (rank**0.5 if self.content.get("use_rslora") else rank)

    @property
    def takes_all(self) -> bool:
        """Whether every dense module but the head is adapted."""
        return str(self.content["target_modules"]).lower() == "all-linear"

    def targets(self, name: str) -> bool:
        """Whether a module is adapted, by the rules of the library."""
        excluded, wanted = self.content.get("exclude_modules"), self.content["target_modules"]
        if excluded and _named(name, excluded):
            return False
        if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.saved):
            return False
        if self.takes_all or isinstance(wanted, str):
            return self.takes_all or _named(name, wanted)
        if name in wanted:
            return True
        layers, patterns = self.content.get("layers_to_transform"), self.content.get("layers_pattern") or r"[^.]*"
        if not _named(name, wanted) or layers is None or layers == []:
            return _named(name, wanted)
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
                return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def _named(name: str, words: str | Sequence[str]) -> bool:
    """Whether a module's name matches a regular expression, or ends as one of several words."""
    if isinstance(words, str):
        return re.fullmatch(words, name) is not None
    return any(f".{name}".endswith(f".{word}") for word in words)


def peft_lora_config(
    layers: Sequence[int],
    modules: Sequence[str],
    rank: int,
    alpha: float,
    model_type: str | None,
    head: bool = True,
) -> dict[str, Any] | None:
    """Returns the content of an `adapter_config.json`, for `peft.LoraConfig`.

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
    names = [theirs[of_layer + module].format(i=layer) for layer in layers for module in modules]
    saved = saved_heads(family) if head else None
    return lora_config(family, dict.fromkeys(names, (rank, alpha)), "SEQ_CLS", saved)


def saved_heads(family: Family) -> list[str]:
    """Returns what the library names the modules of the classification head by."""
    return sorted({name.split(".")[0] for name, ours in family.modules.items() if in_head(ours)})


def lora_config(
    family: Family,
    modules: Mapping[str, tuple[int, float]],
    task_type: str | None,
    saved: Sequence[str] | None,
) -> dict[str, Any]:
    """Returns the content of an `adapter_config.json` for modules with their ranks and α.

    Names are ends of Hugging Face's module paths, with `layers_to_transform`, where these pick exactly the modules
    meant; else (BERT's `output.dense` is also the end of `attention.output.dense`) each with its layer.

    Args:
        family: Whose modules they are.
        modules: Name without the family's prefix to r and α.
        task_type: Of the library.
        saved: Modules that are stored whole.
    """
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in zip(*modules.values(), strict=True))
    ranks = {name: r for name, (r, _) in modules.items() if r != rank}
    alphas = {name: a for name, (_, a) in modules.items() if a != alpha}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "r": rank,
        "lora_alpha": alpha,
        **_targets(family, list(modules)),
        **({"rank_pattern": ranks} if ranks else {}),
        **({"alpha_pattern": alphas} if alphas else {}),
        "modules_to_save": list(saved) if saved else None,
        "fan_in_fan_out": family.untransposed is not None,
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _targets(family: Family, names: Sequence[str]) -> dict[str, Any]:
    """The choice of modules."""
    templates = [name for name in (*family.modules, *family.fused) if "{i}" in name]
    stem = templates[0].split("{i}")[0]
    if not all(name.startswith(stem) for name in names):
        return {"target_modules": list(names)}
    cells = [tuple(name.removeprefix(stem).split(".", 1)) for name in names]
    layers, wanted = (list(dict.fromkeys(part)) for part in zip(*cells, strict=True))
    ends = [_shortest(name) for name in wanted]
    hit = {name for name in (t.split("{i}.")[1] for t in templates) if _named(name, ends)}
    if hit != set(wanted) or len(layers) * len(wanted) != len(names):
        return {"target_modules": list(names)}
    pattern = stem.rstrip(".").rpartition(".")[2]
    return {"target_modules": ends, "layers_to_transform": [int(i) for i in layers], "layers_pattern": pattern}


def _shortest(name: str) -> str:
    """The last part of a module's name, or all of it where that is the `dense` of many."""
    last = name.rpartition(".")[2]
    return name if last == "dense" else last
