"""Choosing the layers and modules to tune, from one pass of block kernels before anything is trained (theory 7)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.jacobian import MEMORY_BUDGET, num_outputs
from jaxlin.ntk.products import ntk_vector_product
from jaxlin.ntk.work import Progress
from jaxlin.peft.config import peft_lora_config
from jaxlin.peft.function import PeftFunction
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.theory.selection import (
    Candidate,
    Draw,
    Estimate,
    Grid,
    Search,
    best_by,
    check_search,
    lam_curve,
    search,
)
from jaxlin.theory.spectrum import Spectrum, spectrum
from jaxlin.training.losses import to_mean
from jaxlin.training.metrics import predicted
from jaxlin.training.trainer import predict
from jaxlin.tunable import Tunable, in_head, layer_index, leaf_paths, module_in_layer

Row = dict[str, Any]
Tunables = Tunable | Sequence[Tunable] | Callable[[int], Tunable]
Data = Dataset | Mapping[str, Any]

LAM_BY = {"leave_one_out": "leave_one_out_error", "marginal_likelihood": "log_marginal_likelihood"}
"""What λ is suggested by, and its column of the curve."""


@dataclasses.dataclass(frozen=True)
class Trust:
    """How far the linearized model is expected to move, and how good it is there.

    Attributes:
        distance: ‖δ‖ of the ridge solution, `√(αᵀKα)`; the mean over draws.
        movement: ‖f̄ − f₀‖ there, over all examples and outputs; the mean over draws.
        measured_gap: ‖f − f̄‖ at that very θ, relative to ‖f̄ − f₀‖; the largest over draws.
        gap_bound: Its bound by `(H/2)‖δ‖²` (theory 5(a)), the largest over draws; `None` where H is not given. H is
            a sampled supremum (theory 8), so that this is an estimate.
    """

    distance: float
    movement: float
    measured_gap: float
    gap_bound: float | None

    @property
    def verdict(self) -> str:
        """In words."""
        if not math.isfinite(self.measured_gap):
            return "cannot be told: the ridge solution does not move, or the model is not finite there"
        share = f"{self.measured_gap:.2g} of the movement at the ridge solution is not linear"
        if self.measured_gap <= 0.1:
            return f"yes: {share}"
        return f"roughly: {share}" if self.measured_gap <= 0.5 else f"no: {share}"


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSelection:
    """What `select_layers` gives. λ is for the summed loss (theory 0).

    Attributes:
        choice: Layers and modules.
        blocks: Its blocks, for `Kernel.subset`; those that every candidate holds among them.
        num_params: Parameters that it tunes.
        budget: Most that it might tune.
        table: Tidy, a row a candidate that was computed, the best first: `rank`, `layers`, `modules`, `num_params`,
            every criterion (its mean over draws; λ-dependent ones at the λ given), `condition_number_is_bound`, and
            `score_min`, `score_max` of the criterion over draws.
        by_criterion: What each criterion would choose of the same candidates.
        references: Everything, what every candidate tunes (the head) and the choice: leave-one-out loss and accuracy,
            each at its own best λ.
        search: How the ranking was found.
        loss: Predicted ½‖f − y‖² an example, leave-one-out at the suggested λ.
        accuracy: Predicted accuracy, likewise; `None` for scores.
        eval_loss: On the held-out examples, where there are any.
        eval_accuracy: Likewise.
        lam: Suggested λ.
        lam_rel: In units of μ₁, the mean over draws.
        lam_by: What it was suggested by.
        lam_at_edge: Whether it is an end of the grid: a better one may lie beyond.
        lam_curve: Leave-one-out error and log marginal likelihood against λ.
        learning_rate: Largest stable η of descent on the summed loss, `2/(μ₁ + λ)`, μ₁ the largest over draws.
        learning_rate_mean: The same for the trainer's mean loss, which changes little with the number of examples.
        trust: Whether the linearization can be trusted.
        spectra: Of the first draw: `"chosen"`, `"everything"`, `"runner-up"` where there is one.
        rank: LoRA's rank; `None` where it is not one number, or what is tuned is no LoRA.
        alpha: LoRA's α, likewise.
        head: Whether the classification head is tuned.
        examples: How many the kernel is of.
        draws: How many draws there were.
    """

    choice: Candidate
    blocks: tuple[str, ...]
    num_params: int
    budget: int | None
    table: list[Row]
    by_criterion: list[Row]
    references: list[Row]
    search: Search
    loss: Estimate
    accuracy: Estimate | None
    eval_loss: Estimate | None
    eval_accuracy: Estimate | None
    lam: float
    lam_rel: float
    lam_by: str
    lam_at_edge: bool
    lam_curve: list[dict[str, float]]
    learning_rate: float
    learning_rate_mean: float
    trust: Trust
    spectra: Mapping[str, Spectrum]
    rank: int | None
    alpha: float | None
    head: bool
    examples: int
    draws: int

    def peft_config(self, model_type: str | None) -> dict[str, Any] | None:
        """Returns the choice for the `peft` library, where Hugging Face's names are known; see `peft_lora_config`.

        Args:
            model_type: Of the checkpoint's `config.json`, such as `"bert"`.
        """
        if self.rank is None or self.alpha is None:
            return None
        return peft_lora_config(
            self.choice.layers, self.choice.modules, self.rank, self.alpha, model_type, head=self.head
        )

    def summary(self) -> dict[str, Any]:
        """Returns its numbers without the tables, for a record."""
        return {
            "layers": list(self.choice.layers),
            "modules": list(self.choice.modules),
            "num_params": self.num_params,
            "budget": self.budget,
            "criterion": self.search.criterion,
            "method": self.search.method,
            "candidates": len(self.search.ranked),
            "optimum_bound": self.search.bound,
            "optimality_gap": self.search.gap,
            "optimality": self.search.optimality,
            **{
                name: None if (found := getattr(self, name)) is None else dataclasses.asdict(found)
                for name in ("accuracy", "loss", "eval_accuracy", "eval_loss")
            },
            "lam": self.lam,
            "lam_over_mu1": self.lam_rel,
            "lam_by": self.lam_by,
            "lam_at_edge": self.lam_at_edge,
            "learning_rate_summed_loss": self.learning_rate,
            "learning_rate_mean_loss": self.learning_rate_mean,
            "linearization": {**dataclasses.asdict(self.trust), "verdict": self.trust.verdict},
            "lora_rank": self.rank,
            "lora_alpha": self.alpha,
            "examples": self.examples,
            "draws": self.draws,
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns its summary and tables, of plain values."""
        return {
            "summary": self.summary(),
            "table": self.table,
            "by_criterion": self.by_criterion,
            "references": self.references,
            "lam_curve": self.lam_curve,
            "spectra": {name: spec.eigenvalues.tolist() for name, spec in self.spectra.items()},
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON; what is undefined is NaN there, as Python reads and writes it."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


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
    lam_rel: float = 1e-2,
    lam_by: str = "leave_one_out",
    lipschitz: float | None = None,
    exhaustive_limit: int = 512,
    memory_budget: int = MEMORY_BUDGET,
    check_examples: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
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
        lam_rel: λ in units of μ₁.
        lam_by: What λ is suggested by, on a grid relative to μ₁: `"leave_one_out"` or `"marginal_likelihood"`.
        lipschitz: H of the stacked Jacobian (theory 5 and 8) on these examples, of all that `tun` tunes.
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
    if (x_eval is None) != (y_eval is None):
        raise InputError("x_eval and y_eval belong together; only one of them is given")
    tunables = _draws(tun, draws)
    data, data_eval = as_dataset(x), None if x_eval is None else as_dataset(x_eval)
    c = num_outputs(tunables[0], data)
    y = _targets(y, len(data), c, "y")
    if np.ptp(y, axis=0).max() == 0:
        raise InputError(f"all {len(y)} examples have the one target {y[0].tolist()}; expected at least two classes")
    held = None if y_eval is None or data_eval is None else _targets(y_eval, len(data_eval), c, "y_eval")
    grid = layer_grid(tunables[0])
    check_search(grid, criterion, budget, lam, lam_rel, exhaustive_limit, held is not None)
    measured = []
    for at, one in enumerate(tunables):
        options: dict[str, Any] = {"blocks": "module", "memory_budget": memory_budget}
        options["progress"] = None if progress is None else functools.partial(_report, progress, at, len(tunables))
        kernel = ntk(one, data, **options, check_examples=check_examples if at == 0 else 0)
        draw = Draw(kernel, y, predict(one, one.theta0, data))
        if data_eval is not None:
            across = ntk(one, data_eval, data, **options, check_examples=0)
            draw = dataclasses.replace(
                draw, kernel_eval=across, y_eval=held, f0_eval=predict(one, one.theta0, data_eval)
            )
        measured.append(draw)
    # ε_J, the noise that κ is told against, is measured in the first draw.
    first = measured[0].kernel.info
    measured = [dataclasses.replace(one, kernel=dataclasses.replace(one.kernel, info=first)) for one in measured]
    found = search(
        measured,
        grid,
        criterion,
        budget=budget,
        lam=lam,
        lam_rel=lam_rel,
        exhaustive_limit=exhaustive_limit,
        progress=None if progress is None else functools.partial(progress, "candidates"),
    )
    return _report_of(found, measured, grid, tunables, data, budget, lam_by, lipschitz, seed)


def _report(progress: Progress, at: int, draws: int, phase: str, done: int, total: int) -> None:
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


def _hits(outputs: Sequence[np.ndarray], y: np.ndarray) -> Float[np.ndarray, "D N"] | None:
    """Whether each example is classified rightly in each draw; `None` where the targets are scores."""
    classes = np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all() if y.shape[1] > 1 else np.isin(y, (-1, 1)).all()
    return np.array([predicted(one) == predicted(y) for one in outputs], float) if classes else None


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
        rows.append({**row, "of_the_choice": found.ranked[0].values[name]})
    return rows


def _reference_rows(draws: Sequence[Draw], grid: Grid, blocks: Sequence[str], lam_by: str) -> list[Row]:
    """Leave-one-out loss and accuracy of the choice, of everything, of what is always tuned."""
    sets = {"the choice": tuple(blocks), "everything": tuple(grid.sizes), "always tuned only": grid.always}
    rows = []
    for name, members in sets.items():
        fits = _fits(draws, members) if members else []
        if not fits or not all(top > 0 for top in _top(fits)):
            continue
        curve = lam_curve(fits)
        rel = curve[_suggest(curve, lam_by)]["lam_rel"]
        held = [dataclasses.replace(fit, ridge=rel * float(fit.eigenvalues[-1])).leave_one_out() for fit in fits]
        hits = _hits(held, draws[0].y)
        row: Row = {"tuned": name, "num_params": sum(grid.sizes[block] for block in members), "lam_over_mu1": rel}
        row |= {"loss": float(_losses(held, draws[0].y).mean())}
        rows.append({**row, "accuracy": None if hits is None else float(hits.mean())})
    return rows


def _lora(tun: Tunable) -> tuple[int | None, float | None]:
    """Rank and α where all modules have the same."""
    scales = dict(tun.apply.scales) if isinstance(tun.apply, PeftFunction) else {}
    leaves = dict(zip(leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), strict=True))
    ranks = {path.removesuffix("/lora_B"): leaf.shape[0] for path, leaf in leaves.items() if path.endswith("/lora_B")}
    found = {(rank, round(scales[path] * rank, 9)) for path, rank in ranks.items()}
    return found.pop() if len(found) == 1 else (None, None)


def _gap_at(
    tun: Tunable, data: Dataset, blocks: Sequence[str], fit: KernelRegression, alpha: Float[np.ndarray, "N C"]
) -> float:
    """‖f − f̄‖/‖f̄ − f₀‖ at the ridge solution θ₀ + J_Sᵀα."""
    moved = (fit.matrix @ alpha.reshape(-1)).reshape(alpha.shape)
    delta = ntk_vector_product(tun, data, check_examples=0).pull(alpha)
    chosen = {path for block in blocks for path in tun.grouped("module")[block]}
    leaves = [
        jnp.asarray(leaf + jnp.asarray(step, leaf.dtype) if path in chosen else leaf)
        for path, leaf, step in zip(
            leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), jax.tree.leaves(delta), strict=True
        )
    ]
    theta = jax.tree.unflatten(jax.tree.structure(tun.theta0), leaves)
    size = float(np.linalg.norm(moved))
    gap = float(np.linalg.norm(predict(tun, theta, data) - fit.f0 - moved))
    return gap / size if size > 0 else math.nan


def _trust(
    fits: Sequence[KernelRegression],
    tunables: Sequence[Tunable],
    data: Dataset,
    blocks: Sequence[str],
    lipschitz: float | None,
) -> Trust:
    distances, movements, gaps, bounds = [], [], [], []
    for fit, tun in zip(fits, tunables, strict=True):
        alpha = fit.coefficients()
        along = fit.matrix @ alpha.reshape(-1)
        distances.append(math.sqrt(max(float(alpha.reshape(-1) @ along), 0.0)))
        movements.append(float(np.linalg.norm(along)))
        gaps.append(_gap_at(tun, data, blocks, fit, alpha))
        if lipschitz is not None and movements[-1] > 0:
            bounds.append(lipschitz / 2 * distances[-1] ** 2 / movements[-1])
    largest = max(bounds) if len(bounds) == len(fits) else None
    return Trust(float(np.mean(distances)), float(np.mean(movements)), float(np.max(gaps)), largest)


def _report_of(
    found: Search,
    draws: Sequence[Draw],
    grid: Grid,
    tunables: Sequence[Tunable],
    data: Dataset,
    budget: int | None,
    lam_by: str,
    lipschitz: float | None,
    seed: int,
) -> LayerSelection:
    """Predicts what training the best candidate will do."""
    best = found.ranked[0]
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
    sets = {"chosen": blocks, "everything": tuple(grid.sizes)}
    if len(found.ranked) > 1:
        sets["runner-up"] = grid.blocks(found.ranked[1].candidate)
    rank, alpha = _lora(tunables[0])
    rate = 2 / (max(top) + lam)
    return LayerSelection(
        choice=best.candidate,
        blocks=blocks,
        num_params=best.num_params,
        budget=budget,
        table=_candidate_rows(found),
        by_criterion=_criterion_rows(found),
        references=_reference_rows(draws, grid, blocks, lam_by),
        search=found,
        loss=Estimate.of(_losses(held, y), seed=seed),
        accuracy=_estimate(_hits(held, y), seed),
        eval_loss=None if y_eval is None else Estimate.of(_losses(outputs_eval, y_eval), seed=seed),
        eval_accuracy=None if y_eval is None else _estimate(_hits(outputs_eval, y_eval), seed),
        lam=lam,
        lam_rel=curve[at]["lam_rel"],
        lam_by=lam_by,
        lam_at_edge=at in (0, len(curve) - 1),
        lam_curve=curve,
        learning_rate=rate,
        learning_rate_mean=to_mean(rate, len(y), "learning_rate"),
        trust=_trust(fits, tunables, data, blocks, lipschitz),
        spectra={name: spectrum(draws[0].kernel.subset(members)) for name, members in sets.items()},
        rank=rank,
        alpha=alpha,
        head=any(in_head(block) for block in grid.always),
        examples=len(y),
        draws=len(draws),
    )
