"""Flax parameters out, as a Hugging Face checkpoint that transformers loads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxlin.data.task import padding_id
from jaxlin.errors import InputError
from jaxlin.models.card import model_card
from jaxlin.models.checkpoint import WEIGHTS, Modules, module_names
from jaxlin.models.decoder import CausalLm, DecoderClassifier
from jaxlin.models.encoder import MaskedLm, SequenceClassifier
from jaxlin.models.families import FAMILIES
from jaxlin.models.family import Family
from jaxlin.models.head_file import write_head
from jaxlin.models.model import Model
from jaxlin.models.reading import Reading
from jaxlin.tunable import CLASSIFIER, in_head

"""Where the head is that no class of transformers has: the linear map of a `mean` or `cls` state."""

CARD = "README.md"

_CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "gpt2": "GPT2",
    "gemma": "Gemma",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
"""How transformers' classes begin, by `model_type`."""

_LMS = MaskedLm | CausalLm
_TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields a folder to write in that becomes `path` when all is written; after an error nothing is left.

    Args:
        path: That is not there yet, or empty.

    Raises:
        InputError: If it is there and holds something, or cannot be made.
    """
    path = Path(path).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is there already and is not an empty folder; give another")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def family_of(model: Model) -> Family:
    """Returns the family of a model's checkpoint.

    Raises:
        InputError: If the model is none of `load_model`, `load_masked_lm` or `load_causal_lm`, or what is read of one.
    """
    if model.source is None or not isinstance(model.module, SequenceClassifier | DecoderClassifier | _LMS | Reading):
        raise InputError(
            "Hugging Face's names are known for models of load_model, load_masked_lm and load_causal_lm only; this "
            f"one's module is a {type(model.module).__name__}"
        )
    return FAMILIES[model.config["model_type"]]


def language_model(model: Model) -> Any:
    """Returns the module, where something is read of a language model that one."""
    return model.module.module if isinstance(model.module, Reading) else model.module


def has_own_head(model: Model) -> bool:
    """Whether the model's head is one of transformers': a language model's, or that of its classifier's class."""
    return isinstance(model.module, _LMS | Reading) or model.module.head == family_of(model).own_head


def hf_modules(model: Model) -> Modules:
    """Returns the names of modules in transformers' class of the model, and our paths; see `architecture`."""
    family = family_of(model)
    prefix = family.prefix if has_own_head(model) else ""

    def of_head(paths: tuple[str, ...]) -> bool:
        return in_head(paths[0]) or paths[0].partition("/")[0] == "lm_head"

    names = module_names(family, model.module.config.num_layers)
    return {name if of_head(paths) else f"{prefix}{name}": paths for name, paths in names.items()}


def architecture(model: Model) -> str:
    """Returns the class of transformers that the model is; without a head, where none has the model's."""
    begin, module = _CLASSES[model.config["model_type"]], language_model(model)
    if isinstance(module, MaskedLm):
        return f"{begin}ForMaskedLM"
    if isinstance(module, CausalLm):
        return f"{begin}LMHeadModel" if begin == "GPT2" else f"{begin}ForCausalLM"
    return f"{begin}ForSequenceClassification" if has_own_head(model) else f"{begin}Model"


def hf_tensors(model: Model, params: PyTree) -> dict[str, np.ndarray]:
    """Returns parameters as the tensors of transformers' class, by name; those of modules that are there whole.

    Args:
        model: Whose parameters they are.
        params: Nested dict of some of its parameters.

    Raises:
        InputError: If a part of a module is missing which transformers holds as one.
    """
    family, flat, tensors = family_of(model), flatten_dict(params, sep="/"), {}
    for name, paths in hf_modules(model).items():
        for ours, theirs in {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}.items():
            leaves = [np.asarray(flat.pop(f"{path}/{ours}")) for path in paths if f"{path}/{ours}" in flat]
            if not leaves:
                continue
            if len(leaves) < len(paths):
                raise InputError(f"transformers holds {', '.join(paths)} as one module, {name}; give all or none")
            value = np.concatenate(leaves, axis=-1)
            as_ours = family.untransposed is not None and paths[0].startswith(family.untransposed)
            tensors[f"{name}.{theirs}"] = value.T if ours == "kernel" and not as_ours else value
    if flat:
        raise InputError(f"transformers' {architecture(model)} has no such parameters: {', '.join(sorted(flat)[:3])}")
    return {name: np.ascontiguousarray(value) for name, value in sorted(tensors.items())}


def save_model(
    model: Model,
    folder: str | Path,
    params: PyTree | None = None,
    *,
    label_names: tuple[str, ...] | None = None,
    card: Mapping[str, str] | None = None,
) -> None:
    """Writes a model as a checkpoint that transformers and `load_model` read, with its tokenizer.

    Where the head reads the `mean` of the token states or an encoder's first (`cls`), no class of transformers has it:
    `model.safetensors` then holds the model without a head, and `jaxlin_head.safetensors` its linear map (`weight`
    `[C, D]` and, of an encoder, `bias` `[C]`), as the folder's `README.md` says; `load_model` reads it back.

    Args:
        model: Of `load_model`, `load_masked_lm`, `load_causal_lm` or `prompt_classifier` (its language model).
        folder: That is made, whole or not at all.
        params: Its parameters, such as `merge(tun, theta)`; default `model.params`.
        label_names: Names of the classes, in the order of the outputs.
        card: What is known of it, heading to text, for `README.md`.

    Raises:
        InputError: If the model is another one, the folder holds something, or it cannot be written.
    """
    params = model.params if params is None else params
    own, config = has_own_head(model), dict(model.config)
    body = dict(params) if own else {name: part for name, part in params.items() if name != CLASSIFIER}
    tensors = hf_tensors(model, body)
    config |= {"architectures": [architecture(model)], "dtype": jnp.dtype(jax.tree.leaves(body)[0].dtype).name}
    config.pop("torch_dtype", None)
    if isinstance(model.module, SequenceClassifier | DecoderClassifier):
        config |= _labels(model.module.num_labels, label_names)
    if family_of(model).is_decoder and config.get("pad_token_id") is None:
        config["pad_token_id"] = padding_id(model.tokenizer)  # by which transformers' classifier finds the last token
    assert model.source is not None  # `family_of` says so
    with new_folder(folder) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in sorted(file for pattern in _TOKENIZER for file in Path(model.source.folder).glob(pattern)):
            shutil.copyfile(file, partial / file.name)
        if not own:
            write_head(params[CLASSIFIER], model.module.head, partial)
        (partial / CARD).write_text(card_of(model, card, adapter=False), encoding="utf-8")


def card_of(model: Model, facts: Mapping[str, str] | None, adapter: bool) -> str:
    """Returns the card of a model or an adapter for it; see `model_card`."""
    assert model.source is not None  # `family_of` says so
    head = None if has_own_head(model) else model.module.head
    return model_card(model.source.name, architecture(model), head, facts or {}, adapter)


def _labels(outputs: int, names: tuple[str, ...] | None) -> dict[str, Any]:
    """Returns what a configuration says of the outputs."""
    named = names if names and len(names) == outputs else tuple(f"LABEL_{i}" for i in range(outputs))
    kind = "regression" if outputs == 1 else "single_label_classification"
    return {
        "id2label": {str(i): name for i, name in enumerate(named)},
        "label2id": {name: i for i, name in enumerate(named)},
        "problem_type": kind,
    }
