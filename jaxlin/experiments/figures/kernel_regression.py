"""How well the kernel alone predicts, against real fine-tuning and the linear probe, and the time that each takes."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxlin.experiments.figures.kernel_regression_figures import (
    ALONE,
    FULL,
    LOGISTIC,
    PROBE,
    PULLED,
    REGRESSION,
    draw,
)
from jaxlin.experiments.figures.kernel_regression_findings import findings
from jaxlin.experiments.figures.study import FAST, PAPER_ADAM, AdamSetting, Problem, Row, Study, Tables, Work
from jaxlin.models.probe import frozen_features
from jaxlin.ntk.engine import kernel_from_jacobian
from jaxlin.ntk.jacobian import jacobian
from jaxlin.theory.calibration import calibration
from jaxlin.theory.logistic import kernel_logistic_regression
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.training.compare import MAJORITY
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import evaluate, targets
from jaxlin.training.metrics import predicted
from jaxlin.training.trainer import predict, train

if TYPE_CHECKING:
    from jaxlin.ntk.kernel import Kernel

STARTS = {ALONE: "zero", REGRESSION: "probe"}
"""What the kernel's regressions start from."""
PAIRS = (
    *((REGRESSION, other) for other in (FULL, PULLED, PROBE)),
    *((ALONE, other) for other in (FULL, PROBE)),
    (LOGISTIC, FULL),
    (FULL, PROBE),
    (PULLED, PROBE),
)
"""What is compared on the same examples: an arm, and what is taken off it."""


@dataclasses.dataclass(frozen=True)
class KernelRegressionSetting(AdamSetting):
    """The kernel against fine-tuning.

    Attributes:
        lam_rel: λ in units of μ₁ among which leave-one-out chooses, above 0.
        levels: Nominal probabilities of predictive intervals.
        bins: Bins of predicted probabilities, of equally many examples.
    """

    lam_rel: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
    levels: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    bins: int = 8


class _Clock:
    """What parts of the work take."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @contextmanager
    def timed(self, arm: str, stage: str, examples: int) -> Iterator[None]:
        """Times a part: seconds gone by, and the processor's, which other programs on the machine do not change."""
        begin = time.monotonic(), time.process_time()
        yield
        seconds, cpu = time.monotonic() - begin[0], time.process_time() - begin[1]
        self.rows.append({"arm": arm, "stage": stage, "examples": examples, "seconds": seconds, "cpu_seconds": cpu})


@dataclasses.dataclass(frozen=True, eq=False)
class _Known:
    """What the kernel's predictors start from.

    Attributes:
        fit: Regression from the probe's outputs, at ridge 0.
        kernel_eval: `K(x_eval, x_train)`.
        blocks: `K(x, x)` of each validation example `[M, C, C]`.
        f0_eval: The probe's outputs there.
    """

    fit: KernelRegression
    kernel_eval: Kernel
    blocks: Float[np.ndarray, "M C C"]
    f0_eval: Float[np.ndarray, "M C"]

    @property
    def mu1(self) -> float:
        """Largest eigenvalue."""
        return float(self.fit.eigenvalues[-1])

    def start(self, arm: str, share: float) -> tuple[KernelRegression, Float[np.ndarray, "M C"]]:
        """Returns the regression of an arm at λ = `share`·μ₁, and what it starts from on validation examples."""
        scale = 0.0 if STARTS[arm] == "zero" else 1.0
        fit = dataclasses.replace(self.fit, f0=scale * self.fit.f0, ridge=share * self.mu1)
        return fit, scale * self.f0_eval


def _targets(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    c = problem.loaded.task.num_labels
    train_y, eval_y = (np.asarray(targets(part["labels"], c), np.float64) for part in (problem.train, problem.eval))
    return train_y, eval_y


def _known(problem: Problem, clock: _Clock, work: Work) -> _Known:
    """Computes Jacobians, kernels and eigenvectors."""
    found = {}
    for split, part in (("training", problem.train), ("validation", problem.eval)):
        with clock.timed("kernel", f"Jacobians, {split}", len(part)):
            phase = f"Jacobians, {split}, {problem.loaded.task.name}, seed {problem.seed}"
            found[split] = jacobian(problem.tun, part, progress=functools.partial(work.progress, phase))
    rows = found["training"], found["validation"]
    blocks = {"all": tuple(path for paths in problem.tun.blocks.values() for path in paths)}
    y, _ = _targets(problem)
    with clock.timed("kernel", "products and eigenvectors", len(problem.train)):
        kernel = kernel_from_jacobian(rows[0], rows[0], blocks, "highest", None, keep=False)
        fit = kernel_regression(kernel, y, rows[0].outputs, 0.0)
    with clock.timed("kernel", "products, validation", len(problem.eval)):
        kernel_eval = kernel_from_jacobian(rows[1], rows[0], blocks, "highest", None, keep=False)
    c = problem.loaded.task.num_labels
    diagonal = np.zeros((len(problem.eval), c, c))
    for leaf in rows[1].rows.values():
        exact = leaf.astype(np.float64)
        diagonal += exact @ exact.swapaxes(1, 2)
    return _Known(fit, kernel_eval, diagonal, np.asarray(rows[1].outputs, np.float64))


def _scores(outputs: np.ndarray, labels: np.ndarray) -> Row:
    """Returns loss and metrics."""
    found = evaluate(outputs, labels, "squared")
    return {name: found[name] for name in ("loss", "accuracy", "f1", "matthews", "pearson", "spearman")}


def _curve(setting: KernelRegressionSetting, problem: Problem, known: _Known, clock: _Clock) -> list[Row]:
    """Returns leave-one-out and validation scores of both regressions at every λ."""
    rows = []
    for arm in STARTS:
        for share in setting.lam_rel:
            fit, start = known.start(arm, share)
            with clock.timed("kernel", f"leave-one-out, {arm}", len(problem.train)):
                left_out = _scores(fit.leave_one_out(), problem.train["labels"])
            on_eval = _scores(fit.test(known.kernel_eval, start), problem.eval["labels"])
            row = {"arm": arm, "lam_over_mu1": share}
            for split, found in (("leave_one_out", left_out), ("eval", on_eval)):
                row |= {f"{name}_{split}": found[name] for name in ("loss", "accuracy")}
            rows.append(row)
    return rows


def least(rows: Sequence[Row], column: str) -> float:
    """Returns the λ/μ₁ of the row where a column is least."""
    return min(rows, key=lambda row: row[column])["lam_over_mu1"]


def _probabilities(arm: str, outputs: np.ndarray) -> np.ndarray:
    """Of the classes: softmax of logits; of outputs fitted to 0 and 1 those, cut to [0, 1] and made to sum to 1."""
    from scipy.special import softmax

    if arm == LOGISTIC:
        return np.asarray(softmax(outputs, axis=1))
    cut = np.clip(outputs, 1e-6, 1)
    return cut / cut.sum(axis=1, keepdims=True)


def _reliability(arm: str, outputs: np.ndarray, labels: np.ndarray, bins: int) -> list[Row]:
    """Returns mean confidence and accuracy by bins of the likeliest class's probability, equally many in each."""
    probability = _probabilities(arm, outputs)
    confidence, right = probability.max(axis=1), predicted(outputs) == labels
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(labels)))
    return [
        {
            "arm": arm,
            "bin": k,
            "examples": len(part),
            "confidence": float(confidence[part].mean()),
            "accuracy": float(right[part].mean()),
        }
        for k, part in enumerate(parts)
    ]


def _kernel(setting: KernelRegressionSetting, problem: Problem, work: Work) -> dict[str, Any]:
    """Computes all that the kernel says, and what the probe says."""
    clock = _Clock()
    with clock.timed(PROBE, "features and ridge", len(problem.train)):
        probe = problem.model  # fits the head
    with clock.timed(PROBE, "features, validation", len(problem.eval)):
        frozen_features(probe, problem.eval)
    known = _known(problem, clock, work)
    labels, (y, y_eval) = problem.eval["labels"], _targets(problem)
    curve = _curve(setting, problem, known, clock)
    share = least([row for row in curve if row["arm"] == ALONE], "loss_leave_one_out")
    outputs = {MAJORITY: np.tile(y.mean(axis=0), (len(labels), 1)), PROBE: known.f0_eval}
    calibrated, coverage = [], []
    for arm in STARTS:
        fit, start = known.start(arm, share)
        with clock.timed("kernel", f"predictions, {arm}", len(labels)):
            outputs[arm] = fit.test(known.kernel_eval, start)
        found = calibration(fit, known.kernel_eval, start, y_eval, known.blocks, setting.levels)
        calibrated.append(
            {
                "arm": arm,
                "squared_residual": found.squared_residual,
                "squared_residual_error": found.squared_residual_error,
                "negative_log_density": found.negative_log_density,
            }
        )
        for level, covered, error in zip(found.levels, found.coverage, found.coverage_error, strict=True):
            coverage.append(
                {"arm": arm, "level": float(level), "coverage": float(covered), "coverage_error": float(error)}
            )
    classes = bool(problem.loaded.task.label_names)
    result: dict[str, Any] = {"mu_1": known.mu1, "lam_over_mu1": share, "curve": curve}
    scores = {arm: _scores(found, labels) for arm, found in outputs.items()}
    if classes:
        zero = np.zeros_like(y)
        with clock.timed(LOGISTIC, "Newton steps", len(y)):
            logistic = kernel_logistic_regression(
                _training_kernel(known), problem.train["labels"], zero, share * known.mu1
            )
        outputs[LOGISTIC] = logistic.test(known.kernel_eval, np.zeros_like(y_eval))
        scores[LOGISTIC] = {**_scores(outputs[LOGISTIC], labels), "loss": None}  # its outputs are logits
        nats = evaluate(outputs[LOGISTIC], labels, "cross_entropy")["loss"]
        calibrated.append({"arm": LOGISTIC, "cross_entropy": nats})
    binned = [arm for arm in outputs if arm != MAJORITY] if classes else []
    return {
        **result,
        "reliability": [row for arm in binned for row in _reliability(arm, outputs[arm], labels, setting.bins)],
        "scores": scores,
        "decisions": {arm: predicted(found).tolist() for arm, found in outputs.items()},
        "calibration": calibrated,
        "coverage": coverage,
        "times": clock.rows,
    }


def _training_kernel(known: _Known) -> Kernel:
    """Returns the kernel that the regression holds as a matrix."""
    n, c = known.fit.f0.shape
    array = known.fit.matrix.reshape(n, c, n, c).transpose(0, 2, 1, 3)
    return dataclasses.replace(known.kernel_eval, parts={"all": array}, symmetric=True, of_two_sets=False)


def _fine_tuned(problem: Problem, arm: str, config: TrainConfig, bins: int, work: Work) -> dict[str, Any]:
    """Fine-tunes in full."""
    clock, labels = _Clock(), problem.eval["labels"]
    total = config.total_steps(len(problem.train))
    phase = f"training, {problem.loaded.task.name}, seed {problem.seed}, {arm}"
    with clock.timed(arm, "training", len(problem.train)):
        theta = train(
            problem.tun,
            problem.train,
            None,
            config,
            log=lambda row: work.progress(phase, row["step"], total),
        ).theta
    with clock.timed(arm, "validation", len(labels)):
        outputs = predict(problem.tun, theta, problem.eval)
    return {
        "scores": _scores(outputs, labels),
        "decisions": predicted(outputs).tolist(),
        "reliability": _reliability(arm, outputs, labels, bins) if problem.loaded.task.label_names else [],
        "times": clock.rows,
    }


def _pair(arm: str, other: str, scores: Mapping[str, Row], right: Mapping[str, np.ndarray], metric: str) -> Row:
    """Returns how much better an arm is than another, and on how many examples only one of them is right."""
    names = ("difference", "accuracy_difference", "only_arm_right", "only_other_right")
    row: Row = {"arm": arm, "other": other, **dict.fromkeys(names)}
    a, b = scores[arm], scores[other]
    if a[metric] is not None and b[metric] is not None:
        row["difference"] = a[metric] - b[metric]
    if right:
        row["accuracy_difference"] = float(right[arm].mean() - right[other].mean())
        row["only_arm_right"] = int(np.sum(right[arm] & ~right[other]))
        row["only_other_right"] = int(np.sum(right[other] & ~right[arm]))
    return row


_CALIBRATED = ("squared_residual", "squared_residual_error", "negative_log_density", "cross_entropy")


def _results(setting: KernelRegressionSetting, work: Work, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns what the kernel says, and what each fine-tuning gives by its arm."""
    options: dict[str, Any] = {"what": "kernel", "lam_rel": list(setting.lam_rel), "levels": list(setting.levels)}
    options |= {"bins": setting.bins, "rank": setting.lora_rank, "probabilities": "of every arm"}
    kernel = work.get(problem, options, lambda: _kernel(setting, problem, work))
    tuned = {}
    for arm, share in ((FULL, 0.0), (PULLED, kernel["lam_over_mu1"])):
        config = setting.training(problem.seed, lam=share * kernel["mu_1"])
        key = {"what": "full", "training": dataclasses.asdict(config), "rank": setting.lora_rank, "bins": setting.bins}
        tuned[arm] = work.get(problem, key, functools.partial(_fine_tuned, problem, arm, config, setting.bins, work))
    return kernel, tuned


def _rows(problem: Problem, kernel: Mapping[str, Any], tuned: Mapping[str, Any]) -> Tables:
    """Returns the tables' rows of one problem."""
    labels, metric, chosen = problem.labels, problem.loaded.task.metrics[0], kernel["lam_over_mu1"]
    scores = kernel["scores"] | {arm: found["scores"] for arm, found in tuned.items()}
    decisions = kernel["decisions"] | {arm: found["decisions"] for arm, found in tuned.items()}
    shares = {FULL: 0.0, **dict.fromkeys((PULLED, ALONE, REGRESSION, LOGISTIC), chosen)}
    classes = bool(problem.loaded.task.label_names)
    right = {arm: np.array(d) == problem.eval["labels"] for arm, d in decisions.items()} if classes else {}
    times = [*kernel["times"], *(row for found in tuned.values() for row in found["times"])]
    tables: Tables = {
        "table": [
            {
                "arm": arm,
                "lam_over_mu1": shares.get(arm),
                "metric": metric,
                "score_eval": row[metric],
                **{f"{name}_eval": value for name, value in row.items()},
            }
            for arm, row in scores.items()
        ],
        "curve": [{**row, "chosen": row["lam_over_mu1"] == chosen} for row in kernel["curve"]],
        "calibration": [
            {"arm": row["arm"], **{name: row.get(name) for name in _CALIBRATED}} for row in kernel["calibration"]
        ],
        "coverage": kernel["coverage"],
        "reliability": [*kernel["reliability"], *(row for found in tuned.values() for row in found["reliability"])],
        "pairs": [
            {"metric": metric, **_pair(arm, other, scores, right, metric)}
            for arm, other in PAIRS
            if arm in scores and other in scores
        ],
        "times": times,
    }
    return {name: [{**labels, **row} for row in rows] for name, rows in tables.items()}


def compute(setting: KernelRegressionSetting, work: Work) -> Tables:
    """Computes kernel and fine-tuning of every task, seed by seed, so that a part is a whole of fewer seeds."""
    tables: dict[str, list[Row]] = {}
    problems = [(task, seed) for seed in range(setting.seeds) for task in setting.tasks]
    for done, (task, seed) in enumerate(problems):
        work.progress("problems", done, len(problems))
        problem = work.problem(task, seed)
        for name, rows in _rows(problem, *_results(setting, work, problem)).items():
            tables.setdefault(name, []).extend(rows)
    return tables


STUDY = Study(
    name="08_kernel_regression",
    title="How well the kernel alone predicts, against real fine-tuning and the linear probe",
    fast=KernelRegressionSetting(**FAST, lam_rel=(1e-4, 1e-3, 1e-2, 1e-1), bins=4),
    full=KernelRegressionSetting(),
    paper=KernelRegressionSetting(**{**PAPER_ADAM, "num_train": 1000}),  # whose kernel fits a machine
    compute=compute,
    draw=draw,
    findings=findings,
)
