"""Lipschitz profiles of the Jacobian and of the kernel around θ₀ (theory 8, the paper's Algorithm 1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.models.model import named_key
from jaxlin.ntk.change import PER_EXAMPLE, PER_PAIR, STACKED, Norm, Sample, all_pairs, change, distance
from jaxlin.ntk.jacobian import MEMORY_BUDGET, Progress, evenly_spread, to_float64
from jaxlin.tunable import Tunable, leaf_paths

QUANTITIES = (STACKED, PER_EXAMPLE, PER_PAIR)

_EXAMPLES = 32
"""Default number of examples of the quantities per example and per pair."""


@dataclasses.dataclass(frozen=True, eq=False)
class LipschitzProfile:
    """Sampled ratios `‖change between θ₀ and θ‖ / ‖θ − θ₀‖`.

    A supremum over samples is an estimate *from below* of the true one: of all directions only a few were tried.

    Attributes:
        table: Tidy, a row a quantity and radius, in the order of the radii, then a row a quantity and point of the
            trajectory: `quantity`, `radius` ‖θ − θ₀‖, `along_trajectory`, `L_avg` (mean over the models at that
            radius), `L_upper` (the largest), `directions` (number of models), `seed` (`None` on a trajectory), and
            `residual`, the largest relative one of the norms (0 by dense linear algebra).
    """

    table: list[dict[str, Any]]

    def largest(self, quantity: str = STACKED, within: float = np.inf) -> float:
        """Returns the largest ratio of a quantity at radii of at most `within`; of `"stacked"` it is H of theory 5.

        Args:
            quantity: One that was asked for.
            within: Radius of the ball.

        Raises:
            InputError: If there is no such row.
        """
        found = [
            row["L_upper"] for row in self.table if row["quantity"] == quantity and row["radius"] <= within * (1 + 1e-9)
        ]
        if not found:
            raise InputError(f"the profile has no {quantity!r} within radius {within:g}")
        return max(found)


def random_direction(theta0: PyTree, seed: int, index: int) -> PyTree:
    """Returns a direction `v/‖v‖`, v ~ N(0, I) over all of theta, in float64 on the host.

    It depends on seed, index and the paths of the leaves only.

    Args:
        theta0: What it is like.
        seed: Of all directions.
        index: Which of them.
    """
    with jax.enable_x64(False):  # the same draws in either mode
        key = jax.random.fold_in(named_key(seed, "lipschitz"), index)
        drawn = [
            np.asarray(jax.random.normal(named_key(key, path), jnp.shape(leaf), jnp.float32), np.float64)
            for path, leaf in zip(leaf_paths(theta0), jax.tree.leaves(theta0), strict=True)
        ]
    norm = sum(float(np.sum(part**2)) for part in drawn) ** 0.5
    return jax.tree.unflatten(jax.tree.structure(theta0), [part / norm for part in drawn])


def moved(theta0: PyTree, direction: PyTree, radius: float) -> PyTree:
    """Returns `θ₀ + radius · direction`, in float64 on the host."""
    return jax.tree.map(lambda leaf, v: leaf + radius * v, to_float64(theta0), direction)


def check_radii(radii: Sequence[float] | np.ndarray, directions: int) -> list[float]:
    """Returns the radii as floats.

    Raises:
        InputError: If one is not above 0 and finite (at 0 there is no ratio), or there is no direction.
    """
    listed = np.asarray(radii, float).reshape(-1).tolist()
    wrong = [r for r in listed if not 0 < r < np.inf]
    if wrong:
        raise InputError(f"radius {wrong[0]}; expected above 0 and finite (at 0 there is no ratio)")
    if listed and directions < 1:
        raise InputError(f"directions={directions}; expected at least 1")
    return listed


def _check_indices(what: str, given: np.ndarray, shape: bool, size: int) -> None:
    """Raises where something is no indices of examples."""
    if not shape or not given.size or given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= size:
        raise InputError(f"{what} must be indices of the {size} examples, at least one; got {given.tolist()}")


def _sample(data: Dataset, examples: Sequence[int] | None, pairs: Sequence[Sequence[int]] | None) -> Sample:
    """Checks and completes the examples and pairs."""
    chosen = evenly_spread(len(data), _EXAMPLES) if examples is None else np.asarray(examples)
    two = all_pairs(chosen) if pairs is None else np.asarray(pairs)
    _check_indices("examples", chosen, chosen.shape == (chosen.size,), len(data))
    _check_indices("pairs, two each,", two, two.shape[1:] == (2,), len(data))
    return Sample(chosen.astype(int), two.astype(int))


def _row(quantity: str, radius: float, norms: Sequence[Norm], seed: int | None) -> dict[str, Any]:
    ratios = [norm.value / radius for norm in norms]
    return {
        "quantity": quantity,
        "radius": radius,
        "along_trajectory": seed is None,
        "L_avg": float(np.mean(ratios)),
        "L_upper": max(ratios),
        "directions": len(ratios),
        "seed": seed,
        "residual": max(norm.residual for norm in norms),
    }


def lipschitz_profile(
    tun: Tunable,
    data: Dataset | Mapping[str, Any],
    radii: Sequence[float] | np.ndarray,
    *,
    quantity: str | Sequence[str] = STACKED,
    directions: int = 8,
    along: Iterable[PyTree] = (),
    examples: Sequence[int] | None = None,
    pairs: Sequence[Sequence[int]] | None = None,
    method: str = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    dtype: str | None = "float64",
    progress: Progress | None = None,
) -> LipschitzProfile:
    """Samples how fast Jacobian or kernel change with the distance from θ₀ (theory 8, the paper's Algorithm 1).

    At each radius r models `θ₀ + r v/‖v‖` are taken in directions v ~ N(0, I) over all of theta, the same at every
    radius, and at each the ratio

    - `"stacked"`: ‖J(θ) − J₀‖₂/r of all examples stacked, which alone is H of theory 5;
    - `"jacobian"`: the largest ‖J(θ;x) − J(θ₀;x)‖₂/r over single examples x;
    - `"kernel"`: the largest ‖K_θ(x,x′) − K_θ₀(x,x′)‖₂/r over pairs (for C = 1 the absolute value);

    L_avg(r) is their mean over the models and L_upper(r) the largest. The points of a trajectory count one by one.
    Sampled suprema are estimates from below: a bound that uses one is no proof.

    Args:
        tun: The model.
        data: Examples: a `Dataset` or a dict of arrays.
        radii: r, each above 0; may be empty where there is a trajectory.
        quantity: One of the three, or several; from one pass where Jacobians are held.
        directions: n_T, models a radius.
        along: Thetas of a trajectory, such as `state.theta` of `result.states`. Those equal to θ₀ have no ratio and
            are left out.
        examples: Indices of those of `"jacobian"` and of the default pairs; default: at most 32, evenly spread.
        pairs: Indices of the pairs of `"kernel"`; default: all of those examples, each with itself among them.
        method: `"dense"` holds Jacobians, `"products"` never does (Lanczos on products of jvp and vjp; the residual is
            in the table), `"auto"` is dense where they fit. See `jaxlin.ntk.change.change`.
        tolerance: Relative residual at which Lanczos stops.
        seed: Of the directions; a direction depends on it, its number and the names of the parameters only.
        memory_budget: Bytes for Jacobians.
        dtype: Of Jacobians that are held: `"float64"`, or `None` for the parameters' own. In float32 it takes a third
            of the time, and a ratio at radius r is off by about 1e-7 ‖J₀‖₂/r, that of kernels by 1e-7 ‖K₀‖₂/r (of
            MiniLM with LoRA on MRPC at r = 0.1: by 8e-6 of itself, and by 2e-4). Products are in float64.
        progress: Called with models done and in all.

    Returns:
        The profile.

    Raises:
        InputError: If an argument is not one of those listed or out of range, there is neither radius nor trajectory,
            or the data do not fit the model.
        FloatingPointError: If Lanczos does not converge, or a model returns NaN.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxlin as jl
        >>> tun = jl.Tunable(lambda theta, batch: 0.5 * batch["x"] * theta["w"] ** 2, {"w": jnp.zeros(1)})
        >>> profile = jl.lipschitz_profile(tun, {"x": np.array([[3.0], [4.0]])}, [0.1, 1.0])  # J = x w
        >>> round(profile.largest(), 6)  # ‖x‖
        5.0
    """
    listed, points = check_radii(radii, directions), list(along)
    wanted = [quantity] if isinstance(quantity, str) else list(quantity)
    if unknown := [name for name in wanted if name not in QUANTITIES]:
        raise InputError(f"quantity {unknown[0]!r} is unknown; expected of {', '.join(QUANTITIES)}")
    if not wanted:
        raise InputError(f"no quantity is given; expected of {', '.join(QUANTITIES)}")
    for i, theta in enumerate(points):
        tun.check_theta(theta, f"along[{i}]")
    lengths = [distance(theta, tun.theta0) for theta in points]
    trajectory = [(length, theta) for length, theta in zip(lengths, points, strict=True) if length > 0]
    if not listed and not trajectory:
        what = "every point of the trajectory is θ₀ itself" if points else "there is no trajectory"
        raise InputError(f"radii is empty and {what}; give at least one radius or point at a distance")
    data = as_dataset(data)
    sample = _sample(data, examples, pairs)
    if STACKED not in wanted:  # then the other examples need not be looked at
        members = np.union1d(sample.examples, sample.members)
        data = data.take(members)
        sample = Sample(np.searchsorted(members, sample.examples), np.searchsorted(members, sample.pairs))
    measure = change(
        tun, data, sample, method=method, tolerance=tolerance, memory_budget=memory_budget, seed=seed, dtype=dtype
    )
    total, done = len(listed) * directions + len(trajectory), 0

    def norms(theta: PyTree) -> dict[str, Norm]:
        nonlocal done
        found = measure.norms(theta, wanted)
        done += 1
        if progress is not None:
            progress(done, total)
        return found

    table: list[dict[str, Any]] = []
    for radius in listed:
        found = [norms(moved(tun.theta0, random_direction(tun.theta0, seed, k), radius)) for k in range(directions)]
        table += [_row(name, radius, [one[name] for one in found], seed) for name in wanted]
    for length, theta in trajectory:
        table += [_row(name, length, [norm], None) for name, norm in norms(theta).items()]
    return LipschitzProfile(table)
