"""Lipschitz profiles around θ₀ (theory 8, the paper's Algorithm 1), with the radius that training reaches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots
from jaxlin.data.dataset import Dataset
from jaxlin.experiments.figures.study import (
    FAST,
    PAPER_ADAM,
    PAPER_KERNEL,
    AdamSetting,
    Problem,
    Row,
    Study,
    Tables,
    Work,
)
from jaxlin.experiments.figures.summary import band, counted, distinct, name_of, number, of, sizes, values_of, written
from jaxlin.ntk.change import PER_EXAMPLE, PER_PAIR, STACKED
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.jacobian import evenly_spread
from jaxlin.ntk.lipschitz import QUANTITIES, lipschitz_profile
from jaxlin.theory.spectrum import spectrum
from jaxlin.training.trainer import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class LipschitzSetting(AdamSetting):
    """Profiles in random directions, and along real fine-tuning.

    Attributes:
        radii: At which models are drawn.
        directions: Models drawn at each.
        profile_examples: Training examples that Jacobian and kernel are taken on.
        lam_rel: Pull strengths of the runs in units of μ₁.
        points: States of a run at which the profile is taken too.
        mu_examples: Training examples that μ₁ is estimated on, times their share.
    """

    radii: tuple[float, ...] = (0.1, 0.5, 2.0, 10.0)
    directions: int = 3
    profile_examples: int = 1000
    lam_rel: tuple[float, ...] = (0.0, 1e-2)
    points: int = 3
    mu_examples: int = 256


def _some(data: Dataset, count: int) -> Dataset:
    return data.take(evenly_spread(len(data), count))


def _mu1(problem: Problem, data: Dataset) -> float:
    """Largest eigenvalue of the kernel at θ₀ of some examples."""
    return float(spectrum(ntk(problem.tun, data)).eigenvalues[0])


def _random(setting: LipschitzSetting, work: Work, problem: Problem) -> dict[str, Any]:
    """The profile in random directions, and σ = ‖J₀‖₂ on the same examples."""
    some = _some(problem.train, setting.profile_examples)
    found = lipschitz_profile(
        problem.tun,
        some,
        setting.radii,
        quantity=QUANTITIES,
        directions=setting.directions,
        examples=range(len(some)),
        seed=problem.seed,
        progress=lambda done, of: work.progress(f"profile, {problem.loaded.task.name}", done, of),
    )
    return {"profile": found.table, "sigma": _mu1(problem, some) ** 0.5}


def _trained(setting: LipschitzSetting, work: Work, problem: Problem, share: float) -> dict[str, Any]:
    """The profile at points of a run of full fine-tuning, evenly spread over log steps, and where the run ends."""
    n, task = len(problem.train), problem.loaded.task
    some = _some(problem.train, setting.profile_examples)
    lam = 0.0
    if share:
        few = _some(problem.train, setting.mu_examples)
        lam = share * _mu1(problem, few) * n / len(few)
    config = setting.training(problem.seed, lam=lam)
    total = config.total_steps(n)
    steps = sorted({int(step) for step in np.geomspace(1, total, setting.points).round()})

    def tell(row: Row) -> None:
        work.progress(f"training, {task.name}, λ/μ₁ = {share:g}", row["step"], total)

    run = train(problem.tun, problem.train, problem.eval, config, keep=steps, log=tell)
    found = lipschitz_profile(
        problem.tun,
        some,
        (),
        quantity=QUANTITIES,
        along=[run.states[step].theta for step in steps],
        examples=range(len(some)),
        progress=lambda done, of: work.progress(f"along the run, {task.name}", done, of),
    )
    end = run.history[-1]
    score = end[f"eval_{task.metrics[0]}"]
    # Points come in their order, each with every quantity.
    at = [step for step in steps for _ in QUANTITIES]
    profile = [{**row, "step": step} for step, row in zip(at, found.table, strict=True)]
    radius = max(row["distance"] for row in run.history)
    reached = {"steps": total, "radius": radius, "loss_eval": end["eval_loss"], "score_eval": score}
    return {"profile": profile, "reached": reached}


_KEPT = ("quantity", "radius", "L_avg", "L_upper", "directions", "residual")


def compute(setting: LipschitzSetting, work: Work) -> Tables:
    """Samples every task, seed by seed: in random directions, then along a run at each λ."""
    tables: dict[str, list[Row]] = {"profile": [], "reached": []}
    runs = [(seed, task) for seed in range(setting.seeds) for task in setting.tasks]
    for done, (seed, task) in enumerate(runs):
        work.progress("tasks", done, len(runs))
        problem = work.problem(task, seed)
        metric = problem.loaded.task.metrics[0]
        examples = min(setting.profile_examples, len(problem.train))
        labels = {**problem.labels, "profile_examples": examples}
        same = {"examples": examples, "rank": setting.lora_rank}
        key = {"what": "lipschitz", "radii": setting.radii, "directions": setting.directions, **same}
        found = work.get(problem, key, functools.partial(_random, setting, work, problem))
        sigma = found["sigma"]

        def add(rows: Sequence[Row], share: float | None, labels: Row = labels, sigma: float = sigma) -> None:
            tables["profile"] += [
                {**labels, "lam_over_mu1": share, "step": row.get("step"), "sigma": sigma}
                | {name: row[name] for name in _KEPT}
                for row in rows
            ]

        add(found["profile"], None)
        for share in setting.lam_rel:
            key = {"what": "lipschitz along a run", "lam_rel": share, **same}
            key |= {name: getattr(setting, name) for name in ("points", "mu_examples")}
            key["training"] = dataclasses.asdict(setting.training(seed))
            found = work.get(problem, key, functools.partial(_trained, setting, work, problem, share))
            add(found["profile"], share)
            tables["reached"].append({**labels, "lam_over_mu1": share, "metric": metric, **found["reached"]})
    return tables


_ROWS = (
    (STACKED, "stacked\n‖J(θ)−J₀‖₂ / r"),
    (PER_EXAMPLE, "largest of an example\n‖J(θ;x)−J(θ₀;x)‖₂ / r"),
    (PER_PAIR, "largest of a pair\n‖K(x,x′)−K₀(x,x′)‖₂ / r"),
)


def panel(axis: Axes, rows: Sequence[Row], reached: Sequence[Row]) -> None:
    """Draws one quantity of one task."""
    from matplotlib.ticker import LogLocator

    axis.set(xscale="log", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))  # some span little more than a decade
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    random = [row for row in rows if row["lam_over_mu1"] is None]
    colour, name = plots.COLOURS["random_direction"], plots.NAMES["random_direction"]
    band(axis, random, "radius", "L_avg", fmt="-", color=colour, label=f"L_avg, {name}")
    band(axis, random, "radius", "L_upper", fmt="--", color=colour, label=f"L_upper, {name}")
    for order, share in enumerate(sorted(distinct(reached, "lam_over_mu1"))):
        size = max(6.5 - 3 * order, 2)  # open and each smaller: the first steps of all runs coincide
        shade, mark = plots.lam_look(share)
        for seed in distinct(rows, "seed"):
            mine = of(rows, lam_over_mu1=share, seed=seed)
            label = f"along a run, λ/μ₁ = {number(share)}" if seed == rows[0]["seed"] else None
            x, y = ([row[key] for row in mine] for key in ("radius", "L_upper"))
            axis.plot(x, y, f"{mark}-", color=shade, lw=0.9, ms=size, mfc="none", label=label)
        ends = values_of(of(reached, lam_over_mu1=share), "radius")
        axis.axvspan(ends.min(), ends.max(), color=shade, alpha=0.25, lw=0.8)


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws the three quantities against the radius, a column a task."""
    rows, reached = tables["profile"], tables["reached"]
    tasks = distinct(rows, "task")
    figure, axes = plots.canvas(len(_ROWS), len(tasks), plots.COLUMN, 5.2, sharex=True, sharey="row")
    with plots.drawing():
        for column, task in enumerate(tasks):
            for line, (quantity, name) in enumerate(_ROWS):
                axis = axes[line, column]
                axis.set_ylabel("" if column else name)
                panel(axis, of(rows, task=task, quantity=quantity), of(reached, task=task))
            axes[0, column].set_title(name_of(task))
            axes[-1, column].set_xlabel("radius r = ‖θ−θ₀‖")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        models = max(row["directions"] for row in rows)
        some = max(distinct(rows, "profile_examples"))
        plots.headline(
            figure,
            f"Lipschitz profiles on {some} training examples, {models} random directions a radius: lower estimates.\n"
            f"Fine-tuning, the radius it reaches shaded: {sizes(reached)}",
        )
    return {"profile": figure}


FLAT = 2.0
"""Factor within which L_avg is called constant."""


def _at(rows: Sequence[Row], radius: float) -> float:
    """L_upper in random directions at a radius, interpolated in its logarithm between the sampled ones."""
    ordered = sorted(rows, key=lambda row: row["radius"])
    radii, values = (np.array([row[key] for row in ordered]) for key in ("radius", "L_upper"))
    return float(np.interp(np.log(radius), np.log(radii), values))


def changes(rows: Sequence[Row], reached: Sequence[Row], task: str, share: float) -> list[tuple[float, ...]]:
    """For each seed at its run's end: H along it over H in random directions, ‖J(θ)−J₀‖₂/σ of both, and the radius."""
    found: list[tuple[float, ...]] = []
    for end in of(reached, task=task, lam_over_mu1=share):
        mine = of(rows, task=task, seed=end["seed"], quantity=STACKED)
        last = max(of(mine, lam_over_mu1=share), key=lambda row: row["step"])
        random = _at([row for row in mine if row["lam_over_mu1"] is None], last["radius"])
        moved = last["radius"] / last["sigma"]
        found.append((last["L_upper"] / random, last["L_upper"] * moved, random * moved, last["radius"]))
    return found


def findings(tables: Tables) -> dict[str, str]:
    """Says how constant the profiles are, how far training goes, and how random directions compare with its own."""
    rows, reached = tables["profile"], tables["reached"]
    lines, flat, ratios = [], 0, []
    tasks, shares = distinct(rows, "task"), sorted(distinct(reached, "lam_over_mu1"))
    for task in tasks:
        random = [row for row in of(rows, task=task, quantity=STACKED) if row["lam_over_mu1"] is None]
        averages = [values_of(of(random, radius=r), "L_avg").mean() for r in sorted(distinct(random, "radius"))]
        flat += max(averages) <= FLAT * min(averages)
        for share in shares:
            found = np.array(changes(rows, reached, task, share))
            ratios += found[:, 0].tolist()
            radius = written(values_of(of(reached, task=task, lam_over_mu1=share), "radius"))
            cells = [radius, *(written(found[:, column]) for column in (3, 0, 1, 2))]
            lines.append(f"| {name_of(task)} | {number(share)} | " + " | ".join(cells) + " |")
    head = "| Task | λ/μ₁ | largest radius | radius at the end | H along the run / in random directions |"
    head += " ‖J−J₀‖₂/‖J₀‖₂ | the same, in random directions |\n|---|---|---|---|---|---|---|\n"
    radii = sorted(distinct([row for row in rows if row["lam_over_mu1"] is None], "radius"))
    word = "more than random directions tell" if min(ratios) > 1 else "not always more than random directions tell"
    least = shares[0]
    moved = np.concatenate([np.array(changes(rows, reached, task, least))[:, 1] for task in tasks])
    return {
        "in_short": (
            f"**Along the way that fine-tuning takes, the Jacobian changes {word}**: {min(ratios):.2g} to "
            f"{max(ratios):.2g} times as much at equal distance ({counted(len(tasks), 'task')}, "
            f"λ/μ₁ = {' and '.join(f'{share:g}' for share in shares)}, every seed). At λ/μ₁ = {least:g} it has "
            f"changed by {moved.min():.2g} to {moved.max():.2g} of its norm at θ₀ in the end. In random directions "
            f"the ratio stays within a factor {FLAT:g} at all distances on {flat} of {len(tasks)} tasks."
        ),
        "profile": (
            f"L_avg of the stacked Jacobian stays within a factor {FLAT:g} from radius {radii[0]:g} to {radii[-1]:g} "
            f"on {flat} of {len(tasks)} tasks. L_upper is the largest of samples, and so an estimate of the supremum "
            "**from below**; L_avg is their mean."
        ),
        "reach": (
            "With H = ‖J(θ)−J₀‖₂/‖θ−θ₀‖ of the stacked Jacobian: how far fine-tuning goes, and the rest at its end "
            f"(mean over seeds, and range):\n\n{head}" + "\n".join(lines)
        ),
    }


STUDY = Study(
    name="04_lipschitz_profile",
    title="How fast Jacobian and kernel change with the distance from θ₀, and how far training goes",
    fast=LipschitzSetting(
        **FAST, radii=(0.1, 1.0, 10.0), directions=2, profile_examples=8, points=3, num_train_epochs=2.0
    ),
    full=LipschitzSetting(),
    paper=LipschitzSetting(**PAPER_ADAM, profile_examples=PAPER_KERNEL),
    compute=compute,
    draw=draw,
    findings=findings,
)
