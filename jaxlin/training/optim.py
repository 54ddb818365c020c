"""The pull towards the pretrained weights, as optax transformations (theory 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxlin.errors import InputError
from jaxlin.tunable import block_factors, leaf_paths

MODES = ("coupled", "selective", "decoupled", "prox", "spd")


class ProximalState(NamedTuple):
    """State of `proximal`.

    Attributes:
        theta0: The point that is pulled to: the parameters given to `init`.
        lam: λ, before the factors of `lam_blocks`, as an array, so that a sweep over it compiles once
            (`state._replace(lam=...)`).
        rate: Factor of the inner optimizer's step and of η, 1 at first; an array for the same reason.
        steps: Steps taken, for a learning-rate schedule.
        inner: State of the wrapped optimizer.
    """

    theta0: PyTree
    lam: Array
    rate: Array
    steps: Array
    inner: optax.OptState


def _inner_product(a: PyTree, b: PyTree) -> Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, a, b))


def _spd(lam: Array, g: Array, step: Array, delta: Array) -> Array:
    """One tensor's step under selective projection decay: back from `θ + T(g)` where it moved outwards."""
    ahead = delta + step
    norm = jnp.linalg.norm(ahead)
    moved = jnp.where(norm > 0, (norm - jnp.linalg.norm(delta)) / jnp.where(norm > 0, norm, 1), 0)
    active = jnp.vdot(g, delta) > 0
    return step - jnp.where(active, lam * jnp.clip(moved, 0, 1), 0).astype(step.dtype) * ahead


def proximal(
    inner: optax.GradientTransformation,
    lam: float,
    mode: str = "coupled",
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    per_tensor: bool = False,
    lam_blocks: Mapping[str, float] | None = None,
    learning_rate_blocks: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    r"""Wraps an optimizer with an :math:`\ell_2` pull to where the parameters started.

    With :math:`T(g)` the inner optimizer's step from gradient g (sign included), :math:`\delta=\theta-\theta_0`, the
    new parameters are (theory 1)

    .. math::
        \text{coupled:}   &\quad \theta + T(g+\lambda\delta) \\
        \text{selective:} &\quad \theta + T(g+\lambda s\delta), \quad s = 1[\langle g,\delta\rangle \ge 0] \\
        \text{decoupled:} &\quad \theta + T(g) - \eta\lambda\delta \\
        \text{prox:}      &\quad (\theta + T(g) + \eta\lambda\theta_0)/(1+\eta\lambda) \\
        \text{spd:}       &\quad \tilde\theta - \lambda\rho(\tilde\theta-\theta_0)
        \text{ where } \langle g,\delta\rangle>0,
        \quad \tilde\theta = \theta + T(g)

    with :math:`\rho = \mathrm{clip}((\|\tilde\theta-\theta_0\|-\|\theta-\theta_0\|)/\|\tilde\theta-\theta_0\|, 0, 1)`
    by tensor. The gradient given to `update` is that of the data loss alone.

    Args:
        inner: An optax optimizer, learning rate included.
        lam: λ ≥ 0 in the normalisation of the loss that is differentiated: for the mean over n examples it
            is λ/n of theory 0 (`spd`: a dimensionless strength).
        mode: One of the five.
        learning_rate: η of `decoupled` and `prox`, a number or a schedule of the step.
        per_tensor: Whether `selective` decides for each tensor apart (as SPD does) rather than for all of θ.
        lam_blocks: Factors of λ by block: regular expression, searched for in the `/`-joined path of a leaf, to
            factor; the first that matches counts, 1 where none does.
        learning_rate_blocks: Likewise factors of the step T(g), and of η (`{"lora_B": 16}` is LoRA+).

    Returns:
        The transformation; `update` needs `params`. Its state is a `ProximalState`.

    Raises:
        InputError: If λ is negative or NaN, the mode is unknown, or η is missing where it is needed; from `init`, if a
            pattern matches no leaf.

    Example:
        >>> import jax.numpy as jnp, optax, jaxlin as jl
        >>> tx = jl.optim.proximal(optax.sgd(0.5), lam=1.0)
        >>> theta = jnp.array([2.0])
        >>> state = tx.init(jnp.zeros(1))  # pulled to 0
        >>> updates, state = tx.update(jnp.array([1.0]), state, theta)
        >>> float(updates[0])  # -0.5 (1 + 1·2)
        -1.5

    References:
        Tian et al. 2024, "Rethinking Weight Decay for Robust Fine-Tuning" (Selective Projection Decay).
    """
    if not 0 <= lam < math.inf:
        raise InputError(f"lam={lam}; expected at least 0, and finite")
    if mode not in MODES:
        raise InputError(f"pull mode {mode!r} is unknown; expected one of {', '.join(MODES)}")
    if mode in ("decoupled", "prox") and learning_rate is None:
        raise InputError(f"mode={mode!r} needs the learning_rate: its pull is scaled by it")

    def factors(params: PyTree, patterns: Mapping[str, float] | None, what: str) -> PyTree:
        by_path = block_factors(leaf_paths(params), patterns, what)
        return jax.tree.unflatten(jax.tree.structure(params), list(by_path.values()))

    def init(params: PyTree) -> ProximalState:
        for patterns, what in ((lam_blocks, "lam_blocks"), (learning_rate_blocks, "learning_rate_blocks")):
            factors(params, patterns, what)  # for its errors
        theta0 = jax.tree.map(jnp.array, params)  # a copy: params may be donated to a step
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return ProximalState(
            theta0,
            jnp.asarray(lam, dtype),
            jnp.ones((), dtype),
            jnp.zeros((), jnp.int32),
            inner.init(params),
        )

    def update(grads: PyTree, state: ProximalState, params: PyTree | None = None) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError("proximal needs the parameters: call update(grads, state, params)")
        delta = jax.tree.map(jnp.subtract, params, state.theta0)
        weights = factors(params, lam_blocks, "lam_blocks")
        rates = jax.tree.map(
            lambda factor: factor * state.rate, factors(params, learning_rate_blocks, "learning_rate_blocks")
        )
        lams = jax.tree.map(lambda weight, p: (state.lam * weight).astype(p.dtype), weights, params)

        pulled = grads
        if mode == "coupled":
            pulled = jax.tree.map(lambda g, lam, d: g + lam * d, grads, lams, delta)
        elif mode == "selective":
            if per_tensor:
                active = jax.tree.map(lambda g, d: jnp.vdot(g, d) >= 0, grads, delta)
            else:
                whole = _inner_product(grads, delta) >= 0
                active = jax.tree.map(lambda _: whole, grads)
            pulled = jax.tree.map(lambda g, lam, d, s: g + jnp.where(s, lam, 0) * d, grads, lams, delta, active)
        moves, inner_state = inner.update(pulled, state.inner, params)
        moves = jax.tree.map(lambda move, rate: move * rate.astype(move.dtype), moves, rates)
        if mode == "spd":
            moves = jax.tree.map(_spd, lams, grads, moves, delta)
        elif mode in ("decoupled", "prox"):
            eta: Any = learning_rate(state.steps) if callable(learning_rate) else learning_rate
            strengths = jax.tree.map(lambda lam, rate: (eta * rate * lam).astype(lam.dtype), lams, rates)
            moves = jax.tree.map(lambda move, s, d: move - s * d, moves, strengths, delta)
            if mode == "prox":
                moves = jax.tree.map(lambda move, s: move / (1 + s), moves, strengths)
        return moves, state._replace(steps=state.steps + 1, inner=inner_state)

    return optax.GradientTransformation(init, update)
