"""Hugging Face safetensors in, Flax parameters out, with no torch."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open

from jaxlin.errors import InputError
from jaxlin.models.family import Family
from jaxlin.tunable import CLASSIFIER, in_head

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WORDS = "embeddings/word/embedding"
BUFFERS = re.compile(r"embeddings\.position_ids|h\.\d+\.attn\.(masked_)?bias|.*\.rotary_emb\.inv_freq")
"""Tensors that older versions of transformers saved and that hold no parameter."""

Modules = Mapping[str, tuple[str, ...]]
"""Checkpoint module names to our module paths: one, or those whose outputs the checkpoint's holds side by side."""


def module_names(family: Family, num_layers: int) -> Modules:
    """Names and paths with the layers written out."""
    names: dict[str, tuple[str, ...]] = {}
    for theirs, ours in {**{name: (path,) for name, path in family.modules.items()}, **family.fused}.items():
        for i in range(num_layers) if "{i}" in theirs else (0,):
            names[theirs.format(i=i)] = tuple(path.format(i=i) for path in ours)
    return names


def flax_leaf(path: str, kind: str) -> str:
    """Name of the Flax leaf for a checkpoint's `weight` or `bias` of the module at `path`."""
    if kind == "bias":
        return "bias"
    if path in ("embeddings/word", "embeddings/position", "embeddings/token_type"):
        return "embedding"
    return "scale" if path.endswith("norm") else "kernel"


def how_to_convert(source: Path | str) -> str:
    """Says how to make safetensors of a pickle, with the class that its configuration names so that no head is lost."""
    try:
        named = json.loads((Path(source) / "config.json").read_text())["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        named = "THE_CLASS_IN_ITS_config.json"
    return (
        f"convert it where torch is installed: transformers.{named}.from_pretrained({str(source)!r})"
        ".save_pretrained(FOLDER, safe_serialization=True), and the same with AutoTokenizer"
    )


def tensor_names(folder: Path, family: Family) -> set[str]:
    """Returns the names of a checkpoint's tensors, the family's prefix removed.

    Raises:
        InputError: If a file cannot be read.
    """
    names: set[str] = set()
    for file in weights_files(folder):
        with opened(file) as tensors:
            names |= {name.removeprefix(family.prefix) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    return names


def weights_files(folder: Path) -> list[Path]:
    """Returns the folder's safetensors files: one, or the shards that its index lists.

    Raises:
        InputError: If there are none, with what to do about the formats that are not read, or a shard is absent.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not an index of safetensors shards: {error!r}") from error
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent or not shards:
            raise InputError(f"{index} lists {len(shards)} shards; absent from the folder: {', '.join(absent[:3])}")
        return [folder / name for name in shards]
    if (folder / "pytorch_model.bin").exists() or (folder / "pytorch_model.bin.index.json").exists():
        raise InputError(
            f"{folder} has only pytorch_model.bin, a pickle, which is never loaded; {how_to_convert(folder)}"
        )
    raise InputError(f"{folder} has no {WEIGHTS}; it holds {sorted(p.name for p in folder.iterdir())[:12]}")


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file; whatever is wrong with it is one error."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (SafetensorError, OSError, TypeError) as error:
        raise InputError(f"{file} cannot be read as safetensors: {error}") from error


def flax_paths(name: str, family: Family, modules: Modules, tied: bool, file: Path) -> tuple[str, ...]:
    """Returns the paths of a checkpoint's tensor in our parameters; none for what no module of ours has.

    Raises:
        InputError: If the family has no such tensor.
    """
    bare = name.removeprefix(family.prefix)
    if tied and bare == f"{family.decoder}.weight":
        return (WORDS,)
    if BUFFERS.fullmatch(bare):
        return ()
    module, _, kind = bare.rpartition(".")
    kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
    if module not in modules and bare.partition(".")[0] not in family.body:
        return ()  # another head's
    if module not in modules or kind not in ("weight", "bias"):
        near = difflib.get_close_matches(module, modules, 1)
        hint = f" (did it mean {near[0]!r}?)" if near else ""
        raise InputError(f"{file} holds an unexpected tensor {name!r}{hint}")
    return tuple(f"{path}/{flax_leaf(path, kind)}" for path in modules[module])


def flax_arrays(
    value: np.ndarray, paths: tuple[str, ...], family: Family, expected: Mapping[str, Any], where: str
) -> dict[str, np.ndarray]:
    """Returns a tensor in Flax's layout by path, cut where it holds several of ours side by side.

    Raises:
        InputError: If its shape, dtype or a value is not what it should be.
    """
    stored_as_ours = family.untransposed is not None and paths[0].startswith(family.untransposed)
    value = value.T if paths[0].endswith("kernel") and not stored_as_ours else value
    if len(paths) > 1 and (not value.ndim or value.shape[-1] % len(paths)):
        raise InputError(f"{where} has shape {value.shape}; expected {len(paths)} equal parts along its last axis")
    parts = np.split(value, len(paths), axis=-1) if len(paths) > 1 else [value]
    for path, part in zip(paths, parts, strict=True):
        shape = expected[path].shape
        if part.shape != shape:
            if path.startswith(f"{CLASSIFIER}/"):
                raise InputError(
                    f"{where}: the checkpoint's head has {part.shape[-1]} outputs, the task {shape[-1]}; "
                    "new_head=True (--new_head) draws another in its place"
                )
            raise InputError(f"{where} gives {path} shape {part.shape}; the configuration says {shape}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"{where} has dtype {value.dtype}; expected floating point")
    if not np.isfinite(value).all():
        raise InputError(f"{where} holds NaN or infinity")
    return dict(zip(paths, parts, strict=True))


def load_params(
    folder: Path, family: Family, num_layers: int, expected: Mapping[str, Any], dtype: Any = None, tied: bool = True
) -> tuple[PyTree, set[str]]:
    """Reads a checkpoint's tensors as Flax parameters, one at a time: the model is never held twice.

    Args:
        folder: Folder with `model.safetensors`, or shards and their index.
        family: Name mapping.
        num_layers: Number of layers of the configuration.
        expected: Path to shape struct of the parameters wanted.
        dtype: Of the parameters; `None` for each tensor's own.
        tied: Whether the language-modelling head's output map is the word embedding.

    Returns:
        Nested dict of arrays (kernels in Flax's `[in, out]`), and the paths of leaves of `expected` that the
        checkpoint does not have, which can only be of the classification head.

    Raises:
        InputError: If a file is damaged, a tensor is missing, unexpected, of another shape, not
            floating point, or holds NaN or infinity. The message names the tensor.
    """
    modules = module_names(family, num_layers)
    found: dict[str, jax.Array] = {}
    for file in weights_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                paths = flax_paths(name, family, modules, tied, file)
                again = paths == (WORDS,) and WORDS in found and name.endswith(f"{family.decoder}.weight")
                if paths and set(paths) <= set(expected) and not again:  # else of a head that is not wanted
                    parts = flax_arrays(tensors.get_tensor(name), paths, family, expected, f"{file}: tensor {name!r}")
                    found |= {path: jnp.asarray(part, dtype) for path, part in parts.items()}
    missing = set(expected) - set(found)
    lost = sorted(path for path in missing if not in_head(path))
    if lost:
        theirs = {path: name for name, paths in modules.items() for path in paths}
        named = [f"{theirs[path.rpartition('/')[0]]} ({path})" for path in lost[:3]]
        hint = "; the head 'mean' or 'cls' does without it" if lost[0].startswith("pooler/") else ""
        raise InputError(
            f"{folder} lacks {len(lost)} tensor(s) of the configuration, among them {', '.join(named)}{hint}"
        )
    return unflatten_dict(found, sep="/"), missing
