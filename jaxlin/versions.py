"""Versions that results depend on."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("jaxlin", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
