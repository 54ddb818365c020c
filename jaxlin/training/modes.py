"""How something is trained: from its network, from activations computed once, or from Jacobians computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.linearize import Linearized
from jaxlin.ntk.jacobian import MEMORY_BUDGET, Progress, jacobian, jacobian_bytes
from jaxlin.training.cached import cached_linearized
from jaxlin.trunk import Trunk, cache_found, find_trunk
from jaxlin.tunable import Tunable

MODES = ("auto", "streaming", "trunk", "cached")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to train, and why.

    Attributes:
        mode: `"streaming"`, `"trunk"` or `"cached"`.
        reason: In words, with the bytes.
    """

    mode: str
    reason: str


def size(nbytes: float) -> str:
    """Returns a number of bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def choose_cached(nbytes: int, memory_budget: int) -> Choice:
    """Says whether the linearized model trains from Jacobians of so many bytes: where they fit half the budget."""
    fits = 2 * nbytes <= memory_budget  # half: they are copied to the device
    said = (
        f"Jacobians take {size(nbytes)}, {'within' if fits else 'more than'} half the budget of {size(memory_budget)}"
    )
    return (
        Choice("cached", f"Jacobians computed once: {said}")
        if fits
        else Choice("streaming", f"jvp at every step: {said}")
    )


def choose_trunk(tun: Tunable, data: Sequence[Dataset], memory_budget: int) -> tuple[Trunk | None, Choice]:
    """Says whether activations below what is tuned are to be computed once: where there are any and they fit.

    Args:
        tun: What is tuned.
        data: All examples.
        memory_budget: Bytes.

    Returns:
        The trunk where there is one, and the choice.
    """
    try:
        trunk = find_trunk(tun, data[0])
    except InputError as error:
        return None, Choice("streaming", f"the whole network at every step: {error}")
    nbytes = trunk.nbytes(sum(map(len, data)))
    fits = nbytes <= memory_budget
    said = (
        f"{trunk.share:.0%} of a forward pass lies below {trunk.cut.path!r}, inclusive; its activations take "
        f"{size(nbytes)}, {'within' if fits else 'more than'} the budget of {size(memory_budget)}"
    )
    if fits:
        return trunk, Choice("trunk", f"the trunk computed once: {said}")
    return trunk, Choice("streaming", f"the whole network at every step: {said}")


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What `prepare` gives.

    Attributes:
        tun: The model to train, in the form chosen.
        data: The data sets for it.
        mode: `"streaming"`, `"trunk"` or `"cached"`.
        reason: Why, in words, with the bytes.
        jacobian_error: Relative Frobenius error of the Jacobians by the dtype that they are kept in, measured on all
            examples; 0 where they are kept as computed, or there are none.
    """

    tun: Tunable
    data: tuple[Dataset, ...]
    mode: str
    reason: str
    jacobian_error: float = 0.0


def prepare(
    tun: Tunable,
    *data: Dataset | Mapping[str, Any],
    mode: str = "auto",
    memory_budget: int = MEMORY_BUDGET,
    folder: str | Path | None = None,
    jacobian_dtype: str | None = None,
    precision: str = "highest",
    progress: Progress | None = None,
) -> Prepared:
    """Brings a model and its data into the form that trains fastest within a memory budget.

    The trajectories are the same to rounding (in bfloat16: to `jacobian_error`). A linearized model (`linearize`) has
    three forms: `"cached"`, its Jacobians computed once, a step being two matrix products; `"trunk"`, what lies below
    the tuned parameters computed once (see `cache_trunk`); `"streaming"`, the network at every step. Any other model
    has the latter two.

    Args:
        tun: What is to be trained: a Tunable, or `linearize` of one.
        *data: Data sets with `labels`, such as training and evaluation examples.
        mode: One of the three, or `"auto"`: cached where the Jacobians fit half the budget, else trunk where there is
            one and its activations fit, else streaming.
        memory_budget: Bytes for Jacobians or activations.
        folder: For activations that do not fit, under `mode="trunk"`; see `cache_trunk`.
        jacobian_dtype: `"bfloat16"` keeps Jacobians in half the memory; `None` as the parameters.
        precision: Of matrix products in what is computed once.
        progress: Called with examples done and in all, of each data set where these are Jacobians'.

    Returns:
        Model and data, what was chosen and why.

    Raises:
        InputError: If the mode is unknown or cannot be, Jacobians do not fit, or the data does not fit the model.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((2, 1), jnp.float32)})
        >>> data = {"x": np.eye(2, dtype=np.float32), "labels": np.array([1.0, -1.0])}
        >>> jl.prepare(jl.linearize(tun), data).reason
        'Jacobians computed once: Jacobians take 16 bytes, within half the budget of 4.0 GiB'
    """
    if mode not in MODES:
        raise InputError(f"mode={mode!r} is unknown; expected one of {', '.join(MODES)}")
    if jacobian_dtype not in (None, "bfloat16"):
        raise InputError(f'jacobian_dtype={jacobian_dtype!r} is unknown; expected "bfloat16", or None')
    if not data:
        raise InputError("prepare needs the data that is to be trained on")
    sets = [as_dataset(part) for part in data]
    for part in sets:
        tun.check_batch(part.columns)
        if "labels" not in part.columns:
            raise InputError(f"the data has no column 'labels'; it has {sorted(part.columns)}")
    linear = tun.apply if isinstance(tun.apply, Linearized) else None
    if mode == "cached" and linear is None:
        raise InputError("mode='cached' is for linearized models: give linearize(tun)")
    choice, trunk = Choice(mode, f"{mode}, as asked for"), None
    if mode == "auto":
        notes = []
        if linear is not None:
            choice = choose_cached(sum(jacobian_bytes(tun, part, jacobian_dtype) for part in sets), memory_budget)
            notes.append(choice.reason)
        if choice.mode != "cached":
            trunk, choice = choose_trunk(tun, sets, memory_budget)
            notes.append(choice.reason)
        choice = Choice(choice.mode, "; ".join(notes))
    if choice.mode == "streaming":
        return Prepared(tun, tuple(sets), choice.mode, choice.reason)
    if choice.mode == "trunk":
        trunk = trunk or find_trunk(tun, sets[0])
        tun, rest = cache_found(tun, trunk, sets, memory_budget, folder, precision, progress)
        return Prepared(tun, tuple(rest), choice.mode, choice.reason)
    assert linear is not None  # checked
    needed = sum(jacobian_bytes(tun, part, jacobian_dtype) for part in sets)
    if needed > memory_budget:
        raise InputError(
            f"mode='cached' needs {size(needed)} for Jacobians, more than memory_budget={size(memory_budget)}; use "
            "'auto', 'streaming' or fewer examples"
        )
    exact = Tunable(linear.apply, linear.at, tun.blocks)
    options: dict[str, Any] = {"precision": precision, "memory_budget": memory_budget, "progress": progress}
    found = [jacobian(exact, part, storage=jacobian_dtype, **options) for part in sets]
    cached, rows = cached_linearized(exact, sets, found)
    error = max(jac.storage_error for jac in found)
    kept = f"; kept in {jacobian_dtype}, relative error {error:.1e}" if jacobian_dtype else ""
    return Prepared(dataclasses.replace(cached, theta0=tun.theta0), tuple(rows), "cached", choice.reason + kept, error)
