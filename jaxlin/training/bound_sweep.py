"""Every bound of theory 3 to 7 on a model and its training examples, over a sweep of λ: which hold, how tightly."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxlin import bounds
from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.ntk.change import METHODS
from jaxlin.ntk.jacobian import MEMORY_BUDGET
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.work import PhaseProgress
from jaxlin.theory.bound import Bound
from jaxlin.theory.drift import relative
from jaxlin.training.bound_run import (
    BETA_TOLERANCE,
    Descent,
    Origin,
    PartCache,
    SelectiveDescent,
    descend,
    descend_selectively,
    from_json,
    to_json,
)
from jaxlin.training.compare import check_lams
from jaxlin.training.trainer import Row, check_data
from jaxlin.tunable import Tunable, layer_index

LAM_REL = (0.1, 1.0, 10.0, 100.0)
"""Default grid of λ, in units of μ₁."""

_SCALING = ("distance", "parameter_gap", "output_gap", "same_theta_gap", "kernel_drift")
"""What falls as a power of λ as λ → ∞ (theory 5): the first and last as 1/λ, the gaps as 1/λ²."""


@dataclasses.dataclass(frozen=True, eq=False)
class BoundSweep:
    """What `bound_sweep` gives.

    Attributes:
        table: Tidy: a row a bound and λ; see `rows`.
        measurements: Tidy: a row a λ and step, with what was measured there, for the summed loss.
        summary: Sizes, σ, β at θ₀; by λ the constants that the bounds used; slopes of what was measured.
        bounds: The bounds themselves, by λ.
    """

    table: list[Row]
    measurements: list[Row]
    summary: dict[str, Any]
    bounds: Mapping[float, list[Bound]]


def rows(found: Sequence[Bound], labels: Mapping[str, Any]) -> list[Row]:
    """Returns bounds as rows of a table; so those of other sections can stand beside them.

    Args:
        found: The bounds; arrays have an entry a step (or an eigenvalue), the last of which is the end.
        labels: Columns that go before: which λ they are of.

    Returns:
        For each: `bound`, `applies`, `holds` (`None` where it does not apply), `tightness` (measured over bound, or the
        inverse of a lower one, where they are nearest); `value`, `measured` and `tightness_end` at the end, or where a
        bound that fails is missed by most, which is `entry` of `entries`; `sampled`, and `failing`, the conditions that
        are not met.
    """
    return [_row(one, labels) for one in found]


def _row(one: Bound, labels: Mapping[str, Any]) -> Row:
    value, measured = np.atleast_1d(one.value), np.atleast_1d(one.measured)
    shown = int(np.argmin(np.nan_to_num(np.atleast_1d(one.slack), nan=-np.inf))) if one.holds is False else -1
    there = dataclasses.replace(one, value=value[[shown]], measured=measured[[shown]])
    return {
        "bound": one.name,
        **labels,
        "applies": one.applies,
        "holds": one.holds,
        "tightness": one.tightness,
        "value": float(value[shown]),
        "measured": float(measured[shown]),
        "tightness_end": there.tightness,
        "entry": shown % len(value) + 1,
        "entries": len(value),
        "sampled": one.sampled,
        "failing": "; ".join(name for name, met in one.conditions.items() if not met) or None,
    }


def check_sweep(
    tun: Tunable,
    data: Dataset,
    *,
    lam_rel: Sequence[float] | np.ndarray = LAM_REL,
    steps: int = 24,
    selective_steps: int = 6,
    share: float = 0.5,
    directions: int = 2,
    method: str = "auto",
    gradient_accumulation_steps: int = 1,
) -> None:
    """Checks all that `bound_sweep` is given, without computing anything; arguments as there.

    Raises:
        InputError: Naming the first that cannot be used.
    """
    check_lams("auto", lam_rel, "coupled")
    least_1 = {"steps": steps, "selective_steps": selective_steps, "directions": directions}
    least_1["gradient_accumulation_steps"] = gradient_accumulation_steps
    for name, value in least_1.items():
        if value < 1:
            raise InputError(f"{name}={value}; expected at least 1")
    if not 0 < share <= 1:
        raise InputError(f"share={share}; expected above 0 and at most 1, of the largest step that the bounds allow")
    if method not in METHODS:
        raise InputError(f"method={method!r} is unknown; expected one of {', '.join(METHODS)}")
    check_data(tun, data, "squared")


def measured_steps(steps: int) -> list[int]:
    """Returns where a run is measured: at 1, 2, 4, … and at its end."""
    return sorted({steps, *(1 << k for k in range(steps.bit_length()) if 1 << k <= steps)})


def bound_sweep(
    tun: Tunable,
    data: Dataset | Mapping[str, Any],
    *,
    lam_rel: Sequence[float] | np.ndarray = LAM_REL,
    steps: int = 24,
    selective_steps: int = 6,
    share: float = 0.5,
    directions: int = 2,
    method: str = "auto",
    seed: int = 0,
    gradient_accumulation_steps: int = 1,
    memory_budget: int = MEMORY_BUDGET,
    progress: PhaseProgress | None = None,
    cache: PartCache | None = None,
) -> BoundSweep:
    """Runs what the bounds of theory 3 to 7 are of, over a sweep of λ, and evaluates every one.

    For each λ full-batch descent with the coupled pull and a constant step, of the model and of its linearization
    (sections 4, 5, 6), and of the model with the selective pull (section 3); squared loss; all in float64, since the
    gaps shrink as 1/λ². H and β are the largest of samples within the run's own radius: H at the measured steps,
    halfway to the end and in random directions, β at θ₀, at the end and in one random direction. Such suprema are
    estimates from below, and what uses them is marked `sampled`: where it fails, the samples missed the supremum.
    Section 7 is of `K₀ + λI` as layers are added, the head first and then from the top; it needs no run.

    Args:
        tun: The model.
        data: Training examples with `labels`.
        lam_rel: λ of the summed loss, in units of μ₁.
        steps: Of descent at each λ; enough for the smallest.
        selective_steps: Of descent with the selective pull.
        share: c of the step `η = c/(max(β, σ²) + λ)`, with β at θ₀.
        directions: Random directions in which H is sampled at the radius of each λ's run; β in the first of them.
        method: `"dense"`, `"products"` or `"auto"`; see `jaxlin.ntk.change.change`.
        seed: Of directions.
        gradient_accumulation_steps: About how many parts a step over all examples is computed in, each of like
            length, for less memory and padding; at most one an example.
        memory_budget: Bytes for Jacobians.
        progress: Called with a phase's name, units done and in all.
        cache: Makes long work go on where it was: called for β at θ₀ and for each λ with what that part is of, beside
            model and data, and with a function of no arguments that computes it, it returns the part, computed or from
            before. Both are of what JSON holds; numbers of the part may be NaN or infinite. K₀ is computed each time.

    Returns:
        Tables, constants and bounds.

    Raises:
        InputError: If an argument is out of range, the data do not fit, or the kernel at θ₀ vanishes.
        TrainingDivergedError: If a run diverges.
        FloatingPointError: If a norm does not converge.
    """
    data = as_dataset(data)
    options: dict[str, Any] = {"steps": steps, "selective_steps": selective_steps, "directions": directions}
    options |= {"share": share, "method": method, "gradient_accumulation_steps": gradient_accumulation_steps}
    check_sweep(tun, data, lam_rel=lam_rel, **options)
    cache = cache or (lambda part, compute: compute())
    shares = np.atleast_1d(np.asarray(lam_rel, float)).tolist()
    ticks = _Ticks(progress, {"training": len(shares) * (steps + selective_steps)})
    ticks.total["derivatives"] = len(shares) * (len(measured_steps(steps)) + 1 + directions + 2)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        origin = Origin.compute(tun, data, method, seed, memory_budget, gradient_accumulation_steps, cache)
        derivatives = type(origin.measure).__name__.removesuffix("Change").lower()
        runs, selective = [], []
        for done, rel in enumerate(shares, start=1):
            compute = functools.partial(_run, origin, rel, seed, options, ticks)
            part = cache({"part": "descent", "lam_rel": rel, "seed": seed, **options, "method": derivatives}, compute)
            ticks.reach(done / len(shares))
            runs.append(from_json(Descent, part["coupled"]))
            selective.append(from_json(SelectiveDescent, part["selective"]))
    samples = _Samples.of(origin, runs)
    found = {run.lam: _bounds(origin, run, part, samples) for run, part in zip(runs, selective, strict=True)}
    labels = {
        run.lam: {"lam": run.lam, "lam_over_mu1": rel, "learning_rate": run.learning_rate}
        for run, rel in zip(runs, shares, strict=True)
    }
    table = [row for lam, listed in found.items() for row in rows(listed, labels[lam])]
    measurements = [row for run in runs for row in _measurements(run, labels[run.lam])]
    constants = [{**labels[run.lam], **_constants(run, samples)} for run in runs]
    summary = {
        "train_examples": len(data),
        "outputs": origin.y.shape[1],
        "trainable_parameters": tun.num_params,
        "steps": steps,
        "share": share,
        "directions": directions,
        "seed": seed,
        "derivatives": derivatives,
        "sigma": origin.sigma,
        "mu_1": origin.sigma**2,
        "beta_start": origin.beta.value,
        "beta_start_residual": origin.beta.residual,
        "beta_residual_at_most": BETA_TOLERANCE,
        "risk_start": origin.risk,
        "constants": constants,
        "slopes": slopes(runs),
    }
    return BoundSweep(table, measurements, summary, found)


def _run(origin: Origin, rel: float, seed: int, options: Mapping[str, Any], ticks: _Ticks) -> dict[str, Any]:
    """Runs descent at λ = rel μ₁ with both pulls; as JSON."""
    lam, trained = rel * origin.sigma**2, ticks.of("training")
    eta = options["share"] / (max(origin.beta.value, origin.sigma**2) + lam)
    where, measured = measured_steps(options["steps"]), ticks.of("derivatives")
    coupled = descend(origin, lam, eta, where, options["directions"], seed, trained, measured)
    selective = descend_selectively(origin, lam, eta, options["selective_steps"], trained)
    return {"coupled": to_json(coupled), "selective": to_json(selective)}


@dataclasses.dataclass(frozen=True)
class _Ticks:
    """Counts units of phases."""

    progress: PhaseProgress | None
    total: dict[str, int]
    done: dict[str, int] = dataclasses.field(default_factory=dict)

    def of(self, phase: str) -> Callable[[int], None]:
        """Returns what counts a phase on."""
        return functools.partial(self._tick, phase)

    def reach(self, share: float) -> None:
        """Sets how much of every phase is done, be it from before: told with the next unit, for the rate's sake."""
        for phase, total in self.total.items():
            self.done[phase] = round(share * total)
            if share == 1 and self.progress is not None:
                self.progress(phase, total, total)

    def _tick(self, phase: str, units: int) -> None:
        self.done[phase] = self.done.get(phase, 0) + units
        if self.progress is not None and units:
            self.progress(phase, self.done[phase], self.total[phase])


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Radius and value of every sample of H and β."""

    lipschitz: list[list[float]]
    beta: list[list[float]]

    @classmethod
    def of(cls, origin: Origin, runs: Sequence[Descent]) -> _Samples:
        """Returns those of all runs, and β at θ₀."""
        lipschitz = [pair for run in runs for pair in run.lipschitz.tolist()]
        smoothness = [pair for run in runs for pair in run.smoothness.tolist()]
        return cls([[0.0, 0.0], *lipschitz], [[0.0, origin.beta.value], *smoothness])

    def within(self, what: str, radius: float) -> float:
        """Returns the largest value in the ball."""
        return max(value for r, value in getattr(self, what) if r <= radius * (1 + 1e-9))


@dataclasses.dataclass(frozen=True)
class _Noise:
    """What float64 leaves of a number that vanishes, such as the risk of a model that fits already.

    Attributes:
        share: Of a number, after a pass through the network.
        outputs: Of ‖f‖.
        theta: Of ‖θ‖, in which a step is lost that is smaller.
    """

    share: float
    outputs: float
    theta: float

    @classmethod
    def of(cls, origin: Origin) -> _Noise:
        share = 64 * float(np.finfo(np.float64).eps)
        leaves = jax.tree.leaves(origin.tun.theta0)
        theta = float(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in leaves)) ** 0.5
        return cls(share, share * float(np.linalg.norm(origin.regression.f0)), share * theta)


def _bounds(origin: Origin, run: Descent, selective: SelectiveDescent, samples: _Samples) -> list[Bound]:
    lam, eta, sigma, largest = run.lam, run.learning_rate, origin.sigma, run.largest_distance
    h, beta = samples.within("lipschitz", largest), samples.within("beta", largest)
    on_steps = (selective.risk, selective.risk_next, selective.inner, selective.update)
    of_steps = samples.within("beta", selective.largest_distance)
    mu = origin.regression.eigenvalues
    resolved = float(mu[mu > origin.regression.noise_floor].min())
    limit = bounds.contraction(run.limit_gap, np.concatenate([[0], run.steps]), float(mu[-1]), resolved, lam, eta)
    a_priori = bounds.distance_a_priori(run.distance, origin.risk, lam, eta, beta)
    by_recursion = bounds.distance_by_recursion(run.distance, run.steps, run.largest_gradient, lam, eta)
    noise = _Noise.of(origin)
    slope = float(np.max(selective.gradient)) * noise.theta / eta + (sigma * noise.outputs) ** 2
    risk = run.largest_residual * noise.outputs + noise.outputs**2
    least = noise.theta + (2 * risk / lam) ** 0.5 if lam > 0 else noise.theta
    found = [
        (bounds.selective_direction(selective.inner, selective.gradient), slope),
        (bounds.descent_step(*on_steps, eta, of_steps), risk),
        (bounds.monotone_descent(*on_steps, eta, of_steps), risk),
        (bounds.distance_a_posteriori(run.distance, origin.risk, run.risk, lam, eta, beta), least),
        (a_priori, least),
        (by_recursion, noise.theta),
        (bounds.smallest_distance(a_priori, by_recursion), noise.theta),
        (bounds.same_theta_gap(run.same_theta_gap, run.distance, h), noise.outputs),
        (
            bounds.parameter_gap(run.parameter_gap, run.steps, h, largest, run.largest_residual, sigma, lam, eta),
            noise.theta,
        ),
        (bounds.output_gap(run.output_gap, run.parameter_gap, h, largest, sigma), noise.outputs),
        (bounds.kernel_drift(run.kernel_drift, run.distance, h, sigma), noise.share * sigma**2),
    ]
    return [
        *(dataclasses.replace(one, rounding=rounding) for one, rounding in found),
        dataclasses.replace(limit, value=limit.value[1:], measured=limit.measured[1:]),  # it starts as an equality
        *_as_layers_are_added(origin.kernel, lam),
    ]


def _as_layers_are_added(kernel: Kernel, lam: float) -> list[Bound]:
    """Theory 7 along the layers; nothing where there is one group of blocks only."""
    groups = {name.split("/")[0]: layer_index(name) for name in kernel.parts}
    order = sorted(groups, key=lambda name: (groups[name] is not None, -(groups[name] or 0)))
    chain = [order[:k] for k in range(1, len(order) + 1)]
    return bounds.chain_bounds(kernel, chain, lam) if len(chain) > 1 else []


def _constants(run: Descent, samples: _Samples) -> Row:
    """The constants of the bounds at one λ."""
    return {
        "D": run.largest_distance,
        "rho": run.largest_residual,
        "G": run.largest_gradient,
        "H_sampled": samples.within("lipschitz", run.largest_distance),
        "beta_sampled": samples.within("beta", run.largest_distance),
    }


def _measurements(run: Descent, labels: Row) -> list[Row]:
    names = ("distance", "risk", "same_theta_gap", "parameter_gap", "output_gap", "kernel_drift", "ratio")
    columns = {name: getattr(run, name) for name in names} | {"limit_gap": run.limit_gap[1:]}
    return [
        {**labels, "step": int(t), **{name: float(values[i]) for name, values in columns.items()}}
        for i, t in enumerate(run.steps)
    ]


def slopes(runs: Sequence[Descent]) -> dict[str, float | None]:
    """Returns the log-log slope in λ of what was measured at the end, between the two largest λ (theory 5).

    Args:
        runs: Of the sweep.

    Returns:
        By name; `None` where there are not two λ above 0, or something vanishes.
    """
    two = sorted((run for run in runs if run.lam > 0), key=lambda run: run.lam)[-2:]
    found: dict[str, float | None] = {}
    for name in _SCALING:
        ends = [float(getattr(run, name)[-1]) for run in two]
        known = len(ends) == 2 and min(ends) > 0
        found[name] = float(np.log(relative(ends[1], ends[0])) / np.log(two[1].lam / two[0].lam)) if known else None
    return found
