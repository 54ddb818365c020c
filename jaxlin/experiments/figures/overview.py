"""The results page: every claim beside what was measured, and one figure of all studies."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxlin import plots
from jaxlin.experiments.figures import choose_layers_page as chosen
from jaxlin.experiments.figures import condition_number_page as condition
from jaxlin.experiments.figures import dynamics, lipschitz, llm, regularization, spectra_page
from jaxlin.experiments.figures import kernel_regression_findings as regression
from jaxlin.experiments.figures.correlations import POOLED
from jaxlin.experiments.figures.study import Row, Tables
from jaxlin.experiments.figures.summary import (
    band,
    counted,
    distinct,
    lam_positions,
    name_of,
    number,
    of,
    poolable,
    spread,
    values_of,
    with_interval,
)
from jaxlin.training.compare import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, and how a study answers it.

    Attributes:
        study: Name of the study.
        words: The claim, the paper's if not said otherwise.
        answer: Says of the study's tables what was measured, and whether the claim holds.
        table: Name of the table that it is measured in.
    """

    study: str
    words: str
    answer: Callable[[Tables], tuple[str, str]]
    table: str = "table"

    def sample(self, tables: Tables) -> str:
        """Says how many tasks, draws and training examples that table is of."""
        rows = poolable(tables[self.table])
        draws = len(distinct(rows, "seed" if "seed" in rows[0] else "draw"))
        n, kernels = (
            distinct(rows, "train_examples"),
            distinct(rows, "kernel_examples") if "kernel_examples" in rows[0] else [],
        )
        return f"{counted(len(distinct(rows, 'task')), 'task')}, {counted(draws, 'draw')}, n = {spread(n)}" + (
            f", kernels of {spread(kernels)}" if kernels not in ([], n) else ""
        )


def _gaps(rows: Sequence[Row], share: float) -> list[float]:
    """The relative output gap of each task at one λ, mean over seeds."""
    mine = of(rows, lam_over_mu1=share)
    return [float(values_of(of(mine, task=task), "output_gap_relative_eval").mean()) for task in distinct(rows, "task")]


def _pull(tables: Tables) -> tuple[str, str]:
    rows = poolable(of(tables["table"], pull="coupled", arm=FULL))
    tasks, shares = distinct(rows, "task"), sorted(distinct(rows, "lam_over_mu1"))
    gaps = {share: _gaps(rows, share) for share in shares}
    least = min(shares, key=lambda share: max(gaps[share]))
    measured = (
        f"‖f−f̄‖/‖f−f₀‖ on validation examples is {spread(gaps[shares[0]], '.2g')} at λ/μ₁ = {shares[0]:g} and "
        f"{spread(gaps[least], '.2g')} at {least:g}"
    )
    good = [regularization.good_from(of(rows, task=task), regularization.LIMIT) for task in tasks]
    known = [share for share in good if share is not None]
    if len(known) < len(tasks):
        return measured, f"in part: below {regularization.LIMIT:g} on {len(known)} of {counted(len(tasks), 'task')}"
    left = regularization.left_of_gains(poolable(of(tables["table"], pull="coupled")), max(known))
    holds = f"yes, with a pull: below {regularization.LIMIT:g} from λ/μ₁ = {max(known):g} on"
    return measured, f"{holds}, but {left}" if left else holds


def _held(rows: Sequence[Row], what: str) -> tuple[str, str]:
    """Counts bounds that apply and hold."""
    applying = [row for row in rows if row["applies"]]
    failing = sum(not row["holds"] for row in applying)
    measured = f"of {len(rows)} {what}, {len(applying)} apply and {len(applying) - failing} of these hold"
    return measured, "yes" if applying and not failing else f"no: {failing} fail" if failing else "none applies"


def _distance_bounds(tables: Tables) -> tuple[str, str]:
    rows = regularization.of_theory(tables["bounds"], "4", "5")
    measured, holds = _held(rows, "bounds of theory 4 and 5 on runs of descent")
    distance = regularization.looseness(rows, *regularization.ON_DISTANCE)
    gap = regularization.looseness(rows, *regularization.ON_GAP)
    measured += (
        f"; at the median those on the distance are {spread(distance, '.2g')} times what is measured, those on the "
        f"gap (5(b), 5(c)) {' and '.join(number(x, '.2g') for x in gap)} times. The runs end "
        f"{spread(regularization.reached(rows), '.2g')} from θ₀"
    )
    return measured, f"{holds} (H is sampled: no proof)" if holds == "yes" else holds


def _spectral_bounds(tables: Tables) -> tuple[str, str]:
    measured, holds = _held(tables["holds"], "bounds of theory 7, as layers are added")
    return measured, f"{holds}: theorems, and the code agrees" if holds == "yes" else holds


def _equivalence(tables: Tables) -> tuple[str, str]:
    rows = poolable(tables["curves"])
    off, gaps = dynamics.off_closed_form(rows), dynamics.curve_gaps(rows)
    said = " and ".join(f"{number(gaps[share], '.2g')} at λ/μ₁ = {number(share)}" for share in (min(gaps), max(gaps)))
    measured = (
        f"the linearized model, trained, is off the kernel’s closed form by {number(off, '.1g')} of the way; the "
        f"training loss of the network is off it by at most {said}, as a share of what it falls by"
    )
    shares = spread(list(gaps.values()), ".2g")
    exact = "yes, to rounding" if dynamics.exact_to_rounding(rows) else "not to rounding"
    return (
        measured,
        f"of the linearized model: {exact}; of the network: to within {shares} of that fall",
    )


def _directions(tables: Tables) -> tuple[str, str]:
    rows, reached = poolable(tables["profile"]), tables["reached"]
    shares = distinct(reached, "lam_over_mu1")
    ratios = [
        found[0]
        for task in distinct(rows, "task")
        for share in shares
        for found in lipschitz.changes(rows, reached, task, share)
    ]
    measured = (
        f"on its way, fine-tuning changes the Jacobian {spread(ratios, '.2g')} times as much as random directions do "
        "at the same distance"
    )
    return measured, "no: they tell too little" if min(ratios) > 1 else "in part"


def _condition(tables: Tables) -> tuple[str, str]:
    correlations = tables["correlations"]
    loss, metric = (condition.one(correlations, condition.KAPPA, outcome) for outcome in ("train_loss", "metric"))
    measured = (
        f"log κ against training loss: ρ = {condition.cell(loss, 'spearman')}; with trace and size held constant "
        f"{condition.cell(loss, 'partial')}; against the validation metric {condition.cell(metric, 'spearman')} "
        f"({condition.widest(tables['table'], correlations)})"
    )
    if of(correlations, way=condition.STABLE):
        stable = condition.one(correlations, condition.KAPPA, "train_loss", condition.STABLE)
        measured += (
            f"; under descent at c/(μ₁+λ), against training loss {condition.cell(stable, 'spearman')}, partial "
            f"{condition.cell(stable, 'partial')}"
        )
        if far := condition.beyond(tables["table"]):
            measured += f", but {100 * far:.0f} % of those runs go farther from θ₀ than any of Adam’s"
    return measured, condition.verdict(correlations)


def _choice(tables: Tables) -> tuple[str, str]:
    table = chosen.by_accuracy(poolable(tables["table"]))
    over, training = (
        {other: chosen.pooled(table, other, column) for other in (chosen.LAST, chosen.RANDOM)}
        for column in ("score_eval", "loss_train")
    )
    said, fits = (
        "; ".join(f"minus {chosen.NAMES[other]} {with_interval(values)}" for other, values in found.items())
        for found in (over, training)
    )
    better = [chosen.outcome(values, 1) for values in over.values()]
    holds = {1: "yes", 0: "not shown", -1: "no"}[min(better)]
    measured = (
        f"accuracy of the choice, within a budget of parameters of which it used {100 * chosen.share_used(table):.3g} "
        f"% and the others all: {said}. Training loss: {fits}"
    )
    return measured, holds


def _prediction(tables: Tables) -> tuple[str, str]:
    every = poolable(tables["pairs"])
    pairs = of(every, arm=regression.REGRESSION, other=regression.FULL)
    over = regression.pooled(pairs, regression.REGRESSION, regression.FULL)
    same = regression.pooled(every, regression.REGRESSION, regression.PULLED)
    words, holds = regression.learning(every)
    told = [
        chosen.outcome(values_of(of(pairs, task=task), "accuracy_difference"), 1) for task in distinct(pairs, "task")
    ]
    measured = (
        f"accuracy of kernel regression minus that of fine-tuning at the same λ {with_interval(same)}, without a pull "
        f"{with_interval(over)}; taken singly, the latter is better on {told.count(-1)} of the tasks, the kernel on "
        f"{told.count(1)}. {words}"
    )
    return measured, holds


def _prompts(tables: Tables) -> tuple[str, str]:
    rows = poolable(of(tables["table"], arm=FULL))
    least = min(distinct(rows, "lam_over_mu1"))
    gaps = {start: _gaps(of(rows, start=start), least) for start in llm.STARTS}
    said = ", ".join(f"{spread(values, '.2g')} with {llm.NAMES[start]}" for start, values in gaps.items())
    firsts = [min(gaps, key=lambda start: gaps[start][i]) for i in range(len(gaps[llm.STARTS[0]]))]
    count = firsts.count(llm.STARTS[0])
    holds = "yes" if count == len(firsts) else "no" if not count else f"on {count} of {len(firsts)} tasks"
    measured = f"‖f−f̄‖/‖f−f₀‖ without a pull: {said}"
    if reasons := llm.untestable(poolable(tables["table"]), poolable(tables["shares"])):
        return f"{measured}; {'; '.join(reasons)}", "not testable with this decoder"
    return measured, holds


CLAIMS = (
    Claim(
        "02_regularization_and_linearity",
        "The stronger the pull to the pretrained weights, the better a model of fine-tuning its linearization is",
        _pull,
    ),
    Claim(
        "02_regularization_and_linearity",
        "How far fine-tuning moves, and how far the two can be apart, is bounded (bounds derived here)",
        _distance_bounds,
        "bounds",
    ),
    Claim(
        "03_dynamics", "Fine-tuning’s dynamics become those of learning with the tangent kernel", _equivalence, "curves"
    ),
    Claim(
        "04_lipschitz_profile",
        "Sampling random directions (Algorithm 1) says how fast the network leaves its linearization",
        _directions,
        "reached",
    ),
    Claim(
        "05_spectra_and_layers", "The spectrum for a choice of layers lies between bounds", _spectral_bounds, "holds"
    ),
    Claim(
        "06_condition_number_predicts",
        "The condition number of K₀ predicts training loss and accuracy over choices of layers",
        _condition,
    ),
    Claim("07_choose_layers", "So the kernel tells which layers to adapt (here: by leave-one-out loss)", _choice),
    Claim("08_kernel_regression", "The kernel predicts how well fine-tuning does", _prediction, "pairs"),
    Claim(
        "09_llm",
        "With a prompt in place of a new head, fine-tuning is nearest to linear (Malladi et al. 2023)",
        _prompts,
    ),
)
"""In the order of the notebooks."""


def caption(setting: Mapping[str, Any]) -> str:
    """Writes what stands below the figure.

    Args:
        setting: Of a study, as in its record.

    Returns:
        Markdown.
    """
    *tasks, last = map(name_of, setting["tasks"])
    letter = string.ascii_lowercase[list(_PANELS).index("06_condition_number_predicts")]
    return (
        f"*{setting['model_name_or_path']} with LoRA of rank {setting['lora_rank']} on {', '.join(tasks)} and {last}: "
        f"{setting['num_train']} training examples, {setting['seeds']} draws of training examples, A and data order, "
        "where table and notebook do not say otherwise (06 is of more tasks, 09 of another model); bands and "
        "intervals are over draws, or over tasks, and in "
        f"({letter}) over choices of layers and draws with the tasks as they are. One panel a notebook, in their "
        "order.*"
    )


def claims_table(studies: Mapping[str, Tables]) -> str:
    """Writes every claim of the studies that there are, what was measured, and whether it holds.

    Args:
        studies: Name to tables.

    Returns:
        A Markdown table.
    """
    lines = ["| Claim | What we measured | Of | Does it hold here? | Notebook |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        if claim.study in studies:
            tables = studies[claim.study]
            measured, holds = claim.answer(tables)
            link = f"[{claim.study[:2]}](notebooks/{claim.study}.ipynb)"
            lines.append(f"| {claim.words} | {measured} | {claim.sample(tables)} | {holds} | {link} |")
    return "\n".join(lines)


def _draw_pull(axis: Axes, tables: Tables) -> None:
    rows = of(tables["table"], pull="coupled", arm=FULL)
    axis.set_yscale("log")
    at = lam_positions(axis, rows)
    for task in distinct(rows, "task"):
        mine, (colour, style) = of(rows, task=task), plots.task_look(task)
        band(axis, mine, "lam_over_mu1", "output_gap_relative_eval", at, style, color=colour, label=name_of(task))
    axis.set(title="Gap against the pull", xlabel="pull λ/μ₁", ylabel="‖f−f̄‖ / ‖f−f₀‖")
    axis.legend()


def _draw_dynamics(axis: Axes, tables: Tables) -> None:
    rows = tables["curves"]
    share, task = min(distinct(rows, "lam_over_mu1")), distinct(rows, "task")[0]
    dynamics.panel(axis, of(rows, lam_over_mu1=share, task=task), "loss_train")
    axis.set(title=f"{name_of(task)}, λ/μ₁ = {number(share)}", xlabel="step")
    axis.set_ylabel("training loss ½‖f−y‖²")
    axis.legend()


def _draw_profile(axis: Axes, tables: Tables) -> None:
    task = distinct(tables["profile"], "task")[0]
    rows = of(tables["profile"], task=task, quantity=lipschitz.STACKED)
    lipschitz.panel(axis, rows, of(tables["reached"], task=task))
    axis.set_title(f"{name_of(task)}: Jacobian", pad=32)
    axis.set(xlabel="radius r = ‖θ−θ₀‖", ylabel="‖J(θ)−J₀‖₂ / r")
    handles, labels = axis.get_legend_handles_labels()
    short = [label.replace("random directions", "random").removeprefix("along a ") for label in labels]
    axis.legend(handles, short, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, columnspacing=1.2)


def _draw_bounds(axis: Axes, tables: Tables) -> None:
    rows = tables["bounds"]
    task, seed = distinct(rows, "task")[0], distinct(rows, "seed")[0]
    mine = of(rows, task=task, seed=seed, step=min(distinct(rows, "step")))
    spectra_page.between(axis, mine)
    axis.set(title=f"{name_of(task)}: layer {mine[0]['added']} added", xlabel="index i")
    axis.set_ylabel("eigenvalue μᵢ, after / before")
    axis.legend()


def _draw_condition(axis: Axes, tables: Tables) -> None:
    rows = of(tables["correlations"], predictor=condition.KAPPA, way=condition.PAPER, outcome="train_loss")
    rows = [row for row in rows if row["task"] in {*distinct(tables["table"], "task"), POOLED}]
    for at, row in enumerate(rows):
        condition.interval(axis, row, "spearman", at - 0.16, marker="o", color=plots.COLOURS["plain"], ms=4)
        condition.interval(
            axis, row, "partial", at + 0.16, marker="s", color=plots.COLOURS["partial"], mfc="white", ms=4
        )
    axis.axvline(0, color="#000000", lw=0.7)
    axis.plot([], [], "o-", color=plots.COLOURS["plain"], ms=4, label="plain")
    axis.plot([], [], "s-", color=plots.COLOURS["partial"], mfc="white", ms=4, label="trace, size held constant")
    axis.set_yticks(range(len(rows)), ["all" if row["task"] == POOLED else name_of(row["task"]) for row in rows])
    axis.set_title("κ and training loss", pad=20)
    axis.set(xlabel="rank correlation", xlim=(-1.05, 1.05))
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _draw_choice(axis: Axes, tables: Tables) -> None:
    table = chosen.by_accuracy(tables["table"])
    for at, other in enumerate(chosen.OTHERS):
        chosen.points(axis, chosen.pooled(table, other, "score_eval"), at, plots.COLOURS[other])
    axis.axvline(0, color="#000000", lw=0.7)
    names = [chosen.NAMES[other].replace(" (", "\n(") for other in chosen.OTHERS]
    axis.set_yticks(range(len(chosen.OTHERS)), names)
    axis.set_ylim(len(chosen.OTHERS) - 0.4, -0.5)
    axis.locator_params(axis="x", nbins=5)
    axis.set(title="Chosen layers against others", xlabel="accuracy: chosen − other")


def _draw_prediction(axis: Axes, tables: Tables) -> None:
    pairs = of(tables["pairs"], arm=regression.REGRESSION, other=regression.FULL)
    tasks = distinct(pairs, "task")
    for at, task in enumerate(tasks):
        values = values_of(of(pairs, task=task), "accuracy_difference")
        chosen.points(axis, values, at, plots.COLOURS["kernel_regression"])
    chosen.points(axis, regression.pooled(pairs, regression.REGRESSION, regression.FULL), len(tasks), "#000000")
    axis.axvline(0, color="#000000", lw=0.7)
    axis.set_yticks(range(len(tasks) + 1), [*map(name_of, tasks), "all tasks"])
    axis.set_ylim(len(tasks) + 0.6, -0.5)
    axis.set(title="Kernel against fine-tuning", xlabel="accuracy: kernel − fine-tuning")


def _draw_prompts(axis: Axes, tables: Tables) -> None:
    rows = of(tables["table"], arm=FULL)
    task = distinct(rows, "task")[0]
    mine = of(rows, task=task)
    axis.set_yscale("log")
    at = lam_positions(axis, mine)
    for start in llm.STARTS:
        look = {"fmt": f"{llm.MARKERS[start]}-", "color": llm.COLOURS[start], "label": llm.NAMES[start]}
        band(axis, of(mine, start=start), "lam_over_mu1", "output_gap_relative_eval", at, **look)
    axis.set(title=f"A decoder, {name_of(task)}", xlabel="pull λ/μ₁", ylabel="‖f−f̄‖ / ‖f−f₀‖")
    axis.legend()


_PANELS: Mapping[str, Callable[[Axes, Tables], None]] = {
    "02_regularization_and_linearity": _draw_pull,
    "03_dynamics": _draw_dynamics,
    "04_lipschitz_profile": _draw_profile,
    "05_spectra_and_layers": _draw_bounds,
    "06_condition_number_predicts": _draw_condition,
    "07_choose_layers": _draw_choice,
    "08_kernel_regression": _draw_prediction,
    "09_llm": _draw_prompts,
}


def draw(studies: Mapping[str, Tables]) -> Figure:
    """Draws one panel a study, two in a line.

    Args:
        studies: Name to tables.

    Returns:
        The figure.
    """
    shown = [name for name in _PANELS if name in studies]
    columns = min(len(shown), 2)
    lines = -(-len(shown) // columns)
    figure, axes = plots.canvas(lines, columns, plots.COLUMN if columns > 1 else 3.5, 1.9 * lines)
    with plots.drawing():
        for axis, name, letter in zip(axes.flat, shown, string.ascii_lowercase, strict=False):
            _PANELS[name](axis, studies[name])
            axis.title.set_text(f"({letter}) {axis.get_title()}")
        for unused in axes.flat[len(shown) :]:
            unused.set_axis_off()
    return figure
