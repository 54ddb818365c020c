"""The findings of study 08: who predicts how well, and what of the kernel's promises holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxlin.experiments.figures.kernel_regression_figures import (
    ALONE,
    ARMS,
    FULL,
    NAMES,
    PROBE,
    PULLED,
    REGRESSION,
    STAGES,
    seconds_of,
)
from jaxlin.experiments.figures.summary import (
    NEVER_POOLED,
    distinct,
    gaining,
    mean_interval,
    metric_of,
    name_of,
    of,
    spread,
    values_of,
    with_interval,
    written,
)

if TYPE_CHECKING:
    from jaxlin.experiments.figures.study import Row, Tables

SHOWN_PAIRS = (
    (REGRESSION, PULLED),
    (REGRESSION, FULL),
    (ALONE, FULL),
    (REGRESSION, PROBE),
    (FULL, PROBE),
    (PULLED, PROBE),
)
COVERED = 0.9
"""Nominal coverage that the findings speak of."""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _of_scores(table: Sequence[Row]) -> str:
    arms = [arm for arm in ARMS if of(table, arm=arm)]
    lines = []
    for task in distinct(table, "task"):
        mine = of(table, task=task)
        cells = [values_of(of(mine, arm=arm), "score_eval") for arm in arms]
        lines.append([f"{name_of(task)} ({metric_of(mine)})", *(written(v) if len(v) else "" for v in cells)])
    chosen = values_of(of(table, arm=PULLED), "lam_over_mu1")
    return (
        f"Validation scores, mean over seeds and range. λ is {spread(chosen, 'g')} of μ₁: what leave-one-out on the "
        f"training examples chose for the kernel alone.\n\n{_table(['Task', *(NAMES[arm] for arm in arms)], lines)}"
    )


def pooled(pairs: Sequence[Row], arm: str, other: str) -> np.ndarray:
    """Returns the mean accuracy difference of each task that may be pooled."""
    rows = [row for row in of(pairs, arm=arm, other=other) if row["task"] not in NEVER_POOLED]
    means = [values_of(of(rows, task=task), "accuracy_difference") for task in distinct(rows, "task")]
    return np.array([values.mean() for values in means if len(values)])


def _verdict(values: np.ndarray, arm: str, other: str) -> str:
    """Says what an interval over tasks resolves."""
    _, low, high = mean_interval(values)
    if low > 0:
        return f"{NAMES[arm]} is better"
    return f"{NAMES[other]} is better" if high < 0 else "no difference is resolved"


def _of_differences(pairs: Sequence[Row]) -> str:
    tasks = distinct(pairs, "task")
    lines = []
    for arm, other in SHOWN_PAIRS:
        mine = of(pairs, arm=arm, other=other)
        cells = []
        for task in tasks:
            values = values_of(of(mine, task=task), "difference")
            cells.append(with_interval(values) if len(values) else "")
        over = pooled(pairs, arm, other)
        cells.append(f"{with_interval(over)}: {_verdict(over, arm, other)}" if len(over) else "")
        lines.append([f"{NAMES[arm]} − {NAMES[other]}", *cells])
    head = ["Difference", *map(name_of, tasks), "accuracy, over tasks"]
    errors = [error for row in of(pairs, arm=REGRESSION, other=PULLED) if (error := sampling_error(row)) is not None]
    sampled = (
        f" That other validation examples might have been drawn adds a standard error of {min(errors):.3f} to "
        f"{max(errors):.3f} to the accuracy difference of the first line, seed by seed."
        if errors
        else ""
    )
    return (
        "Paired differences in the task's score, mean over seeds with a 95 % interval (Student's t); in the last "
        f"column in accuracy, mean over tasks with an interval over these.{sampled}\n\n{_table(head, lines)}"
    )


def sampling_error(row: Row) -> float | None:
    """Standard error, over validation examples, of the accuracy difference of two arms on the same ones (McNemar)."""
    if row["only_arm_right"] is None:
        return None
    a, b, m = row["only_arm_right"], row["only_other_right"], row["eval_examples"]
    return math.sqrt(max(a + b - (a - b) ** 2 / m, 0.0)) / m


def _of_leave_one_out(curve: Sequence[Row]) -> str:
    lines = []
    ratios: dict[str, list[float]] = {ALONE: [], REGRESSION: []}
    worse: dict[str, list[float]] = {ALONE: [], REGRESSION: []}
    for task in distinct(curve, "task"):
        cells = [name_of(task)]
        for arm in (ALONE, REGRESSION):
            mine = of(curve, task=task, arm=arm)
            ratio, cost, shares = [], [], []
            for seed in distinct(mine, "seed"):
                rows = of(mine, seed=seed)
                chosen = min(rows, key=lambda row: row["loss_leave_one_out"])
                best = min(row["loss_eval"] for row in rows)
                ratio.append(chosen["loss_leave_one_out"] / chosen["loss_eval"])
                cost.append(chosen["loss_eval"] / best - 1)
                shares.append(chosen["lam_over_mu1"])
            ratios[arm] += ratio
            worse[arm] += cost
            cells += [written(ratio, ".2f"), spread(np.array(shares), "g"), written(100 * np.array(cost), ".1f")]
        lines.append(cells)
    head = ["Task"]
    for arm in (ALONE, REGRESSION):
        head += [f"{NAMES[arm]}: leave-one-out / validation loss", "its λ/μ₁", "costs in %"]
    mean = {arm: float(np.mean(values)) for arm, values in ratios.items()}
    costs = {arm: 100 * float(np.mean(values)) for arm, values in worse.items()}
    words = {arm: f"{100 * abs(1 - m):.0f} % too {'low' if m < 1 else 'high'}" for arm, m in mean.items()}
    reason = (
        ": the probe was fitted on the example left out too, and only the kernel's part leaves it out"
        if mean[REGRESSION] < min(1.0, mean[ALONE])
        else ""
    )
    return (
        f"At the λ that leave-one-out chooses it is, on the average over tasks and seeds, {words[ALONE]} for the "
        f"kernel alone, and that λ costs {costs[ALONE]:.1f} % of validation loss against the best of the grid. From "
        f"the probe it is {words[REGRESSION]}, and its λ costs {costs[REGRESSION]:.1f} %{reason}. λ of fine-tuning was "
        f"chosen by the former.\n\n{_table(head, lines)}"
    )


def calibration_error(rows: Sequence[Row]) -> float:
    """Expected calibration error: |confidence − accuracy|, mean over examples of the bins."""
    weights = values_of(rows, "examples")
    gap = np.abs(values_of(rows, "confidence") - values_of(rows, "accuracy"))
    return float(np.sum(weights * gap) / np.sum(weights))


def _of_calibration(tables: Tables) -> str:
    coverage = of(tables["coverage"], level=COVERED)
    lines, words = [], {}
    for task in distinct(tables["coverage"], "task"):
        cells = [name_of(task)]
        for arm in (ALONE, REGRESSION):
            cells.append(written(values_of(of(coverage, task=task, arm=arm), "coverage")))
            rows = of(tables["calibration"], task=task, arm=arm)
            cells.append(written(values_of(rows, "squared_residual"), ".2f"))
        lines.append(cells)
    for arm in (ALONE, REGRESSION):
        rows = of(coverage, arm=arm)
        off = []  # in standard errors
        for task in distinct(rows, "task"):
            mine = of(rows, task=task)
            off.append((values_of(mine, "coverage").mean() - COVERED) / values_of(mine, "coverage_error").mean())
        narrow, wide = (sum(sign * gap > 2 for gap in off) for sign in (-1, 1))
        words[arm] = f"too narrow on {narrow}, too wide on {wide}, and right within twice the error on "
        words[arm] += f"{len(off) - narrow - wide} of {len(off)} tasks"
    head = ["Task"]
    for arm in (ALONE, REGRESSION):
        head += [f"{NAMES[arm]}: covered by 90 % intervals", "squared residual"]
    return (
        f"Of the kernel alone, 90 % intervals are {words[ALONE]}; from the probe they are {words[REGRESSION]}. The "
        "squared residual, in units of the variance that is predicted, is 1 where that is right.\n\n"
        f"{_table(head, lines)}{_of_probabilities(tables['reliability'])}"
    )


def _of_probabilities(reliability: Sequence[Row]) -> str:
    """The expected calibration error of every arm whose outputs are read as probabilities."""
    arms = [arm for arm in ARMS if of(reliability, arm=arm)]
    if not arms:
        return ""
    tasks = distinct(reliability, "task")
    errors = {
        (task, arm): [calibration_error(of(mine, seed=seed)) for seed in distinct(mine, "seed")]
        for task in tasks
        for arm in arms
        for mine in [of(reliability, task=task, arm=arm)]
    }
    lines = [[name_of(task), *(written(errors[task, arm], ".3f") for arm in arms)] for task in tasks]
    counted = [task for task in tasks if task not in NEVER_POOLED]
    means = {arm: float(np.mean([np.mean(errors[task, arm]) for task in counted])) for arm in arms if counted}
    ranked = ", ".join(f"{NAMES[arm]} {means[arm]:.3f}" for arm in sorted(means, key=means.__getitem__)) or "none"
    return (
        "\n\nThe expected calibration error, the mean distance between the probability of the class that is "
        "answered and the share of these answers that is right; outputs fitted to 0 and 1 are taken for probabilities, "
        f"cut to [0, 1] and made to sum to 1, those of logistic regression by softmax. Mean over tasks: {ranked}.\n\n"
        f"{_table(['Task', *(NAMES[arm] for arm in arms)], lines)}"
    )


def _of_times(times: Sequence[Row]) -> str:
    lines: list[list[str]] = []
    ratios: list[float] = []
    totals: list[float] = []
    for task in distinct(times, "task"):
        fit, test = (
            [seconds_of(times, task, which, predicting) for _, which, _ in STAGES] for predicting in (False, True)
        )
        ratios.append(float(np.median(fit[1]) / np.median(fit[2])))
        totals.append(float(np.median(fit[1] + test[1]) / np.median(fit[2] + test[2])))
        lines.append(
            [name_of(task), *(f"{np.median(v):.3g}" for v in [*fit, *test]), f"{ratios[-1]:.2f}", f"{totals[-1]:.2f}"]
        )
    names = [name for name, _, _ in STAGES]
    head = [
        "Task",
        *(f"{name}: fit" for name in names),
        *(f"{name}: predict" for name in names),
        "kernel / fine-tuning: fit",
        "kernel / fine-tuning: with prediction",
    ]
    low, high = min(ratios), max(ratios)
    dearer = [name_of(task) for task, total in zip(distinct(times, "task"), totals, strict=True) if round(total, 2) > 1]
    what = "less than" if high < 1 else "more than" if low > 1 else "about as much as"
    between = f"{low:.2f}" if len(ratios) == 1 else f"{low:.2f} to {high:.2f}"
    return (
        "Processor seconds, median over seeds (seconds gone by depend on what else the machine does). "
        f"Fitting by the kernel, with leave-one-out at every λ of the grid, takes {what} one fine-tuning at "
        f"one λ: {between} times the processor's time. To predict, the kernel needs Jacobians of the new "
        "examples too, where the network needs one forward pass: with prediction, of as many validation examples "
        f"as there are, it takes {spread(totals, '.2f')} times as much, more than fine-tuning on "
        f"{', '.join(dearer) or 'no task'}."
        f"\n\n{_table(head, lines)}"
    )


def learning(pairs: Sequence[Row]) -> tuple[str, str]:
    """Says where fine-tuning gains on the probe it starts from, what the kernel gains there, and what follows."""
    pairs = [row for row in pairs if row["task"] not in NEVER_POOLED]

    def gained(arm: str) -> dict[str, np.ndarray]:
        found = of(pairs, arm=arm, other=PROBE)
        each = {task: values_of(of(found, task=task), "accuracy_difference") for task in distinct(found, "task")}
        return {task: values for task, values in each.items() if len(values)}

    tuned, kernel = gained(FULL), gained(REGRESSION)
    where = [task for task in gaining(tuned) if task in kernel]
    if not where:
        words = "fine-tuning without a pull gains on its start on no task"
        return words, f"not testable: {words}"
    told = [task for task in gaining(kernel) if task in where]
    each = "; ".join(
        f"{name_of(task)} {with_interval(tuned[task])}, the kernel {with_interval(kernel[task])}" for task in where
    )
    others = [name_of(task) for task in tuned if task not in where]
    rest = f"; on {', '.join(others)} no gain is resolved" if others else ""
    words = f"Accuracy that fine-tuning without a pull gains on the probe: {each}{rest}"
    if not told:
        learnt = ", ".join(map(name_of, where))
        return words, f"no: where fine-tuning learns ({learnt}), the kernel shows none of the gain"
    holds = "yes" if len(told) == len(where) else "in part"
    return words, f"{holds}: where fine-tuning learns, the kernel gains on {len(told)} of {len(where)} tasks"


def _in_all(tables: Tables) -> str:
    pairs = tables["pairs"]
    parts = []
    for arm, other in ((REGRESSION, PULLED), (REGRESSION, FULL), (REGRESSION, PROBE), (FULL, PROBE)):
        over = pooled(pairs, arm, other)
        if len(over):
            count = f"{len(over)} tasks" if len(over) > 1 else "1 task"
            parts.append(
                f"- {NAMES[arm]} against {NAMES[other]}: {_verdict(over, arm, other)} "
                f"(accuracy {with_interval(over)}, {count})" + " at the same λ" * (other == PULLED)
            )
    if parts:
        parts.append(f"- {learning(pairs)[0]}")
    return "\n".join(parts) if parts else "No task with classes: nothing is pooled."


def findings(tables: Tables) -> dict[str, str]:
    """Says who predicts how well, whether leave-one-out and intervals can be trusted, and the time taken."""
    return {
        "in_all": _in_all(tables),
        "scores": _of_scores(tables["table"]),
        "differences": _of_differences(tables["pairs"]),
        "leave_one_out": _of_leave_one_out(tables["curve"]),
        "calibration": _of_calibration(tables),
        "times": _of_times(tables["times"]),
    }
