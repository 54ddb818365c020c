"""The file of a head that no class of transformers has, beside a model or an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import PyTree
from safetensors.numpy import save_file

from jaxlin.errors import InputError
from jaxlin.models.checkpoint import opened

HEAD_FILE = "jaxlin_head.safetensors"


def write_head(head: Mapping[str, PyTree], reads: str, folder: Path) -> None:
    """Writes a linear map to the logits, with what it reads (`"mean"` or `"cls"`) as metadata."""
    names = {"weight": np.ascontiguousarray(np.asarray(head["kernel"]).T)}
    if "bias" in head:
        names["bias"] = np.asarray(head["bias"])
    save_file(names, folder / HEAD_FILE, metadata={"head": reads})


def head_in(folder: Path) -> tuple[str, int] | None:
    """Returns what the head that lies in a folder reads, and its outputs; `None` if there is none.

    Raises:
        InputError: If it cannot be read.
    """
    if not (folder / HEAD_FILE).is_file():
        return None
    with opened(folder / HEAD_FILE) as tensors:
        return str((tensors.metadata() or {}).get("head")), int(tensors.get_slice("weight").get_shape()[0])


def read_head(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the head that lies in a folder.

    Args:
        folder: That `write_head` wrote into.
        expected: Shapes of the head that it is to be, by `kernel` and `bias`.

    Returns:
        Parameters by these names.

    Raises:
        InputError: If it cannot be read, or has other shapes.
    """
    file = folder / HEAD_FILE
    with opened(file) as tensors:
        reads = (tensors.metadata() or {}).get("head")
        head = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
    found = {{"weight": "kernel"}.get(name, name): value.T for name, value in head.items()}
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != dict(expected):
        raise InputError(
            f"{file} is a head that reads {reads!r}, of shapes {shapes}; the model's has {dict(expected)}: "
            "load_model(…, num_labels, head=…)"
        )
    return found
