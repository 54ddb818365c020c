"""Is this fine-tuning lazy? The gaps to the linearized model and the drift of the kernel, at chosen steps of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.linearize import linearize
from jaxlin.ntk.change import distance
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.jacobian import MEMORY_BUDGET, evenly_spread, num_outputs
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.work import PhaseProgress
from jaxlin.theory.criteria import alignment
from jaxlin.theory.drift import kernel_alignment, principal_angles, relative, relative_drift, top_eigenspace, widest_gap
from jaxlin.training.losses import targets
from jaxlin.training.trainer import Row, TrainResult, check_data, predict
from jaxlin.tunable import Tunable, leaf_paths

KERNEL_EXAMPLES = 256
"""Default number of examples that the kernels along a run are taken on."""

LAZY, NOT_LAZY = 0.1, 0.5
"""What the verdict stands on: every relative number at most the first, or one above the second. Both are this report's
own convention."""

_ROUNDING = 100
"""Relative movement of the outputs, in units of their dtype's eps, below which gaps relative to it tell nothing."""

_JUDGED = {
    "same-θ gap": "same_theta_gap_relative",
    "trajectory gap": "trajectory_gap_relative",
    "kernel drift": "kernel_drift",
}


@dataclasses.dataclass(frozen=True, eq=False)
class LinearizationReport:
    """What `linearization_report` gives.

    Attributes:
        table: Tidy: one row a step; see there for its columns.
        summary: What it stands on: `examples` (of the outputs), `kernel_examples`, `top`, the relative `eigengap` of K₀
            below its top eigenspace, and `epsilon_J` of K₀ (drift of about twice that is rounding).
        verdict: A line from the largest relative numbers of the table, with the thresholds used.
    """

    table: list[Row]
    summary: dict[str, Any]
    verdict: str


def verdict(table: list[Row]) -> str:
    """Says whether a run was lazy, in one line; see `LAZY`."""
    moved = [row for row in table if row["distance"] > 0]
    if not moved:
        return "lazy or not cannot be told: θ is at θ₀ at every step of the report"
    known = {name: [row[key] for row in moved if row[key] is not None] for name, key in _JUDGED.items()}
    worst = {name: max(values) for name, values in known.items() if values}
    largest = max(worst.values())
    word = "lazy" if largest <= LAZY else "not lazy" if largest > NOT_LAZY else "neither lazy nor far from it"
    numbers = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
    rule = f"lazy: all at most {LAZY:g}; not lazy: one above {NOT_LAZY:g}"
    return f"{word}, steps {moved[0]['step']} to {moved[-1]['step']}: relative {numbers} at most ({rule})"


@dataclasses.dataclass(frozen=True, eq=False)
class Tracker:
    """What the report of every run from one θ₀ needs once: outputs and kernel there, and how to get them elsewhere."""

    tun: Tunable
    data: Dataset
    linear: Tunable
    linear_data: Dataset
    chosen: np.ndarray
    top: int
    memory_budget: int
    f0: np.ndarray
    linear0: np.ndarray
    kernel0: Kernel

    @classmethod
    def of(
        cls,
        tun: Tunable,
        data: Dataset,
        linear: Tunable | None = None,
        linear_data: Dataset | None = None,
        kernel_examples: int = KERNEL_EXAMPLES,
        top: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> Tracker:
        """Computes it.

        Args:
            tun: The model.
            data: Examples with labels.
            linear: Its linearization, if there is one at hand, such as from cached Jacobians.
            linear_data: The same examples in the form that `linear` takes.
            kernel_examples: As for `linearization_report`.
            top: Likewise.
            memory_budget: Likewise.

        Returns:
            The tracker.

        Raises:
            InputError: If the data or a number does not fit; before anything is computed.
        """
        check_data(tun, data, "squared")
        if kernel_examples < 1:
            raise InputError(f"kernel_examples={kernel_examples}; expected at least 1")
        chosen, c = evenly_spread(len(data), kernel_examples), num_outputs(tun, data)
        m = len(chosen) * c
        if top is not None and not 1 <= top <= m:
            raise InputError(f"top={top}; expected between 1 and {m} ({len(chosen)} examples × {c} outputs)")
        linear, linear_data = linear or linearize(tun), linear_data or data
        kernel0 = _kernel(tun, tun.theta0, data, chosen, memory_budget)
        top = widest_gap(kernel0, min(c + 1, max(m - 1, 1)), 4 * c) if top is None else top
        f0, linear0 = predict(tun, tun.theta0, data), predict(linear, tun.theta0, linear_data)
        return cls(tun, data, linear, linear_data, chosen, top, memory_budget, f0, linear0, kernel0)

    def _linear_outputs(self, theta: PyTree) -> np.ndarray:
        # As f₀ and what is added to it, so that at θ₀ it is f₀ to the bit, whatever program computes it.
        return self.f0 + (predict(self.linear, theta, self.linear_data) - self.linear0)

    def row(self, theta: PyTree, other: PyTree | None) -> Row:
        """Returns the columns of the report at θ_t, but for its step.

        Args:
            theta: θ_t.
            other: θ̄_t, or `None`.

        Raises:
            InputError: If the kernel at θ_t holds NaN or infinity.
        """
        outputs = predict(self.tun, theta, self.data)
        moved = float(np.linalg.norm(outputs - self.f0))
        rounding = _ROUNDING * float(jnp.finfo(jnp.result_type(*jax.tree.leaves(theta))).eps)
        told = not 0 < moved < rounding * float(np.linalg.norm(outputs))
        same = float(np.linalg.norm(outputs - self._linear_outputs(theta)))
        row: Row = {
            "distance": distance(theta, self.tun.theta0),
            "distance_linearized": None,
            "parameter_gap": None,
            "same_theta_gap": same,
            "same_theta_gap_relative": relative(same, moved) if told else None,
            "trajectory_gap": None,
            "trajectory_gap_relative": None,
        }
        if other is not None:
            gap = float(np.linalg.norm(outputs - self._linear_outputs(other)))
            row["distance_linearized"] = distance(other, self.tun.theta0)
            row["parameter_gap"] = distance(theta, other)
            row |= {"trajectory_gap": gap, "trajectory_gap_relative": relative(gap, moved) if told else None}
        kernel = _kernel(self.tun, theta, self.data, self.chosen, self.memory_budget)
        angles = principal_angles(kernel, self.kernel0, self.top)
        y = np.asarray(targets(self.data["labels"], outputs.shape[1]), np.float64)
        matrix, columns = kernel.matrix(), {"targets": y, "residual": self.f0 - y}
        aligned = {name: alignment(matrix, value[self.chosen].reshape(-1, 1)) for name, value in columns.items()}
        return row | {
            "kernel_drift": relative_drift(kernel, self.kernel0),
            "kernel_drift_spectral": relative_drift(kernel, self.kernel0, "spectral"),
            "eigenspace_angle": _defined(float(np.degrees(angles[0]))),
            "eigenspace_overlap": _defined(float(np.mean(np.cos(angles) ** 2))),
            "alignment_kernel0": _defined(kernel_alignment(kernel, self.kernel0)),
            **{f"alignment_{name}": _defined(value) for name, value in aligned.items()},
        }

    def report(
        self,
        full: TrainResult,
        linearized: TrainResult | None,
        steps: Collection[int],
        labels: Row | None = None,
        progress: PhaseProgress | None = None,
    ) -> LinearizationReport:
        """Returns the report of one run.

        Args:
            full: Of `train` on the model.
            linearized: Of `train` on the linearized model, or `None`.
            steps: Which; kept in both.
            labels: Columns to put before the others, such as λ.
            progress: Called with a phase's name, units done and in all.

        Raises:
            InputError: If a kernel holds NaN or infinity.
        """
        steps = sorted(set(steps))
        table: list[Row] = []
        for done, k in enumerate(steps, start=1):
            other = None if linearized is None else linearized.states[k].theta
            table.append({**(labels or {}), "step": k, **self.row(full.states[k].theta, other)})
            if progress is not None:
                progress("linearization report", done, len(steps))
        _, gap = top_eigenspace(self.kernel0, self.top)
        summary = {
            "examples": len(self.data),
            "kernel_examples": len(self.chosen),
            "top": self.top,
            "eigengap": gap,
            "epsilon_J": self.kernel0.info.epsilon_J,
        }
        return LinearizationReport(table, summary, verdict(table))


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def _kernel(tun: Tunable, theta: PyTree, data: Dataset, chosen: np.ndarray, memory_budget: int) -> Kernel:
    blocks = {"all": leaf_paths(tun.theta0)}
    return ntk(tun, data.take(chosen), theta=theta, blocks=blocks, memory_budget=memory_budget)


def _check_states(tun: Tunable, name: str, run: TrainResult, steps: Collection[int]) -> None:
    missing = [k for k in steps if k not in run.states]
    if missing or not steps:
        kept = ", ".join(map(str, sorted(run.states))) or "none"
        what = f"step {missing[0]} of the {name} run was not kept" if missing else f"no step of the {name} run was kept"
        raise InputError(f"{what} (kept: {kept}); train with keep=[…] to have states to report on")
    for k in steps:
        tun.check_theta(run.states[k].theta, f"the parameters of the {name} run")


def linearization_report(
    tun: Tunable,
    full: TrainResult,
    linearized: TrainResult | None,
    data: Dataset | Mapping[str, Any],
    steps: Collection[int] | None = None,
    *,
    kernel_examples: int = KERNEL_EXAMPLES,
    top: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: PhaseProgress | None = None,
) -> LinearizationReport:
    """Says at chosen steps t of a run how far fine-tuning is from its linearization at θ₀ (theory 5): is it lazy?

    Columns of the table, for each `step`; f, f̄ are over all examples and outputs of `data`, norms Frobenius:

    - `distance` ‖θ_t−θ₀‖, `distance_linearized` ‖θ̄_t−θ₀‖, `parameter_gap` ‖θ_t−θ̄_t‖;
    - `same_theta_gap` ‖f(θ_t)−f̄(θ_t)‖ (5(a)) and `trajectory_gap` ‖f(θ_t)−f̄(θ̄_t)‖ (5(c)), and each `_relative` to
      ‖f(θ_t)−f₀‖ (0 where neither has moved, `None` where the outputs have moved by less than 100 times their
      rounding: their gap is rounding then);
    - `kernel_drift` ‖K_t−K₀‖/‖K₀‖ in the Frobenius norm, `kernel_drift_spectral` in the spectral one (5(d));
    - `eigenspace_angle`, the largest principal angle between the top-k eigenspaces of K_t and K₀, in degrees, and
      `eigenspace_overlap`, the mean of cos² of all k: where μ_k and μ_{k+1} are near one another (see the summary's
      `eigengap`) the largest angle says little and the overlap more; `None` where they are tied to rounding;
    - `alignment_kernel0`, the cosine of K_t and K₀; `alignment_targets` and `alignment_residual`, that of K_t and yyᵀ,
      and of K_t and r₀r₀ᵀ with r₀ = f₀ − y (theory 6); `None` where one vanishes.

    Args:
        tun: The model that was trained.
        full: Of `train(tun, …, keep=steps)`.
        linearized: Of `train(linearize(tun), …, keep=steps)` or of its cached form; `None`: only what is of θ_t alone.
        data: Examples with `labels`, such as those trained on.
        steps: Which; `None`: all that `full` kept.
        kernel_examples: Kernels are of at most so many of the examples, evenly spread.
        top: k; `None`: that between C + 1 and 4C with the largest μ_k/μ_{k+1} of K₀. (The first C are mostly of what
            all examples have in common.)
        memory_budget: Bytes, as for `ntk`.
        progress: Called with a phase's name, units done and in all.

    Returns:
        The report.

    Raises:
        InputError: If a step was not kept, the runs are of other parameters, or the data, `kernel_examples` or `top` do
            not fit; or a kernel holds NaN or infinity.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": jnp.zeros((3, 2))})  # linear
        >>> data = {"x": np.eye(3, dtype=np.float32), "labels": np.array([0, 1, 1])}
        >>> run = jl.train(tun, data, config=jl.TrainConfig(max_steps=4), keep=[4])
        >>> print(jl.linearization_report(tun, run, None, data).verdict.partition(",")[0])
        lazy
    """
    data = as_dataset(data)
    steps = full.states if steps is None else steps
    for name, run in {"full": full, "linearized": linearized}.items():
        if run is not None:
            _check_states(tun, name, run, steps)
    with jax.default_matmul_precision("highest"):
        tracker = Tracker.of(tun, data, kernel_examples=kernel_examples, top=top, memory_budget=memory_budget)
        return tracker.report(full, linearized, steps, progress=progress)
