"""Which layers and modules to tune: a search over sums of block kernels (theory 6 and 7).

`K_S = Σ K_ℓ`, so one pass over the data gives the kernel of every set S, and a candidate costs one eigendecomposition.
Ranks are not chosen: at LoRA's start K depends on the rank only through (α/r)² and the draw of A (theory 6).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlin.errors import InputError
from jaxlin.ntk.kernel import Kernel
from jaxlin.ntk.threads import in_parallel
from jaxlin.theory.criteria import CRITERIA, Criteria, criteria
from jaxlin.theory.regression import KernelRegression
from jaxlin.theory.spectrum import Spectrum, spectrum

VALIDATION = "validation_error"
SELECTION_CRITERIA: dict[str, bool] = {**CRITERIA, VALIDATION: False}
"""Name to whether more of it promises better training."""

_RATIOS = ("condition_number", "regularized_condition_number")
"""Averaged over draws as their logarithms."""

LAM_GRID = tuple(float(rel) for rel in np.logspace(-5, 1, 25))
"""λ in units of μ₁ among which one is suggested."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Layers and modules: each of the modules is tuned in each of the layers.

    Attributes:
        layers: Indices, ascending.
        modules: Paths within a layer, such as `"attention/query"`, in the order of the model.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]

    @property
    def label(self) -> str:
        """In words."""
        runs = [list(run) for _, run in itertools.groupby(enumerate(self.layers), lambda pair: pair[1] - pair[0])]
        spans = [f"{run[0][1]}–{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
        short = [module.removeprefix("attention/") for module in self.modules]
        return f"layer{'s' * (len(self.layers) > 1)} {', '.join(spans)}: {', '.join(short)}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """What candidates are made of.

    Attributes:
        cells: Layer and module to the names of its blocks.
        always: Blocks that every candidate holds: those in no layer, such as the head.
        sizes: Number of parameters of every block.
    """

    cells: Mapping[tuple[int, str], tuple[str, ...]]
    always: tuple[str, ...]
    sizes: Mapping[str, int]

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers, ascending."""
        return tuple(sorted({layer for layer, _ in self.cells}))

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules, in the order in which they are met."""
        return tuple(dict.fromkeys(module for _, module in self.cells))

    def blocks(self, candidate: Candidate) -> tuple[str, ...]:
        """Returns the blocks of a candidate, those that every one holds first."""
        cells = itertools.product(candidate.layers, candidate.modules)
        return self.always + tuple(block for cell in cells for block in self.cells[cell])

    def num_params(self, candidate: Candidate) -> int:
        """Returns how many parameters a candidate tunes, with those that every one holds."""
        return sum(self.sizes[block] for block in self.blocks(candidate))

    def allows(self, candidate: Candidate, budget: float) -> bool:
        """Whether a candidate is not empty, is there in full, and keeps to a budget of parameters."""
        cells = set(itertools.product(candidate.layers, candidate.modules))
        return bool(cells) and cells <= self.cells.keys() and self.num_params(candidate) <= budget

    def candidates(self, budget: float) -> Iterator[Candidate]:
        """Yields every candidate within a budget, those of the same modules together."""
        layers = self.layers

        def grow(candidate: Candidate, start: int) -> Iterator[Candidate]:
            for at in range(start, len(layers)):
                larger = Candidate((*candidate.layers, layers[at]), candidate.modules)
                if self.allows(larger, budget):  # what is larger still is allowed only where this is
                    yield larger
                    yield from grow(larger, at + 1)

        for size in range(1, len(self.modules) + 1):
            for modules in itertools.combinations(self.modules, size):
                yield from grow(Candidate((), modules), 0)

    def neighbours(self, candidate: Candidate, budget: float) -> list[Candidate]:
        """Returns the candidates with one layer or module more, less, or in another's place."""
        found = []
        for layers in _changed(candidate.layers, self.layers):
            found.append(Candidate(layers, candidate.modules))
        for modules in _changed(candidate.modules, self.modules):
            found.append(Candidate(candidate.layers, modules))
        return [other for other in found if self.allows(other, budget)]


def _changed(chosen: tuple[Any, ...], all_of: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Subsets one addition, removal or exchange away, in the order of the whole."""
    out = [item for item in all_of if item not in chosen]
    sets = [{*chosen, item} for item in out] + [set(chosen) - {item} for item in chosen]
    sets += [(set(chosen) - {old}) | {new} for old in chosen for new in out]
    return [tuple(item for item in all_of if item in one) for one in sets]


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """One draw of what is random at θ₀: kernels with the blocks of a `Grid`, and outputs.

    Attributes:
        kernel: Of the labelled examples, of the full kind.
        y: Targets.
        f0: Outputs at θ₀.
        kernel_eval: Of held-out examples with those, where there are any.
        y_eval: Their targets.
        f0_eval: Their outputs.
    """

    kernel: Kernel
    y: Float[np.ndarray, "N C"]
    f0: Float[np.ndarray, "N C"]
    kernel_eval: Kernel | None = None
    y_eval: Float[np.ndarray, "M C"] | None = None
    f0_eval: Float[np.ndarray, "M C"] | None = None


class _Sums:
    """The kernel of any candidate; the modules of a layer are summed once for all candidates with the same ones."""

    def __init__(self, kernel: Kernel, grid: Grid) -> None:
        self.kernel = kernel
        self.cells = {cell: kernel.subset(blocks).array for cell, blocks in grid.cells.items()}
        self.always = (
            kernel.subset(grid.always).array if grid.always else np.zeros_like(next(iter(self.cells.values())))
        )
        self._modules: tuple[str, ...] = ()
        self._of_layer: dict[int, np.ndarray] = {}

    def of(self, candidate: Candidate) -> Kernel:
        if candidate.modules != self._modules:
            self._modules, self._of_layer = candidate.modules, {}
        total = self.always.copy()
        for layer in candidate.layers:
            if layer not in self._of_layer:
                first, *rest = (self.cells[layer, module] for module in candidate.modules)
                self._of_layer[layer] = sum(rest, start=first)
            total += self._of_layer[layer]
        leaves = {"chosen": tuple(path for paths in self.kernel.leaves.values() for path in paths)}
        return dataclasses.replace(self.kernel, parts={"chosen": total}, leaves=leaves, jacobian=None)


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """A candidate and what its kernel says.

    Attributes:
        candidate: Layers and modules.
        num_params: Parameters tuned, with those that every candidate tunes.
        values: Every criterion, the mean over draws (of κ and κ_λ the geometric one).
        by_draw: The same for each draw.
        condition_number_is_bound: Whether κ is "≥" in a draw.
    """

    candidate: Candidate
    num_params: int
    values: dict[str, float]
    by_draw: tuple[dict[str, float], ...]
    condition_number_is_bound: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """Candidates ranked by a criterion.

    Attributes:
        ranked: Those that were computed, the best first; equal ones by number of parameters.
        criterion: Name.
        method: `"exhaustive"`: every candidate within the budget; `"greedy"`: forward selection, then exchange.
        bound: Value that no candidate within the budget is better than, from the monotony of eigenvalues in S
            (Weyl, theory 7(a)); the best's own where the search was exhaustive; `None`: not bounded.
        gap: How far the best is from it; `None` where it is not bounded.
    """

    ranked: tuple[Scored, ...]
    criterion: str
    method: str
    bound: float | None
    gap: float | None

    @property
    def optimality(self) -> str:
        """What is known of the optimum, in words."""
        if self.method == "exhaustive":
            return f"the best of all {len(self.ranked)} candidates within the budget"
        seen = f"the best of {len(self.ranked)} candidates seen by forward selection and exchange"
        if self.bound is None or self.gap is None:
            return f"{seen}; its distance to the optimum is not bounded, since it is not monotone in S"
        side = "above" if SELECTION_CRITERIA[self.criterion] else "below"
        return f"{seen}; none within the budget has one {side} {self.bound:.4g}: a gap of at most {self.gap:.3g}"


def _mean(name: str, values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if name in _RATIOS else float(np.mean(values))


def _order(one: Scored, criterion: str) -> tuple[float, int]:
    """Sorts the best first, of equals the smallest; NaN last."""
    value = -one.values[criterion] if SELECTION_CRITERIA[criterion] else one.values[criterion]
    return (math.inf if math.isnan(value) else value, one.num_params)


class _Scorer:
    """Computes candidates once each."""

    def __init__(self, draws: Sequence[Draw], grid: Grid, criterion: str, lam: float | None, lam_rel: float) -> None:
        self.draws, self.grid, self.criterion, self.lam, self.lam_rel = draws, grid, criterion, lam, lam_rel
        self.sums = [_Sums(draw.kernel, grid) for draw in draws]
        self.sums_eval = [None if draw.kernel_eval is None else _Sums(draw.kernel_eval, grid) for draw in draws]
        self.seen: dict[Candidate, Scored] = {}
        self.progress: Callable[[int], None] | None = None

    def _of_draw(self, candidate: Candidate, at: int) -> tuple[dict[str, float], bool]:
        draw, evaluation, kernel = self.draws[at], self.sums_eval[at], self.sums[at].of(candidate)
        if not kernel.array.any():
            names = SELECTION_CRITERIA if evaluation is not None else CRITERIA
            return dict.fromkeys(names, math.nan), False
        found: Criteria = criteria(kernel, draw.y, draw.f0, self.lam, self.lam_rel)
        values = dict(found.values)
        if evaluation is not None and draw.f0_eval is not None and draw.y_eval is not None:
            outputs = found.fit.test(evaluation.of(candidate), draw.f0_eval)
            values[VALIDATION] = float(np.mean(0.5 * np.sum((outputs - draw.y_eval) ** 2, axis=1)))
        return values, found.condition_number_is_bound

    def __call__(self, candidate: Candidate) -> Scored:
        if candidate not in self.seen:
            # One thread of BLAS each: on matrices of this size more of them are slower.
            found = in_parallel(functools.partial(self._of_draw, candidate), range(len(self.draws)))
            by_draw, bounds = zip(*found, strict=True)
            values = {name: _mean(name, [one[name] for one in by_draw]) for name in by_draw[0]}
            size = self.grid.num_params(candidate)
            self.seen[candidate] = Scored(candidate, size, values, by_draw, any(bounds))
            if self.progress is not None:
                self.progress(len(self.seen))
        return self.seen[candidate]

    def order(self, one: Scored) -> tuple[float, int]:
        return _order(one, self.criterion)

    def best(self, candidates: Sequence[Candidate]) -> Scored:
        return min(map(self, candidates), key=self.order)


def _forward_and_exchange(scorer: _Scorer, budget: float) -> None:
    """Sees candidates: growing by the best layer or module to the end, then from the best seen by any one change."""
    grid = scorer.grid
    whole = Candidate(grid.layers, grid.modules)
    if grid.allows(whole, budget):
        scorer(whole)
    singles = [Candidate((layer,), (module,)) for layer, module in grid.cells]
    now = scorer.best([one for one in singles if grid.allows(one, budget)]).candidate
    while grown := [one for one in grid.neighbours(now, budget) if _size(one) > _size(now)]:
        now = scorer.best(grown).candidate
    best = min(scorer.seen.values(), key=scorer.order)
    while near := grid.neighbours(best.candidate, budget):
        other = scorer.best(near)
        if scorer.order(other) >= scorer.order(best):
            break
        best = other


def _size(candidate: Candidate) -> int:
    return len(candidate.layers) + len(candidate.modules)


def _bound(scorer: _Scorer, budget: float) -> float | None:
    """The value that no candidate within the budget passes, where eigenvalues that grow with S give one."""
    # μ_i(K_S) is at most that of everything, and μ₁(K_S) at least the smallest of a single cell.
    name, grid = scorer.criterion, scorer.grid
    if name == "effective_dimension" and scorer.lam is None:
        return None  # λ then moves with μ₁
    singles = [Candidate((layer,), (module,)) for layer, module in grid.cells]
    least = [scorer(one) for one in singles if grid.allows(one, budget)]
    bounds = []
    for at, sums in enumerate(scorer.sums):
        every = spectrum(sums.of(Candidate(grid.layers, grid.modules)))
        tops = [one.by_draw[at]["mu_max"] for one in least]
        low = min((top for top in tops if top > 0), default=math.nan)
        value = _bound_of_draw(name, every, low, scorer.lam, scorer.lam_rel)
        if value is None:
            return None
        bounds.append(value)
    return _mean(name, bounds)


def _bound_of_draw(name: str, every: Spectrum, low: float, lam: float | None, lam_rel: float) -> float | None:
    """Of one draw; `every` is the spectrum of all blocks, `low` the least μ₁ of a candidate."""
    smallest = float(every.eigenvalues[-1])
    if name in ("mu_max", "mu_min", "trace"):
        values = {"mu_max": float(every.eigenvalues[0]), "mu_min": smallest, "trace": every.trace}
        return values[name]
    if name == "effective_dimension" and lam is not None:
        return every.effective_dimension(lam)
    if name == "condition_number":  # the largest that can be told is the same for every candidate
        known = float(every.eigenvalues[0]) / every.resolution
        return max(1.0, min(low / smallest if smallest > 0 else math.inf, known))
    if name == "regularized_condition_number":
        value = (low + lam) / (smallest + lam) if lam is not None else (1 + lam_rel) / (smallest / low + lam_rel)
        return max(1.0, value)
    return None


def check_search(
    grid: Grid,
    criterion: str,
    budget: int | None,
    lam: float | None,
    lam_rel: float,
    exhaustive_limit: int,
    held_out: bool,
) -> None:
    """Checks what `search` is given, without any kernel; arguments as there, `held_out`: whether draws have such.

    Raises:
        InputError: Naming the first that cannot be used.
    """
    if criterion not in SELECTION_CRITERIA:
        raise InputError(f"criterion={criterion!r} is unknown; expected one of {', '.join(SELECTION_CRITERIA)}")
    if criterion == VALIDATION and not held_out:
        raise InputError(f"criterion={VALIDATION!r} needs held-out examples; give x_eval and y_eval")
    for name, value in (("lam", lam), ("lam_rel", lam_rel)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}={value}; expected above 0 and finite")
    if exhaustive_limit < 1:
        raise InputError(f"exhaustive_limit={exhaustive_limit}; expected at least 1")
    if not grid.cells:
        raise InputError("nothing is tuned in a numbered layer (layer_0, …), so there are no layers to choose from")
    smallest = min(grid.num_params(Candidate((layer,), (module,))) for layer, module in grid.cells)
    if budget is not None and budget < smallest:
        always = sum(grid.sizes[block] for block in grid.always)
        raise InputError(
            f"budget={budget}: the smallest candidate tunes {smallest} parameters, {always} of them always, such as "
            "the head; give at least so many"
        )


def search(
    draws: Sequence[Draw],
    grid: Grid,
    criterion: str,
    *,
    budget: int | None = None,
    lam: float | None = None,
    lam_rel: float = 1e-2,
    exhaustive_limit: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Search:
    """Ranks sets of layers × modules by what their kernels say.

    Args:
        draws: At least one draw of what is random at θ₀; a criterion is its mean over them.
        grid: Layers, modules and their blocks.
        criterion: Name of `SELECTION_CRITERIA`; `"validation_error"` (mean over held-out examples of ½‖f − y‖²) needs
            draws with held-out examples.
        budget: Most parameters that may be tuned, those that every candidate tunes among them; `None`: no limit.
        lam: λ of the summed loss that criteria are at; `None` for `lam_rel` times the candidate's own μ₁.
        lam_rel: λ in units of μ₁.
        exhaustive_limit: Up to so many candidates are all computed; more are searched.
        progress: Called with candidates done and in all (an estimate where they are searched).

    Returns:
        The ranking, with what is known of the optimum.

    Raises:
        InputError: If the criterion is unknown or needs held-out examples, no candidate is within the budget, a
            kernel vanishes or holds NaN, or the criterion is NaN for every candidate.
    """
    if not draws:
        raise InputError("no draw of kernels is given; expected at least one")
    held_out = all(draw.kernel_eval is not None for draw in draws)
    check_search(grid, criterion, budget, lam, lam_rel, exhaustive_limit, held_out)
    limit = math.inf if budget is None else budget
    few = list(itertools.islice(grid.candidates(limit), exhaustive_limit + 1))
    scorer = _Scorer(draws, grid, criterion, lam, lam_rel)
    exhaustive = len(few) <= exhaustive_limit
    total = len(few) if exhaustive else _searched(grid)
    if progress is not None:
        scorer.progress = lambda done: progress(min(done, total), total)
    if exhaustive:
        for candidate in few:
            scorer(candidate)
    else:
        _forward_and_exchange(scorer, limit)
    bound = None if exhaustive else _bound(scorer, limit)
    ranked = tuple(sorted(scorer.seen.values(), key=scorer.order))
    if progress is not None:
        progress(total, total)
    best = ranked[0].values[criterion]
    if math.isnan(best):
        raise InputError(
            f"criterion {criterion!r} is undefined for every candidate: the kernels vanish, or f0 fits y exactly"
        )
    if exhaustive:
        return Search(ranked, criterion, "exhaustive", best, 0.0)
    return Search(ranked, criterion, "greedy", bound, None if bound is None else abs(bound - best))


def _searched(grid: Grid) -> int:
    """About how many candidates forward selection sees."""
    steps = len(grid.layers) + len(grid.modules)
    return len(grid.cells) + steps * (steps + 1) // 2


def best_by(found: Search) -> dict[str, Scored]:
    """Returns for every criterion the best of the candidates that a search computed."""
    names = [name for name in SELECTION_CRITERIA if name in found.ranked[0].values]
    return {name: min(found.ranked, key=functools.partial(_order, criterion=name)) for name in names}


def lam_curve(fits: Sequence[KernelRegression], grid: Sequence[float] = LAM_GRID) -> list[dict[str, float]]:
    """Returns leave-one-out error and log marginal likelihood against λ.

    Args:
        fits: Regressions of the same examples, a draw each, whatever their ridge.
        grid: λ in units of each kernel's μ₁.

    Returns:
        A row a λ: `lam_rel`, `leave_one_out_error` (mean over examples of ½‖f₋ᵢ(xᵢ) − yᵢ‖²) and
        `log_marginal_likelihood`, means over the draws.
    """
    rows = []
    for rel in grid:
        at = [dataclasses.replace(fit, ridge=rel * float(fit.eigenvalues[-1])) for fit in fits]
        errors = [np.mean(0.5 * np.sum((fit.leave_one_out() - fit.y) ** 2, axis=1)) for fit in at]
        evidence = [fit.log_marginal_likelihood() for fit in at]
        row = {"lam_rel": float(rel), "leave_one_out_error": float(np.mean(errors))}
        rows.append({**row, "log_marginal_likelihood": float(np.mean(evidence))})
    return rows


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over examples and draws.

    Attributes:
        value: The mean.
        low: Lower end of the bootstrap interval over examples, and over draws where there are several.
        high: Upper end.
        confidence: Its confidence.
        by_draw: The mean over examples for each draw.
        examples: How many.
    """

    value: float
    low: float
    high: float
    confidence: float
    by_draw: tuple[float, ...]
    examples: int

    @classmethod
    def of(
        cls, values: Float[np.ndarray, "D N"], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Estimate:
        """Averages a quantity known for every draw and example; draws and examples are resampled, each by themselves.

        Args:
            values: By draw and example.
            confidence: Of the interval.
            resamples: How many.
            seed: Of the bootstrap.

        Returns:
            The mean. Of few draws, D, the bootstrap sees (D − 1)/D of their variance; of one, none.
        """
        (d, n), rng = values.shape, np.random.default_rng(seed)
        examples = rng.integers(n, size=(resamples, n))
        shares = rng.multinomial(d, np.full(d, 1 / d), size=resamples) / d  # of the draws; 1 where there is one
        means = np.take_along_axis(shares @ values, examples, axis=1).mean(axis=1)
        tail = (1 - confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        by_draw = tuple(float(value) for value in values.mean(axis=1))
        return cls(float(values.mean()), float(low), float(high), confidence, by_draw, n)
