"""Descent at one λ as the bounds of theory 3 to 6 speak of it: run, and measured at chosen steps. In float64."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.linearize import linearize
from jaxlin.ntk.change import DRIFT, STACKED, DenseChange, ProductChange, change, distance
from jaxlin.ntk.engine import kernel_from_jacobian, ntk
from jaxlin.ntk.jacobian import to_float64
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.lanczos import Extreme
from jaxlin.ntk.lipschitz import moved, random_direction
from jaxlin.ntk.products import NTKOperator, ntk_vector_product
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.training.cached import cached_linearized
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import targets, to_mean
from jaxlin.training.smoothness import smoothness
from jaxlin.training.trainer import TrainResult, predict, train
from jaxlin.tunable import Tunable

Tick = Callable[[int], None]
"""Called with the number of units just done."""

PartCache = Callable[[Mapping[str, Any], Callable[[], Any]], Any]
"""Called with what a part of long work is of, and with a function of no arguments that computes it: returns the part,
computed or from before. Both are of what JSON holds; numbers of the part may be NaN or infinite."""

BETA_TOLERANCE = 1e-2
"""Relative residual of β away from θ₀, where Lanczos starts from θ₀'s vector."""


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """What is known at θ₀, in float64.

    Attributes:
        tun: The model.
        linear: Its linearization, on `linear_data`: from J₀ where that is held.
        data: Training examples; in one bucket where a step takes them all at once, and pads to the longest anyway.
        linear_data: The same for `linear`.
        measure: Norms of `J(θ) − J₀` and `K_θ − K₀`.
        operator: K₀ as products.
        kernel: K₀, a block a layer.
        regression: Of the linearized model, at λ = 0.
        y: Targets `[N, C]`.
        sigma: σ = ‖J₀‖₂.
        beta: Smoothness of R at θ₀.
        parts: That a step is computed in.
    """

    tun: Tunable
    linear: Tunable
    data: Dataset
    linear_data: Dataset
    measure: DenseChange | ProductChange
    operator: NTKOperator
    kernel: Kernel
    regression: KernelRegression
    y: Float[np.ndarray, "N C"]
    sigma: float
    beta: Extreme
    parts: int

    @classmethod
    def compute(
        cls, tun: Tunable, data: Dataset, method: str, seed: int, memory_budget: int, parts: int, cache: PartCache
    ) -> Origin:
        """Computes it, under x64.

        Args:
            tun: The model.
            data: Training examples.
            method: See `jaxlin.ntk.change.change`.
            seed: Of Lanczos's start.
            memory_budget: Bytes for Jacobians.
            parts: That a step is computed in.
            cache: Of β, which takes longest.

        Returns:
            What is known.

        Raises:
            InputError: If the kernel at θ₀ vanishes.
        """
        if parts == 1:
            data = dataclasses.replace(data, buckets=data.buckets[-1:])
        exact = jax.tree.map(jnp.asarray, to_float64(tun))
        measure = change(exact, data, method=method, seed=seed, memory_budget=memory_budget)
        sigma = measure.sigma().value
        if not sigma > 0:
            raise InputError("the kernel at θ₀ vanishes: nothing that is tuned moves the outputs there")
        linear, linear_data = linearize(exact), data
        if isinstance(measure, DenseChange):
            linear, (linear_data,) = cached_linearized(exact, [data], [measure.start])
            kernel = kernel_from_jacobian(measure.start, measure.start, exact.grouped("layer"), "highest", None, False)
        else:
            kernel = ntk(exact, data, blocks="layer", dtype="float64", memory_budget=memory_budget, check_examples=0)
        f0 = predict(exact, exact.theta0, data)
        y = np.asarray(targets(data["labels"], f0.shape[1]), np.float64)
        operator = ntk_vector_product(exact, data, dtype="float64", check_examples=0)

        def beta_start() -> dict[str, Any]:
            found = smoothness(operator, rng=seed)
            vector = base64.b64encode(found.vector.tobytes()).decode()  # as long as theta: no list of numbers
            return {"value": found.value, "residual": found.residual, "vector": vector}

        found = cache({"part": "smoothness at θ₀", "seed": seed}, beta_start)
        beta = Extreme(found["value"], found["residual"], np.frombuffer(base64.b64decode(found["vector"])))
        regression = kernel_regression(kernel, y, f0, 0.0)
        return cls(exact, linear, data, linear_data, measure, operator, kernel, regression, y, sigma, beta, parts)

    @property
    def risk(self) -> float:
        """R(θ₀)."""
        return 0.5 * float(np.sum((self.regression.f0 - self.y) ** 2))

    def outputs(self, theta: PyTree) -> tuple[Float[np.ndarray, "N C"], Float[np.ndarray, "N C"]]:
        """Returns f(θ) and f̄(θ) on the training examples."""
        return predict(self.tun, theta, self.data), predict(self.linear, theta, self.linear_data)

    def limit(self, lam: float) -> PyTree:
        """Returns the θ that descent of the linearized model converges to (theory 2)."""
        coefficients = dataclasses.replace(self.regression, ridge=lam).coefficients()
        return jax.tree.map(lambda leaf, d: leaf + np.asarray(d), self.tun.theta0, self.operator.pull(coefficients))


@dataclasses.dataclass(frozen=True, eq=False)
class Descent:
    """Full-batch descent at one λ, full and linearized, measured.

    Everything is of the summed loss (theory 0). Arrays have an entry for each of `steps`.

    Attributes:
        lam: λ.
        learning_rate: η.
        steps: t, ascending, from 1.
        distance: ‖δ_t‖.
        risk: R(θ_t).
        same_theta_gap: ‖f(θ_t) − f̄(θ_t)‖.
        parameter_gap: ‖θ_t − θ̄_t‖.
        output_gap: ‖f(θ_t) − f̄(θ̄_t)‖.
        kernel_drift: ‖K_t − K₀‖₂.
        ratio: ‖J(θ_t) − J₀‖₂/‖δ_t‖.
        limit_gap: ‖δ̄_t − δ̄*‖ of the linearized run, with one more entry, t = 0, in front.
        largest_distance: D, over all steps.
        largest_residual: ρ, likewise.
        largest_gradient: G, likewise.
        lipschitz: Radius ‖δ‖ and `ratio` of every θ sampled: those of the steps, the one halfway to the last, and those
            in random directions.
        smoothness: Radius and smoothness of R of some of them: the last, and the first in a random direction.
    """

    lam: float
    learning_rate: float
    steps: Int[np.ndarray, " T"]
    distance: Float[np.ndarray, " T"]
    risk: Float[np.ndarray, " T"]
    same_theta_gap: Float[np.ndarray, " T"]
    parameter_gap: Float[np.ndarray, " T"]
    output_gap: Float[np.ndarray, " T"]
    kernel_drift: Float[np.ndarray, " T"]
    ratio: Float[np.ndarray, " T"]
    limit_gap: Float[np.ndarray, " S"]
    largest_distance: float
    largest_residual: float
    largest_gradient: float
    lipschitz: Float[np.ndarray, "L 2"]
    smoothness: Float[np.ndarray, "B 2"]


@dataclasses.dataclass(frozen=True, eq=False)
class SelectiveDescent:
    """Full-batch descent of the model with the selective pull (theory 3); an entry a step.

    Attributes:
        learning_rate: η.
        risk: R(θ_t).
        risk_next: R(θ_{t+1}).
        inner: ⟨g_t, u_t⟩.
        update: ‖u_t‖.
        gradient: ‖g_t‖.
        largest_distance: Largest ‖δ_t‖.
    """

    learning_rate: float
    risk: Float[np.ndarray, " T"]
    risk_next: Float[np.ndarray, " T"]
    inner: Float[np.ndarray, " T"]
    update: Float[np.ndarray, " T"]
    gradient: Float[np.ndarray, " T"]
    largest_distance: float


Run = TypeVar("Run", Descent, SelectiveDescent)


def _train(
    origin: Origin, what: str, lam: float, learning_rate: float, pull: str, keep: Sequence[int], tick: Tick
) -> TrainResult:
    """Runs descent of one arm up to the last step to be kept."""
    tun, data = (origin.linear, origin.linear_data) if what == "linearized" else (origin.tun, origin.data)
    n = len(data)
    rate = to_mean(learning_rate, n, "learning_rate")
    config = TrainConfig(
        optimizer="sgd",
        learning_rate=rate,
        batch_size=n,
        gradient_accumulation_steps=min(origin.parts, n),
        group_by_length=origin.parts > 1,
        max_steps=max(keep),
        lam=lam,
        pull=pull,
    )
    try:
        return train(tun, data, None, config, keep=keep, log=lambda _: tick(int(what != "linearized")))
    except TrainingDivergedError as error:
        raise TrainingDivergedError(f"{what} at λ = {lam:g}: {error}") from error


def descend(
    origin: Origin,
    lam: float,
    learning_rate: float,
    steps: Sequence[int],
    directions: int,
    seed: int,
    trained: Tick,
    measured: Tick,
) -> Descent:
    """Runs descent with the coupled pull, full and linearized, and measures it.

    Args:
        origin: What is known at θ₀.
        lam: λ.
        learning_rate: η.
        steps: Where to measure, ascending, from 1; the last is the run's length.
        directions: Random directions in which θ are sampled too, at the largest distance of the run.
        seed: Of them.
        trained: Called with 1 for each step of the full model.
        measured: Called with 1 for each norm, or β, that is measured somewhere.

    Returns:
        What was measured.

    Raises:
        TrainingDivergedError: If an arm diverges; names it and λ.
        FloatingPointError: If a norm, or β, does not converge.
    """
    n = len(origin.data)
    full, linear = (
        _train(origin, arm, lam, learning_rate, "coupled", (0, *steps), trained) for arm in ("full", "linearized")
    )
    rows: list[dict[str, float]] = []
    for t in steps:
        theta, other = full.states[t].theta, linear.states[t].theta
        f, same_theta = origin.outputs(theta)
        linear_outputs = predict(origin.linear, other, origin.linear_data)
        norms, away = origin.measure.norms(theta, (STACKED, DRIFT)), distance(theta, origin.tun.theta0)
        measured(1)
        rows.append(
            {
                "distance": away,
                "risk": 0.5 * float(np.sum((f - origin.y) ** 2)),
                "same_theta_gap": float(np.linalg.norm(f - same_theta)),
                "parameter_gap": distance(theta, other),
                "output_gap": float(np.linalg.norm(f - linear_outputs)),
                "kernel_drift": norms[DRIFT].value,
                "ratio": norms[STACKED].value / away if away > 0 else 0.0,
            }
        )
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    limit, before = origin.limit(lam), [row["loss"] * n for row in full.history]
    largest = max(row["distance"] for row in full.history)
    lipschitz, smooth = _around(origin, full.theta, arrays["distance"][-1], largest, directions, seed, measured)
    return Descent(
        lam=lam,
        learning_rate=learning_rate,
        steps=np.array(steps),
        **arrays,
        limit_gap=np.array([distance(linear.states[t].theta, limit) for t in (0, *steps)]),
        largest_distance=largest,
        largest_residual=float(np.sqrt(2 * max(*before, arrays["risk"][-1]))),
        largest_gradient=max(row["gradient_norm"] for row in full.history) * n,
        lipschitz=np.array([*zip(arrays["distance"], arrays["ratio"], strict=True), *lipschitz]),
        smoothness=np.array(smooth),
    )


_Pairs = list[tuple[float, float]]


def _around(
    origin: Origin, last: PyTree, length: float, largest: float, directions: int, seed: int, measured: Tick
) -> tuple[_Pairs, _Pairs]:
    """Returns radius and H, and radius and β, of θ beside the steps of a run to `last`, which is `length` from θ₀."""
    start = origin.tun.theta0
    bend = functools.partial(smoothness, start=origin.beta.vector, tolerance=BETA_TOLERANCE, width=4)

    def ratio(theta: PyTree, radius: float) -> tuple[float, float]:
        changed = origin.measure.norms(theta, (STACKED,))[STACKED].value if radius > 0 else 0.0
        measured(1)
        return radius, changed / radius if radius > 0 else 0.0

    def beta(theta: PyTree, radius: float) -> tuple[float, float]:
        found = bend(origin.operator.at(theta)).value
        measured(1)
        return radius, found

    lipschitz = [ratio(jax.tree.map(lambda a, b: (a + b) / 2, last, start), length / 2)]
    smooth = [beta(last, length)]
    for k in range(directions if largest > 0 else 0):
        theta = moved(start, random_direction(start, seed, k), largest)
        lipschitz.append(ratio(theta, largest))
        if k == 0:
            smooth.append(beta(theta, largest))
    return lipschitz, smooth


def descend_selectively(
    origin: Origin, lam: float, learning_rate: float, steps: int, trained: Tick
) -> SelectiveDescent:
    """Runs descent of the model with the selective pull over whole theta, and takes every step apart.

    Args:
        origin: What is known at θ₀.
        lam: λ.
        learning_rate: η.
        steps: Their number.
        trained: Called with 1 for each step.

    Returns:
        What was measured; u from the steps taken, g from the model's own derivative.

    Raises:
        TrainingDivergedError: If it diverges; names λ.
    """
    result = _train(origin, "selective", lam, learning_rate, "selective", range(steps + 1), trained)
    thetas = [result.states[t].theta for t in range(steps + 1)]
    residuals = [predict(origin.tun, theta, origin.data) - origin.y for theta in thetas]
    risks = np.array([0.5 * float(np.sum(r**2)) for r in residuals])
    inner, update, gradients = [], [], []
    for theta, after, residual in zip(thetas, thetas[1:], residuals, strict=False):
        gradient = _flat(origin.operator.at(theta).pull(residual))
        step = (_flat(theta) - _flat(after)) / learning_rate
        inner.append(gradient @ step)
        update.append(np.linalg.norm(step))
        gradients.append(np.linalg.norm(gradient))
    return SelectiveDescent(
        learning_rate=learning_rate,
        risk=risks[:-1],
        risk_next=risks[1:],
        inner=np.array(inner),
        update=np.array(update),
        gradient=np.array(gradients),
        largest_distance=max(row["distance"] for row in result.history),
    )


def _flat(tree: PyTree) -> Float[np.ndarray, " P"]:
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def to_json(run: Descent | SelectiveDescent) -> dict[str, Any]:
    """Returns a run as JSON holds it, to the bit; its numbers may be NaN or infinite."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in dataclasses.asdict(run).items()}


def from_json(kind: type[Run], content: Mapping[str, Any]) -> Run:
    """Returns the run that `to_json` was given."""
    fields: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in content.items()}
    return kind(**fields)
