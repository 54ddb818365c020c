"""Hashes of arrays and of descriptions, the same in every process."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def without_addresses(text: str) -> str:
    """Returns a description without where its functions lie in memory, which is another place in every process."""
    return _ADDRESS.sub("", text)


def add_array(digest: Any, name: str, value: Any) -> None:
    """Adds an array, host or device, to a hash of `hashlib`: its name, dtype, shape and content."""
    array = np.ascontiguousarray(value)
    digest.update(f"{name}{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())
