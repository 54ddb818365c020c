"""Full against linearized fine-tuning over a sweep of λ: how close are the two?"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.hashing import fingerprint
from jaxlin.linearize import linearize
from jaxlin.ntk.jacobian import MEMORY_BUDGET, jacobian_bytes
from jaxlin.ntk.work import PhaseProgress
from jaxlin.sharding import Rules, require_data_axis, shard, specs_of
from jaxlin.theory.drift import relative
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.cached import cached_linearized
from jaxlin.training.checkpoint import Checkpoints, run_record
from jaxlin.training.config import TrainConfig
from jaxlin.training.gaps import distances
from jaxlin.training.losses import targets
from jaxlin.training.modes import Choice, choose_cached, choose_trunk
from jaxlin.training.report import KERNEL_EXAMPLES, LinearizationReport, Tracker
from jaxlin.training.start import Start, factor_blocks
from jaxlin.training.sweep_record import SweepCheckpoints
from jaxlin.training.trainer import Row, TrainResult, TrainState, check_blocks, check_data, predict, train
from jaxlin.trunk import cache_found, entered_alike
from jaxlin.tunable import Tunable, leaf_paths

AUTO_LAMS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Default grid of λ, in units of μ₁."""

FULL, LINEARIZED, REGRESSION, MAJORITY = "full", "linearized", "kernel_regression", "majority_class"
LATE = "linearized_at_step_"
"""Prefix of the arms that are linearized later; the step follows."""
HOW = {"cached": "Jacobians computed once", "streaming": "jvp at every step"}
"""The modes of the linearized arm, in words."""
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` gives.

    Attributes:
        table: Tidy: one row a λ and arm, and one for each baseline. What is undefined is `None`. See `compare`.
        summary: Once-a-run values: sizes, spectrum of K₀ at θ₀, how the linearized arm was computed.
        results: `(arm, λ)` to the trained parameters and history.
        spectrum: Of K₀ on the training examples.
        linearization: λ to the report along the runs of `full` and `linearized`, where it was asked for; its rows begin
            with `lam` and `lam_over_mu1`.
    """

    table: list[Row]
    summary: dict[str, Any]
    results: dict[tuple[str, float], TrainResult]
    spectrum: Spectrum
    linearization: dict[float, LinearizationReport]


@dataclasses.dataclass(frozen=True, eq=False)
class _Arm:
    """A model to train, with the data in the form it takes."""

    tun: Tunable
    data: Mapping[str, Dataset]

    def outputs(self, result: TrainResult) -> dict[str, np.ndarray]:
        return {split: predict(self.tun, result.theta, part) for split, part in self.data.items()}


def _constant(data: Mapping[str, Dataset], num_outputs: int, loss: str) -> dict[str, dict[str, np.ndarray]]:
    """The best constant outputs, by name: class shares (their logarithms under cross-entropy), or the mean score."""
    labels = data["train"]["labels"]
    scores = labels.dtype.kind == "f"
    if scores and len(np.unique(labels)) == 1:  # it would be exact and say nothing, as of a loss, which is to be 0
        return {}
    mean = np.asarray(targets(labels, num_outputs), np.float64).mean(axis=0)
    if loss == "cross_entropy":
        mean = np.log(np.maximum(mean, np.finfo(float).tiny))
    outputs = {split: np.tile(mean, (len(part), 1)) for split, part in data.items()}
    return {"mean_score" if scores else MAJORITY: outputs}


Lams = Sequence[float] | np.ndarray | str


def check_lams(lams: Lams, lam_rel: Sequence[float] | np.ndarray | None, pull: str) -> None:
    """Checks a λ grid.

    Raises:
        InputError: If it is empty, holds a negative, infinite or repeated value, is a word but `"auto"`, or is
            given in units of μ₁ where λ has none.
    """
    if lam_rel is not None and pull == "spd":
        raise InputError("pull='spd' has a λ without unit, a share of the way back; give lams, not lam_rel")
    if lam_rel is None and isinstance(lams, str):
        if lams != "auto":
            raise InputError(f'lams={lams!r}; expected numbers or "auto"')
        return
    grid = np.atleast_1d(np.asarray(lams if lam_rel is None else lam_rel, float)).tolist()
    if not grid or not all(0 <= lam < float("inf") for lam in grid) or len(set(grid)) < len(grid):
        raise InputError(f"lams={grid}; expected at least one λ, each at least 0, finite, and given once")


def _grid(
    lams: Lams, lam_rel: Sequence[float] | np.ndarray | None, mu1: float, pull: str
) -> tuple[list[float], list[float | None]]:
    """Returns every λ, and each in units of μ₁: the number that was asked for, where it was given so."""
    if lam_rel is None and not isinstance(lams, str):
        grid = np.atleast_1d(np.asarray(lams, float)).tolist()
        # SPD's strength is a share of the way back, not a curvature.
        return grid, [None if pull == "spd" else relative(lam, mu1) for lam in grid]
    if not mu1 > 0:
        raise InputError("the kernel at θ₀ vanishes, so that λ in units of μ₁ means nothing; give lams as numbers")
    shares = np.atleast_1d(np.asarray(AUTO_LAMS if lam_rel is None else lam_rel, float)).tolist()
    return (shares, [None] * len(shares)) if pull == "spd" else ([share * mu1 for share in shares], shares)


def check_comparison(
    tun: Tunable,
    data: Mapping[str, Dataset],
    config: TrainConfig,
    *,
    lams: Lams = "auto",
    lam_rel: Sequence[float] | np.ndarray | None = None,
    linearize_at: Sequence[int] = (),
    track_linearization: Sequence[int] = (),
    linear_mode: str = "auto",
    trunk_cache: str = "auto",
    kernel_examples: int = 1024,
    memory_budget: int = MEMORY_BUDGET,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> None:
    """Checks all that `compare` is given, without computing anything; arguments as there.

    Raises:
        InputError: Naming the first that cannot be used.
    """
    config.check()
    check_lams(lams, lam_rel, config.pull)
    if linear_mode not in ("auto", "cached", "streaming"):
        raise InputError(f'linear_mode={linear_mode!r} is unknown; expected "auto", "cached" or "streaming"')
    if trunk_cache not in ("auto", "on", "off"):
        raise InputError(f'trunk_cache={trunk_cache!r} is unknown; expected "auto", "on" or "off"')
    if kernel_examples < 1:
        raise InputError(f"kernel_examples={kernel_examples}; expected at least 1")
    steps = config.total_steps(len(data["train"]))
    for name, listed in {"linearize_at": linearize_at, "track_linearization": track_linearization}.items():
        for k in listed:
            if k != int(k) or not 0 <= k <= steps:
                raise InputError(f"{name}={k} is no step of this run; expected 0 to {steps}")
    if mesh is not None:
        require_data_axis(mesh)
        specs_of(tun, mesh.shape, rules)
        if mesh.is_multi_process and len(track_linearization):
            raise InputError("track_linearization works within one process; leave it out where there are several")
    check_blocks(tun, config)
    for part in data.values():
        check_data(tun, part, config.loss)
    size = sum(jacobian_bytes(tun, part) for part in data.values())
    if linear_mode == "cached" and size > memory_budget:
        raise InputError(
            f"linear_mode='cached' needs {size / 2**30:.1f} GiB for Jacobians, more than the budget of "
            f"{memory_budget / 2**30:.1f} GiB; use 'streaming' or fewer examples"
        )


def _on_trunk(
    tun: Tunable,
    data: dict[str, Dataset],
    extra_arms: Mapping[str, Tunable],
    trunk_cache: str,
    memory_budget: int,
    progress: PhaseProgress | None,
) -> tuple[Tunable, dict[str, Dataset], Mapping[str, Tunable], str]:
    """Computes what lies below the tuned parameters once; returns arms and data that read it, and what was done."""
    if trunk_cache == "off":
        return tun, data, extra_arms, "the whole network at every step, as asked for"
    trunk, choice = choose_trunk(tun, list(data.values()), memory_budget)
    if trunk is None or (trunk_cache == "auto" and choice.mode != "trunk"):
        return tun, data, extra_arms, choice.reason
    report = None if progress is None else functools.partial(progress, "trunk")
    tun, parts = cache_found(tun, trunk, list(data.values()), memory_budget, progress=report)
    data = dict(zip(data, parts, strict=True))
    arms = {name: entered_alike(arm, data["train"], tun) for name, arm in extra_arms.items()}
    return tun, data, arms, choice.reason if choice.mode == "trunk" else f"{choice.reason}; on disk, as asked for"


def _without_absent(tun: Tunable, config: TrainConfig) -> TrainConfig:
    """Drops block patterns that an arm does not have (LoRA's A, frozen)."""
    paths = leaf_paths(tun.theta0)

    def present(patterns: Mapping[str, float] | None) -> dict[str, float]:
        return {k: v for k, v in (patterns or {}).items() if any(re.search(k, path) for path in paths)}

    pulls, rates = present(config.lam_blocks), present(config.learning_rate_blocks)
    return dataclasses.replace(config, lam_blocks=pulls, learning_rate_blocks=rates)


def _summary(
    start: Start, spec: Spectrum, tun: Tunable, config: TrainConfig, mu1: float, size: int, how: Mapping[str, str]
) -> dict[str, Any]:
    n, c = start.f0["train"].shape
    return {
        "train_examples": n,
        "eval_examples": len(start.data["eval"]),
        "outputs": c,
        "trainable_parameters": tun.num_params,
        "steps": config.total_steps(n),
        "linearized_arm": HOW["cached" if start.jacobians is not None else "streaming"],
        **how,
        "jacobian_bytes": size,
        "kernel_examples": len(start.chosen),
        "mu_1": mu1,
        **spec.summary(),
        "kernel": dataclasses.asdict(start.kernel.info),
    }


def compare(
    tun: Tunable,
    train_data: Dataset | Mapping[str, Any],
    eval_data: Dataset | Mapping[str, Any],
    config: TrainConfig | None = None,
    *,
    lams: Lams = "auto",
    lam_rel: Sequence[float] | np.ndarray | None = None,
    linearize_at: Sequence[int] = (),
    track_linearization: Sequence[int] = (),
    extra_arms: Mapping[str, Tunable] | None = None,
    baselines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    linear_mode: str = "auto",
    trunk_cache: str = "auto",
    kernel_examples: int = 1024,
    memory_budget: int = MEMORY_BUDGET,
    mesh: Mesh | None = None,
    rules: Rules = (),
    checkpoints: Checkpoints | None = None,
    resume: bool = False,
    log: Callable[[Row], None] | None = None,
    replay: Callable[[Row], None] | None = None,
    progress: PhaseProgress | None = None,
) -> Comparison:
    """Fine-tunes a model and its linearization for each λ, on the same data in the same order, and compares them.

    Columns of the table, for each λ (`lam`, and `lam_over_mu1` in units of K₀'s largest eigenvalue) and `arm`:

    - `distance`, `distance_A`, `_B`, `_head`, `_other`: ‖θ−θ₀‖ in all and of LoRA's A, B, the head, the rest;
    - `parameter_gap` and the same split: ‖θ−θ̄‖ between this arm and the linearized one;
    - for each split (`_train`, `_eval`): `output_gap` ‖f−f̄‖ (Frobenius over all examples and outputs),
      `output_gap_relative` to ‖f−f₀‖ (0 where neither has moved), `kl` the mean over examples of
      KL(softmax f ‖ softmax f̄), `agreement` of predicted classes with the linearized arm, `agreement_f0` with
      the start, `loss` (mean over examples), and each of `jaxlin.training.metrics.METRICS`.

    An arm `linearized_at_step_<k>` follows the full one for k steps, is linearized there, and goes on linearly with the
    optimizer's state, the data order and the pull (to θ₀) as they are; its gaps are to the arm `full`. Column
    `linearize_at` is its k, and 0 for `linearized`.

    Baselines are rows of the same table: `majority_class` (of scores `mean_score`, unless all are one), `start` (f₀),
    those given, and for each λ `kernel_regression`, the minimiser of the linearized model's squared loss with the pull
    (theory 2), which gradient descent on it converges to. It has none under `pull="selective"` and `"spd"`, which
    minimise no such objective. Under `loss="cross_entropy"` it and a linear probe are still fitted to squared loss:
    read their metrics.

    Args:
        tun: What is fine-tuned.
        train_data: Training examples with `labels`.
        eval_data: Examples to evaluate on, with `labels`.
        config: Training; its `lam` is replaced by each λ.
        lams: λ for the summed loss, or `"auto"`: 0, 1e-3, 1e-2, 1e-1, 1 in units of μ₁ (`pull="spd"`: as they are).
        lam_rel: λ in units of μ₁, in place of `lams`. With factors by block (`config.lam_blocks`) these are of λ.
        linearize_at: Steps k of late linearization; 0 is the arm `linearized`, which is always there.
        track_linearization: Steps of the `linearization_report` of each λ, on the training examples.
        extra_arms: Other Tunables to train alike, by name, such as the same LoRA with A frozen.
        baselines: Outputs of other predictors, name to `{"train": [N, C], "eval": [M, C]}`.
        linear_mode: `"cached"`: the linearized arm trains on Jacobians computed once; `"streaming"`: by jvp at
            every step; `"auto"`: cached where they fit half the budget.
        trunk_cache: Whether activations below what is tuned are computed once, for all arms and Jacobians: `"on"`, in a
            temporary file where they exceed the budget; `"off"`; `"auto"`: where there are any and they fit.
        kernel_examples: At most so many training examples make K₀ and the kernel regression.
        memory_budget: Bytes for Jacobians.
        mesh: Devices that the arms are trained and evaluated on; see `train`. What is known at θ₀ (outputs, Jacobians,
            kernel) is computed on one device, and by every process for itself: the model must fit one.
        rules: How parameters are split over the mesh; see `shard`.
        checkpoints: Where (a folder for the whole sweep) and when every run is saved; `None`: never.
        resume: Go on with the sweep in that folder: runs that are finished are not run again, the one that was going on
            continues from its last checkpoint, as for `train`. Outputs, Jacobians and kernel at θ₀ are computed again.
        log: Called with every training row, extended by `arm`, `lam` and `lam_over_mu1`.
        replay: Likewise with every row that a checkpoint brought.
        progress: Called with a phase's name, units done and in all.

    Returns:
        Table, summary, trained parameters, spectrum and reports.

    Raises:
        InputError: If an argument is not one of those listed or the data does not fit, or they are not those of the
            sweep to go on with; before long work. Or if the disk is full.
        TrainingDivergedError: If an arm diverges; the message names arm and λ.
        Interrupted: As for `train`.
    """
    config = config or TrainConfig()
    data = {"train": as_dataset(train_data), "eval": as_dataset(eval_data)}
    options: dict[str, Any] = {"lams": lams, "lam_rel": lam_rel, "linear_mode": linear_mode, "trunk_cache": trunk_cache}
    options |= {"linearize_at": linearize_at, "track_linearization": track_linearization}
    options |= {"kernel_examples": kernel_examples, "memory_budget": memory_budget, "mesh": mesh, "rules": rules}
    check_comparison(tun, data, config, **options)
    with jax.default_matmul_precision(config.precision):
        return _compare(
            tun,
            data,
            config,
            extra_arms or {},
            baselines or {},
            checkpoints,
            resume,
            log,
            replay,
            progress,
            **options,
        )


def _compare(
    tun: Tunable,
    data: dict[str, Dataset],
    config: TrainConfig,
    extra_arms: Mapping[str, Tunable],
    baselines: Mapping[str, Mapping[str, np.ndarray]],
    checkpoints: Checkpoints | None,
    resume: bool,
    log: Callable[[Row], None] | None,
    replay: Callable[[Row], None] | None,
    progress: PhaseProgress | None,
    *,
    lams: Lams,
    lam_rel: Sequence[float] | np.ndarray | None,
    linearize_at: Sequence[int],
    track_linearization: Sequence[int],
    linear_mode: str,
    trunk_cache: str,
    kernel_examples: int,
    memory_budget: int,
    mesh: Mesh | None,
    rules: Rules,
) -> Comparison:
    size = sum(jacobian_bytes(tun, part) for part in data.values())
    linear_choice = choose_cached(size, memory_budget)
    if linear_mode != "auto":
        linear_choice = Choice(linear_mode, f"{HOW[linear_mode]}, as asked for")
    cached = linear_choice.mode == "cached"
    inputs: dict[str, dict[str, str]] = {}
    sweep = None
    if checkpoints is not None:
        checkpoints.check(config, True)
        hashes = {f"{split}_sha256": part.sha256() for split, part in data.items()}
        inputs = {
            name: {**fingerprint(other, other.theta0), **hashes} for name, other in {FULL: tun, **extra_arms}.items()
        }
        given: dict[str, Any] = {"lams": lams, "lam_rel": lam_rel, "linearize_at": linearize_at}
        given |= {"track_linearization": track_linearization, "kernel_examples": kernel_examples}
        given |= {"cached": cached, "trunk_cache": trunk_cache}
        sweep = SweepCheckpoints(checkpoints, run_record(config, **given, **inputs[FULL], arms=list(inputs)), resume)
    tun, data, extra_arms, below = _on_trunk(tun, data, extra_arms, trunk_cache, memory_budget, progress)
    start = Start.compute(tun, data, cached, kernel_examples, memory_budget, factor_blocks(tun, config), progress)
    spec = spectrum(start.kernel)
    n, c = start.f0["train"].shape
    mu1 = float(spec.eigenvalues[0]) * n / len(start.chosen)
    grid, shares = _grid(lams, lam_rel, mu1, config.pull)
    if sweep is not None:
        grid = sweep.grid(grid)
    labels_of: dict[float, Row] = {
        lam: {"lam": lam, "lam_over_mu1": share} for lam, share in zip(grid, shares, strict=True)
    }

    if mesh is not None:
        tun = shard(tun, mesh, rules)
        extra_arms = {name: shard(other, mesh, rules) for name, other in extra_arms.items()}
    if start.jacobians is not None:
        on_cache, rows = cached_linearized(tun, [data[s] for s in SPLITS], [start.jacobians[s] for s in SPLITS])
        linear = _Arm(on_cache, dict(zip(SPLITS, rows, strict=True)))
    else:
        linear = _Arm(linearize(tun), data)
    full = {name: _Arm(other, data) for name, other in {FULL: tun, **extra_arms}.items()}
    arms = {**full, LINEARIZED: linear}

    table: list[Row] = []
    for name, fixed in {**_constant(data, c, config.loss), "start": start.f0, **baselines}.items():
        table.append({"arm": name, **start.scores(fixed, config.loss)})
    results: dict[tuple[str, float], TrainResult] = {}
    total = config.total_steps(n)
    late = sorted({k for k in linearize_at if k})
    tracked, tracker = sorted({*track_linearization}), None
    kept = {FULL: {*late, *tracked}, LINEARIZED: tracked}
    reports: dict[float, LinearizationReport] = {}
    if tracked:
        on = data["train"], linear.tun, linear.data["train"]
        tracker = Tracker.of(tun, *on, min(kernel_examples, KERNEL_EXAMPLES), memory_budget=memory_budget)
    counted = [name for name in arms if not (cached and name == LINEARIZED)]  # the others take no time
    steps_in_all = len(grid) * (len(counted) * total + sum(total - k for k in late))
    steps_done = 0
    limits = {pulled: start.limit(config, pulled) for pulled in {lam > 0 for lam in grid}}

    def run(name: str, arm: _Arm, lam: float, begin: TrainState | None = None) -> TrainResult:
        nonlocal steps_done
        before = steps_done - (begin.step if begin is not None else 0)

        def log_row(row: Row, replayed: bool = False) -> None:
            nonlocal steps_done
            tell = replay if replayed else log
            if tell is not None:
                tell({"arm": name, **labels_of[lam], **row})
            if name in counted or begin is not None:
                steps_done = before + row["step"]
                if progress is not None and not replayed:  # its rate is of steps that are taken
                    progress("training", steps_done, steps_in_all)

        options = _without_absent(arm.tun, dataclasses.replace(config, lam=lam))
        held_out = None if config.eval_steps is None else arm.data["eval"]
        keep = kept.get(name, ())
        saving = None if sweep is None else sweep.run(grid.index(lam), name, inputs.get(name, inputs[FULL]))
        try:
            return train(
                arm.tun,
                arm.data["train"],
                held_out,
                options,
                start=begin,
                keep=keep,
                checkpoints=saving,
                resume=True,  # of the sweep's own folder
                log=log_row,
                replay=functools.partial(log_row, replayed=True),
                mesh=mesh,
            )
        except TrainingDivergedError as error:
            raise TrainingDivergedError(f"arm {name!r} at λ = {lam:g}: {error}") from error

    def tell(phase: str, done: int, _: int) -> None:
        if progress is not None:
            progress(phase, len(reports) * len(tracked) + done, len(grid) * len(tracked))

    for lam in grid:
        labels = labels_of[lam]
        outputs: dict[str, dict[str, np.ndarray]] = {}
        for name, arm in arms.items():
            results[name, lam] = run(name, arm, lam)
            outputs[name] = arm.outputs(results[name, lam])
        if tracker is not None:
            pair = results[FULL, lam], results[LINEARIZED, lam]
            reports[lam] = tracker.report(*pair, tracked, labels, tell)
            # What is not needed any more: with full fine-tuning the states of a sweep are many times the model.
            results[FULL, lam] = dataclasses.replace(pair[0], states={k: pair[0].states[k] for k in late})
            results[LINEARIZED, lam] = dataclasses.replace(pair[1], states={})
        late_arms, step_of = {}, {LINEARIZED: 0}
        for k, state in results[FULL, lam].states.items():
            late_arms[name := f"{LATE}{k}"] = _Arm(linearize(tun, at=state.theta), data)
            step_of[name] = k
            results[name, lam] = run(name, late_arms[name], lam, state)
            outputs[name] = late_arms[name].outputs(results[name, lam])
        for name, arm in {**arms, **late_arms}.items():
            theta = results[name, lam].theta
            row: Row = {"arm": name, **labels, "linearize_at": step_of.get(name)}
            row.update({f"distance{key}": value for key, value in distances(theta, arm.tun.theta0).items()})
            if name != LINEARIZED:
                ours, other = (FULL, name) if name in late_arms else (name, LINEARIZED)
                gap = distances(results[ours, lam].theta, results[other, lam].theta)
                row.update({f"parameter_gap{key}": value for key, value in gap.items()})
                row.update(start.gaps(outputs[ours], outputs[other]))
            table.append({**row, **start.scores(outputs[name], config.loss)})
        limit = limits[lam > 0]
        if limit is not None:
            table.append({"arm": REGRESSION, **labels, **start.scores(limit.outputs(lam), config.loss)})

    columns = list(dict.fromkeys(key for row in sorted(table, key=len, reverse=True) for key in row))
    return Comparison(
        [{key: row.get(key) for key in columns} for row in table],
        _summary(start, spec, tun, config, mu1, size, {"linear_mode": linear_choice.reason, "trunk_cache": below}),
        results,
        spec,
        reports,
    )
