"""By what a computation is known again: hashes, the same in every process, and how two records differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlin.tunable import Tunable, leaf_paths

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def without_addresses(text: str) -> str:
    """Returns a description without where its functions lie in memory, which is another place in every process."""
    return _ADDRESS.sub("", text)


def add_array(digest: Any, name: str, value: Any) -> None:
    """Adds an array, host or device, to a hash of `hashlib`: its name, dtype, shape and content."""
    array = np.ascontiguousarray(value)
    digest.update(f"{name}{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())


def fingerprint(tun: Tunable, theta: PyTree) -> dict[str, str]:
    """Returns hashes of the model and of theta, from every weight (where one process holds it) and its path."""
    model, point = hashlib.sha256(without_addresses(str(jax.tree.structure(tun.apply))).encode()), hashlib.sha256()
    for digest, tree in ((model, tun.apply), (point, theta)):
        for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
            if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                digest.update(f"{path}{leaf.dtype}{leaf.shape}".encode())
                continue
            add_array(digest, path, leaf)
    return {"model_sha256": model.hexdigest(), "theta_sha256": point.hexdigest()}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what differs between two records, as `name was …, is …`, long values cut; empty if nothing does."""

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 24 else f"{text[:12]}…"

    other = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(f"{name} was {short(was.get(name))}, is {short(now.get(name))}" for name in other)
