"""The quick start without its notebook: one small task, its tangent kernel's spectrum, and full against linearized."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from jaxlin import plots
from jaxlin.experiments.data_arguments import STDLIB
from jaxlin.experiments.figures.study import Problem, Row, Setting, Study, Tables, Work
from jaxlin.experiments.figures.summary import name_of, number, of
from jaxlin.theory.spectrum import Spectrum
from jaxlin.training.compare import FULL, compare
from jaxlin.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class QuickstartSetting(Setting):
    """Full against linearized fine-tuning; by default of one task from one draw, as the notebook has it.

    Attributes:
        lam_rel: Pull strengths in units of μ₁.
        batch_size: Examples a step.
        steps: Of a run.
        learning_rate: Of Adam.
    """

    optimizer: ClassVar[str] = "Adam at a constant rate"

    tasks: tuple[str, ...] = (STDLIB,)
    seeds: int = 1
    num_train: int = 64
    num_eval: int | None = 64
    max_seq_length: int = 32
    lam_rel: tuple[float, ...] = (0.0, 1e-2, 1.0)
    batch_size: int = 16
    steps: int = 16
    learning_rate: float = 1e-3


def _of_problem(setting: QuickstartSetting, work: Work, problem: Problem) -> dict[str, list[Row]]:
    config = TrainConfig(
        learning_rate=setting.learning_rate, batch_size=setting.batch_size, max_steps=setting.steps, seed=problem.seed
    )
    found = compare(problem.tun, problem.train, problem.eval, config, lam_rel=setting.lam_rel, progress=work.progress)
    spec = found.spectrum
    noise = {"noise_floor": spec.noise_floor, "resolution": spec.resolution}
    columns = list(dict.fromkeys(name for row in found.table for name in row))
    return {
        "spectrum": [{"index": i, "eigenvalue": float(mu), **noise} for i, mu in enumerate(spec.eigenvalues, start=1)],
        "table": [{name: row.get(name) for name in columns} for row in found.table],
        "history": [
            {"arm": arm, "lam": lam, "step": row["step"], "distance": row["distance"]}
            for (arm, lam), run in found.results.items()
            for row in run.history
        ],
    }


def compute(setting: QuickstartSetting, work: Work) -> Tables:
    """Takes the kernel's spectrum and compares full and linearized fine-tuning, for every task and draw."""
    names = ("lam_rel", "batch_size", "steps", "learning_rate", "lora_rank")
    options = {"what": "quickstart", **{name: getattr(setting, name) for name in names}}
    tables: dict[str, list[Row]] = {}
    for task, seed in itertools.product(setting.tasks, range(setting.seeds)):
        problem = work.problem(task, seed)
        found = work.get(problem, options, functools.partial(_of_problem, setting, work, problem))
        for name, rows in found.items():
            tables.setdefault(name, []).extend({**problem.labels, **row} for row in rows)
    return tables


def _each(tables: Tables) -> Iterator[tuple[str, str, dict[str, list[Row]]]]:
    """Yields the problems of the tables: what tells names of their figures apart, their sizes, and their rows."""
    problems = [(row["task"], row["seed"]) for row in tables["table"] if row["arm"] == FULL]
    for task, seed in dict.fromkeys(problems):
        mine = {name: of(rows, task=task, seed=seed) for name, rows in tables.items()}
        first = mine["table"][0]
        sizes = f"{first['train_examples']} training and {first['eval_examples']} validation examples, seed {seed}"
        suffix = f"_{task}_{seed}" if len(set(problems)) > 1 else ""
        yield suffix, f"{name_of(task)}, {sizes}", mine


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws the spectrum and the comparison of every task and draw."""
    figures = {}
    for suffix, sizes, mine in _each(tables):
        history: dict[tuple[str, float], list[Row]] = {}
        for row in mine["history"]:
            history.setdefault((row["arm"], row["lam"]), []).append(row)
        values = mine["spectrum"]
        mu = np.array([row["eigenvalue"] for row in values])
        spec = Spectrum(mu, values[0]["noise_floor"], values[0]["resolution"])
        figures[f"spectrum{suffix}"] = plots.spectrum(spec, f"{len(mu)} eigenvalues of K₀: {sizes}")
        figures[f"comparison{suffix}"] = plots.comparison(mine["table"], history, f"Full against linearized: {sizes}")
    return figures


def _alike(row: Row) -> str:
    same = row["agreement_eval"]  # nothing is decided where scores are predicted
    return "" if same is None else f" and decide alike on {same:.0%} of the examples"


def findings(tables: Tables) -> dict[str, str]:
    """Says how far the two end apart, and how often they decide alike, at each λ."""
    said = []
    for _, sizes, mine in _each(tables):
        each = "; ".join(
            f"at λ/μ₁ = {row['lam_over_mu1']:g} they end {number(row['output_gap_relative_eval'], '.2g')} of the "
            f"outputs' change apart{_alike(row)}"
            for row in of(mine["table"], arm=FULL)
        )
        said.append(f"Full and linearized fine-tuning ({sizes}): {each}.")
    return {"gap": "\n\n".join(said)}


_SETTING = QuickstartSetting()
STUDY = Study(
    name="01_quickstart",
    title="A quick start: one small task, its kernel's spectrum, and full against linearized fine-tuning",
    fast=_SETTING,
    full=_SETTING,
    compute=compute,
    draw=draw,
    findings=findings,
)
