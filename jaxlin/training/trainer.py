"""One trainer for every Tunable: full, linearized, cached."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.ntk.jacobian import num_outputs
from jaxlin.training.losses import LOSSES, check_labels, evaluate, to_mean
from jaxlin.training.optim import MODES, ProximalState, proximal
from jaxlin.tunable import Batch, Tunable, block_factors, leaf_paths

Row = dict[str, Any]
"""One line of a history: `step`, `loss` and so on."""

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "rmsprop": optax.rmsprop,
    "lion": functools.partial(optax.lion, weight_decay=0.0),
}
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("highest", "high", "default")


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
        num_train_epochs: Passes over the data.
        max_steps: Number of steps, in place of `num_train_epochs`.
        lam: λ of the pull for the *summed* loss (theory 0), whatever the batch size.
        pull: Mode of `jaxlin.optim.proximal`.
        lam_blocks: Factors of λ by block: regular expression, searched for in the paths of theta's leaves, to factor;
            the first that matches counts, 1 where none does.
        learning_rate_blocks: Likewise factors of the learning rate; `{"lora_B": 16}` is LoRA+.
        seed: Of the data order.
        group_by_length: Put examples of like length into a batch, so that little is padding; the batches come in
            random order, a partial one last. Full-batch descent takes no notice of it.
        eval_steps: Evaluate every so many steps; `None`: at the end only.
        precision: Of matrix products on the device. `"highest"` is true float32, which the gap between two nearly
            equal models needs; `"default"` is the device's own (TF32 or bfloat16), faster there.
    """

    loss: str = "squared"
    optimizer: str | optax.GradientTransformation = "adam"
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = 0.0
    batch_size: int = 32
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
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(allowed)}")
        positive = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        positive["num_train_epochs"] = self.num_train_epochs
        positive["max_steps"] = 1 if self.max_steps is None else self.max_steps
        positive["eval_steps"] = 1 if self.eval_steps is None else self.eval_steps
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name}={value}; expected above 0")
        integers = {"batch_size": self.batch_size, "max_steps": self.max_steps, "eval_steps": self.eval_steps}
        for name, count in {**integers, "seed": self.seed}.items():
            if count is not None and (not isinstance(count, int | np.integer) or count < 0):
                raise InputError(f"{name}={count}; expected a whole number, not negative")
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


@dataclasses.dataclass(frozen=True, eq=False)
class TrainState:
    """Where a training run stands, to go on from.

    Attributes:
        theta: The parameters.
        optimizer: State of `jaxlin.optim.proximal`; holds the point that is pulled to.
        step: Steps taken.
    """

    theta: PyTree
    optimizer: ProximalState
    step: int


@dataclasses.dataclass(frozen=True, eq=False)
class TrainResult:
    """What training gives.

    Attributes:
        theta: The parameters at the end.
        states: By step, those that were asked for by `keep`.
        history: One row a step: `step` (from 1), `epoch`, `loss` (mean data loss of the batch before the
            step, without the pull), `gradient_norm` of that loss, `distance` ‖θ−θ₀‖ after the step; where
            evaluated `eval_loss` and the metrics (`eval_accuracy`, …).
    """

    theta: PyTree
    history: list[Row]
    states: Mapping[int, TrainState] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Learning rate as a function of the step; compared by value, so that equal runs share a compilation."""

    peak: float
    kind: str
    warmup: int
    total: int

    def __call__(self, count: Array | int) -> Array:
        count = jnp.asarray(count, jnp.float32)
        left = jnp.clip((count - self.warmup) / max(self.total - self.warmup, 1), 0, 1)
        decay = {"constant": jnp.ones(()), "linear": 1 - left, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * left))}[self.kind]
        return self.peak * decay * jnp.clip((count + 1) / max(self.warmup, 1), 0, 1)


Step = Callable[[Any, PyTree, Any, Batch], tuple[PyTree, Any, dict[str, Array]]]


Factors = tuple[tuple[str, float], ...]


@functools.lru_cache(maxsize=32)
def _compiled_step(
    loss: str,
    optimizer: str | optax.GradientTransformation,
    schedule: _Schedule,
    pull: str,
    lam_blocks: Factors,
    learning_rate_blocks: Factors,
) -> tuple[optax.GradientTransformation, Step]:
    """Returns the transformation (λ and the rate in its state) and the compiled step, one for all of a sweep."""
    inner = OPTIMIZERS[optimizer](schedule) if isinstance(optimizer, str) else optimizer
    rates = dict(learning_rate_blocks)
    tx = proximal(inner, 0.0, pull, schedule, lam_blocks=dict(lam_blocks), learning_rate_blocks=rates)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(apply: Any, theta: PyTree, state: Any, batch: Batch) -> tuple[PyTree, Any, dict[str, Array]]:
        def objective(p: PyTree) -> Array:
            weight = batch["weight"]
            return jnp.sum(LOSSES[loss](apply(p, batch), batch["labels"]) * weight) / jnp.sum(weight)

        value, grads = jax.value_and_grad(objective)(theta)
        updates, state = tx.update(grads, state, theta)
        theta = jax.tree.map(lambda p, u: p + u.astype(p.dtype), theta, updates)
        delta = jax.tree.map(jnp.subtract, theta, state.theta0)
        return (
            theta,
            state,
            {
                "loss": value,
                "gradient_norm": optax.tree.norm(grads),
                "distance": optax.tree.norm(delta),
            },
        )

    return tx, step


def copied(tree: PyTree) -> PyTree:
    """Returns `tree` with buffers of its own."""
    return jax.tree.map(jnp.array, tree)


@jax.jit
def _outputs(apply: Any, theta: PyTree, batch: Batch) -> Array:
    return apply(theta, batch)


def predict(tun: Tunable, theta: PyTree, data: Dataset | Batch, chunk: int = 32) -> Float[np.ndarray, "N C"]:
    """Returns `tun.apply(theta, ·)` of every example, float64 `[N, C]` on the host."""
    data = as_dataset(data)
    tun.check_batch(data.columns)
    return data.map(lambda batch: _outputs(tun.apply, theta, batch), chunk)


def epoch_order(data: Dataset, config: TrainConfig, epoch: int) -> np.ndarray:
    """Returns the order of the examples in one epoch; depends on their number and lengths, batch size and seed only."""
    n, size = len(data), config.batch_size
    if size >= n:
        return np.arange(n)
    rng = np.random.default_rng((config.seed, epoch))
    order = rng.permutation(n)
    if not config.group_by_length or data.lengths is None:
        return order
    order = order[np.argsort(data.lengths[order], kind="stable")]
    # A last partial batch is a random stretch of lengths: were it always the longest, they would weigh more.
    start = rng.integers(n // size + 1) * size
    rest, partial = np.delete(order, np.s_[start : start + n % size]), order[start : start + n % size]
    whole = rest.reshape(-1, size)
    return np.concatenate([whole[rng.permutation(len(whole))].reshape(-1), partial])


def batches(data: Dataset, config: TrainConfig) -> Iterator[np.ndarray]:
    """Yields the examples of each step."""
    n, size = len(data), config.batch_size
    for step in range(config.total_steps(n)):
        epoch, within = divmod(step, config.steps_per_epoch(n))
        if within == 0:
            order = epoch_order(data, config, epoch)
        yield order[within * size : (within + 1) * size]


def check_blocks(tun: Tunable, config: TrainConfig) -> None:
    """Checks that the block patterns of `config` are found in theta.

    Raises:
        InputError: If they are not.
    """
    for what in ("lam_blocks", "learning_rate_blocks"):
        block_factors(leaf_paths(tun.theta0), getattr(config, what), what)


def check_data(tun: Tunable, data: Dataset, loss: str) -> None:
    """Checks that inputs and labels fit the model and the loss.

    Raises:
        InputError: If they do not; says what.
    """
    if "labels" not in data.columns:
        raise InputError(f"the data has no column 'labels'; it has {sorted(data.columns)}")
    tun.check_batch(data.columns)
    check_labels(data["labels"], num_outputs(tun, data), loss)


def train(
    tun: Tunable,
    train: Dataset | Mapping[str, Any],
    eval: Dataset | Mapping[str, Any] | None = None,
    config: TrainConfig | None = None,
    *,
    start: TrainState | None = None,
    keep: Collection[int] = (),
    log: Callable[[Row], None] | None = None,
) -> TrainResult:
    """Minimises the mean loss with the pull `(λ/2n)‖θ−θ₀‖²` from `tun.theta0` (theory 0 and 1).

    The same code trains a model and its linearization; equal data, batch size and seed give both the same
    order. Equal inputs give equal bits on the same CPU machine, versions and thread count.

    Args:
        tun: What to train.
        train: Training examples with `labels` `[N]`: integer classes, or scores for C = 1.
        eval: Examples to evaluate on, or `None`.
        config: How; `None` for the defaults.
        start: Goes on from there, with the same data order, learning rates and point that is pulled to, up to the
            number of steps that `config` gives; `None` starts anew.
        keep: Steps after which the state is kept, in `result.states` (0: before the first).
        log: Called with every row of the history as it is made.

    Returns:
        Parameters and history.

    Raises:
        InputError: If configuration, labels or inputs do not fit; before anything is computed.
        TrainingDivergedError: If the loss becomes NaN or infinite; says at which step. Rows before it
            have been logged.
    """
    config = config or TrainConfig()
    config.check()
    data = as_dataset(train)
    held_out = None if eval is None else as_dataset(eval)
    for part in (data, held_out):
        if part is not None:
            check_data(tun, part, config.loss)
    check_blocks(tun, config)
    n = len(data)
    total = config.total_steps(n)
    named = isinstance(config.optimizer, str)  # else the rate of its steps is its own
    peak = 1.0 if named else config.learning_rate
    schedule = _Schedule(peak, config.lr_scheduler_type, int(config.warmup_ratio * total), total)
    by_block = [tuple((patterns or {}).items()) for patterns in (config.lam_blocks, config.learning_rate_blocks)]
    tx, step = _compiled_step(config.loss, config.optimizer, schedule, config.pull, *by_block)
    if start is None:
        start = TrainState(tun.theta0, tx.init(tun.theta0), 0)
    beyond = [k for k in (start.step, *keep) if not 0 <= k <= total]
    if beyond:
        raise InputError(f"step {beyond[0]} to start from or keep is none of this run, which has {total}")
    theta, state = copied(start.theta), copied(start.optimizer)  # since the step takes its buffers over
    lam = config.lam if config.pull == "spd" else to_mean(config.lam, n, "lam")
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    rate = config.learning_rate if named else 1.0
    state = state._replace(lam=jnp.asarray(lam, dtype), rate=jnp.asarray(rate, dtype))
    history: list[Row] = []
    states = {0: TrainState(copied(theta), copied(state), 0)} if 0 in keep else {}
    for i, indices in enumerate(batches(data, config), start=1):
        if i <= start.step:
            continue
        with jax.default_matmul_precision(config.precision):
            theta, state, metrics = step(tun.apply, theta, state, data.batch(indices, min(config.batch_size, n)))
        row: Row = {
            "step": i,
            "epoch": i / config.steps_per_epoch(n),
            **{k: float(v) for k, v in metrics.items()},
        }
        if not (math.isfinite(row["loss"]) and math.isfinite(row["distance"])):
            raise TrainingDivergedError(
                f"the loss is {row['loss']} and ‖θ−θ₀‖ {row['distance']} at step {i} of {total} (examples "
                f"{indices[:8].tolist()}{'…' if len(indices) > 8 else ''}); lower the learning rate "
                f"({config.learning_rate:g})"
            )
        if held_out is not None and (i == total or (config.eval_steps and i % config.eval_steps == 0)):
            scores = evaluate(predict(tun, theta, held_out), held_out["labels"], config.loss)
            row.update({f"eval_{name}": value for name, value in scores.items()})
        history.append(row)
        if i in keep:
            states[i] = TrainState(copied(theta), copied(state), i)
        if log is not None:
            log(row)
    return TrainResult(theta, history, states)
