"""How the eigenvalues move when more blocks are tuned: the spectral perturbation bounds of theory 7.

All are of two disjoint sets of blocks S and T of one kernel, with `E = K_T`, so that `K_{S∪T} = K_S + E`. Eigenvalues
are those of the matrices as they were computed, in descending order, index i from 1; rounding may leave some slightly
negative, and each bound carries that as its `rounding`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.bound import Bound, bound
from jaxlin.theory.spectrum import Spectrum

Pair = tuple[Bound, Bound]
"""A bound from below and one from above."""


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbation:
    """The eigenvalues that the bounds of theory 7 are of.

    Attributes:
        base: `μ(K_S)`, descending.
        added: `μ(E)`.
        total: `μ(K_{S∪T})`.
        relative: Eigenvalues ω of `K_S^{-1/2} E K_S^{-1/2}`, descending; `None` where K_S is singular or its smallest
            eigenvalue is not resolved.
        relative_error: Rounding of the smallest and of the largest ω.
        rounding: Absolute error of the eigenvalues: `m·eps·μ_1(K_{S∪T})`, eps that of the Gram matrix.
        resolution: Smallest eigenvalue of K_{S∪T} that counts as above zero.
    """

    base: Float[np.ndarray, " m"]
    added: Float[np.ndarray, " m"]
    total: Float[np.ndarray, " m"]
    relative: Float[np.ndarray, " m"] | None
    relative_error: tuple[float, float]
    rounding: float
    resolution: float


def perturbation(kernel: Kernel, base: Iterable[str], added: Iterable[str], ridge: float = 0.0) -> Perturbation:
    """Computes the eigenvalues of K_S, E and K_{S∪T}, and those of E relative to K_S.

    Args:
        kernel: A kernel of examples with themselves, with blocks.
        base: Names of the blocks of S, or prefixes as in `Kernel.subset`.
        added: Those of T.
        ridge: λ of the summed loss: then all is of `K_S + λI` and `K_{S∪T} + λI`, and κ is κ_λ (theory 6).

    Returns:
        The eigenvalues, for `weyl`, `weyl_all_pairs`, `relative`, `condition` and `tightest`.

    Raises:
        InputError: If a name is no block, S and T share one, the kernel is not symmetric or holds NaN, or the ridge is
            negative.
    """
    if not ridge >= 0:
        raise InputError(f"ridge={ridge}; expected at least 0")
    kernel = kernel.require_symmetric("a perturbation bound")
    first, second = kernel.subset(base), kernel.subset(added)
    shared = sorted(set(first.parts) & set(second.parts))
    if shared:
        raise InputError(f"the block {shared[0]!r} is in both sets; theory 7 needs disjoint ones")
    k_s, e = first.matrix() + ridge * np.eye(len(first.matrix())), second.matrix()
    if not (np.isfinite(k_s).all() and np.isfinite(e).all()):
        raise InputError("the kernel holds NaN or infinity; check the model's weights and inputs")
    mu_s, mu_e, mu = (np.linalg.eigvalsh(matrix)[::-1] for matrix in (k_s, e, k_s + e))
    m, eps = len(mu), float(np.finfo(kernel.info.gram_dtype).eps)
    own = Spectrum.of_eigenvalues(np.clip(mu_s, 0, None), kernel.info)
    omega, error = None, (0.0, 0.0)
    if mu_s[-1] > max(own.resolution, 10 * m * eps * float(mu_s[0]), 0.0):
        omega, error = _relative(k_s, e, mu_s, mu_e)
    rounding = m * eps * max(float(mu[0]), 0.0)
    resolution = max(Spectrum.of_eigenvalues(np.clip(mu, 0, None), kernel.info).resolution, 10 * rounding)
    return Perturbation(mu_s, mu_e, mu, omega, error, rounding, resolution)


def _relative(
    k_s: Float[np.ndarray, "m m"],
    e: Float[np.ndarray, "m m"],
    mu_s: Float[np.ndarray, " m"],
    mu_e: Float[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, " m"], tuple[float, float]]:
    """Returns ω, descending, and the rounding of its two ends: `eps (‖E‖‖K_S⁻¹‖ + κ(K_S)|ω|)` times m."""
    from scipy.linalg import eigh

    omega = np.ascontiguousarray(eigh(e, k_s, eigvals_only=True)[::-1])
    unit = len(omega) * float(np.finfo(np.float64).eps) / float(mu_s[-1])
    low, high = (unit * (float(mu_e[0]) + float(mu_s[0]) * abs(float(end))) for end in (omega[-1], omega[0]))
    return omega, (low, high)


def weyl(eigenvalues: Perturbation) -> Pair:
    """Returns `μ_i(K_S) + μ_m(E) ≤ μ_i(K_{S∪T}) ≤ μ_i(K_S) + μ_1(E)`, for every i (theory 7(a))."""
    p = eigenvalues
    lower = bound("7(a) μᵢ from below", p.base + p.added[-1], p.total, lower=True, rounding=p.rounding)
    return lower, bound("7(a) μᵢ", p.base + p.added[0], p.total, rounding=p.rounding)


def weyl_all_pairs(eigenvalues: Perturbation) -> Pair:
    """Returns Weyl's inequalities for all pairs of indices, the best for every eigenvalue (theory 7(b)).

    `max_{i+j−m=k} μ_i(K_S) + μ_j(E) ≤ μ_k(K_{S∪T}) ≤ min_{i+j−1=k} μ_i(K_S) + μ_j(E)`: never looser than (a).
    """
    p, m = eigenvalues, len(eigenvalues.total)
    above = np.array([np.min(p.base[: k + 1] + p.added[k::-1]) for k in range(m)])
    below = np.array([np.max(p.base[k:] + p.added[k:][::-1]) for k in range(m)])
    lower = bound("7(b) μᵢ from below", below, p.total, lower=True, rounding=p.rounding)
    return lower, bound("7(b) μᵢ", above, p.total, rounding=p.rounding)


def relative(eigenvalues: Perturbation) -> Pair:
    """Returns `μ_i(K_S)(1 + ω_min) ≤ μ_i(K_{S∪T}) ≤ μ_i(K_S)(1 + ω_max)`, for every i (theory 7(c)).

    ω is widened by its rounding. Where K_S is not positive definite the bounds are 0 and infinity, and do not apply.
    """
    p = eigenvalues
    conditions = {"K_S ≻ 0, its smallest eigenvalue resolved": p.relative is not None}
    if p.relative is None:
        below, above = np.zeros_like(p.total), np.full_like(p.total, np.inf)
    else:
        below = p.base * (1 + p.relative[-1] - p.relative_error[0])
        above = p.base * (1 + p.relative[0] + p.relative_error[1])
    lower = bound("7(c) μᵢ from below", below, p.total, conditions, lower=True, rounding=p.rounding)
    return lower, bound("7(c) μᵢ", above, p.total, conditions, rounding=p.rounding)


def condition(eigenvalues: Perturbation) -> Pair:
    """Returns the bounds of κ(K_{S∪T}) (theory 7(d)).

    `max(1, (μ_1(K_S)+μ_m(E))/(μ_m(K_S)+μ_1(E))) ≤ κ(K_{S∪T}) ≤ (μ_1(K_S)+μ_1(E))/(μ_m(K_S)+μ_m(E))`. κ is infinite
    where the smallest eigenvalue is not resolved; the bound from above applies where its denominator is.
    """
    p = eigenvalues
    smallest = float(p.base[-1] + p.added[-1])
    resolved = smallest > p.resolution
    kappa = float(p.total[0] / p.total[-1]) if p.total[-1] > p.resolution - p.rounding else float("inf")
    above = float(p.base[0] + p.added[0]) / smallest if resolved else float("inf")
    over = max(float(p.base[-1] + p.added[0]), p.resolution)
    below = max(1.0, float(p.base[0] + p.added[-1]) / over) if over > 0 else 1.0
    lower = bound(
        "7(d) κ from below",
        below,
        kappa,
        {"K_{S∪T} does not vanish": bool(p.total[0] > 0)},
        lower=True,
        rounding=2 * below * p.rounding / over if over > 0 else 0.0,
    )
    upper = bound(
        "7(d) κ",
        above,
        kappa,
        {"μ_m(K_S) + μ_m(E) > 0, resolved": resolved},
        rounding=2 * above * p.rounding / smallest if resolved else 0.0,
    )
    return lower, upper


_OF_EIGENVALUES = {"a": weyl, "b": weyl_all_pairs, "c": relative}


def tightest(eigenvalues: Perturbation) -> Pair:
    """Returns for every i the tightest of (a), (b), (c) from below and from above, of those that apply (theory 7)."""
    pairs = [function(eigenvalues) for function in _OF_EIGENVALUES.values()]
    below = np.max([pair[0].value for pair in pairs if pair[0].applies], axis=0)
    above = np.min([pair[1].value for pair in pairs if pair[1].applies], axis=0)
    p = eigenvalues
    lower = bound("7 μᵢ from below, tightest", below, p.total, lower=True, rounding=p.rounding)
    return lower, bound("7 μᵢ, tightest", above, p.total, rounding=p.rounding)


def perturbation_table(kernel: Kernel, chain: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Sets the eigenvalues of a growing set of blocks between the bounds of theory 7.

    Args:
        kernel: A kernel of examples with themselves, with blocks.
        chain: Sets `S_1 ⊂ S_2 ⊂ …`, at least two, each of names of blocks or prefixes (`"encoder/layer_0"`).

    Returns:
        A row for every step from S_k to S_{k+1} and index i: `step` (from 1), `set` (what was added), `index` (from 1),
        `base` μᵢ(K_S), `eigenvalue` μᵢ(K_{S∪T}); `lower_a`, `upper_a`, and likewise b and c (`None` where it does not
        apply); `lower`, `upper` the tightest and `lower_by`, `upper_by` its letter (the first of equals); and
        `tightness_lower`, `tightness_upper`, smaller over larger of it and the eigenvalue, `None` where the eigenvalue
        is rounding.

    Raises:
        InputError: If there are fewer than two sets, one does not hold the one before and more, or as for
            `perturbation`.
    """
    rows: list[dict[str, Any]] = []
    for step, (base, added) in enumerate(_steps(kernel, chain), start=1):
        rows += _rows(perturbation(kernel, base, added), step, " ".join(added))
    return rows


def _steps(kernel: Kernel, chain: Sequence[Sequence[str]]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Each set of a chain but the last, and what the next adds to it."""
    sets = [tuple(kernel.subset(names).parts) for names in chain]
    if len(sets) < 2:
        raise InputError(f"a chain of {len(sets)} set(s) of blocks; expected at least two, each within the next")
    found = []
    for step, (base, whole) in enumerate(itertools.pairwise(sets), start=1):
        added = [name for name in whole if name not in base]
        if not added or set(base) - set(whole):
            raise InputError(f"set {step + 1} of the chain does not hold set {step} and more: {', '.join(chain[step])}")
        found.append((base, added))
    return found


def chain_bounds(kernel: Kernel, chain: Sequence[Sequence[str]], ridge: float = 0.0) -> list[Bound]:
    """Returns (a) to (d) along a growing set of blocks, each as one bound of all its steps and eigenvalues (theory 7).

    Args:
        kernel: As for `perturbation_table`.
        chain: Likewise.
        ridge: As for `perturbation`.

    Returns:
        For each of (a) to (d) that from below and that from above; of the steps in which its conditions are met, if
            there are some, and then the conditions say of how many of them.

    Raises:
        InputError: As for `perturbation_table`, or if the ridge is negative.
    """
    steps = [perturbation(kernel, base, added, ridge) for base, added in _steps(kernel, chain)]
    pairs = [[side for function in (*_OF_EIGENVALUES.values(), condition) for side in function(p)] for p in steps]
    return [_of_steps(parts) for parts in zip(*pairs, strict=True)]


def _of_steps(parts: Sequence[Bound]) -> Bound:
    """One bound of all the steps in which it applies; of all of them, not applicable, where it applies in none."""
    applying = [one for one in parts if one.applies]
    used, share = applying or parts, f" (in {len(applying)} of {len(parts)} steps)"
    return bound(
        parts[0].name,
        np.concatenate([np.atleast_1d(one.value) for one in used]),
        np.concatenate([np.atleast_1d(one.measured) for one in used]),
        {name + share * (len(applying) < len(parts)): bool(applying) for name in parts[0].conditions},
        lower=parts[0].lower,
        rounding=max(one.rounding for one in used),
    )


def _rows(p: Perturbation, step: int, added: str) -> list[dict[str, Any]]:
    pairs = {letter: function(p) for letter, function in _OF_EIGENVALUES.items()}
    applying = [letter for letter, pair in pairs.items() if pair[0].applies]
    below = np.array([pairs[letter][0].value for letter in applying])
    above = np.array([pairs[letter][1].value for letter in applying])
    best_below, best_above = below.argmax(axis=0), above.argmin(axis=0)
    rows = []
    for i, mu in enumerate(map(float, p.total)):
        row: dict[str, Any] = {"step": step, "set": added, "index": i + 1, "base": float(p.base[i]), "eigenvalue": mu}
        for letter, (lower, upper) in pairs.items():
            row[f"lower_{letter}"] = float(lower.value[i]) if lower.applies else None
            row[f"upper_{letter}"] = float(upper.value[i]) if upper.applies else None
        row["lower"], row["upper"] = float(below[best_below[i], i]), float(above[best_above[i], i])
        row["lower_by"], row["upper_by"] = applying[best_below[i]], applying[best_above[i]]
        known = mu > p.rounding
        row["tightness_lower"] = min(max(row["lower"], 0.0) / mu, 1.0) if known else None
        row["tightness_upper"] = min(mu / row["upper"], 1.0) if known else None
        rows.append(row)
    return rows
