"""Choosing the layers and modules to tune, from one pass of block kernels before anything is trained (theory 7)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.jacobian import MEMORY_BUDGET, num_outputs
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.kinds import contrast_basis
from jaxlin.ntk.lipschitz import lipschitz_profile
from jaxlin.ntk.products import ntk_vector_product
from jaxlin.ntk.work import PhaseProgress
from jaxlin.peft.function import PeftFunction
from jaxlin.peft.part import part_of
from jaxlin.selection_report import LayerSelection, Row, Trust
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.theory.selection import (
    Draw,
    Estimate,
    Grid,
    Search,
    best_by,
    check_search,
    lam_curve,
    search,
)
from jaxlin.theory.spectrum import spectrum
from jaxlin.training.losses import to_mean
from jaxlin.training.metrics import predicted
from jaxlin.training.trainer import predict
from jaxlin.tunable import Tunable, in_head, layer_index, leaf_paths, module_in_layer

Tunables = Tunable | Sequence[Tunable] | Callable[[int], Tunable]
Data = Dataset | Mapping[str, Any]

LAM_BY = {"leave_one_out": "leave_one_out_error", "marginal_likelihood": "log_marginal_likelihood"}
"""What λ is suggested by, and its column of the curve."""


def layer_grid(tun: Tunable) -> Grid:
    """Returns what candidates are made of: the modules of a Tunable in its numbered layers, and the rest."""
    blocks = tun.grouped("module")
    shapes = dict(zip(leaf_paths(tun.theta0), map(np.shape, jax.tree.leaves(tun.theta0)), strict=True))
    cells: dict[tuple[int, str], tuple[str, ...]] = {}
    always: tuple[str, ...] = ()
    for name in blocks:
        layer, module = layer_index(name), module_in_layer(name)
        if layer is None or module is None:
            always += (name,)
        else:
            cells[layer, module] = (*cells.get((layer, module), ()), name)
    sizes = {name: sum(math.prod(shapes[path]) for path in paths) for name, paths in blocks.items()}
    return Grid(cells, always, sizes)


def select_layers(
    tun: Tunables,
    x: Data,
    y: Float[np.ndarray, "N C"],
    *,
    budget: int | None = None,
    criterion: str = "condition_number",
    draws: int = 3,
    x_eval: Data | None = None,
    y_eval: Float[np.ndarray, "M C"] | None = None,
    lam: float | None = None,
    lam_rel: float | None = None,
    lam_by: str = "leave_one_out",
    contrasts: bool = False,
    lipschitz: float | None = None,
    lipschitz_directions: int = 0,
    exhaustive_limit: int = 512,
    memory_budget: int = MEMORY_BUDGET,
    check_examples: int = 2,
    seed: int = 0,
    progress: PhaseProgress | None = None,
) -> LayerSelection:
    """Ranks sets of layers × modules under a budget of parameters, by kernels at θ₀ alone (theory 6 and 7).

    One pass over the examples gives the kernel of every module, sums of them that of every candidate; nothing is
    trained. A candidate tunes each of some modules in each of some layers, and whatever lies in no layer (the head)
    where `tun` tunes it. LoRA's rank is not chosen but is that of `tun`: with B = 0 the kernel depends on the rank
    only through (α/r)² and the draw of A, so that it cannot tell ranks apart.

    Args:
        tun: What may be tuned at most, such as `jl.lora(model, targets=("query", "key", "value", "attention/output",
            "mlp/up", "mlp/down"))`; or several draws of the same (A, a random head), or a function from a seed to one.
        x: Labelled examples, a few hundred.
        y: Their targets `[N, C]`: one-hot, or ±1 or the score for C = 1. They must not have made the head: a probe
            that was fitted on them has seen every label that is left out.
        budget: Most parameters that may be tuned, the head among them; `None`: no limit.
        criterion: Name of `jaxlin.theory.selection.SELECTION_CRITERIA`; the paper's is the condition number.
        draws: How many draws are made, seeds 0, 1, …, where `tun` is a function.
        x_eval: Held-out examples, for the criterion `"validation_error"` and for a prediction on them.
        y_eval: Their targets.
        lam: λ of the summed loss that criteria are at; `None` for `lam_rel` times each kernel's own μ₁.
        lam_rel: λ in units of μ₁; `None` for what `lam_by` suggests for everything that may be tuned.
        lam_by: What λ is suggested by, on a grid relative to μ₁: `"leave_one_out"` or `"marginal_likelihood"`.
        contrasts: Take the C − 1 contrasts of the outputs, as softmax sees them, in place of all C: kernels, losses
            and λ are then those of fitting the contrasts of y; the learning rate stays that of the squared loss of all
            C outputs, as it is trained. A head whose columns sum to 0, such as a probe that stays frozen, has a
            singular kernel else.
        lipschitz: H of the stacked Jacobian (theory 5 and 8) on these examples, of all that `tun` tunes.
        lipschitz_directions: Where it is not given: sample H of what is chosen, in the first draw, at the ridge
            solution and in so many random directions at its distance, a float64 Jacobian each; 0: go without.
        exhaustive_limit: Up to so many candidates are all computed; more are searched (forward selection, exchange).
        memory_budget: Bytes; see `ntk`.
        check_examples: See `ntk`; of the first draw.
        seed: Of the bootstrap.
        progress: Called with a phase's name, and units done and in all.

    Returns:
        The choice, with predictions, λ, learning rate, and the ranking.

    Raises:
        InputError: If an argument is not one of those listed, y does not fit or has one class, the draws tune
            different parameters, no candidate is within the budget, or kernels vanish or hold NaN.
    """
    if lam_by not in LAM_BY:
        raise InputError(f"lam_by={lam_by!r} is unknown; expected one of {', '.join(LAM_BY)}")
    if lipschitz is not None and not 0 <= lipschitz < math.inf:
        raise InputError(f"lipschitz={lipschitz}; expected H, at least 0 and finite")
    if lipschitz_directions < 0:
        raise InputError(f"lipschitz_directions={lipschitz_directions}; expected at least 0")
    if (x_eval is None) != (y_eval is None):
        raise InputError("x_eval and y_eval belong together; only one of them is given")
    tunables = _draws(tun, draws)
    data, data_eval = as_dataset(x), None if x_eval is None else as_dataset(x_eval)
    c = num_outputs(tunables[0], data)
    y = _targets(y, len(data), c, "y")
    if _are_classes(y) and np.ptp(y, axis=0).max() == 0:
        raise InputError(f"all {len(y)} examples have the one target {y[0].tolist()}; expected at least two classes")
    held = None if y_eval is None or data_eval is None else _targets(y_eval, len(data_eval), c, "y_eval")
    grid = layer_grid(tunables[0])
    rel = 1.0 if lam_rel is None else lam_rel
    check_search(grid, criterion, budget, lam, rel, exhaustive_limit, held is not None)
    basis = contrast_basis(c) if contrasts else np.eye(c)
    measured, kernels = [], []
    for at, one in enumerate(tunables):
        options: dict[str, Any] = {"blocks": "module", "memory_budget": memory_budget}
        options["progress"] = None if progress is None else functools.partial(_report, progress, at, len(tunables))
        kernel = ntk(one, data, **options, check_examples=check_examples if at == 0 else 0)
        kernels.append(kernel)
        draw = Draw(_seen(kernel, contrasts), y @ basis, predict(one, one.theta0, data) @ basis)
        if data_eval is not None and held is not None:
            across = _seen(ntk(one, data_eval, data, **options, check_examples=0), contrasts)
            f0_eval = predict(one, one.theta0, data_eval) @ basis
            draw = dataclasses.replace(draw, kernel_eval=across, y_eval=held @ basis, f0_eval=f0_eval)
        measured.append(draw)
    # ε_J, the noise that κ is told against, is measured in the first draw.
    first = measured[0].kernel.info
    measured = [dataclasses.replace(one, kernel=dataclasses.replace(one.kernel, info=first)) for one in measured]
    every = _fits(measured, tuple(grid.sizes))
    if not all(top > 0 for top in _top(every)):
        raise InputError(
            "the kernel of all that may be tuned vanishes: it changes no output, such as below a zero head"
        )
    if lam_rel is None and lam is None:
        curve = lam_curve(every)
        rel = curve[_suggest(curve, lam_by)]["lam_rel"]
    found = search(
        measured,
        grid,
        criterion,
        budget=budget,
        lam=lam,
        lam_rel=rel,
        exhaustive_limit=exhaustive_limit,
        progress=None if progress is None else functools.partial(progress, "candidates"),
    )
    settled = {"budget": budget, "criteria_lam": lam, "criteria_lam_rel": rel, "lam_by": lam_by, "contrasts": contrasts}
    steepness = _Steepness(lipschitz, lipschitz_directions, memory_budget, seed)
    outputs = _Outputs(basis, _are_classes(y))
    return _report_of(found, measured, kernels, grid, tunables, data, settled, outputs, steepness, seed)


def _seen(kernel: Kernel, contrasts: bool) -> Kernel:
    return kernel.contrasts() if contrasts else kernel


def _report(progress: PhaseProgress, at: int, draws: int, phase: str, done: int, total: int) -> None:
    progress(f"{phase}, draw {at + 1} of {draws}", done, total)


def _draws(tun: Tunables, draws: int) -> list[Tunable]:
    if isinstance(tun, Tunable):
        return [tun]
    if callable(tun):
        if draws < 1:
            raise InputError(f"draws={draws}; expected at least 1")
        tunables = [tun(seed) for seed in range(draws)]
    else:
        tunables = list(tun)
    if not tunables:
        raise InputError("no Tunable is given; expected at least one draw")
    shapes = [
        dict(zip(leaf_paths(one.theta0), map(np.shape, jax.tree.leaves(one.theta0)), strict=True)) for one in tunables
    ]
    if any(other != shapes[0] for other in shapes):
        raise InputError("the draws tune different parameters; expected the same, drawn anew")
    return tunables


def _targets(y: np.ndarray, n: int, c: int, name: str) -> Float[np.ndarray, "N C"]:
    y = np.asarray(y, np.float64)
    if y.shape != (n, c):
        raise InputError(f"{name} has shape {y.shape}; expected (examples, outputs) = {(n, c)}")
    if not np.isfinite(y).all():
        raise InputError(f"{name} holds NaN or infinity")
    return y


def _fits(draws: Sequence[Draw], blocks: Sequence[str]) -> list[KernelRegression]:
    return [kernel_regression(draw.kernel.subset(blocks), draw.y, draw.f0, 0.0) for draw in draws]


def _suggest(curve: Sequence[Mapping[str, float]], lam_by: str) -> int:
    values = [row[LAM_BY[lam_by]] for row in curve]
    return int(np.argmin(values) if lam_by == "leave_one_out" else np.argmax(values))


def _top(fits: Sequence[KernelRegression]) -> list[float]:
    return [float(fit.eigenvalues[-1]) for fit in fits]


def _losses(outputs: Sequence[np.ndarray], y: np.ndarray) -> Float[np.ndarray, "D N"]:
    return np.array([0.5 * np.sum((one - y) ** 2, axis=1) for one in outputs])


def _are_classes(y: np.ndarray) -> bool:
    """Whether targets are one-hot, or ±1, rather than scores."""
    if y.shape[1] > 1:
        return bool(np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all())
    return bool(np.isin(y, (-1, 1)).all())


@dataclasses.dataclass(frozen=True, eq=False)
class _Outputs:
    """What the draws hold of the C outputs: `f @ basis`; and whether classes are read from them."""

    basis: Float[np.ndarray, "C K"]
    classes: bool

    def hits(self, outputs: Sequence[np.ndarray], y: np.ndarray) -> Float[np.ndarray, "D N"] | None:
        """Whether each example is classified rightly in each draw; `None` where the targets are scores."""
        if not self.classes:
            return None
        back = self.basis.T  # up to a constant for all outputs, which no class depends on
        return np.array([predicted(one @ back) == predicted(y @ back) for one in outputs], float)


def _estimate(values: np.ndarray | None, seed: int) -> Estimate | None:
    return None if values is None else Estimate.of(values, seed=seed)


def _candidate_rows(found: Search) -> list[Row]:
    rows = []
    for rank, one in enumerate(found.ranked, start=1):
        scores = [draw[found.criterion] for draw in one.by_draw]
        rows.append(
            {
                "rank": rank,
                "layers": " ".join(map(str, one.candidate.layers)),
                "modules": " ".join(one.candidate.modules),
                "num_params": one.num_params,
                **one.values,
                "condition_number_is_bound": one.condition_number_is_bound,
                "score_min": min(scores),
                "score_max": max(scores),
            }
        )
    return rows


def _criterion_rows(found: Search) -> list[Row]:
    rows = []
    for name, one in best_by(found).items():
        row: Row = {"criterion": name, "layers": " ".join(map(str, one.candidate.layers))}
        row |= {"modules": " ".join(one.candidate.modules), "num_params": one.num_params, "value": one.values[name]}
        row["leave_one_out_error"] = one.values["leave_one_out_error"]
        row["is_bound"] = name == "condition_number" and one.condition_number_is_bound
        rows.append({**row, "of_the_choice": found.ranked[0].values[name]})
    return rows


def _reference_rows(
    draws: Sequence[Draw],
    sets: Mapping[str, Sequence[str]],
    lam_by: str,
    grid: Grid,
    outputs: _Outputs,
    seed: int,
) -> list[Row]:
    """Leave-one-out loss and accuracy of sets of blocks, each once, the choice first, at the λ that suits it."""
    y, rows, losses = draws[0].y, [], []
    names: dict[frozenset[str], str] = {}  # a set is compared once: as the choice, else as everything
    for name in sorted(sets, key=("chosen", "everything", "runner-up").index):
        names.setdefault(frozenset(sets[name]), name)
    once = {name: members for name, members in sets.items() if name in names.values()}
    for name, members in {**once, "always tuned only": grid.always}.items():
        fits = _fits(draws, members) if members else []
        if not fits or not all(top > 0 for top in _top(fits)):
            continue
        curve = lam_curve(fits)
        rel = curve[_suggest(curve, lam_by)]["lam_rel"]
        held = [
            dataclasses.replace(fit, ridge=rel * top).leave_one_out() for fit, top in zip(fits, _top(fits), strict=True)
        ]
        hits = outputs.hits(held, y)
        losses.append(_losses(held, y))
        more = Estimate.of(losses[-1] - losses[0], seed=seed)
        row: Row = {"tuned": name, "num_params": sum(grid.sizes[block] for block in members), "lam_over_mu1": rel}
        row |= {"loss": float(losses[-1].mean()), "accuracy": None if hits is None else float(hits.mean())}
        rows.append({**row, "loss_minus_choice": more.value, "low": more.low, "high": more.high})
    return rows


def _always_share(draws: Sequence[Draw], grid: Grid, blocks: Sequence[str]) -> float:
    """Share of the trace of a candidate's kernel that every candidate holds."""
    if not grid.always:
        return 0.0
    traces = [
        [float(np.trace(draw.kernel.subset(members).matrix())) for members in (grid.always, blocks)] for draw in draws
    ]
    return float(np.mean([always / whole for always, whole in traces]))


def _lora(tun: Tunable) -> tuple[int | None, float | None]:
    """Rank and α where all modules have the same."""
    scales = dict(tun.apply.scales) if isinstance(tun.apply, PeftFunction) else {}
    leaves = dict(zip(leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), strict=True))
    ranks = {path.removesuffix("/lora_B"): leaf.shape[0] for path, leaf in leaves.items() if path.endswith("/lora_B")}
    found = {(rank, round(scales[path] * rank, 9)) for path, rank in ranks.items()}
    return found.pop() if len(found) == 1 else (None, None)


@dataclasses.dataclass(frozen=True)
class _Steepness:
    """H of theory 5: as given, or how to sample it."""

    given: float | None
    directions: int
    memory_budget: int
    seed: int

    def at(self, tun: Tunable, data: Dataset, blocks: Sequence[str], theta: PyTree, distance: float) -> float | None:
        """Returns H of what is chosen within the distance of the ridge solution; `None` where none is wanted."""
        if self.given is not None or not self.directions or not distance > 0:
            return self.given
        part = part_of(dataclasses.replace(tun, blocks=tun.grouped("module")), blocks)
        own = dict(zip(leaf_paths(theta), jax.tree.leaves(theta), strict=True))
        options: dict[str, Any] = {"directions": self.directions, "memory_budget": self.memory_budget}
        along = [{path: own[path] for path in part.theta0}]
        return lipschitz_profile(part, data, [distance], along=along, seed=self.seed, **options).largest()


def _ridge_theta(
    tun: Tunable, data: Dataset, blocks: Sequence[str], basis: np.ndarray, alpha: Float[np.ndarray, "N K"]
) -> PyTree:
    """θ₀ + J_Sᵀα."""
    delta = ntk_vector_product(tun, data, check_examples=0).pull(alpha @ basis.T)
    chosen = {path for block in blocks for path in tun.grouped("module")[block]}
    leaves = [
        jnp.asarray(leaf + jnp.asarray(step, leaf.dtype) if path in chosen else leaf)
        for path, leaf, step in zip(
            leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), jax.tree.leaves(delta), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(tun.theta0), leaves)


def _trust(
    fits: Sequence[KernelRegression],
    tunables: Sequence[Tunable],
    data: Dataset,
    blocks: Sequence[str],
    basis: np.ndarray,
    steepness: _Steepness,
) -> Trust:
    distances, movements, gaps, h = [], [], [], None
    for at, (fit, tun) in enumerate(zip(fits, tunables, strict=True)):
        alpha = fit.coefficients()
        along = fit.matrix @ alpha.reshape(-1)
        distances.append(math.sqrt(max(float(alpha.reshape(-1) @ along), 0.0)))
        movements.append(float(np.linalg.norm(along)))
        theta = _ridge_theta(tun, data, blocks, basis, alpha)
        gap = np.linalg.norm(predict(tun, theta, data) @ basis - fit.f0 - along.reshape(alpha.shape))
        gaps.append(float(gap) / movements[-1] if movements[-1] > 0 else math.nan)
        if at == 0:
            h = steepness.at(tun, data, blocks, theta, distances[-1])
    moved = all(movement > 0 for movement in movements)
    bounds = [] if h is None or not moved else [h / 2 * d**2 / m for d, m in zip(distances, movements, strict=True)]
    largest = max(bounds) if bounds else None
    sampled = h is not None and steepness.given is None
    return Trust(float(np.mean(distances)), float(np.mean(movements)), float(np.max(gaps)), h, sampled, largest)


def _report_of(
    found: Search,
    draws: Sequence[Draw],
    kernels: Sequence[Kernel],
    grid: Grid,
    tunables: Sequence[Tunable],
    data: Dataset,
    settled: Mapping[str, Any],
    outputs: _Outputs,
    steepness: _Steepness,
    seed: int,
) -> LayerSelection:
    """Predicts what training the best will do; `kernels`: of all C outputs, `settled`: fields that are known."""
    best, lam_by = found.ranked[0], settled["lam_by"]
    blocks, y = grid.blocks(best.candidate), draws[0].y
    fits = _fits(draws, blocks)
    curve = lam_curve(fits)
    at, top = _suggest(curve, lam_by), _top(fits)
    lam = curve[at]["lam_rel"] * float(np.mean(top))
    fits = [dataclasses.replace(fit, ridge=lam) for fit in fits]
    held = [fit.leave_one_out() for fit in fits]
    outputs_eval = [
        fit.test(draw.kernel_eval.subset(blocks), draw.f0_eval)
        for fit, draw in zip(fits, draws, strict=True)
        if draw.kernel_eval is not None and draw.f0_eval is not None
    ]
    y_eval = draws[0].y_eval
    sets = {"chosen": blocks}
    if len(found.ranked) > 1:
        sets["runner-up"] = grid.blocks(found.ranked[1].candidate)
    sets["everything"] = tuple(grid.sizes)
    rank, alpha = _lora(tunables[0])
    # The loss that is trained is of all outputs, whose kernel may be steeper than that of contrasts.
    steepest = max(float(spectrum(kernel.subset(blocks)).eigenvalues[0]) for kernel in kernels)
    rate = 2 / (steepest + lam)
    return LayerSelection(
        choice=best.candidate,
        blocks=blocks,
        num_params=best.num_params,
        **settled,
        table=_candidate_rows(found),
        by_criterion=_criterion_rows(found),
        references=_reference_rows(draws, sets, lam_by, grid, outputs, seed),
        always_share=_always_share(draws, grid, blocks),
        search=found,
        loss=Estimate.of(_losses(held, y), seed=seed),
        accuracy=_estimate(outputs.hits(held, y), seed),
        eval_loss=None if y_eval is None else Estimate.of(_losses(outputs_eval, y_eval), seed=seed),
        eval_accuracy=None if y_eval is None else _estimate(outputs.hits(outputs_eval, y_eval), seed),
        lam=lam,
        lam_rel=curve[at]["lam_rel"],
        lam_at_edge=at in (0, len(curve) - 1),
        lam_curve=curve,
        learning_rate=rate,
        learning_rate_mean=to_mean(rate, len(y), "learning_rate"),
        trust=_trust(fits, tunables, data, blocks, outputs.basis, steepness),
        spectra={name: spectrum(draws[0].kernel.subset(members)) for name, members in sets.items()},
        rank=rank,
        alpha=alpha,
        head=any(in_head(block) for block in grid.always),
        examples=len(y),
        draws=len(draws),
    )
