"""Choosing layers by the kernel at θ₀ (`jl.select_layers`), against not choosing: real fine-tuning of each (theory 7).

LoRA on some of query, key and value of some layers, the head a probe that stays as it is: the choices then differ in
all that is tuned, and the kernel that they are chosen by is of exactly that. The probe is fitted on the training
examples that the choice is not made on, since one fitted on these would have seen the labels that are left out.

All choices train at the cost of the whole (`only`): one compilation serves every choice of a task.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.experiments.figures import choose_layers_page as page
from jaxlin.experiments.figures.choices import MODULES, Choice, depth_of, num_params, tunable
from jaxlin.experiments.figures.choose_layers_page import BY_KAPPA, BY_LOSS, EVERYTHING, LAST, RANDOM, START
from jaxlin.experiments.figures.study import FAST, PAPER_ADAM, AdamSetting, Problem, Row, Study, Tables, Work
from jaxlin.experiments.figures.summary import METRICS
from jaxlin.models.probe import probe_head
from jaxlin.peft.lora import lora
from jaxlin.peft.part import only
from jaxlin.selection import select_layers
from jaxlin.training.compare import MAJORITY
from jaxlin.training.losses import evaluate, targets
from jaxlin.training.trainer import predict, train
from jaxlin.tunable import Tunable


@dataclasses.dataclass(frozen=True)
class ChooseLayersSetting(AdamSetting):
    """Chosen layers against others within the same budget, and against all; every choice is trained alike.

    Attributes:
        select_examples: Training examples that the choice is made on; the others make the probe head.
        budget_layers: Most parameters that may be tuned: those of query, key and value of so many layers.
        random_choices: Choices drawn anew for each seed, of those that use the budget up.
    """

    select_examples: int = 256
    budget_layers: int = 2
    random_choices: int = 3
    num_train_epochs: float = 2.0
    learning_rate: float = 2e-3

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: If something is.
        """
        super().check()
        self.require_positive("select_examples", "budget_layers", "random_choices")
        if self.select_examples >= self.num_train:
            raise InputError(
                f"--num_train {self.num_train}: expected more than the {self.select_examples} examples that layers are "
                "chosen on, since the others make the probe head"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What is tuned at most, and what the choice is made on."""

    tun: Tunable
    alone: Tunable
    some: Dataset


def _start(setting: ChooseLayersSetting, problem: Problem) -> _Start:
    """LoRA on every query, key and value below a probe of the examples that the choice is not made on."""
    data, rank = problem.train, setting.lora_rank
    order = np.random.default_rng(problem.seed).permutation(len(data))
    some, others = (data.take(np.sort(part)) for part in np.split(order, [setting.select_examples]))
    y = np.asarray(targets(others["labels"], problem.loaded.task.num_labels), np.float64)
    model = probe_head(problem.loaded.model, others, y)
    alone = lora(model, rank, float(rank), tuple(MODULES.values()), rng=problem.seed, train_head=False)
    return _Start(tunable(model, rank, problem.seed), alone, some)


def _budget(setting: ChooseLayersSetting, tun: Tunable) -> int:
    layers = tuple(range(setting.budget_layers))
    if setting.budget_layers > depth_of(tun):
        raise InputError(f"--budget_layers {setting.budget_layers}: the model has {depth_of(tun)}")
    return num_params(tun, Choice(layers, "".join(MODULES)).blocks)


def _select(setting: ChooseLayersSetting, problem: Problem, start: _Start) -> dict[str, list[Row]]:
    """Ranks all choices within the budget; keeps what each criterion chooses, and what the two say of each choice."""
    y = np.asarray(targets(start.some["labels"], problem.loaded.task.num_labels), np.float64)
    report = select_layers(
        start.alone,
        start.some,
        y,
        budget=_budget(setting, start.tun),
        criterion=BY_LOSS,
        contrasts=y.shape[1] > 1,  # a probe's logits sum to a constant, along which LoRA's kernel vanishes
    )
    kept = ("num_params", BY_LOSS, BY_KAPPA, "condition_number_is_bound")
    table = [{"choice": _choice(row).name} | {name: row[name] for name in kept} for row in report.table]
    chosen = [
        {"choice": _choice(row).name} | {name: row[name] for name in ("criterion", "num_params", "value", BY_LOSS)}
        for row in report.by_criterion
    ]
    return {"candidates": table, "by_criterion": chosen}


def _choice(row: Row) -> Choice:
    """The choice that a row of a report names."""
    modules = [module.rpartition("/")[2] for module in row["modules"].split()]
    letters = "".join(letter for letter, name in MODULES.items() if name in modules)
    return Choice(tuple(map(int, row["layers"].split())), letters)


def _last(setting: ChooseLayersSetting, tun: Tunable) -> Choice:
    depth = depth_of(tun)
    return Choice(tuple(range(depth - setting.budget_layers, depth)), "".join(MODULES))


def _random(setting: ChooseLayersSetting, tun: Tunable, seed: int) -> list[Choice]:
    """Draws choices that use the budget up: so many modules in so many layers; the last layers are not among them."""
    cells, depth = setting.budget_layers * len(MODULES), depth_of(tun)
    every = [
        Choice(layers, "".join(modules))
        for count in range(1, len(MODULES) + 1)
        if cells % count == 0 and cells // count <= depth
        for modules in itertools.combinations(MODULES, count)
        for layers in itertools.combinations(range(depth), cells // count)
    ]
    every.remove(_last(setting, tun))
    if len(every) < setting.random_choices:
        raise InputError(f"--random_choices {setting.random_choices}: only {len(every)} others use the budget up")
    drawn = np.random.default_rng(seed).choice(len(every), setting.random_choices, replace=False)
    return [every[at] for at in drawn]


def _scores(problem: Problem, outputs: Callable[[Dataset], np.ndarray]) -> Row:
    row: Row = {}
    for split, part in (("train", problem.train), ("eval", problem.eval)):
        found = evaluate(outputs(part), part["labels"], "squared")
        row |= {f"{name}_{split}": found.get(name) for name in ("loss", *METRICS)}
    return row


def _of_majority(problem: Problem) -> Row:
    """Scores of the class that most training examples are of: the best constant output."""
    mean = np.asarray(targets(problem.train["labels"], problem.loaded.task.num_labels), np.float64).mean(axis=0)
    return _scores(problem, lambda part: np.tile(mean, (len(part), 1)))


def _arms(setting: ChooseLayersSetting, start: _Start, seed: int, chosen: Sequence[Row]) -> list[tuple[str, Choice]]:
    by_name = {row["criterion"]: Choice.parse(row["choice"]) for row in chosen}
    everything = Choice(tuple(range(depth_of(start.tun))), "".join(MODULES))
    return [
        (BY_LOSS, by_name[BY_LOSS]),
        (BY_KAPPA, by_name[BY_KAPPA]),
        (EVERYTHING, everything),
        (LAST, _last(setting, start.tun)),
        *((RANDOM, choice) for choice in _random(setting, start.tun, seed)),
    ]


def _of_problem(setting: ChooseLayersSetting, work: Work, task: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Chooses, and fine-tunes every arm, on one task with one draw."""
    problem = work.problem(task, seed)
    start = _start(setting, problem)
    shared = {"study": "choose_layers", "select_examples": setting.select_examples, "rank": setting.lora_rank}
    budget = {"budget_layers": setting.budget_layers}
    found = work.get(problem, {**shared, **budget, "what": "select"}, lambda: _select(setting, problem, start))
    training = setting.training(seed)

    def fine_tuned(choice: Choice) -> Row:
        tun = only(start.tun, choice.blocks)
        result = train(tun, problem.train, None, training)
        return {
            "distance": result.history[-1]["distance"],
            **_scores(problem, lambda part: predict(tun, result.theta, part)),
        }

    said = {row["choice"]: row for row in found["candidates"]}

    def at_start() -> Row:
        return _scores(problem, lambda part: predict(start.tun, start.tun.theta0, part))

    before = work.get(problem, {**shared, "what": START}, at_start)
    metric = problem.loaded.task.metrics[0]
    rows = []
    untrained = {START: before}
    if problem.loaded.task.label_names:
        untrained = {MAJORITY: _of_majority(problem), **untrained}
    arms = _arms(setting, start, seed, found["by_criterion"])
    runs: list[tuple[str, Choice | None]] = [*((arm, None) for arm in untrained), *arms]
    for arm, choice in runs:
        if choice is None:
            got, name, size = {"distance": 0.0, **untrained[arm]}, None, 0
        else:
            options = {**shared, "what": "run", "choice": choice.name, "training": dataclasses.asdict(training)}
            got = work.get(problem, options, functools.partial(fine_tuned, choice))
            name, size = choice.name, num_params(start.tun, choice.blocks)
        of_kernel = {key: said.get(name, {}).get(key) for key in (BY_LOSS, BY_KAPPA)}
        row = {**problem.labels, "arm": arm, "choice": name, "num_params": size, **of_kernel, **got}
        rows.append({**row, "metric": metric, "score_eval": row[f"{metric}_eval"]})
    labels = {**problem.labels, "select_examples": setting.select_examples, "candidates": len(said)}
    return rows, [{**labels, **row} for row in found["by_criterion"]]


def compute(setting: ChooseLayersSetting, work: Work) -> Tables:
    """Chooses and fine-tunes, seed by seed, so that a part is a whole of fewer seeds."""
    table: list[Row] = []
    chosen: list[Row] = []
    problems = [(seed, task) for seed in range(setting.seeds) for task in setting.tasks]
    for done, (seed, task) in enumerate(problems):
        work.progress("choices", done, len(problems))
        rows, by_criterion = _of_problem(setting, work, task, seed)
        table += rows
        chosen += by_criterion
    return {"table": table, "chosen": chosen}


STUDY = Study(
    name="07_choose_layers",
    title="Choosing layers by the kernel before training, against all layers, the last ones and random ones",
    fast=ChooseLayersSetting(**FAST, select_examples=32),
    full=ChooseLayersSetting(),
    paper=ChooseLayersSetting(**PAPER_ADAM),
    compute=compute,
    draw=page.draw,
    findings=page.findings,
)
