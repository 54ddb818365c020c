"""Closed forms of the linearized dynamics (theory 2).

With `s = μ + λ`, the parameters after time t are `δ_t = −J₀ᵀ V φ_t(s) Vᵀ r₀`; each rule of descent has its own
φ. All are for the *summed* loss `½‖r‖² + (λ/2)‖δ‖²`; `jaxlin.training.losses` converts to a trainer's mean.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError


def phi_limit(s: Float[np.ndarray, " m"], noise_floor: float = 0.0) -> Float[np.ndarray, " m"]:
    """φ at infinity, `1/s`; 0 where `s` does not exceed the noise floor (the pseudo-inverse)."""
    live = s > noise_floor
    return np.where(live, 1 / np.where(live, s, 1), 0)


def check_stable(s: Float[np.ndarray, " m"], learning_rate: float, momentum: float = 0.0) -> None:
    """Checks that descent with heavy-ball momentum converges.

    Raises:
        InputError: If momentum is not at least 0 and below 1, or η not above 0 and below `2(1 + b)/max(s)`.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum}; expected at least 0 and below 1")
    top = float(np.max(s, initial=0))
    if not learning_rate > 0 or learning_rate * top >= 2 * (1 + momentum):
        limit = 2 * (1 + momentum) / top if top > 0 else float("inf")
        raise InputError(
            f"descent diverges at learning_rate={learning_rate:g}: expected above 0 and below "
            f"2(1+b)/(μ₁+λ) = {limit:g} (for the summed loss)"
        )


def phi_gradient_descent(s: Float[np.ndarray, " m"], steps: int, learning_rate: float) -> Float[np.ndarray, " m"]:
    """Returns φ after gradient-descent steps, `(1 − (1 − ηs)^t)/s`, and ηt at s = 0.

    Raises:
        InputError: If descent diverges.
    """
    check_stable(s, learning_rate)
    x = learning_rate * s
    with np.errstate(divide="ignore", invalid="ignore"):
        # For x < 1/2 by log1p and expm1: no digits are lost where x is small.
        small = -np.expm1(steps * np.log1p(-np.minimum(x, 0.5))) / s
        large = (1 - (1 - x) ** steps) / s
    return np.where(s <= 0, learning_rate * steps, np.where(x < 0.5, small, large))


def phi_flow(s: Float[np.ndarray, " m"], time: float) -> Float[np.ndarray, " m"]:
    """φ of gradient flow, `(1 − e^{−st})/s`, and t at s = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(s > 0, -np.expm1(-s * time) / s, time)


def phi_heavy_ball(
    s: Float[np.ndarray, " m"], steps: int, learning_rate: float, momentum: float
) -> Float[np.ndarray, " m"]:
    """Returns φ after heavy-ball steps `v ← bv + g`, `θ ← θ − ηv`, by powers of the 2×2 recursion of each direction.

    Args:
        s: μ + λ.
        steps: t.
        learning_rate: η.
        momentum: b, at least 0 and below 1.

    Raises:
        InputError: If b is out of range, or descent diverges.
    """
    check_stable(s, learning_rate, momentum)
    # State (a, v, 1) for r₀ = −1, so that φ is a itself: v ← b v + s a − 1, a ← a − η v.
    step = np.zeros((len(s), 3, 3))
    step[:, 1, 0], step[:, 1, 1], step[:, 1, 2] = s, momentum, -1
    step[:, 0] = -learning_rate * step[:, 1]
    step[:, 0, 0] += 1
    step[:, 2, 2] = 1
    return np.linalg.matrix_power(step, steps)[:, 0, 2]


def phi_at(
    s: Float[np.ndarray, " m"],
    t: float | None = None,
    learning_rate: float | None = None,
    momentum: float = 0.0,
    noise_floor: float = 0.0,
) -> Float[np.ndarray, " m"]:
    """Returns φ of the rule that the options name.

    Args:
        s: μ + λ.
        t: Gradient-descent steps where `learning_rate` is given, else time of the flow; `None` or infinity: the limit.
        learning_rate: η of the summed loss.
        momentum: Heavy-ball momentum of gradient descent.
        noise_floor: Directions with s at or below it count as null space in the limit.

    Raises:
        InputError: If t is negative, the step diverges, or momentum is given without a learning rate.
    """
    t = math.inf if t is None else t
    if not t >= 0:
        raise InputError(f"t={t}; expected at least 0 (None: the limit)")
    if momentum and learning_rate is None:
        raise InputError("momentum needs a learning_rate: the closed form is that of the discrete recursion")
    if learning_rate is not None:
        check_stable(s, learning_rate, momentum)
    if t == math.inf:
        return phi_limit(s, noise_floor)
    if learning_rate is None:
        return phi_flow(s, t)
    if t != int(t):
        raise InputError(f"t={t} counts gradient-descent steps; expected a whole number")
    if momentum:
        return phi_heavy_ball(s, int(t), learning_rate, momentum)
    return phi_gradient_descent(s, int(t), learning_rate)
