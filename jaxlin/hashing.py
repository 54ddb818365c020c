"""By what a computation is known again: hashes, the same in every process, and how two records differ."""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxlin.tunable import PlainFunction, Tunable, leaf_paths

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def without_addresses(text: str) -> str:
    """Returns a description without where its functions lie in memory, which is another place in every process."""
    return _ADDRESS.sub("", text)


def add_array(digest: Any, name: str, value: Any) -> None:
    """Adds an array, host or device, to a hash of `hashlib`: its name, dtype, shape and content."""
    array = np.ascontiguousarray(value)
    digest.update(f"{name}{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())


def add_function(digest: Any, function: Callable) -> None:
    """Adds a Python function to a hash of `hashlib`: its code, and what that reads outside it.

    That is defaults, variables of functions around it, and globals of its own module; other functions of the module
    that it calls, likewise. Arrays and numbers count by their content, modules and classes by their name.
    """
    seen: set[int] = set()

    def add(value: Any, module: str) -> None:
        if isinstance(value, functools.partial):
            add((value.func, value.args, sorted(value.keywords.items())), module)
        elif isinstance(value, types.MethodType):
            add((value.__func__, value.__self__), module)
        elif isinstance(value, types.FunctionType):
            digest.update(value.__qualname__.rpartition(".")[2].encode())
            if id(value) in seen or value.__module__ != module:
                return
            seen.add(id(value))
            add((value.__code__, value.__defaults__, value.__kwdefaults__), module)
            read = _names(value.__code__)
            add([_held(cell) for cell in value.__closure__ or ()], module)
            add({name: value.__globals__[name] for name in sorted(read & value.__globals__.keys())}, module)
        elif isinstance(value, types.CodeType):
            digest.update(value.co_code)
            add((value.co_names, value.co_varnames, value.co_consts), module)
        elif isinstance(value, tuple | list):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for one in value:
                add(one, module)
        elif isinstance(value, dict):
            add([part for item in value.items() for part in item], module)
        elif isinstance(value, jax.Array | np.ndarray | np.generic):
            add_array(digest, "", value)
        elif isinstance(value, frozenset | set):
            digest.update("".join(sorted(map(repr, value))).encode())
        elif isinstance(value, types.ModuleType | type):
            digest.update(value.__name__.encode())
        elif jax.tree_util.all_leaves([value]):
            digest.update(without_addresses(repr(value)).encode())
        else:
            digest.update(without_addresses(str(jax.tree.structure(value))).encode())
            add(jax.tree.leaves(value), module)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    add(function, getattr(inner, "__module__", ""))


def _names(code: types.CodeType) -> set[str]:
    """Names that code reads, and the functions within it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _held(cell: types.CellType) -> Any:
    """What a variable of the function around is; `None` where it is not set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def fingerprint(tun: Tunable, theta: PyTree) -> dict[str, str]:
    """Returns hashes of the model and of theta.

    They are of every weight (where one process holds it) and its path, and of plain functions as `add_function` sees
    them.
    """
    model, point = hashlib.sha256(without_addresses(str(jax.tree.structure(tun.apply))).encode()), hashlib.sha256()
    for digest, tree in ((model, tun.apply), (point, theta)):
        for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
            if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
                digest.update(f"{path}{leaf.dtype}{leaf.shape}".encode())
                continue
            add_array(digest, path, leaf)
    for part in jax.tree.leaves(tun.apply, is_leaf=lambda part: isinstance(part, PlainFunction)):
        if isinstance(part, PlainFunction):
            add_function(model, part.fn)
    return {"model_sha256": model.hexdigest(), "theta_sha256": point.hexdigest()}


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns what differs between two records, as `name was …, is …`, long values cut; empty if nothing does."""

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 24 else f"{text[:12]}…"

    other = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(f"{name} was {short(was.get(name))}, is {short(now.get(name))}" for name in other)
