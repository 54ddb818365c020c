"""Adapters in and out, in the format of the `peft` library."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree
from safetensors.numpy import save_file

from jaxlin.errors import InputError
from jaxlin.models.checkpoint import flax_arrays, flax_paths, module_names, opened
from jaxlin.models.decoder import CausalLm
from jaxlin.models.encoder import MaskedLm
from jaxlin.models.export import (
    CARD,
    card_of,
    family_of,
    has_own_head,
    hf_modules,
    hf_tensors,
    language_model,
    new_folder,
)
from jaxlin.models.family import Family
from jaxlin.models.head_file import head_in, read_head, write_head
from jaxlin.models.load import family_in
from jaxlin.models.model import Model
from jaxlin.models.resolve import resolve_model
from jaxlin.peft.config import CONFIG, AdapterConfig, lora_config, saved_heads
from jaxlin.peft.function import PeftFunction
from jaxlin.peft.lora import adapted
from jaxlin.peft.select import near_matches, require_live_head
from jaxlin.tunable import CLASSIFIER, Tunable, in_head

WEIGHTS = "adapter_model.safetensors"
_BEGIN = "base_model.model."


def _folder(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"there is no folder {path}; expected an adapter, as the peft library saves it")
    if not (path / WEIGHTS).is_file():
        pickle = (
            " (adapter_model.bin is a pickle, which is never loaded)" if (path / "adapter_model.bin").exists() else ""
        )
        raise InputError(f"{path} has no {WEIGHTS}{pickle}; expected an adapter, as the peft library saves it")
    return path


def _tensors(file: Path) -> dict[str, np.ndarray]:
    with opened(file) as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)


def adapter_head(folder: str | Path, name_or_path: str, revision: str | None = None) -> tuple[str, int] | None:
    """Returns what the head that an adapter holds reads, as `load_model` names it, and its number of outputs.

    Args:
        folder: Of the adapter.
        name_or_path: Of the pretrained model.
        revision: Of it.

    Returns:
        Both; `None` if it holds no head.

    Raises:
        InputError: If the folder is no adapter, or the model cannot be found or is not supported.
    """
    return _head(_folder(folder), family_in(resolve_model(name_or_path, revision)))


def _head(path: Path, family: Family) -> tuple[str, int] | None:
    if (own := head_in(path)) is not None:
        return own
    name = next(name for name, ours in family.modules.items() if ours == CLASSIFIER)
    with opened(path / WEIGHTS) as tensors:
        if f"{_BEGIN}{name}.weight" not in tensors.keys():  # noqa: SIM118 (not a mapping)
            return None
        return family.own_head, int(tensors.get_slice(f"{_BEGIN}{name}.weight").get_shape()[0])


def with_saved_modules(model: Model, folder: str | Path) -> Model:
    """Returns the model with the modules that an adapter stores whole, such as its head, in place of its own.

    Args:
        model: The pretrained model.
        folder: Of the adapter.

    Raises:
        InputError: As in `load_adapter`.
    """
    return _with_saved(model, folder, _Stored.read(model, folder).saved)


def _with_saved(model: Model, folder: str | Path, saved: Mapping[str, Array]) -> Model:
    params = unflatten_dict({**flatten_dict(model.params, sep="/"), **saved}, sep="/")
    assert model.source is not None  # `family_of` says so
    new = model.source.head_is_new and f"{CLASSIFIER}/kernel" not in saved
    source = dataclasses.replace(model.source, head_is_new=new, adapter=str(folder))
    return dataclasses.replace(model, params=params, source=source)


def load_adapter(model: Model, folder: str | Path, *, train_head: bool = True, freeze_A: bool = False) -> Tunable:
    """Returns a model with a LoRA adapter of the `peft` library, which is where its tuning starts.

    θ₀ is the adapter: the factors, the modules that it stores whole, and the head. The outputs at θ₀ are those of
    the adapted model in `peft`, its dropout off, and `linearize` expands around them.

    GPT-2 computes query, key and value by one module, `c_attn`; adapted there, each of the three has a copy of A here
    and its part of B. The outputs are the same; tuned on, the copies part.

    Args:
        model: The pretrained model that the adapter is for. Where the adapter holds a head, one with such a head:
            `load_model(…, head="pooler")` for an encoder, `head="last"` for a decoder.
        folder: With `adapter_config.json` and `adapter_model.safetensors`.
        train_head: Whether the classification head is part of theta.
        freeze_A: Keep every A fixed (LoRA-FA).

    Returns:
        A Tunable as `lora` makes them.

    Raises:
        InputError: If the folder is no adapter, its configuration asks for what is not plain LoRA (the message names
            it), or its tensors are damaged or do not fit the configuration or the model.
    """
    stored = _Stored.read(model, folder)
    model = _with_saved(model, folder, stored.saved)
    if not train_head:
        require_live_head(model)
    return adapted(
        model,
        lambda path: train_head if in_head(path) else path in stored.saved,
        stored.factors,
        stored.scales,
        freeze_A,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """An adapter by our paths.

    Attributes:
        factors: A `[d_in, r]` and B `[r, d_out]` of every module that is adapted.
        scales: What its product of factors is multiplied by.
        saved: Parameters that are stored whole.
    """

    factors: dict[str, tuple[Array, Array]]
    scales: dict[str, float]
    saved: dict[str, Array]

    @classmethod
    def read(cls, model: Model, folder: str | Path) -> _Stored:
        """Reads and checks all of it; see `load_adapter`."""
        family, path = family_of(model), _folder(folder)
        config, file = AdapterConfig.read(path), path / WEIGHTS
        params = flatten_dict(model.params, sep="/")
        names = module_names(family, model.module.config.num_layers)
        factors: dict[str, tuple[Array, Array]] = {}
        scales: dict[str, float] = {}
        saved: dict[str, Array] = {}
        pairs: dict[str, dict[str, np.ndarray]] = {}
        reads, head = _head(path, family), getattr(model.module, "head", None)
        if reads is not None and head != reads[0]:
            raise InputError(
                f"{path} holds a head for a model with head={reads[0]!r}; this one's is {head!r}: load_model(…, "
                f"num_labels={reads[1]}, head={reads[0]!r})"
            )
        for key, value in _tensors(file).items():
            name = key.removeprefix(_BEGIN)
            module, found, factor = name.removesuffix(".weight").rpartition(".lora_")
            if name == key or (found and factor not in ("A", "B")):
                raise InputError(f"{file} holds {key!r}, which is not of a plain LoRA adapter")
            if found:
                pairs.setdefault(module, {})[factor] = value
            else:
                saved |= _whole(name, value, family, names, params, f"{file}: tensor {key!r}")
        for module, pair in pairs.items():
            paths = names.get(module.removeprefix(family.prefix), ())
            if not paths or f"{paths[0]}/kernel" not in params or in_head(paths[0]):
                raise InputError(
                    f"{file} adapts {module!r}, which is no dense module of this model's body; near: "
                    f"{near_matches(module, sorted(hf_modules(model)))}"
                )
            where, scale = f"{file}: {module}", config.scale(module)
            for ours, part in zip(paths, _parts(pair, config.rank(module), params, paths, where), strict=True):
                factors[ours], scales[ours] = part, scale
        _check_targets(config, set(pairs), family, names, params, path)
        if head_in(path) is not None:
            shapes = {name: leaf.shape for name, leaf in model.params.get(CLASSIFIER, {}).items()}
            saved |= {f"{CLASSIFIER}/{k}": jnp.asarray(value) for k, value in read_head(path, shapes).items()}
        order = sorted(factors)
        return cls({p: factors[p] for p in order}, {p: scales[p] for p in order}, saved)


def _whole(
    name: str, value: np.ndarray, family: Family, names: Any, params: Mapping[str, Array], where: str
) -> dict[str, Array]:
    """A tensor of a module that is stored whole, by our paths."""
    paths = flax_paths(name, family, names, False, Path(where))
    if not paths or not set(paths) <= set(params):
        raise InputError(f"{where} is of a module that this model has not; is it of another head or pooling?")
    parts = flax_arrays(value, paths, family, params, where)
    return {path: jnp.asarray(part, params[path].dtype) for path, part in parts.items()}


def _parts(
    pair: Mapping[str, np.ndarray], rank: int, params: Mapping[str, Array], paths: Sequence[str], where: str
) -> list[tuple[Array, Array]]:
    """Factors of the modules of ours that one of transformers' is: A for each, B cut."""
    if len(pair) < 2:
        raise InputError(f"{where} has only lora_{next(iter(pair))}; expected lora_A and lora_B")
    kernels = [params[f"{path}/kernel"] for path in paths]
    d_in, widths = kernels[0].shape[0], [kernel.shape[1] for kernel in kernels]
    shapes = {"A": (rank, d_in), "B": (sum(widths), rank)}
    for factor, shape in shapes.items():
        if pair[factor].shape != shape:
            raise InputError(
                f"{where}: lora_{factor} has shape {pair[factor].shape}; configuration and model say {shape}"
            )
        if not jnp.issubdtype(pair[factor].dtype, jnp.floating) or not np.isfinite(pair[factor]).all():
            raise InputError(f"{where}: lora_{factor} is not of finite floating-point numbers")
    cuts = np.cumsum(widths)[:-1]
    return [
        (jnp.asarray(pair["A"].T, kernel.dtype), jnp.asarray(part.T, kernel.dtype))
        for kernel, part in zip(kernels, np.split(pair["B"], cuts), strict=True)
    ]


def _check_targets(
    config: AdapterConfig, stored: set[str], family: Family, names: Any, params: Mapping[str, Array], path: Path
) -> None:
    """Refuses an adapter that holds other modules than its configuration says."""
    if config.takes_all or not stored:
        if stored:
            return
        raise InputError(f"{path / WEIGHTS} holds no lora_A and lora_B")
    prefix = family.prefix if any(name.startswith(family.prefix) for name in stored) else ""
    dense = [name for name, ours in names.items() if f"{ours[0]}/kernel" in params and not in_head(ours[0])]
    wanted = {f"{prefix}{name}" for name in dense if config.targets(f"{prefix}{name}")}
    if wanted != stored:
        lost, more = sorted(wanted - stored), sorted(stored - wanted)
        words = [f"lacks factors of {lost[:3]}"] * bool(lost) + [f"has factors of {more[:3]}"] * bool(more)
        raise InputError(f"{path / WEIGHTS} {' and '.join(words)}, other than {CONFIG} says")


def save_adapter(
    tun: Tunable, theta: PyTree, folder: str | Path, model: Model, *, card: Mapping[str, str] | None = None
) -> None:
    """Writes LoRA factors, and what is tuned beside them, as an adapter that the `peft` library loads.

    `peft` adapts the model that `model` was loaded from, in the class of transformers that has its head; the head is
    always stored, tuned or not. Where no class has it (`mean`, `cls`), it is in a file of its own that `load_adapter`
    reads and `peft` ignores, and the adapter is for the model without a head: see the folder's `README.md`.

    α is stored as s·r, whatever made the scale s. Of GPT-2, factors of query, key and value become those of `c_attn`,
    of the sum of their ranks unless their A are equal; the product is the same.

    Args:
        tun: Made by `lora` or `load_adapter`.
        theta: Its parameters.
        folder: That is made, whole or not at all.
        model: What `tun` was made of.
        card: What is known of it, heading to text, for `README.md`.

    Raises:
        InputError: If `tun` is no plain LoRA (`save_model(model, folder, merge(tun, theta))` writes whatever it is),
            `theta` or `model` is of another, the folder holds something, or it cannot be written.

    Example:
        >>> import tempfile, jax, jaxlin as jl
        >>> model = jl.load_model(num_labels=2)
        >>> tun = jl.lora(model, rank=2)
        >>> theta = jax.tree.map(lambda leaf: leaf + 0.01, tun.theta0)
        >>> folder = f"{tempfile.mkdtemp()}/adapter"
        >>> jl.save_adapter(tun, theta, folder, model)
        >>> around = jl.linearize(jl.load_adapter(model, folder))
        >>> bool((around.theta0["classifier"]["kernel"] == theta["classifier"]["kernel"]).all())
        True
    """
    if not isinstance(tun.apply, PeftFunction):
        raise InputError(f"save_adapter needs a Tunable of lora; this one's apply is a {type(tun.apply).__name__}")
    tun.check_theta(theta)
    family, modules, adapter = family_of(model), hf_modules(model), tun.apply
    params, leaves = adapter.variables(theta)
    kinds = {path.rpartition("/")[2] for path in leaves}
    if kinds != {"lora_A", "lora_B"}:
        raise InputError(
            f"save_adapter needs plain LoRA; this Tunable has {', '.join(sorted(kinds)) or 'no adapter'}: "
            "save_model(model, folder, merge(tun, theta)) writes the whole model"
        )
    if set(params) != set(flatten_dict(model.params, sep="/")):
        raise InputError("save_adapter: the model is not the one that the Tunable was made of")
    tuned = {path for path in flatten_dict(theta, sep="/") if path in params}
    of_module = {path.rpartition("/")[0] for path in tuned | {path for path in params if in_head(path)}}
    own = has_own_head(model)
    kept = {name: paths for name, paths in modules.items() if of_module & set(paths) and (own or not in_head(paths[0]))}
    inside = {path for paths in kept.values() for path in paths}
    whole = {path: leaf for path, leaf in params.items() if path.rpartition("/")[0] in inside}
    tensors = {f"{_BEGIN}{name}": value for name, value in hf_tensors(model, unflatten_dict(whole, sep="/")).items()}
    scales, sizes = dict(adapter.scales), {}
    for name, paths in modules.items():
        parts = [_Part.of(path, leaves, params, scales) for path in paths]
        if any(part.scale is not None for part in parts):
            if name in kept:
                raise InputError(f"save_adapter: {name} is tuned whole and has factors too, which peft cannot have")
            a, b, scale = _fused(parts)
            tensors[f"{_BEGIN}{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{_BEGIN}{name}.lora_B.weight"] = np.ascontiguousarray(b.T)
            rank = a.shape[1]
            sizes[name.removeprefix(family.prefix)] = (rank, _whole_number(scale * rank))
    heads = set(saved_heads(family)) if own else set()
    saved = heads & {name.split(".")[0] for name in kept} | {n for n in kept if n.split(".")[0] not in heads}
    config = lora_config(family, sizes, _task_type(model), sorted(saved))
    assert model.source is not None  # `family_of` says so
    config |= {"base_model_name_or_path": model.source.name, "inference_mode": True}
    with new_folder(folder) as partial:
        save_file(dict(sorted(tensors.items())), partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not own:
            write_head(unflatten_dict(params, sep="/")[CLASSIFIER], model.module.head, partial)
        (partial / CARD).write_text(card_of(model, card, adapter=True), encoding="utf-8")


def _task_type(model: Model) -> str | None:
    module = language_model(model)
    if isinstance(module, MaskedLm):
        return None  # the library has none
    if isinstance(module, CausalLm):
        return "CAUSAL_LM"
    return "SEQ_CLS" if has_own_head(model) else "FEATURE_EXTRACTION"


def _whole_number(value: float) -> float | int:
    """α as the library writes it: whole where it is, to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Factors of one module of ours; `scale` is `None` where it has none, and its B is 0."""

    a: Float[np.ndarray, "I R"]
    b: Float[np.ndarray, "R O"]
    scale: float | None

    @classmethod
    def of(cls, path: str, leaves: Mapping[str, Any], params: Mapping[str, Any], scales: Mapping[str, float]) -> _Part:
        """Takes them from the leaves of a Tunable."""
        if f"{path}/lora_A" in leaves:
            return cls(np.asarray(leaves[f"{path}/lora_A"]), np.asarray(leaves[f"{path}/lora_B"]), scales[path])
        kernel = params.get(f"{path}/kernel")
        d_in, d_out = (0, 0) if kernel is None else kernel.shape
        return cls(np.zeros((d_in, 0), np.float32), np.zeros((0, d_out), np.float32), None)


def _fused(parts: Sequence[_Part]) -> tuple[np.ndarray, np.ndarray, float]:
    """A, B and scale of modules side by side, whose A are stacked unless they are the same."""
    present = [part for part in parts if part.scale is not None]
    first, scale = present[0].a, max((part.scale or 0.0 for part in present), key=abs) or 1.0
    shared = all(np.array_equal(part.a, first) for part in present)
    rank = first.shape[1] if shared else sum(part.a.shape[1] for part in present)
    b = np.zeros((rank, sum(part.b.shape[1] for part in parts)), first.dtype)
    row = column = 0
    for part in parts:
        r, width = part.b.shape
        if part.scale is not None:
            b[row : row + r, column : column + width] = part.b * first.dtype.type(part.scale / scale)
            row += 0 if shared else r
        column += width
    return first if shared else np.concatenate([part.a for part in present], axis=1), b, scale
