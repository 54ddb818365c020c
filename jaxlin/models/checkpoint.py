"""Hugging Face safetensors in, Flax parameters out, with no torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from jaxlin.errors import InputError
from jaxlin.models.encoder import ACTIVATIONS, EncoderConfig
from jaxlin.tunable import CLASSIFIER


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one architecture map to our modules.

    Attributes:
        prefix: Prefix that a checkpoint with a head puts before the encoder's tensors.
        modules: Module names in the checkpoint to our paths; `{i}` stands for the layer.
        ignored: Pattern of tensor names that are no part of the encoder (other heads, buffers).
        config: Builds our configuration from the Hugging Face one.
    """

    prefix: str
    modules: dict[str, str]
    ignored: str
    config: Callable[[Any], EncoderConfig]


def _bert_config(hf: Any) -> EncoderConfig:
    if getattr(hf, "position_embedding_type", "absolute") != "absolute":
        raise InputError(f"position_embedding_type={hf.position_embedding_type!r} is not supported; only 'absolute' is")
    if getattr(hf, "is_decoder", False):
        raise InputError("the checkpoint is a BERT decoder (is_decoder=true); only encoders are supported")
    if hf.hidden_act not in ACTIVATIONS:
        raise InputError(f"hidden_act={hf.hidden_act!r} is not supported; supported: {sorted(ACTIVATIONS)}")
    return EncoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        type_vocab_size=hf.type_vocab_size,
        activation=hf.hidden_act,
        layer_norm_eps=hf.layer_norm_eps,
        initializer_range=hf.initializer_range,
    )


_BERT_LAYER = {
    "attention.self.query": "attention/query",
    "attention.self.key": "attention/key",
    "attention.self.value": "attention/value",
    "attention.output.dense": "attention/output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "output.LayerNorm": "mlp_norm",
}

FAMILIES = {
    "bert": Family(
        prefix="bert.",
        modules={
            "embeddings.word_embeddings": "embeddings/word",
            "embeddings.position_embeddings": "embeddings/position",
            "embeddings.token_type_embeddings": "embeddings/token_type",
            "embeddings.LayerNorm": "embeddings/norm",
            **{f"encoder.layer.{{i}}.{theirs}": f"encoder/layer_{{i}}/{ours}" for theirs, ours in _BERT_LAYER.items()},
            "pooler.dense": "pooler",
            "classifier": CLASSIFIER,
        },
        ignored=r"(embeddings\.position_ids|cls\..*)",
        config=_bert_config,
    ),
}


def _tensor_names(family: Family, num_layers: int) -> dict[str, str]:
    """Checkpoint module names to our module paths, layers written out."""
    names: dict[str, str] = {}
    for theirs, ours in family.modules.items():
        for i in range(num_layers) if "{i}" in theirs else (0,):
            names[theirs.format(i=i)] = ours.format(i=i)
    return names


def _flax_leaf(path: str, kind: str) -> str:
    """Name of the Flax leaf for a checkpoint's `weight` or `bias` of the module at `path`."""
    if kind == "bias":
        return "bias"
    if path.startswith("embeddings/") and not path.endswith("norm"):
        return "embedding"
    return "scale" if path.endswith("norm") else "kernel"


def weights_file(folder: Path) -> Path:
    """Returns the folder's safetensors file.

    Raises:
        InputError: If there is none, with what to do about the formats that are not read.
    """
    file = folder / "model.safetensors"
    if file.is_file():
        return file
    if (folder / "pytorch_model.bin").exists():
        raise InputError(
            f"{folder} has only pytorch_model.bin, a pickle, which is never loaded; convert it where torch is "
            "installed: AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
        )
    raise InputError(f"{folder} has no model.safetensors; it holds {sorted(p.name for p in folder.iterdir())[:12]}")


def load_params(folder: Path, family: Family, num_layers: int, expected: PyTree) -> tuple[PyTree, set[str]]:
    """Reads a checkpoint's tensors as Flax parameters.

    Args:
        folder: Folder with `model.safetensors`.
        family: Name mapping.
        num_layers: Number of layers of the configuration.
        expected: Nested dict of shape structs of the parameters wanted.

    Returns:
        Nested dict of NumPy arrays (kernels transposed to Flax's `[in, out]`), and the paths of leaves
        of `expected` that the checkpoint does not have, which can only be of the classifier.

    Raises:
        InputError: If the file is damaged, a tensor is missing, unexpected, of another shape, not
            floating point, or holds NaN or infinity. The message names the tensor.
    """
    file = weights_file(folder)
    modules = _tensor_names(family, num_layers)
    found: dict[str, np.ndarray] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                bare = name.removeprefix(family.prefix)
                if re.fullmatch(family.ignored, bare):
                    continue
                module, _, kind = bare.rpartition(".")
                kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
                if module not in modules or kind not in ("weight", "bias"):
                    near = difflib.get_close_matches(module, modules, 1)
                    hint = f" (did it mean {near[0]!r}?)" if near else ""
                    raise InputError(f"{file} holds an unexpected tensor {name!r}{hint}")
                path = f"{modules[module]}/{_flax_leaf(modules[module], kind)}"
                if path not in expected:
                    continue  # a pooler that this head does not use
                value = tensors.get_tensor(name)
                if path.endswith("kernel"):
                    value = value.T
                if value.shape != expected[path].shape:
                    if path.startswith(f"{CLASSIFIER}/"):
                        raise InputError(
                            f"{file}: the checkpoint's head has {value.shape[-1]} outputs, the task "
                            f"{expected[path].shape[-1]}; a head 'mean' or 'cls' would be a new one"
                        )
                    raise InputError(
                        f"{file}: tensor {name!r} gives {path} shape {value.shape}; the configuration says "
                        f"{expected[path].shape}"
                    )
                if not jnp.issubdtype(value.dtype, jnp.floating):
                    raise InputError(f"{file}: tensor {name!r} has dtype {value.dtype}; expected floating point")
                if not np.isfinite(value).all():
                    raise InputError(f"{file}: tensor {name!r} holds NaN or infinity")
                found[path] = value
    except (SafetensorError, OSError, TypeError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from error
    missing = set(expected) - set(found)
    lost = sorted(path for path in missing if not path.startswith(f"{CLASSIFIER}/"))
    if lost:
        theirs = {ours: name for name, ours in modules.items()}
        named = [f"{theirs[path.rpartition('/')[0]]} ({path})" for path in lost[:3]]
        raise InputError(f"{file} lacks {len(lost)} tensor(s) of the configuration, among them {', '.join(named)}")
    return unflatten_dict(found, sep="/"), missing
