"""How close full and linearized fine-tuning are, against the pull towards the pretrained weights (theory 1, 4, 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import STDLIB
from jaxlin.experiments.figures.study import FAST, PAPER_ADAM, PAPER_KERNEL, AdamSetting, Row, Study, Tables, Work
from jaxlin.experiments.figures.summary import (
    against_the_pull,
    band,
    distinct,
    far_below,
    gaining,
    gains,
    lam_positions,
    learnt,
    metric_of,
    name_of,
    number,
    of,
    sizes,
    spread,
    values_of,
    written,
)
from jaxlin.experiments.tuned_arguments import FROZEN_A
from jaxlin.peft.lora import lora
from jaxlin.training.bound_sweep import bound_sweep
from jaxlin.training.compare import FULL, LINEARIZED, MAJORITY, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PULLS = ("coupled", "selective", "decoupled")


@dataclasses.dataclass(frozen=True)
class RegularizationSetting(AdamSetting):
    """Full against linearized over a sweep of pulls.

    Attributes:
        lam_rel: Pull strengths in units of μ₁.
        frozen_tasks: Tasks on which an arm with LoRA's A frozen is trained.
        pull_tasks: Tasks on which the pulls are compared.
        pull_lam_rel: Pull strengths of the others, in units of μ₁.
        bound_examples: Training examples of the first of them on which the bounds are evaluated, in float64.
        bound_steps: Full-batch steps of descent for them.
    """

    lam_rel: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    frozen_tasks: tuple[str, ...] = ("cola", "sst2")
    pull_tasks: tuple[str, ...] = ("sst2",)
    pull_lam_rel: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    bound_examples: int = 1000
    bound_steps: int = 24


_COLUMNS = (
    *("distance", "distance_A", "distance_B", "distance_head"),
    *("parameter_gap", "parameter_gap_A", "parameter_gap_B", "parameter_gap_head"),
    *(f"{name}_{split}" for split in ("train", "eval") for name in ("output_gap", "output_gap_relative")),
    *("kl_eval", "agreement_eval", "agreement_f0_eval", "loss_train", "loss_eval", "accuracy_train", "accuracy_eval"),
    *("f1_eval", "matthews_eval"),
)
"""Columns of `compare` that the table keeps."""


def _sweep(setting: RegularizationSetting, work: Work, task: str, seed: int, pull: str) -> list[Row]:
    """Fine-tunes in full and linearized at every λ, with one kind of pull."""
    problem = work.problem(task, seed)
    training = setting.training(seed, pull=pull)
    coupled = pull == PULLS[0]
    frozen = coupled and task in setting.frozen_tasks
    shares = setting.lam_rel if coupled else setting.pull_lam_rel
    options = {
        "what": "compare",
        "training": dataclasses.asdict(training),
        "lam_rel": list(shares),
        "frozen_A": frozen,
        "rank": setting.lora_rank,
    }

    def compute() -> list[Row]:
        rank = setting.lora_rank
        arms = {FROZEN_A: lora(problem.model, rank, float(rank), rng=seed, freeze_A=True)} if frozen else {}
        found = compare(
            problem.tun,
            problem.train,
            problem.eval,
            training,
            lam_rel=shares,
            extra_arms=arms,
            progress=lambda phase, done, of: work.progress(f"{phase}, {task}, seed {seed}, {pull}", done, of),
        )
        return [
            {"arm": row["arm"], "lam_over_mu1": row["lam_over_mu1"], **{name: row.get(name) for name in _COLUMNS}}
            for row in found.table
        ]

    rows = work.get(problem, options, compute)
    metric = problem.loaded.task.metrics[0]
    return [
        {**problem.labels, "pull": pull, **row, "metric": metric, "score_eval": row[f"{metric}_eval"]} for row in rows
    ]


_PART = 64
"""Examples that a step of descent takes at a time."""


def _bounds(setting: RegularizationSetting, work: Work) -> list[Row]:
    """Evaluates the bounds on full-batch descent, on some examples of the first task on which pulls are compared."""
    problem = work.problem(setting.pull_tasks[0], 0)
    some = problem.train.take(np.arange(min(setting.bound_examples, len(problem.train))))
    shares = [share for share in setting.lam_rel if share >= 1e-3]
    same = {"what": "bounds", "examples": len(some), "rank": setting.lora_rank}

    def compute() -> list[Row]:
        found = bound_sweep(
            problem.tun,
            some,
            lam_rel=shares,
            steps=setting.bound_steps,
            selective_steps=1,
            gradient_accumulation_steps=-(-len(some) // _PART),
            progress=work.progress,
            cache=lambda part, compute: work.get(problem, {**same, "part": part}, compute),
        )
        return found.table

    labels = {"task": problem.loaded.task.name, "seed": 0, "train_examples": len(some), "steps": setting.bound_steps}
    options = {**same, "steps": setting.bound_steps, "lam_rel": shares}
    return [{**labels, **row} for row in work.get(problem, options, compute)]


def compute(setting: RegularizationSetting, work: Work) -> Tables:
    """Runs every sweep; the coupled pull first, seed by seed, so that a part is a whole of fewer seeds."""
    missing = {*setting.pull_tasks, *setting.frozen_tasks} - set(setting.tasks)
    if missing:
        raise InputError(f"{sorted(missing)[0]} is not among --tasks {' '.join(setting.tasks)}")
    coupled = [(task, seed, PULLS[0]) for seed in range(setting.seeds) for task in setting.tasks]
    others = [(t, s, pull) for pull in PULLS[1:] for s in range(setting.seeds) for t in setting.pull_tasks]
    table: list[Row] = []
    for done, (task, seed, pull) in enumerate([*coupled, *others]):
        work.progress("sweeps", done, len(coupled) + len(others))
        table += _sweep(setting, work, task, seed, pull)
    return {"table": table, "bounds": _bounds(setting, work)}


_ROWS = (
    ("distance", "‖θ−θ₀‖", "log"),
    ("parameter_gap", "‖θ−θ̄‖", "log"),
    ("output_gap_eval", "‖f−f̄‖", "log"),
    ("output_gap_relative_eval", "‖f−f̄‖ / ‖f−f₀‖", "log"),
    ("kl_eval", "KL(f ‖ f̄)", "log"),
    ("agreement_eval", "agreement", "linear"),
    ("score_eval", "score", "linear"),
)
"""Rows of the main figure: column, what it is, scale."""
_ARMS = ((FULL, "o-"), (LINEARIZED, "s--"))
_BASELINES = (("start", "-."), (MAJORITY, "-."))
_GAP = "#000000"
_PARTS = (("A", "v-"), ("B", "s--"), ("head", "x-."))
"""Parts of theta that the parameter gap is split into."""
_PART_LOOK: dict[str, Any] = {"color": _GAP, "mfc": "none", "alpha": 0.5, "lw": 0.8, "ms": 2.5}


def _main(table: Sequence[Row]) -> Figure:
    """Everything against λ under the coupled pull, a column a task."""
    rows = of(table, pull="coupled")
    tasks = distinct(rows, "task")
    figure, axes = plots.canvas(len(_ROWS), len(tasks), plots.COLUMN, 8.0, sharex=True)
    for line in axes[:-1]:  # scores are of other kinds from task to task
        for axis in line[1:]:
            axis.sharey(line[0])
            axis.tick_params(labelleft=False)
    with plots.drawing():
        for column, task in enumerate(tasks):
            mine = of(rows, task=task)
            for line, (key, name, scale) in enumerate(_ROWS):
                axis = axes[line, column]
                axis.set_yscale(scale)
                at = lam_positions(axis, mine)
                arms = _ARMS if key in ("distance", "score_eval") else ((FULL, "^-"),)
                for arm, style in arms:
                    colour = plots.COLOURS[arm] if len(arms) > 1 else _GAP
                    label = plots.NAMES[arm] if len(arms) > 1 else None
                    own = {"color": colour, "label": label} | ({"mfc": "none"} if arm == LINEARIZED else {})
                    band(axis, of(mine, arm=arm), "lam_over_mu1", key, at, fmt=style, **own)
                if key == "parameter_gap":
                    for part, style in _PARTS:
                        band(axis, of(mine, arm=FULL), "lam_over_mu1", f"{key}_{part}", at, style, **_PART_LOOK)
                if key == "agreement_eval":
                    grey = {"fmt": "d--", "color": plots.COLOURS["start"], "label": "with start f₀"}
                    band(axis, of(mine, arm=FULL), "lam_over_mu1", "agreement_f0_eval", at, **grey)
                if key == "output_gap_relative_eval":
                    axis.axhline(LIMIT, color=plots.COLOURS["start"], lw=0.6, zorder=0)
                if key == "score_eval":
                    _baselines(axis, mine)
                if key in plots.SCALINGS or key == "output_gap_eval":
                    _guide(axis, of(mine, arm=FULL), key, at)
                axis.set_xlabel("pull λ/μ₁" if line == len(_ROWS) - 1 else "")
                if not column:
                    axis.set_ylabel(name)
            axes[0, column].set_title(name_of(task))
            axes[-1, column].set_xlabel(f"pull λ/μ₁\n(score: {metric_of(mine)})")
        for axis in (*axes[:3, 0], axes[-2, 0]):
            told_below = list(plots.NAMES.values())
            handles = [line for line in axis.get_legend_handles_labels()[0] if line.get_label() not in told_below]
            axis.legend(handles=handles, loc="lower left", fontsize=6, borderpad=0.1, labelspacing=0.2)
        looks = [(style, {"color": plots.COLOURS[arm], "label": plots.NAMES[arm]}) for arm, style in _ARMS]
        looks += [("^-", {"color": _GAP, "label": "full against linearized"})]
        looks += [(style, {"color": plots.COLOURS[arm], "label": plots.NAMES[arm]}) for arm, style in _BASELINES]
        looks += [(style, {**_PART_LOOK, "label": f"θ−θ̄ in {part}"}) for part, style in _PARTS]
        told = [axes[-1, 0].plot([], [], style, **look)[0] for style, look in looks]
        figure.legend(handles=told, loc="outside lower center", ncols=4)
        plots.headline(
            figure,
            "Full (θ, f) against linearized (θ̄, f̄), trained by Adam; outputs f of all validation examples together\n"
            f"Dotted: theory 5’s slopes for descent; thin line: {LIMIT:g}; KL in nats\n" + sizes(rows),
        )
    return figure


def _baselines(axis: Axes, rows: Sequence[Row]) -> None:
    """Draws scores without fine-tuning; one far below all others is written, with an arrow."""
    others = values_of([row for row in rows if row["arm"] in (FULL, LINEARIZED, "start")], "score_eval")
    for arm, style in _BASELINES:
        values = values_of(of(rows, arm=arm), "score_eval")
        if len(values) and far_below(values.mean(), others):
            text = f"{plots.NAMES[arm].removesuffix(' class')} {number(values.mean(), '.2f')} ↓"
            axis.text(0.98, 0.98, text, transform=axis.transAxes, fontsize=6, ha="right", va="top")
        elif len(values):
            axis.axhline(values.mean(), color=plots.COLOURS[arm], lw=0.9, ls=style)


def _guide(axis: Axes, rows: Sequence[Row], column: str, at: Mapping[float, float]) -> None:
    """Draws the slope that theory 5 gives for λ → ∞, from λ = μ₁/10 on."""
    slope = plots.SCALINGS[column.removesuffix("_eval")]
    large = sorted(share for share in at if share >= 0.1)
    values = values_of(of(rows, lam_over_mu1=large[0]), column) if large else np.array([])
    if len(large) > 1 and len(values):
        label = f"slope {number(slope)}"
        guide = [values.mean() * (share / large[0]) ** slope for share in large]
        axis.plot([at[share] for share in large], guide, color=_GAP, lw=0.9, ls=":", label=label)


_PULL_PANELS = (
    ("distance", "‖θ−θ₀‖", "log"),
    ("output_gap_relative_eval", "‖f−f̄‖ / ‖f−f₀‖", "log"),
    ("score_eval", "score", "linear"),
)


def _pulls(table: Sequence[Row]) -> Figure:
    tasks = _pull_tasks(table)
    rows = [row for row in table if row["task"] in tasks]
    styles = zip(PULLS, ("o-", "s--", "^-."), strict=True)
    lines = [({"arm": FULL, "pull": pull}, pull, plots.COLOURS[pull], style) for pull, style in styles]
    return against_the_pull(rows, _PULL_PANELS, lines, f"Three ways to pull, full fine-tuning; {sizes(rows)}")


def _frozen(table: Sequence[Row]) -> Figure:
    tasks = distinct(of(table, arm=FROZEN_A), "task")
    rows = [row for row in of(table, pull="coupled") if row["task"] in tasks]
    styles = {FULL: "o-", FROZEN_A: "v--", LINEARIZED: "s:"}
    lines = [({"arm": arm}, plots.NAMES[arm], plots.COLOURS[arm], style) for arm, style in styles.items()]
    return against_the_pull(rows, _PULL_PANELS, lines, f"With LoRA's A frozen; {sizes(rows)}", nested=True)


def _pull_tasks(table: Sequence[Row]) -> list[str]:
    return distinct(of(table, pull=PULLS[1]), "task")


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws everything against λ; the pulls; the arm with A frozen; and the bounds."""
    table, found = tables["table"], tables["bounds"]
    first = found[0]
    title = (
        f"Bounds of theory 4 and 5, {name_of(first['task'])}: {first['train_examples']} training examples, "
        f"{first['steps']} full-batch steps of descent, float64, 1 seed"
    )
    return {
        "against_the_pull": _main(table),
        "pulls": _pulls(table),
        "A_frozen": _frozen(table),
        "bounds": plots.bounds(found, title),
    }


def _slope(rows: Sequence[Row], column: str) -> float:
    """Log-log slope between the two largest λ, means over seeds."""
    shares = sorted(distinct(rows, "lam_over_mu1"))[-2:]
    low, high = (values_of(of(rows, lam_over_mu1=share), column).mean() for share in shares)
    return float(np.log(high / low) / np.log(shares[1] / shares[0]))


def good_from(rows: Sequence[Row], limit: float) -> float | None:
    """The smallest λ/μ₁ from which on the mean relative output gap stays below `limit`; `None`: none."""
    found = None
    for share in sorted(distinct(rows, "lam_over_mu1"), reverse=True):
        if values_of(of(rows, lam_over_mu1=share), "output_gap_relative_eval").mean() >= limit:
            break
        found = share
    return found


LIMIT = 0.1
"""Relative output gap below which linearization is called a good model."""


def left_of_gains(rows: Sequence[Row], share: float) -> str:
    """Says what is left at one λ of what fine-tuning without a pull gains on the start.

    Args:
        rows: Of the coupled pull, with those of the start.
        share: λ/μ₁.

    Returns:
        Words; empty if no gain is resolved without a pull.
    """
    without, there = (gains(rows, FULL, "start", lam_over_mu1=at) for at in (0.0, share))
    gained = [task for task in gaining(without) if task in there]
    if not gained:
        return ""
    still = [task for task in gaining(there) if task in gained]
    each = "; ".join(
        f"{name_of(task)} {number(without[task].mean(), '+.3f')}, there {number(there[task].mean(), '+.3f')}"
        for task in gained
    )
    word = f"something is left on {len(still)} of {len(gained)} tasks" if still else "nothing is left"
    return f"of what fine-tuning without a pull gains in score on its start {word} ({each})"


def of_theory(rows: Sequence[Row], *sections: str) -> list[Row]:
    """Returns the bounds of some sections of the theory."""
    return [row for row in rows if str(row["bound"]).startswith(sections)]


def looseness(rows: Sequence[Row], *names: str) -> list[float]:
    """Returns for each bound how many times what is measured it is, at the end of the runs: the median over λ."""
    return [float(np.median(1 / values_of(of_theory(rows, name), "tightness_end"))) for name in names]


ON_DISTANCE, ON_GAP = ("4(a)", "4(b)", "4(c)"), ("5(b)", "5(c)")
"""Bounds on how far the weights move, and on how far full and linearized fine-tuning end apart."""


def findings(tables: Tables) -> dict[str, str]:
    """Says how close the two are, where linearization stops being good, and what pulls, A and bounds show."""
    rows = of(tables["table"], pull="coupled")
    full = of(rows, arm=FULL)
    shares = sorted(distinct(full, "lam_over_mu1"))
    tasks = distinct(full, "task")
    lines = []
    for task in tasks:
        mine = of(full, task=task)
        ends = [values_of(of(mine, lam_over_mu1=s), "output_gap_relative_eval") for s in (shares[0], shares[-1])]
        agree = [values_of(of(mine, lam_over_mu1=s), "agreement_eval") for s in (shares[0], shares[-1])]
        good = good_from(mine, LIMIT)
        where = "at no λ of the grid" if good is None else f"from λ/μ₁ = {good:g} on"
        slopes = [number(_slope(mine, key), ".2f") for key in ("distance", "parameter_gap", "output_gap_eval")]
        lines.append(" | ".join(["", name_of(task), *map(written, [*ends, *agree]), where, *slopes, ""]).strip())
    at = [f"{what}, λ/μ₁ = {number(share)}" for what in ("gap", "agreement") for share in (shares[0], shares[-1])]
    head = ["", "Task", *at, "good", "slope of ‖θ−θ₀‖", "of ‖θ−θ̄‖", "of ‖f−f̄‖", ""]
    gap = (
        "Relative output gap ‖f−f̄‖/‖f−f₀‖ and agreement of decisions on validation examples: mean over seeds, and "
        f"range. A gap below {LIMIT:g} (the thin line) counts as good. Slopes are log-log between the two largest λ; "
        f"of descent theory 5 gives −1, −2, −2.\n\n{' | '.join(head).strip()}\n{'|---' * (len(head) - 2)}|\n"
        + "\n".join(lines)
    )
    known = [found for task in tasks if (found := good_from(of(full, task=task), LIMIT)) is not None]
    if len(known) == len(tasks) and (left := left_of_gains(rows, max(known))):
        gap = f"**From λ/μ₁ = {number(max(known))} on the gap is good on every task**, but {left}.\n\n{gap}"
    return {"gap": gap, "scores": _scores(rows), "pulls": _of_pulls(tables["table"]), "bounds": _of_bounds(tables)}


def _scores(rows: Sequence[Row]) -> str:
    """Scores at the best λ of each arm, against the start."""
    lines = []
    for task in distinct(rows, "task"):
        mine = of(rows, task=task)
        cells = [written(values_of(of(mine, arm="start"), "score_eval"))]
        for share in (0.0, 1e-3, 1e-1):
            for arm in (FULL, LINEARIZED):
                values = values_of(of(mine, arm=arm, lam_over_mu1=share), "score_eval")
                cells.append(written(values) if len(values) else "")
        lines.append(f"| {name_of(task)} ({metric_of(mine)}) | " + " | ".join(cells) + " |")
    head = " | ".join(f"{arm}, λ/μ₁ = {number(share)}" for share in (0.0, 1e-3, 1e-1) for arm in ("full", "linearized"))
    table = f"| Task | start | {head} |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    return f"{table}\n\n{learnt(rows, FULL, 'full fine-tuning without a pull', lam_over_mu1=0.0)}".strip()


def _of_pulls(table: Sequence[Row]) -> str:
    lines = []
    frozen_tasks = distinct(of(table, arm=FROZEN_A), "task")
    for task in dict.fromkeys([*frozen_tasks, *_pull_tasks(table)]):
        for pull in PULLS:
            rows = of(table, task=task, pull=pull, arm=FULL)
            middle = of(rows, lam_over_mu1=1e-2)
            if middle:
                cells = [written(values_of(middle, c)) for c in ("distance", "output_gap_relative_eval", "score_eval")]
                lines.append(f"| {name_of(task)} | {pull} | " + " | ".join(cells) + " |")
        frozen = of(table, task=task, pull="coupled", arm=FROZEN_A, lam_over_mu1=1e-2)
        if frozen:
            cells = [written(values_of(frozen, c)) for c in ("distance", "output_gap_relative_eval", "score_eval")]
            lines.append(f"| {name_of(task)} | coupled, A frozen | " + " | ".join(cells) + " |")
    head = "At λ/μ₁ = 0.01:\n\n| Task | pull | ‖θ−θ₀‖ | ‖f−f̄‖/‖f−f₀‖ | score |\n|---|---|---|---|---|\n"
    return "\n\n".join(filter(None, [head + "\n".join(lines), _hardly_pulls(table), _of_frozen(table)]))


def _hardly_pulls(table: Sequence[Row]) -> str:
    """How far runs under the decoupled pull go, beside those without any."""
    rows = of(table, arm=FULL, pull="decoupled")
    if not rows:
        return ""
    free = of(table, arm=FULL, pull="coupled", lam_over_mu1=0.0, task=rows[0]["task"])
    shares = sorted(distinct(rows, "lam_over_mu1"))
    ends = [values_of(of(rows, lam_over_mu1=share), "distance").mean() for share in shares]
    return (
        f"Under the decoupled pull, which Adam does not scale, runs end {spread(ends, '.3g')} from θ₀ at λ/μ₁ = "
        f"{spread(shares, 'g')}; without a pull {number(values_of(free, 'distance').mean(), '.3g')} "
        f"({name_of(rows[0]['task'])}): it hardly pulls."
        if min(ends) > 0.9 * values_of(free, "distance").mean()
        else ""
    )


def _of_frozen(table: Sequence[Row]) -> str:
    """What freezing A does without a pull."""
    lines = []
    for task in distinct(of(table, arm=FROZEN_A), "task"):
        free = of(table, task=task, pull="coupled", lam_over_mu1=0.0)
        gaps, scores = (
            [written(values_of(of(free, arm=arm), column)) for arm in (FULL, FROZEN_A)]
            for column in ("output_gap_relative_eval", "score_eval")
        )
        lines.append(
            f"- {name_of(task)}: gap ‖f−f̄‖/‖f−f₀‖ {gaps[0]} with A trained, {gaps[1]} with A frozen; score "
            f"{scores[0]} and {scores[1]}"
        )
    return "Without a pull:\n\n" + "\n".join(lines) if lines else ""


def _of_bounds(tables: Tables) -> str:
    rows = tables["bounds"]
    applying = [row for row in rows if row["applies"]]
    holding = [row for row in applying if row["holds"]]
    return (
        f"Of {len(rows)} bounds of theory 3 to 7 evaluated on full-batch descent "
        f"({rows[0]['train_examples']} examples), {len(applying)} apply, and {len(holding)} of these hold. "
        "They are far from equally tight. At the end of the runs, at the median over λ, those of theory 4 on ‖θ−θ₀‖ "
        f"are {spread(looseness(rows, *ON_DISTANCE), '.2g')} times what is measured, and those of theory 5 on the gaps "
        f"‖θ−θ̄‖ and ‖f−f̄‖ {' and '.join(number(x, '.2g') for x in looseness(rows, *ON_GAP))} times.\n\n"
        f"{_of_descent(tables)}"
    )


def reached(rows: Sequence[Row]) -> np.ndarray:
    """Returns how far from θ₀ the runs end that the bounds are evaluated on."""
    return values_of(of_theory(rows, "4(a)"), "measured")


def _of_descent(tables: Tables) -> str:
    """How far those runs go, beside Adam's, and how what is measured falls with λ."""
    rows = tables["bounds"]
    free = of(tables["table"], task=rows[0]["task"], pull="coupled", arm=FULL, lam_over_mu1=0.0)
    two = sorted(distinct(rows, "lam_over_mu1"))[-2:]
    said = f"These runs are short: they end {spread(reached(rows), '.2g')} from θ₀"
    if free:
        said += f", Adam’s without a pull, above, {number(values_of(free, 'distance').mean(), '.2g')}"
    if len(two) > 1:
        ends = [[values_of(of_theory(of(rows, lam_over_mu1=s), name), "measured")[0] for s in two] for name in _FALLING]
        slopes = [number(np.log(high / low) / np.log(two[1] / two[0]), ".2f") for low, high in ends]
        names = ", ".join(f"{name} {slope}" for name, slope in zip(_FALLING.values(), slopes, strict=True))
        said += f". Between the two largest λ their slopes are: {names}; theory 5 says −1, −2, −2 and −1"
    return f"{said}."


_FALLING = {"4(a)": "‖θ−θ₀‖", "5(b)": "‖θ−θ̄‖", "5(c)": "‖f−f̄‖", "5(d)": "‖K−K₀‖"}
"""Bounds, and what they are of, that falls as a power of λ."""


STUDY = Study(
    name="02_regularization_and_linearity",
    title="How close full and linearized fine-tuning are, against the pull towards the pretrained weights",
    fast=RegularizationSetting(
        **{**FAST, "pull_tasks": (STDLIB,), "frozen_tasks": (STDLIB,), "num_train": 32, "num_eval": 32},
        lam_rel=(0.0, 1e-2, 1.0),
        pull_lam_rel=(1e-2,),
        bound_examples=8,
        bound_steps=6,
    ),
    full=RegularizationSetting(),
    paper=RegularizationSetting(**PAPER_ADAM, bound_examples=PAPER_KERNEL),
    compute=compute,
    draw=draw,
    findings=findings,
)
