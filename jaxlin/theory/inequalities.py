"""How far fine-tuning moves, and how good its linearization is: the inequalities of theory 3 to 6.

All are of the *summed* loss `R = ½‖f − y‖²` with the pull `(λ/2)‖θ − θ₀‖²`, and of its η (theory 0). Those of sections
4 and 5(b), (c) are of full-batch descent with a constant step and the coupled pull: `descent` says whether that is what
was run. β, H are suprema over a set that holds both trajectories; from samples they are estimates from below (theory
8), and `sampled=True` says so in the bound. Measured values may be arrays, one entry a step.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real

from jaxlin.errors import InputError
from jaxlin.theory.bound import Bound, bound

Values = float | Real[np.ndarray, "..."]

_DESCENT = "full-batch descent, constant step, coupled pull, no momentum"


def selective_direction(gradient_dot_update: Values, gradient_norm: Values) -> Bound:
    """Returns the bound of `⟨g, u⟩` from below by ‖g‖², for the update u = g + λsδ of the selective pull (theory 3).

    Args:
        gradient_dot_update: ⟨g_t, u_t⟩.
        gradient_norm: ‖g_t‖ of the data loss alone.
    """
    return bound("3 ⟨g,u⟩ ≥ ‖g‖²", np.square(gradient_norm), gradient_dot_update, lower=True)


def descent_step(
    risk: Values,
    risk_next: Values,
    gradient_dot_update: Values,
    update_norm: Values,
    learning_rate: float,
    beta: float,
    *,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of the risk after a step `θ − ηu` by `R − η⟨g, u⟩ + (βη²/2)‖u‖²` (theory 3).

    Args:
        risk: R(θ_t).
        risk_next: R(θ_t − ηu_t).
        gradient_dot_update: ⟨g_t, u_t⟩.
        update_norm: ‖u_t‖.
        learning_rate: η.
        beta: Smoothness of R on the step.
        sampled: Whether β is an estimate from below.
    """
    eta = learning_rate
    value = np.asarray(risk) - eta * np.asarray(gradient_dot_update) + beta * eta**2 / 2 * np.square(update_norm)
    return bound("3 R after a step", value, risk_next, sampled=sampled)


def monotone_descent(
    risk: Values,
    risk_next: Values,
    gradient_dot_update: Values,
    update_norm: Values,
    learning_rate: float,
    beta: float,
    *,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of the risk after a step by the risk before it, for `η ≤ 2⟨g, u⟩/(β‖u‖²)` (theory 3).

    Arguments as for `descent_step`; the condition is that of every step.
    """
    limit = 2 * np.asarray(gradient_dot_update) - learning_rate * beta * np.square(update_norm)
    return bound(
        "3 R does not grow", risk, risk_next, {"η ≤ 2⟨g,u⟩/(β‖u‖²)": bool(np.all(limit >= 0))}, sampled=sampled
    )


def _short_steps(learning_rate: float, beta: float, lam: float, descent: bool) -> dict[str, bool]:
    """Conditions of 4(a) and (b)."""
    return {_DESCENT: descent, "η ≤ 1/(β+λ)": learning_rate * (beta + lam) <= 1, "λ > 0": lam > 0}


def distance_a_posteriori(
    distance: Values,
    risk0: float,
    risk: Values,
    lam: float,
    learning_rate: float,
    beta: float,
    *,
    descent: bool = True,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of ‖δ_t‖ by `√(2(R(θ₀) − R(θ_t))/λ)` (theory 4(a)).

    Args:
        distance: ‖δ_t‖.
        risk0: R(θ₀).
        risk: R(θ_t).
        lam: λ.
        learning_rate: η.
        beta: Smoothness of R.
        descent: Whether what was run is descent as the module says.
        sampled: Whether β is an estimate from below.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = (
            np.sqrt(np.maximum(2 * (risk0 - np.asarray(risk)) / lam, 0))
            if lam > 0
            else np.full(np.shape(distance), np.inf)
        )
    return bound("4(a) ‖δ_t‖", value, distance, _short_steps(learning_rate, beta, lam, descent), sampled=sampled)


def distance_a_priori(
    distance: Values,
    risk0: float,
    lam: float,
    learning_rate: float,
    beta: float,
    *,
    descent: bool = True,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of ‖δ_t‖ by `√(2R(θ₀)/λ)`, known before a step is taken (theory 4(b)); arguments as for (a)."""
    value = np.full(np.shape(distance), (2 * risk0 / lam) ** 0.5 if lam > 0 else np.inf)
    return bound("4(b) ‖δ_t‖", value, distance, _short_steps(learning_rate, beta, lam, descent), sampled=sampled)


def pull_sum(steps: Values, lam: float, learning_rate: float) -> Float[np.ndarray, ...]:
    """Returns `c_t = (1 − (1−ηλ)^t)/λ`, and ηt at λ = 0 (theory 4(c)); for ηλ ≤ 1."""
    steps = np.asarray(steps, float)
    if not lam:
        return learning_rate * steps
    with np.errstate(divide="ignore", invalid="ignore"):  # ηλ = 1: log 0, and 0·log 0 at t = 0
        decayed = np.where(steps > 0, -np.expm1(steps * np.log1p(-min(learning_rate * lam, 1.0))), 0.0)
    return np.asarray(decayed / lam)


def distance_by_recursion(
    distance: Values, steps: Values, largest_gradient: float, lam: float, learning_rate: float, *, descent: bool = True
) -> Bound:
    """Returns the bound of ‖δ_t‖ by `G c_t` (theory 4(c)).

    Args:
        distance: ‖δ_t‖.
        steps: t of each.
        largest_gradient: G, the largest ‖g_k‖ of the summed data loss on the way (of minibatches, scaled to the sum).
        lam: λ.
        learning_rate: η.
        descent: Whether what was run is descent as the module says, or the same with minibatches.
    """
    conditions = {_DESCENT: descent, "ηλ ≤ 1": learning_rate * lam <= 1}
    return bound("4(c) ‖δ_t‖", largest_gradient * pull_sum(steps, lam, learning_rate), distance, conditions)


def smallest_distance(a_priori: Bound, by_recursion: Bound) -> Bound:
    """Returns the smaller of 4(b) and 4(c) at every step, of those that apply (theory 4)."""
    both = [a_priori, by_recursion]
    used = [one for one in both if one.applies] or both
    conditions = {name: met for one in used for name, met in one.conditions.items()}
    value, sampled = np.min([one.value for one in used], axis=0), any(one.sampled for one in used)
    return bound("4 ‖δ_t‖, smaller", value, a_priori.measured, conditions, sampled=sampled)


def stationary_distance(gradient_norm: Values, lam: float) -> Float[np.ndarray, ...]:
    """Returns ‖δ*‖ at a stationary point of the objective with the coupled pull, `‖J(θ*)ᵀ r(θ*)‖/λ` (theory 4).

    Args:
        gradient_norm: ‖J(θ*)ᵀ r(θ*)‖, of the summed data loss alone.
        lam: λ, above 0.

    Raises:
        InputError: If λ is not positive.
    """
    if not lam > 0:
        raise InputError(f"lam={lam}; expected above 0: without a pull a stationary point may lie anywhere")
    return np.asarray(np.asarray(gradient_norm, np.float64) / lam)


def same_theta_gap(gap: Values, distance: Values, lipschitz: float, *, sampled: bool = True) -> Bound:
    """Returns the bound of ‖f(θ) − f̄(θ)‖, over all examples and outputs, by `(H/2)‖θ − θ₀‖²`, at any θ (theory 5(a)).

    Args:
        gap: ‖f(θ) − f̄(θ)‖ at the same θ.
        distance: ‖θ − θ₀‖.
        lipschitz: H, of the stacked Jacobian.
        sampled: Whether H is an estimate from below.
    """
    return bound("5(a) ‖f(θ)−f̄(θ)‖", lipschitz / 2 * np.square(distance), gap, sampled=sampled)


def parameter_gap(
    gap: Values,
    steps: Values,
    lipschitz: float,
    largest_distance: float,
    largest_residual: float,
    sigma: float,
    lam: float,
    learning_rate: float,
    *,
    descent: bool = True,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of ‖θ_t − θ̄_t‖ by `c_t H (Dρ + σD²/2)` (theory 5(b)).

    Args:
        gap: ‖θ_t − θ̄_t‖.
        steps: t of each.
        lipschitz: H.
        largest_distance: D, the largest ‖δ_t‖ on the way.
        largest_residual: ρ, the largest ‖r(θ_t)‖.
        sigma: σ = ‖J₀‖₂.
        lam: λ.
        learning_rate: η.
        descent: Whether what was run is descent as the module says.
        sampled: Whether H is an estimate from below.
    """
    large = largest_distance * largest_residual + sigma * largest_distance**2 / 2
    value = pull_sum(steps, lam, learning_rate) * lipschitz * large
    return bound("5(b) ‖θ_t−θ̄_t‖", value, gap, _stable(lam, learning_rate, sigma, descent), sampled=sampled)


def output_gap(
    gap: Values,
    parameter_gap: Values,
    lipschitz: float,
    largest_distance: float,
    sigma: float,
    *,
    sampled: bool = True,
) -> Bound:
    """Returns the bound of ‖f(θ_t) − f̄(θ̄_t)‖ by `HD²/2 + σ‖θ_t − θ̄_t‖` (theory 5(c)).

    It holds for any two points of which the first lies within D of θ₀.

    Args:
        gap: ‖f(θ_t) − f̄(θ̄_t)‖.
        parameter_gap: ‖θ_t − θ̄_t‖.
        lipschitz: H.
        largest_distance: D.
        sigma: σ = ‖J₀‖₂.
        sampled: Whether H is an estimate from below.
    """
    value = lipschitz * largest_distance**2 / 2 + sigma * np.asarray(parameter_gap)
    return bound("5(c) ‖f(θ_t)−f̄(θ̄_t)‖", value, gap, sampled=sampled)


def kernel_drift(drift: Values, distance: Values, lipschitz: float, sigma: float, *, sampled: bool = True) -> Bound:
    """Returns the bound of ‖K_t − K₀‖₂ by `2σHD + H²D²`, at any θ within D of θ₀ (theory 5(d)).

    Args:
        drift: ‖K_t − K₀‖₂.
        distance: ‖θ_t − θ₀‖.
        lipschitz: H.
        sigma: σ = ‖J₀‖₂.
        sampled: Whether H is an estimate from below.
    """
    moved = lipschitz * np.asarray(distance)
    return bound("5(d) ‖K_t−K₀‖₂", 2 * sigma * moved + moved**2, drift, sampled=sampled)


def contraction(
    distance_to_limit: Float[np.ndarray, " T"],
    steps: Real[np.ndarray, " T"],
    largest: float,
    smallest: float,
    lam: float,
    learning_rate: float,
    *,
    linear: bool = True,
    descent: bool = True,
) -> Bound:
    """Returns the bound of the distance to the minimiser after t steps, `q^t` times the first entry (theory 6).

    `q = max(|1 − η(μ_max+λ)|, |1 − η(μ_min+λ)|)`; at the best fixed step, `η = 2/(μ_max + μ_min + 2λ)`, it is
    `(κ_λ − 1)/(κ_λ + 1)`.

    Args:
        distance_to_limit: ‖δ_t − δ*‖ of each step, the first of them where the bound starts.
        steps: t of each.
        largest: μ_max.
        smallest: μ_min on the range of J₀ᵀ, in which δ stays: the smallest eigenvalue that is not zero.
        lam: λ.
        learning_rate: η.
        linear: Whether it is the linearized model that was run.
        descent: Whether what was run is descent as the module says.
    """
    edges = 1 - learning_rate * (np.array([largest, smallest]) + lam)
    rate = float(np.abs(edges).max())
    value = distance_to_limit[0] * rate ** (np.asarray(steps) - steps[0])
    conditions = {"the linearized model": linear, _DESCENT: descent, "q < 1": rate < 1}
    # Steps of rounding size are taken around the limit for ever.
    return bound(
        "6 ‖δ̄_t−δ̄*‖", value, distance_to_limit, conditions, rounding=1e-12 * float(np.max(distance_to_limit, initial=0))
    )


def _stable(lam: float, learning_rate: float, sigma: float, descent: bool) -> dict[str, bool]:
    """Conditions of 5(b)."""
    return {_DESCENT: descent, "η ≤ 1/(λ+σ²)": learning_rate * (lam + sigma**2) <= 1 + 1e-12}
