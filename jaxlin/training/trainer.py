"""One trainer for every Tunable: full, linearized, cached."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError, Interrupted, TrainingDivergedError
from jaxlin.hashing import fingerprint
from jaxlin.interrupt import held_back
from jaxlin.mesh import fetch, place
from jaxlin.ntk.jacobian import num_outputs
from jaxlin.sharding import Rules, mesh_of, process_share, shard, spread
from jaxlin.training.checkpoint import Checkpoints, RunCheckpoints, run_record
from jaxlin.training.config import TrainConfig
from jaxlin.training.failure import explained
from jaxlin.training.groups import spread_groups
from jaxlin.training.input import step_input
from jaxlin.training.losses import check_labels, evaluate
from jaxlin.training.precision import in_dtype
from jaxlin.training.state import Row, TrainState, copied
from jaxlin.training.step import layout_of, step_of, strengths
from jaxlin.tunable import Batch, Tunable, block_factors, leaf_paths


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


@jax.jit
def _outputs(apply: Any, theta: PyTree, batch: Batch) -> Array:
    return apply(theta, batch)


def predict(tun: Tunable, theta: PyTree, data: Dataset | Batch, chunk: int = 32) -> Float[np.ndarray, "N C"]:
    """Returns `tun.apply(theta, ·)` of every example, float64 `[N, C]` on the host.

    Where theta lies on a mesh (`shard`, or the result of training on one), examples are split over its axis `data`.

    Args:
        tun: The model.
        theta: Its parameters.
        data: The examples.
        chunk: How many are computed at a time, on all devices together.
    """
    data = as_dataset(data)
    tun.check_batch(data.columns)
    mesh = mesh_of((theta, tun.apply))
    apply = tun.apply
    if mesh is not None:
        apply, theta = place((apply, theta), mesh)
    return data.map(lambda batch: fetch(_outputs(apply, theta, spread(batch, mesh))), chunk)


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


def check_run(tun: Tunable, data: Dataset, held_out: Dataset | None, config: TrainConfig) -> None:
    """Checks that model, data and configuration of a run fit each other.

    Raises:
        InputError: If they do not; says what.
    """
    for part in (data, held_out):
        if part is not None:
            check_data(tun, part, config.loss)
    check_blocks(tun, config)


def _nothing(*_: Any) -> None:
    return None


def _open(
    checkpoints: Checkpoints,
    tun: Tunable,
    data: Dataset,
    held_out: Dataset | None,
    config: TrainConfig,
    first: int,
    keep: Collection[int],
    resume: bool,
) -> RunCheckpoints:
    checkpoints.check(config, held_out is not None)
    inputs = checkpoints.inputs
    if inputs is None:
        evaluated = {} if held_out is None else {"eval_sha256": held_out.sha256()}
        inputs = {**fingerprint(tun, tun.theta0), "train_sha256": data.sha256(), **evaluated}
    run = run_record(config, first_step=first, keep=sorted(keep), **inputs)
    return RunCheckpoints(checkpoints, run, keep, config.total_steps(len(data)), resume)


def train(
    tun: Tunable,
    train: Dataset | Mapping[str, Any],
    eval: Dataset | Mapping[str, Any] | None = None,
    config: TrainConfig | None = None,
    *,
    start: TrainState | None = None,
    keep: Collection[int] = (),
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    log: Callable[[Row], None] | None = None,
    replay: Callable[[Row], None] | None = None,
    mesh: Mesh | None = None,
    rules: Rules = (),
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
        checkpoints: Where and when the state is saved, also when interrupted; `None`: never.
        resume: Go on from the last checkpoint (from `start` where there is none yet): the result is that of the run
            without interruption, to the bit where equal inputs give equal bits. A finished run is not run again.
        log: Called with every row of the history as it is made.
        replay: Called with every row that a checkpoint brought.
        mesh: Devices to train on, of one process or of several that all make this call; the examples of a batch are
            split over its axis `data`. Default: the one that `tun` lies on (`shard`), or one device.
        rules: How parameters and the optimizer's state are split over the mesh; see `shard`.

    Returns:
        Parameters and history, which is the same on every mesh to rounding.

    Raises:
        InputError: If configuration, labels, inputs, mesh or rules do not fit, or are not those of the checkpoints;
            before anything is computed. Or if the disk is full; the last checkpoint is whole then.
        DeviceMemoryError: If a step does not fit a device's memory; says what to lower.
        ProcessLostError: If another process of the mesh has ended.
        TrainingDivergedError: If the loss becomes NaN or infinite; says at which step, and which checkpoint is the
            last. Rows before it have been logged.
        Interrupted: With checkpoints, on Ctrl-C, or on SIGTERM where it has a handler: after the step that was being
            taken is saved. It is a `KeyboardInterrupt`. (Where several processes train together, a signal ends them at
            once, and the last checkpoint counts.)
    """
    config = config or TrainConfig()
    config.check()
    data = as_dataset(train)
    held_out = None if eval is None else as_dataset(eval)
    check_run(tun, data, held_out, config)
    n = len(data)
    total = config.total_steps(n)
    tx, step = step_of(config, n)
    given = tun
    if mesh is None:
        mesh = mesh_of((tun.apply, tun.theta0))
    if mesh is not None:
        tun = shard(tun, mesh, rules)
    elif rules:
        raise InputError("rules are given and no mesh to split parameters over; give mesh=make_mesh(...)")
    if start is None:
        start = TrainState(tun.theta0, tx.init(tun.theta0), 0)
    beyond = [k for k in (start.step, *keep) if not 0 <= k <= total]
    if beyond:
        raise InputError(f"step {beyond[0]} to start from or keep is none of this run, which has {total}")
    theta, state = copied(start.theta), copied(start.optimizer)  # since the step takes its buffers over
    dtype = jnp.result_type(*jax.tree.leaves(theta))
    lam, rate = strengths(config, n)
    state = state._replace(lam=jnp.asarray(lam, dtype), rate=jnp.asarray(rate, dtype))
    layout = None
    if mesh is not None:
        like = place((tun.theta0, tx.init(tun.theta0)), mesh)  # a start may come from another mesh, or from none
        theta, state = jax.tree.map(lambda leaf, to: place(leaf, mesh, to.sharding.spec), (theta, state), like)
        layout = layout_of(theta, state)
    stepped = tun.apply if config.compute_dtype == "float32" else in_dtype(tun, config.compute_dtype).apply
    history: list[Row] = []
    states = {0: TrainState(copied(theta), copied(state), 0)} if 0 in keep else {}
    with contextlib.ExitStack() as stack:
        saver: RunCheckpoints | None = None
        signalled: Callable[[], int | None] = _nothing
        if checkpoints is not None:
            saver = _open(checkpoints, given, data, held_out, config, start.step, keep, resume)
            if jax.process_count() == 1:  # several would be stopped at different steps, and save together
                signalled = stack.enter_context(held_back())
            stack.callback(saver.close)
        share, shares = process_share(mesh)
        source = stack.enter_context(contextlib.closing(step_input(data, config, start.step, share, shares)))
        if saver is not None:
            saved = saver.restore(TrainState(theta, state, start.step))
            if saved is not None:
                theta, state = saved.state.theta, saved.state.optimizer
                history, states = saved.history, saved.states
                source.set_state(saved.input)
                for done in history:
                    (replay or _nothing)(done)
            elif states:
                saver.save(states[0], history, source.get_state())
        for i, (indices, batches) in enumerate(source, start=start.step + len(history) + 1):
            batch = spread_groups(batches, mesh, config.gradient_accumulation_steps, shares)
            with jax.default_matmul_precision(config.precision), explained(i, config, tun, batch, mesh):
                theta, state, metrics = step(stepped, theta, state, batch, layout)
                row: Row = {"step": i, "epoch": i / config.steps_per_epoch(n)}
                row |= {k: float(v) for k, v in metrics.items()}
            if not (math.isfinite(row["loss"]) and math.isfinite(row["distance"])):
                raise TrainingDivergedError(
                    f"the loss is {row['loss']} and ‖θ−θ₀‖ {row['distance']} at step {i} of {total} (examples "
                    f"{indices[:64].tolist()}{'…' if len(indices) > 64 else ''}); lower the learning rate "
                    f"({config.learning_rate:g}){'' if saver is None else f'; {saver.last()}'}"
                )
            if held_out is not None and (i == total or (config.eval_steps and i % config.eval_steps == 0)):
                scores = evaluate(predict(tun, theta, held_out), held_out["labels"], config.loss)
                row.update({f"eval_{name}": value for name, value in scores.items()})
            history.append(row)
            if i in keep:
                states[i] = TrainState(copied(theta), copied(state), i)
            if log is not None:
                log(row)
            if saver is not None:
                signum = signalled()
                if signum is not None or saver.due(i):
                    saver.save(TrainState(theta, state, i), history, source.get_state())
                if signum is not None:
                    raise Interrupted(f"interrupted after step {i} of {total}, which is saved in {saver.path}", signum)
    return TrainResult(theta, history, states)
