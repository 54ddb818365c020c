"""Labels made to fit a model: classes in its order, scores on one scale."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlin.data.task import TextSplit
from jaxlin.errors import InputError


def label_order(names: Sequence[str], config: Mapping[str, Any]) -> tuple[Int[np.ndarray, " C"] | None, str | None]:
    """Finds how a checkpoint counts the classes of a task.

    Args:
        names: The task's class names by id.
        config: The checkpoint's `config.json`, whose `id2label` names its classes.

    Returns:
        The checkpoint's id of each class, by name whatever the case (`None`: ids stay as they are), and a line that
        says so. Both are `None` where the order is the same or the checkpoint names nothing (`LABEL_0`).
    """
    theirs = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    if all(re.fullmatch(r"LABEL_\d+", name) for name in theirs.values()):
        return None, None
    listed = ", ".join(theirs[i] for i in sorted(theirs))
    ids = {name.casefold(): i for i, name in theirs.items()}
    folded = [name.casefold() for name in names]
    if sorted(ids) != sorted(folded) or sorted(ids.values()) != list(range(len(names))):
        return None, (
            f"the checkpoint's classes are named {listed}, the task's {', '.join(names)}: "
            "class ids are used as they are"
        )
    order = np.array([ids[name] for name in folded])
    if np.array_equal(order, np.arange(len(names))):
        return None, None
    positive = f"; F1 is of {theirs[1]}" if len(theirs) == 2 else ""
    return order, f"class ids follow the checkpoint's order, by name: {listed}{positive}"


def reorder(split: TextSplit, order: Int[np.ndarray, " C"]) -> TextSplit:
    """Returns the split with class i counted as `order[i]`."""
    return dataclasses.replace(split, labels=order[split.labels])


@dataclasses.dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the training scores.

    Attributes:
        mean: Taken off every score.
        std: Unit of every score.
    """

    mean: float
    std: float


def scale_of(train: TextSplit) -> Scale:
    """Returns the scale of the training scores.

    Raises:
        InputError: If they are all the same.
    """
    scale = Scale(float(train.labels.mean()), float(train.labels.std()))
    if not scale.std > 1e-12 * abs(scale.mean):
        raise InputError(f"all {len(train)} training scores are {scale.mean:g}; expected at least two different ones")
    return scale


def standardise(split: TextSplit, scale: Scale) -> TextSplit:
    """Returns the split with its scores in units of the training scores' standard deviation, from their mean."""
    return dataclasses.replace(split, labels=(split.labels - scale.mean) / scale.std)
