"""How to train."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from jaxlin.errors import InputError
from jaxlin.training.losses import LOSSES
from jaxlin.training.optim import MODES

MOMENTUM = 0.9
"""Of heavy ball, the optimizer `"momentum"`."""

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=MOMENTUM),
    "adam": optax.adam,
    "rmsprop": optax.rmsprop,
    "lion": functools.partial(optax.lion, weight_decay=0.0),
}
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("highest", "high", "default")
COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        loss: `"squared"`: ½‖f − y‖² on one-hot targets (C ≥ 2), ±1 or the score (C = 1); or
            `"cross_entropy"`. Its mean over a batch is minimised.
        optimizer: A name of `OPTIMIZERS`, or an optax optimizer (then `learning_rate` is only the pull's η).
        learning_rate: η for the *mean* loss, n times theory's.
        lr_scheduler_type: `"constant"`, or `"linear"` or `"cosine"` decay to 0.
        warmup_ratio: Share of the steps with linearly growing rate.
        batch_size: Examples a step; at least the number of examples is full-batch descent.
        gradient_accumulation_steps: Parts that the batch of a step is computed in, one after the other, for less memory
            and to rounding the same step; `batch_size` stays the examples of the whole step.
        num_train_epochs: Passes over the data.
        max_steps: Number of steps, in place of `num_train_epochs`.
        lam: λ of the pull for the *summed* loss (theory 0), whatever the batch size.
        pull: Mode of `jaxlin.optim.proximal`.
        lam_blocks: Factors of λ by block: regular expression, searched for in the paths of theta's leaves, to factor;
            the first that matches counts, 1 where none does.
        learning_rate_blocks: Likewise factors of the learning rate; `{"lora_B": 16}` is LoRA+.
        seed: Of the data order.
        group_by_length: Put examples of like length into a batch, so that little is padding; the batches come in
            random order, a partial one last. A batch of all examples is computed in groups of like length.
        eval_steps: Evaluate every so many steps; `None`: at the end only.
        precision: Of matrix products on the device. `"highest"` is true float32, which the gap between two nearly
            equal models needs; `"default"` is the device's own (TF32 or bfloat16), faster there.
        compute_dtype: Of weights and activations within the model: `"float32"` for the parameters' own, or `"bfloat16"`
            (see `jaxlin.training.precision`); parameters, optimizer, pull, loss, evaluation keep the parameters' own.
    """

    loss: str = "squared"
    optimizer: str | optax.GradientTransformation = "adam"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = 0.0
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int | None = None
    lam: float = 0.0
    pull: str = "coupled"
    lam_blocks: Mapping[str, float] | None = None
    learning_rate_blocks: Mapping[str, float] | None = None
    seed: int = 0
    group_by_length: bool = False
    eval_steps: int | None = None
    precision: str = "highest"
    compute_dtype: str = "float32"

    def check(self) -> None:
        """Checks the values.

        Raises:
            InputError: Naming the first that cannot be.
        """
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            hint = ": adam with pull='decoupled' is AdamW towards theta0" if self.optimizer == "adamw" else ""
            raise InputError(f"optimizer {self.optimizer!r} is unknown; expected one of {', '.join(OPTIMIZERS)}{hint}")
        if not isinstance(self.optimizer, str | optax.GradientTransformation):
            raise InputError(
                f"optimizer={self.optimizer!r}; expected a name or an optax optimizer, such as optax.sgd(0.1)"
            )
        choices = {"precision": PRECISIONS, "loss": LOSSES, "lr_scheduler_type": SCHEDULES, "pull": MODES}
        choices["compute_dtype"] = COMPUTE_DTYPES
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(allowed)}")
        positive = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        positive["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        positive["num_train_epochs"] = self.num_train_epochs
        positive["max_steps"] = 1 if self.max_steps is None else self.max_steps
        positive["eval_steps"] = 1 if self.eval_steps is None else self.eval_steps
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value}; expected above 0")
        integers = {"batch_size": self.batch_size, "max_steps": self.max_steps, "eval_steps": self.eval_steps}
        integers["gradient_accumulation_steps"] = self.gradient_accumulation_steps
        for name, count in {**integers, "seed": self.seed}.items():
            if count is not None and (not isinstance(count, int | np.integer) or count < 0):
                raise InputError(f"{name}={count}; expected a whole number, not negative")
        if self.gradient_accumulation_steps > self.batch_size:
            raise InputError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} cuts a batch of {self.batch_size} "
                "into more parts than it has examples; expected at most batch_size, which is of the whole step"
            )
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"warmup_ratio={self.warmup_ratio}; expected at least 0 and below 1")
        if not 0 <= self.lam < math.inf:
            raise InputError(f"lam={self.lam}; expected at least 0")

    def steps_per_epoch(self, num_examples: int) -> int:
        """Steps in one pass over the data, a last partial batch counted."""
        return -(-num_examples // self.batch_size)

    def total_steps(self, num_examples: int) -> int:
        """Number of steps of the run."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.num_train_epochs * self.steps_per_epoch(num_examples)))
