"""What a command tunes: its arguments, and the Tunable that they describe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxlin.errors import InputError
from jaxlin.models.model import Model
from jaxlin.peft.adapter import load_adapter
from jaxlin.peft.ia3 import ia3
from jaxlin.peft.lora import lora
from jaxlin.peft.prompt import prompt_tuning
from jaxlin.peft.select import bias_only, full, head_only, layer_norm_only, select
from jaxlin.tunable import Tunable

FROZEN_A = "full_A_frozen"


@dataclasses.dataclass(frozen=True)
class TunedArguments:
    """What is tuned.

    Attributes:
        peft: Method: low-rank factors, scaling vectors, soft prompt, a kind of parameter, a regular expression, or all.
        lora_rank: Rank r.
        lora_alpha: Scale α.
        lora_targets: Modules that are adapted, by the end of their path; or one regular expression for whole paths.
        lora_layers: Layers that are adapted; all if not given.
        lora_rank_pattern: Other ranks, as regex=rank for the end of a module's path.
        lora_alpha_pattern: Other α, likewise.
        use_rslora: Scale α/√r in place of α/r.
        use_dora: Magnitude and direction apart (DoRA).
        freeze_A: Keep A fixed (LoRA-FA).
        modules_to_save: Modules that are tuned whole beside LoRA.
        ia3_targets: Modules whose output IA³ scales; as lora_targets.
        ia3_feedforward: Modules whose input IA³ scales.
        num_virtual_tokens: Vectors that prompt tuning puts before each text.
        select: Regular expression for the parameters to tune, with --peft select.
        train_head: Whether the head is tuned too.
    """

    peft: Literal["lora", "ia3", "prompt", "bitfit", "layer_norm", "head", "select", "full"] = "lora"
    lora_rank: int = 8
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] = ("query", "value")
    lora_layers: tuple[int, ...] = ()
    lora_rank_pattern: tuple[str, ...] = ()
    lora_alpha_pattern: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    freeze_A: bool = False
    modules_to_save: tuple[str, ...] = ()
    ia3_targets: tuple[str, ...] = ("key", "value")
    ia3_feedforward: tuple[str, ...] = ("mlp/down",)
    num_virtual_tokens: int = 8
    select: str | None = None
    train_head: bool = True


def pairs(words: Sequence[str], option: str, kind: Callable[[str], Any] = float) -> dict[str, Any]:
    """Returns `regex=number` words as a mapping.

    Raises:
        InputError: If one is something else, or names a pattern again.
    """
    out: dict[str, Any] = {}
    for word in words:
        pattern, _, number = word.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            pattern = ""
        if not pattern or pattern in out:
            raise InputError(f"--{option} {word}: expected regex=number, each regex once, such as lora_B=16")
        out[pattern] = value
    return out


def _check(arguments: TunedArguments, adapter: str | None) -> None:
    """Refuses options that the method, or an adapter that is started from, does not heed."""
    default = TunedArguments()
    for field in dataclasses.fields(arguments):
        name = field.name
        if name in ("peft", "train_head", "select") or getattr(arguments, name) == getattr(default, name):
            continue
        if adapter is not None and name != "freeze_A":
            raise InputError(f"--{name} and --adapter_name_or_path {adapter} are both given; the adapter settles it")
        prompt = name == "num_virtual_tokens"
        method = "ia3" if name.startswith("ia3") else "prompt" if prompt else "lora"
        if arguments.peft != method and (arguments.peft, name) != ("ia3", "lora_layers"):
            raise InputError(f"--{name} needs --peft {method}; it is {arguments.peft}")
    if adapter is not None and arguments.peft != "lora":
        raise InputError(f"--adapter_name_or_path is a LoRA adapter; --peft is {arguments.peft}")
    if (arguments.select is not None) != (arguments.peft == "select"):
        raise InputError("--select REGEX and --peft select belong together")
    if not arguments.train_head and arguments.peft in ("head", "select", "full"):
        raise InputError(f"--no-train_head contradicts --peft {arguments.peft}")


def _modules(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """Ends of modules' paths, or the one regular expression for whole paths."""
    return words[0] if len(words) == 1 and re.search(r"[^\w/]", words[0]) else words


def tune(model: Model, arguments: TunedArguments, seed: int, with_frozen_A: bool) -> tuple[Tunable, dict[str, Tunable]]:
    """Returns what is tuned, and the extra arms by name.

    Raises:
        InputError: If an option is not for the method chosen, or does not fit the model.
    """
    adapter = model.source.adapter if model.source else None
    _check(arguments, adapter)
    method = arguments.peft
    if with_frozen_A and (method != "lora" or arguments.freeze_A):
        raise InputError(f"--with_frozen_A needs --peft lora with A tuned; it is {method}")
    if adapter is not None:
        given: dict[str, Any] = {"train_head": arguments.train_head}
        extra = {FROZEN_A: load_adapter(model, adapter, **given, freeze_A=True)} if with_frozen_A else {}
        return load_adapter(model, adapter, **given, freeze_A=arguments.freeze_A), extra
    if method == "lora":
        options: dict[str, Any] = {
            "rank": arguments.lora_rank,
            "alpha": arguments.lora_alpha,
            "targets": _modules(arguments.lora_targets),
            "layers": arguments.lora_layers or None,
            "rng": seed,
            "rank_pattern": pairs(arguments.lora_rank_pattern, "lora_rank_pattern", int),
            "alpha_pattern": pairs(arguments.lora_alpha_pattern, "lora_alpha_pattern"),
            "use_rslora": arguments.use_rslora,
            "use_dora": arguments.use_dora,
            "train_head": arguments.train_head,
            "modules_to_save": arguments.modules_to_save,
        }
        extra = {FROZEN_A: lora(model, **options, freeze_A=True)} if with_frozen_A else {}
        return lora(model, **options, freeze_A=arguments.freeze_A), extra
    if method == "ia3":
        outward, inward = _modules(arguments.ia3_targets), _modules(arguments.ia3_feedforward)
        return ia3(model, outward, inward, arguments.lora_layers or None, train_head=arguments.train_head), {}
    if method == "prompt":
        return prompt_tuning(model, arguments.num_virtual_tokens, train_head=arguments.train_head, rng=seed), {}
    if method in ("bitfit", "layer_norm"):
        return (bias_only if method == "bitfit" else layer_norm_only)(model, arguments.train_head), {}
    if arguments.select is not None:
        return select(model, arguments.select), {}
    return (head_only if method == "head" else full)(model), {}
