"""A decoder with a prompt and label words: is its fine-tuning nearer to linear than that of a new head?

Kernels are said to describe fine-tuning best where a prompt makes the task look like pretraining (Malladi et al. 2023,
"A Kernel-Based View of Language Model Fine-Tuning"). Three starts are compared on the same decoder, data and steps: the
pretrained language-modelling head read at a prompt's label words; a new head fitted to the frozen features (probe); and
a new head drawn at random.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxlin import plots
from jaxlin.errors import InputError
from jaxlin.experiments.figures.study import FAST, AdamSetting, Problem, Row, Study, Tables, Work
from jaxlin.experiments.figures.summary import (
    against_the_pull,
    band,
    counted,
    distinct,
    mean_interval,
    name_of,
    of,
    sizes,
    values_of,
    written,
)
from jaxlin.experiments.model_arguments import ModelArguments
from jaxlin.ntk.engine import ntk
from jaxlin.peft.lora import lora
from jaxlin.selection import select_layers
from jaxlin.theory.spectrum import spectrum
from jaxlin.training.compare import FULL, LINEARIZED, MAJORITY, compare
from jaxlin.training.losses import evaluate, targets
from jaxlin.training.trainer import predict, train
from jaxlin.tunable import layer_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from jaxlin.tunable import Tunable

STORIES = "stories260K"
"""The real decoder of 260,032 parameters that is looked for in the folder JAXLIN_MODELS."""

STARTS = ("prompt", "probe", "random")


@dataclasses.dataclass(frozen=True)
class LlmSetting(AdamSetting):
    """A decoder by prompt and by new heads.

    Attributes:
        template: Of the prompt.
        label_words: One a class.
        lam_rel: Pull strengths in units of μ₁.
        num_kernel: Training examples that make the kernels.
        budget_share: Share of LoRA's parameters that a choice of layers may tune.
        random_choices: Random choices of layers with that budget.
        start: How the head starts; set by the study.
    """

    tasks: tuple[str, ...] = ("sst2", "imdb")
    max_seq_length: int = 128
    model_name_or_path: str = STORIES
    template: str = "{text} It was {mask}"
    label_words: tuple[str, ...] = ("little", "happy")
    lam_rel: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
    num_kernel: int = 128
    budget_share: float = 0.4
    random_choices: int = 3
    start: str = STARTS[0]

    def model_arguments(self) -> ModelArguments:
        """Which decoder, and how it makes logits."""
        name = self.model_name_or_path
        if name == STORIES:
            folder = os.environ.get("JAXLIN_MODELS")
            if folder is None or not (Path(folder) / STORIES).is_dir():
                raise InputError(
                    f"the environment variable JAXLIN_MODELS names no folder that holds {STORIES}; set it, give a "
                    "decoder by --model_name_or_path, or name other studies"
                )
            name = str(Path(folder) / STORIES)
        if self.start == "prompt":
            return ModelArguments(name, template=self.template, label_words=self.label_words)
        return ModelArguments(name, head_init="probe" if self.start == "probe" else "random")


LOSS = "cross_entropy"
"""A prompt's logits have a level and a scale of their own, which squared loss would fit first."""


_GAPS = ("distance", "parameter_gap", "output_gap_relative_eval", "kl_eval", "agreement_eval", "accuracy_eval")


def _compared(setting: LlmSetting, problem: Problem) -> list[Row]:
    found = compare(
        problem.tun, problem.train, problem.eval, setting.training(problem.seed, loss=LOSS), lam_rel=setting.lam_rel
    )
    return [
        {"arm": row["arm"], "lam_over_mu1": row["lam_over_mu1"], **{name: row.get(name) for name in _GAPS}}
        for row in found.table
    ]


def _kernel(setting: LlmSetting, problem: Problem) -> dict[str, list[Row]]:
    """The spectrum of K₀ of the contrasts of the logits, as softmax sees them, and each layer's share of its trace."""
    some = problem.train.take(np.arange(min(setting.num_kernel, len(problem.train))))
    kernel = ntk(problem.tun, some, blocks="leaf").contrasts()
    spec = spectrum(kernel)
    traces: dict[str, float] = {}
    for name, block in kernel.blocks.items():
        layer = layer_index(name)
        part = "head" if layer is None else f"layer {layer}"
        traces[part] = traces.get(part, 0.0) + float(np.trace(block.matrix()))
    whole = sum(traces.values())
    shares = [{"part": part, "share": value / whole} for part, value in traces.items()]
    values = [
        {"index": i + 1, "eigenvalue": float(value), "noise_floor": spec.noise_floor}
        for i, value in enumerate(spec.eigenvalues)
    ]
    return {"shares": shares, "spectrum": values}


def _wide(setting: LlmSetting, problem: Problem, layers: Sequence[int] | None = None) -> Tunable:
    rank = setting.lora_rank
    return lora(problem.model, rank, float(rank), ("query", "key", "value"), layers, rng=problem.seed)


def _selected(setting: LlmSetting, problem: Problem) -> list[Row]:
    """Fine-tunes layers chosen by the kernel, the last ones, random ones, and all."""
    everything = _wide(setting, problem)
    depth = problem.model.module.config.num_layers
    budget = int(setting.budget_share * everything.num_params)
    count = max(1, int(setting.budget_share * depth))
    some = problem.train.take(np.arange(min(setting.num_kernel, len(problem.train))))
    y = np.asarray(targets(some["labels"], problem.loaded.task.num_labels), np.float64)
    report = select_layers(everything, some, y, budget=budget, criterion="leave_one_out_error", contrasts=True)
    rng = np.random.default_rng(problem.seed)
    rows = []

    def tuned(choice: str, tun: Tunable) -> None:
        result = train(tun, problem.train, None, setting.training(problem.seed, loss=LOSS))
        scores = evaluate(predict(tun, result.theta, problem.eval), problem.eval["labels"], LOSS)
        rows.append({"choice": choice, "num_params": tun.num_params, "accuracy_eval": scores["accuracy"]})

    choice = report.choice
    named = lora(
        problem.model,
        setting.lora_rank,
        float(setting.lora_rank),
        tuple(module.rpartition("/")[2] for module in choice.modules),
        choice.layers,
        rng=problem.seed,
    )
    tuned("chosen", named)
    tuned("last layers", _wide(setting, problem, range(depth - count, depth)))
    for _ in range(setting.random_choices):
        tuned("random layers", _wide(setting, problem, sorted(rng.permutation(depth)[:count].tolist())))
    tuned("all layers", everything)
    return rows


def compute(setting: LlmSetting, work: Work) -> Tables:
    """Compares the three starts on every task and seed; kernels and choices of layers with them."""
    tables: dict[str, list[Row]] = {"table": [], "shares": [], "spectrum": [], "choices": []}
    options = dataclasses.asdict(setting)
    for name in ("tasks", "seeds", "data_dir", "model_name_or_path", "start"):
        options.pop(name)
    todo = [(seed, task, start) for seed in range(setting.seeds) for task in setting.tasks for start in STARTS]
    for done, (seed, task, start) in enumerate(todo):
        work.progress("starts", done, len(todo))
        problem = work.made(dataclasses.replace(setting, start=start), task, seed)
        labels = {**problem.labels, "start": start}

        def kept(what: str, of_this: Any, problem: Problem = problem, start: str = start) -> Any:
            return work.get(problem, {**options, "what": what, "start": start}, lambda: of_this(setting, problem))

        tables["table"] += [{**labels, **row} for row in kept("compare", _compared)]
        for name, rows in kept("kernel", _kernel).items():
            tables[name] += [{**labels, **row} for row in rows]
        if start == STARTS[0]:
            tables["choices"] += [{**labels, **row} for row in kept("choices", _selected)]
    return tables


COLOURS = {start: plots.COLOURS[f"{start}_head"] for start in STARTS}
MARKERS = dict(zip(STARTS, "os^", strict=True))
NAMES = {"prompt": "prompt, label words", "probe": "new head, probe", "random": "new head, random"}
_PANELS = (
    ("output_gap_relative_eval", "‖f−f̄‖ / ‖f−f₀‖", "log"),
    ("agreement_eval", "agreement with linearized", "linear"),
    ("accuracy_eval", "accuracy", "linear"),
)


def _main(table: Sequence[Row]) -> Figure:
    arms = ((FULL, "", "o-"), (LINEARIZED, ", linearized", "s--"))  # of the second there are scores only
    lines = [
        ({"start": start, "arm": arm}, NAMES[start] + word, COLOURS[start], style)
        for start in STARTS
        for arm, word, style in arms
    ]
    title = f"Full (solid) against linearized (dashed) fine-tuning of a decoder\n{sizes(table)}"
    return against_the_pull(table, _PANELS, lines, title)


def _kernels(tables: Tables) -> Figure:
    """Spectra of the first seed, and the shares of the trace by layer."""
    values, shares = tables["spectrum"], tables["shares"]
    tasks = distinct(values, "task")
    figure, axes = plots.canvas(2, len(tasks), plots.COLUMN, 3.9)
    with plots.drawing():
        for column, task in enumerate(tasks):
            top, bottom = axes[:, column]
            top.set(xscale="log", yscale="log", title=name_of(task), xlabel="index", ylabel="eigenvalue of K₀")
            parts = distinct(of(shares, task=task), "part")
            parts = [part for part in parts if part != "head"] + [part for part in parts if part == "head"]
            for shift, start in enumerate(STARTS):
                rows = [row for row in of(values, task=task, start=start) if row["eigenvalue"] > row["noise_floor"]]
                style = "--" if start == STARTS[-1] else "-"  # the probe's lies below it
                band(top, rows, "index", "eigenvalue", fmt=style, color=COLOURS[start])
                some = of(shares, task=task, start=start)
                where = {part: at + 0.2 * (shift - 1) for at, part in enumerate(parts)}
                bottom.set_yscale("log")
                for part in distinct(some, "part"):
                    known = values_of(of(some, part=part), "share")
                    bottom.plot([where[part]] * 2, [known.min(), known.max()], color=COLOURS[start], lw=4, alpha=0.35)
                    bottom.plot(where[part], known.mean(), MARKERS[start], color=COLOURS[start])
            bottom.set_xticks(range(len(parts)), ["new\nhead" if part == "head" else part for part in parts])
            bottom.set(ylabel="share of the trace of K₀")
        for start in STARTS:
            axes[1, 0].plot([], [], f"{MARKERS[start]}-", color=COLOURS[start], label=NAMES[start])
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        examples = max(row["index"] for row in values)
        title = f"Tangent kernels at the start, {examples} training examples (contrasts of the logits)"
        plots.headline(figure, f"{title}\n{counted(len(distinct(values, 'seed')), 'seed')} (mean and range)")
    return figure


_ARMS = {
    "chosen": "chosen",
    "last layers": "last_layers",
    "random layers": "random_choice",
    "all layers": "everything",
}
"""Colours of what is tuned, as in study 07."""


def _choices(table: Sequence[Row]) -> Figure:
    tasks, names = distinct(table, "task"), distinct(table, "choice")
    figure, axes = plots.canvas(1, len(tasks), plots.COLUMN, 2.1)
    with plots.drawing():
        for column, task in enumerate(tasks):
            axis = axes[0, column]
            for i, name in enumerate(names):
                values = values_of(of(table, task=task, choice=name), "accuracy_eval")
                axis.plot(np.full(len(values), i), values, ".", color=plots.COLOURS["start"], ms=5)
                axis.plot([i - 0.2, i + 0.2], [values.mean()] * 2, color=plots.COLOURS[_ARMS[name]], lw=2)
            axis.set_xticks(range(len(names)), names, rotation=20)
            axis.set(title=name_of(task), ylabel="validation accuracy")
        title = "Layers tuned through the prompt; points: runs, bars: their means"
        plots.headline(figure, f"{title}\n{sizes(table, banded=False)}")
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws gaps against the pull, kernels, and choices of layers."""
    return {
        "against_the_pull": _main(tables["table"]),
        "kernels": _kernels(tables),
        "choices": _choices(tables["choices"]),
    }


MOST = 0.9
"""Share of the kernel's trace from which on fine-tuning is nearly that of the linear head."""


def untestable(table: Sequence[Row], shares: Sequence[Row]) -> list[str]:
    """Says why the comparison of starts tells nothing of the claim; empty if it does.

    Args:
        table: With accuracies of full fine-tuning, and of the majority class.
        shares: Of the trace of K₀, by part.

    Returns:
        Reasons: tasks on which the prompt learns nothing that shows, and heads that are nearly all of the kernel.
    """
    full = of(table, arm=FULL, start=STARTS[0])
    least = min(distinct(full, "lam_over_mu1"))
    at_chance = []
    for task in distinct(full, "task"):
        found = values_of(of(full, task=task, lam_over_mu1=least), "accuracy_eval")
        majority = values_of(of(table, task=task, start=STARTS[0], arm=MAJORITY), "accuracy_eval")
        if len(majority) and mean_interval(found)[1] <= majority.mean():
            at_chance.append(f"{name_of(task)} (accuracy {found.mean():.3f} against {majority.mean():.3f})")
    heads = [row["share"] for row in of(shares, part="head") if row["start"] in STARTS[1:]]
    reasons = []
    if at_chance:
        reasons.append(f"with the prompt no more than the majority class is learnt on {', '.join(at_chance)}")
    if heads and min(heads) >= MOST:
        share = f"{min(heads):.1%}"
        reasons.append(
            f"with new heads at least {share} of the kernel’s trace is the linear head’s, so that these are near to "
            "linear by construction"
        )
    return reasons


def findings(tables: Tables) -> dict[str, str]:
    """Says with which start the two are nearest, what is learnt, and what choosing layers brings."""
    table = tables["table"]
    full = of(table, arm=FULL)
    least = min(distinct(full, "lam_over_mu1"))
    lines, nearest = [], []
    for task in distinct(full, "task"):
        found = {s: of(full, task=task, start=s, lam_over_mu1=least) for s in STARTS}
        gaps = {start: values_of(rows, "output_gap_relative_eval") for start, rows in found.items()}
        nearest.append(min(gaps, key=lambda start: gaps[start].mean()))
        for start, rows in found.items():
            before = values_of(of(table, task=task, start=start, arm="start"), "accuracy_eval")
            linear = of(table, task=task, start=start, arm=LINEARIZED, lam_over_mu1=least)
            scores = [before, values_of(rows, "accuracy_eval"), values_of(linear, "accuracy_eval")]
            cells = [written(gaps[start]), *(written(values, ".3f") for values in scores)]
            lines.append(" | ".join(["| " + name_of(task), NAMES[start], *cells]) + " |")
    verdict = f"Without a pull (λ/μ₁ = {least:g}) full and linearized fine-tuning end nearest "
    if set(nearest) == {STARTS[0]}:
        verdict += "with the prompt on every task, as Malladi et al. would have it."
    else:
        which = list(zip(nearest, distinct(full, "task"), strict=True))
        tasks = {start: [name_of(task) for found, task in which if found == start] for start in dict.fromkeys(nearest)}
        verdict += "with " + "; ".join(f"{NAMES[start]} on {' and '.join(names)}" for start, names in tasks.items())
        verdict += ". That a prompt makes fine-tuning the most linear does not show here."
    if reasons := untestable(table, tables["shares"]):
        verdict += f" **But with this decoder the claim cannot be tested:** {'; '.join(reasons)}."
    head = "| Task | start | ‖f−f̄‖/‖f−f₀‖ | accuracy before | full | linearized |\n|---|---|---|---|---|---|\n"
    return {"gap": f"{verdict}\n\n{head}" + "\n".join(lines), "choices": _of_choices(tables["choices"])}


def _of_choices(table: Sequence[Row]) -> str:
    lines = []
    for task in distinct(table, "task"):
        for name in distinct(table, "choice"):
            rows = of(table, task=task, choice=name)
            params = written(values_of(rows, "num_params"), ",.0f")
            lines.append(
                f"| {name_of(task)} | {name} | {params} | {written(values_of(rows, 'accuracy_eval'), '.3f')} |"
            )
    return "| Task | tuned | parameters | accuracy |\n|---|---|---|---|\n" + "\n".join(lines)


STUDY = Study(
    name="09_llm",
    title="A decoder by prompt and label words, against new heads: is fine-tuning nearer to linear?",
    fast=LlmSetting(
        **FAST,
        model_name_or_path=STORIES,
        label_words=("big", "little", "happy", "very"),
        lam_rel=(0.0, 1e-1),
        num_kernel=24,
        random_choices=1,
    ),
    full=LlmSetting(),
    compute=compute,
    draw=draw,
    findings=findings,
)
