"""Full against linearized fine-tuning over a sweep of λ: how close are the two?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PyTree
from scipy.special import log_softmax

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.linearize import linearize
from jaxlin.ntk.engine import kernel_from_jacobian
from jaxlin.ntk.jacobian import Jacobian, Progress, jacobian, jacobian_bytes, measure_epsilon, num_outputs
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.regression import kernel_regression
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.cached import cached_linearized
from jaxlin.training.losses import check_labels, predicted, targets
from jaxlin.training.trainer import Row, TrainConfig, TrainResult, evaluate, predict, train
from jaxlin.tunable import Tunable, leaf_paths, parameter_role

AUTO_LAMS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""Default grid of λ, in units of μ₁."""

FULL, LINEARIZED = "full", "linearized"
ROLES = ("A", "B", "head", "other")
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` gives.

    Attributes:
        table: Tidy: one row a λ and arm, and one for each baseline (`majority_class`, `start`,
            `kernel_regression` a λ, and those given). Undefined entries are `None`. See `compare`.
        summary: Once-a-run values: sizes, spectrum of K₀ at θ₀, how the linearized arm was computed.
        results: `(arm, λ)` to the trained parameters and history.
        spectrum: Of K₀ on the training examples.
    """

    table: list[Row]
    summary: dict[str, Any]
    results: dict[tuple[str, float], TrainResult]
    spectrum: Spectrum


def relative(value: float, scale: float) -> float:
    """Returns `value/scale`, and 0 where both vanish: two arms that have not moved are equal."""
    return value / scale if scale > 0 else (0.0 if value == 0 else float("inf"))


def distances(theta: PyTree, other: PyTree) -> dict[str, float]:
    """Returns ‖θ−θ′‖ in all (`""`) and by role (`"_A"`, `"_B"`, `"_head"`, `"_other"`), float64.

    A leaf that only one of the two has counts as unmoved: its role is compared over the leaves in common.
    """
    a, b = (dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True)) for tree in (theta, other))
    squares = dict.fromkeys(sorted({parameter_role(path) for path in {*a, *b}}, key=ROLES.index), 0.0)
    for path in a.keys() & b.keys():
        gap = np.asarray(a[path], np.float64) - np.asarray(b[path], np.float64)
        squares[parameter_role(path)] += float(np.sum(gap**2))
    return {"": sum(squares.values()) ** 0.5, **{f"_{role}": value**0.5 for role, value in squares.items()}}


def kl_divergence(p: Float[np.ndarray, "N C"], q: Float[np.ndarray, "N C"]) -> float | None:
    """Returns the mean over examples of KL(softmax(p) ‖ softmax(q)), in nats; `None` for C = 1."""
    if p.shape[1] < 2:
        return None
    log_p, log_q = log_softmax(p, axis=1), log_softmax(q, axis=1)
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))


def agreement(a: np.ndarray, b: np.ndarray, labels: np.ndarray) -> float | None:
    """Returns the share of examples with the same predicted class; `None` where labels are scores."""
    return None if labels.dtype.kind == "f" else float(np.mean(predicted(a) == predicted(b)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    """One data split: examples, outputs at θ₀, and the Jacobian there where it is held."""

    data: Dataset
    f0: np.ndarray
    jac: Jacobian | None

    @property
    def labels(self) -> np.ndarray:
        return self.data["labels"]


def _scores(outputs: dict[str, np.ndarray], splits: dict[str, _Split], loss: str) -> Row:
    """Loss, metric and agreement with f₀ of one set of outputs, by split."""
    row: Row = {}
    for name, split in splits.items():
        row.update({f"{key}_{name}": value for key, value in evaluate(outputs[name], split.labels, loss).items()})
        row[f"agreement_f0_{name}"] = agreement(outputs[name], split.f0, split.labels)
    return row


def _gaps(outputs: dict[str, np.ndarray], linear: dict[str, np.ndarray], splits: dict[str, _Split]) -> Row:
    """How far one arm's outputs are from the linearized arm's, by split."""
    row: Row = {}
    for name, split in splits.items():
        gap = float(np.linalg.norm(outputs[name] - linear[name]))
        row[f"output_gap_{name}"] = gap
        row[f"output_gap_relative_{name}"] = relative(gap, float(np.linalg.norm(outputs[name] - split.f0)))
        row[f"kl_{name}"] = kl_divergence(outputs[name], linear[name])
        row[f"agreement_{name}"] = agreement(outputs[name], linear[name], split.labels)
    return row


def _prepare(
    tun: Tunable,
    data: dict[str, Dataset],
    cached: bool,
    budget: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, _Split]:
    splits = {}
    total = sum(len(part) for part in data.values())
    done = 0

    def report(base: int) -> Progress | None:
        return None if progress is None else lambda now, _: progress("Jacobian", base + now, total)

    for name, part in data.items():
        if cached:
            jac = jacobian(tun, part, memory_budget=budget, progress=report(done))
            splits[name] = _Split(part, jac.outputs.astype(np.float64), jac)
        else:
            splits[name] = _Split(part, predict(tun, tun.theta0, part), None)
        done += len(part)
    return splits


def _kernels(tun: Tunable, splits: dict[str, _Split], examples: int, budget: int) -> tuple[Kernel, Kernel, np.ndarray]:
    """Returns K₀ on (some of) the training examples, K(eval, them), and which they are."""
    data = splits["train"].data
    chosen = np.sort(np.random.default_rng(0).permutation(len(data))[:examples])
    jac, jac_eval = splits["train"].jac, splits["eval"].jac
    part = data.take(chosen)
    if jac is None or len(chosen) < len(data):
        jac = jacobian(tun, part, memory_budget=budget)
    if jac_eval is None:
        jac_eval = jacobian(tun, splits["eval"].data, memory_budget=budget)
    epsilon = measure_epsilon(tun, part, None, jac, 2, "highest")
    groups = tun.grouped("layer")
    kernel = kernel_from_jacobian(jac, jac, groups, "highest", epsilon, keep=True)
    return kernel, kernel_from_jacobian(jac_eval, jac, groups, "highest", epsilon, keep=False), chosen


def _lam_grid(lams: Sequence[float] | str, mu1: float, pull: str) -> list[float]:
    if isinstance(lams, str):
        if lams != "auto":
            raise InputError(f'lams={lams!r}; expected numbers or "auto"')
        # SPD's strength is a share of the way back, not a curvature.
        return list(AUTO_LAMS) if pull == "spd" else [share * mu1 for share in AUTO_LAMS]
    return [float(lam) for lam in lams]


def check_lams(lams: Sequence[float] | str) -> None:
    """Checks a λ grid.

    Raises:
        InputError: If it is empty, or holds a negative, infinite or repeated value.
    """
    if isinstance(lams, str):
        return
    if not lams or not all(0 <= lam < float("inf") for lam in lams) or len(set(lams)) < len(lams):
        raise InputError(f"lams={list(lams)}; expected at least one value, each at least 0, finite and given once")


def compare(
    tun: Tunable,
    train_data: Dataset | Mapping[str, Any],
    eval_data: Dataset | Mapping[str, Any],
    config: TrainConfig | None = None,
    *,
    lams: Sequence[float] | str = "auto",
    lam_rel: Sequence[float] | None = None,
    extra_arms: Mapping[str, Tunable] | None = None,
    baselines: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    linear_mode: str = "auto",
    kernel_examples: int = 1024,
    memory_budget: int = 4 << 30,
    log: Callable[[Row], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Fine-tunes a model and its linearization for each λ, on the same data in the same order, and compares them.

    Columns of the table, for each λ (`lam`, and `lam_over_mu1` in units of K₀'s largest eigenvalue) and `arm`:

    - `distance`, `distance_A`, `_B`, `_head`, `_other`: ‖θ−θ₀‖ in all and of LoRA's A, B, the head, the rest;
    - `parameter_gap` and the same split: ‖θ−θ̄‖ between this arm and the linearized one;
    - for each split (`_train`, `_eval`): `output_gap` ‖f−f̄‖ (Frobenius over all examples and outputs),
      `output_gap_relative` to ‖f−f₀‖ (0 where neither has moved), `kl` the mean over examples of
      KL(softmax f ‖ softmax f̄), `agreement` of predicted classes with the linearized arm, `agreement_f0` with
      the start, `loss` (mean over examples), `accuracy`.

    Baselines are rows of the same table: `majority_class`, `start` (f₀), those given, and `kernel_regression`, the
    closed-form limit of the linearized arm under squared loss (theory 2), for each λ.

    Args:
        tun: What is fine-tuned.
        train_data: Training examples with `labels`.
        eval_data: Examples to evaluate on, with `labels`.
        config: Training; its `lam` is replaced by each λ.
        lams: λ for the summed loss, or `"auto"`: 0, 1e-3, 1e-2, 1e-1, 1 in units of μ₁.
        lam_rel: λ in units of μ₁, in place of `lams`.
        extra_arms: Other Tunables to train alike, by name, such as the same LoRA with A frozen.
        baselines: Outputs of other predictors, name to `{"train": [N, C], "eval": [M, C]}`.
        linear_mode: `"cached"`: the linearized arm trains on Jacobians computed once; `"streaming"`: by jvp at
            every step; `"auto"`: cached where they fit half the budget.
        kernel_examples: At most so many training examples make K₀ and the kernel regression.
        memory_budget: Bytes for Jacobians.
        log: Called with every training row, extended by `arm` and `lam`.
        progress: Called with a phase's name, units done and in all.

    Raises:
        InputError: If an argument is not one of those listed or the data does not fit; before long work.
        TrainingDivergedError: If an arm diverges; the message names arm and λ.
    """
    config = config or TrainConfig()
    config.check()
    check_lams(lams if lam_rel is None else lam_rel)
    if linear_mode not in ("auto", "cached", "streaming"):
        raise InputError(f'linear_mode={linear_mode!r} is unknown; expected "auto", "cached" or "streaming"')
    if kernel_examples < 1:
        raise InputError(f"kernel_examples={kernel_examples}; expected at least 1")
    data = {"train": as_dataset(train_data), "eval": as_dataset(eval_data)}
    for part in data.values():
        if "labels" not in part.columns:
            raise InputError(f"the data has no column 'labels'; it has {sorted(part.columns)}")
        tun.check_batch(part.columns)
        check_labels(part["labels"], num_outputs(tun, part), config.loss)

    size = sum(jacobian_bytes(tun, part) for part in data.values())
    cached = linear_mode == "cached" or (linear_mode == "auto" and 2 * size <= memory_budget)
    splits = _prepare(tun, data, cached, memory_budget, progress)
    kernel, kernel_eval, chosen = _kernels(tun, splits, kernel_examples, memory_budget)
    spec = spectrum(kernel)
    n, c = splits["train"].f0.shape
    mu1 = float(spec.eigenvalues[0]) * n / len(chosen)
    grid = _lam_grid(lams, mu1, config.pull) if lam_rel is None else [share * mu1 for share in lam_rel]

    rows: list[Row] = []
    results: dict[tuple[str, float], TrainResult] = {}
    majority = np.zeros(c)
    if splits["train"].labels.dtype.kind == "f":
        majority[:] = splits["train"].labels.mean()
    else:
        majority[:] = np.asarray(targets(splits["train"].labels, c)).mean(axis=0)
    constant = {name: np.tile(majority, (len(split.data), 1)) for name, split in splits.items()}
    start = {name: split.f0 for name, split in splits.items()}
    for name, outputs in {"majority_class": constant, "start": start, **(baselines or {})}.items():
        rows.append({"arm": name, **_scores(dict(outputs), splits, config.loss)})

    linear = linearize(tun)
    arms: dict[str, tuple[Tunable, Dataset, Dataset]] = {}
    if cached:
        assert splits["train"].jac is not None
        assert splits["eval"].jac is not None
        on_train, index_train = cached_linearized(tun, data["train"], splits["train"].jac)
        on_eval, index_eval = cached_linearized(tun, data["eval"], splits["eval"].jac)
        arms[LINEARIZED] = (on_train, index_train, index_eval)
    else:
        on_train = on_eval = linear
        arms[LINEARIZED] = (linear, data["train"], data["eval"])
    for name, other in {FULL: tun, **(extra_arms or {})}.items():
        arms[name] = (other, data["train"], data["eval"])

    total = config.total_steps(n) * len(grid) * (len(arms) - cached)
    done = 0
    for lam in grid:
        outputs: dict[str, dict[str, np.ndarray]] = {}
        labelled = {"lam": lam, "lam_over_mu1": relative(lam, mu1)}

        def log_row(row: Row, arm: str, labelled: Row = labelled) -> None:
            nonlocal done
            if log is not None:
                log({"arm": arm, **labelled, **row})
            if not (cached and arm == LINEARIZED):
                done += 1
                if progress is not None:
                    progress("training", done, total)

        for arm, (arm_tun, arm_train, arm_eval) in arms.items():
            # The evaluation examples of the cached arm live in a cache of their own.
            during = None if config.eval_steps is None or (cached and arm == LINEARIZED) else arm_eval
            try:
                result = train(
                    arm_tun,
                    arm_train,
                    during,
                    dataclasses.replace(config, lam=lam),
                    log=lambda r, a=arm: log_row(r, a),
                )
            except FloatingPointError as error:
                raise type(error)(f"arm {arm!r} at λ = {lam:g}: {error}") from error
            results[arm, lam] = result
            eval_tun = on_eval if arm == LINEARIZED else arm_tun
            outputs[arm] = {
                "train": predict(arm_tun, result.theta, arm_train),
                "eval": predict(eval_tun, result.theta, arm_eval),
            }
        for arm in sorted(arms, key=lambda name: (name != FULL, name != LINEARIZED)):
            theta, theta0 = results[arm, lam].theta, arms[arm][0].theta0
            row: Row = {"arm": arm, **labelled}
            row.update({f"distance{key}": value for key, value in distances(theta, theta0).items()})
            if arm != LINEARIZED:
                gap = distances(theta, results[LINEARIZED, lam].theta)
                row.update({f"parameter_gap{key}": value for key, value in gap.items()})
                row.update(_gaps(outputs[arm], outputs[LINEARIZED], splits))
            rows.append({**row, **_scores(outputs[arm], splits, config.loss)})
        if config.pull != "spd":
            y = np.asarray(targets(splits["train"].labels, c), np.float64)
            # λ is for n examples; fewer of them weigh as much when it shrinks with them.
            fit = kernel_regression(kernel, y[chosen], splits["train"].f0[chosen], lam * len(chosen) / n)
            fitted = {"eval": fit.test(kernel_eval, splits["eval"].f0)}
            if len(chosen) == n:
                fitted["train"] = fit.train()
            known = {name: splits[name] for name in SPLITS if name in fitted}
            rows.append({"arm": "kernel_regression", **labelled, **_scores(fitted, known, config.loss)})

    summary = {
        "train_examples": n,
        "eval_examples": len(data["eval"]),
        "outputs": c,
        "trainable_parameters": tun.num_params,
        "steps": config.total_steps(n),
        "linearized_arm": "cached Jacobian" if cached else "jvp at every step",
        "jacobian_bytes": size,
        "kernel_examples": len(chosen),
        "mu_1": mu1,
        "mu_max": float(spec.eigenvalues[0]),
        "mu_min": float(spec.eigenvalues[-1]),
        "condition_number": spec.condition_number,
        "condition_number_is_lower_bound": spec.condition_number_is_bound,
        "condition_number_on_range": spec.condition_number_on_range,
        "rank": spec.rank,
        "noise_floor": spec.noise_floor,
        "trace": spec.trace,
        "epsilon_J": kernel.info.epsilon_J,
        "kernel": dataclasses.asdict(kernel.info),
    }
    columns = list(dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row))
    return Comparison([{key: row.get(key) for key in columns} for row in rows], summary, results, spec)
