"""Full and linearized fine-tuning step by step, and the closed form of the latter (theory 2); late linearization."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np

from jaxlin import plots
from jaxlin.errors import InputError
from jaxlin.experiments.figures.study import FAST, PAPER_MODEL, Problem, Row, Setting, Study, Tables, Work
from jaxlin.experiments.figures.summary import (
    band,
    distinct,
    metric_of,
    name_of,
    number,
    of,
    sizes,
    spread,
    values_of,
    written,
)
from jaxlin.linearize import linearize
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.kernel import Kernel
from jaxlin.theory.regression import KernelRegression, kernel_regression
from jaxlin.training.compare import FULL, LINEARIZED, SPLITS
from jaxlin.training.config import MOMENTUM, TrainConfig
from jaxlin.training.gaps import by_split, gaps
from jaxlin.training.losses import evaluate, targets, to_mean
from jaxlin.training.modes import Prepared, prepare
from jaxlin.training.report import Tracker
from jaxlin.training.trainer import TrainResult, predict, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSED = "closed_form"


@dataclasses.dataclass(frozen=True)
class DynamicsSetting(Setting):
    """Full-batch heavy ball, on the network and on its linearization.

    Attributes:
        lam_rel: Pull strengths in units of μ₁, each a column of the figure.
        steps: Of a run.
        every: Steps between two at which outputs of the full model are computed; it divides `steps`.
        late_steps: Steps of the full run at which it is linearized anew.
        drift_steps: Steps at which the kernel is computed.
        drift_examples: Training examples that it is computed on.
        step_size: c of the step η = c/(μ₁+λ) of the summed loss.
        parts: That a batch is computed in, for less memory.
    """

    optimizer: ClassVar[str] = f"full-batch heavy ball (momentum {MOMENTUM:g}) at the constant rate c/(μ₁+λ)"

    lam_rel: tuple[float, ...] = (1e-4, 1e-2, 1.0)
    steps: int = 24
    every: int = 2
    late_steps: tuple[int, ...] = (4, 12)
    drift_steps: tuple[int, ...] = (2, 4, 8, 12, 18, 24)
    drift_examples: int = 1000
    step_size: float = 1.0
    parts: int = 8

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: If something is.
        """
        super().check()
        if self.every < 1 or self.steps % self.every:
            raise InputError(f"every={self.every}; expected a divisor of steps={self.steps}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """What all runs from one θ₀ share.

    Attributes:
        linear: The linearized model, and training and validation examples in the form it takes.
        fit: Its closed form, without a pull.
        cross: Kernel of validation with training examples.
        f0: Outputs at θ₀ by split.
    """

    linear: Prepared
    fit: KernelRegression
    cross: Kernel
    f0: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, problem: Problem) -> _Start:
        tun, data = problem.tun, _splits(problem)
        f0 = {split: predict(tun, tun.theta0, part) for split, part in data.items()}
        y = np.asarray(targets(problem.train["labels"], f0["train"].shape[1]), np.float64)
        fit = kernel_regression(ntk(tun, problem.train), y, f0["train"], 0.0)
        return cls(prepare(linearize(tun), *data.values()), fit, ntk(tun, problem.eval, problem.train), f0)

    def closed(self, lam: float, rate: float, steps: int) -> tuple[dict[str, np.ndarray], float]:
        """Returns outputs by split and ‖δ‖ after so many steps."""
        fit = dataclasses.replace(self.fit, ridge=lam)
        options: dict[str, Any] = {"t": steps, "learning_rate": rate, "momentum": MOMENTUM}
        alpha = fit.coefficients(**options).reshape(-1)
        outputs = {"train": fit.train(**options), "eval": fit.test(self.cross, self.f0["eval"], **options)}
        return outputs, float(max(alpha @ fit.matrix @ alpha, 0.0)) ** 0.5


def _splits(problem: Problem) -> dict[str, Any]:
    return dict(zip(SPLITS, (problem.train, problem.eval), strict=True))


def _run(setting: DynamicsSetting, work: Work, problem: Problem, start: _Start, share: float) -> dict[str, list[Row]]:
    """Trains at one λ in full, linearized, and linearized late."""
    tun, data, n = problem.tun, _splits(problem), len(problem.train)
    mu1 = float(start.fit.eigenvalues[-1])
    lam = share * mu1
    rate = setting.step_size / (mu1 + lam)
    config = TrainConfig(
        optimizer="momentum",
        learning_rate=to_mean(rate, n, "learning_rate"),
        batch_size=n,
        gradient_accumulation_steps=min(setting.parts, n),
        max_steps=setting.steps,
        lam=lam,
        seed=problem.seed,
        group_by_length=True,
    )
    name = f"{problem.loaded.task.name}, seed {problem.seed}, λ/μ₁ = {share:g}"
    steps = range(setting.steps + 1)
    shown = steps[:: setting.every]

    def tell(row: Row) -> None:
        work.progress(f"full, {name}", row["step"], setting.steps)

    keep = {*shown, *setting.late_steps, *setting.drift_steps}
    full = train(tun, problem.train, config=config, keep=keep, log=tell)
    linear = start.linear
    parts = dict(zip(SPLITS, linear.data, strict=True))
    lazy = train(linear.tun, linear.data[0], config=config, keep=steps)

    metric = problem.loaded.task.metrics[0]

    def row(arm: str, step: int, outputs: Mapping[str, np.ndarray], distance: float) -> Row:
        found = {k: evaluate(value, data[k]["labels"], "squared") for k, value in outputs.items()}
        kept = {k: {"loss": values["loss"], "score": values[metric]} for k, values in found.items()}
        return {"arm": arm, "step": step, "distance": distance, **by_split(kept)}

    curves = []
    for step in steps:
        closed, distance = start.closed(lam, rate, step)
        theta = lazy.states[step].theta
        straight = {split: predict(linear.tun, theta, part) for split, part in parts.items()}
        curves.append(row(CLOSED, step, closed, distance))
        curves.append(row(LINEARIZED, step, straight, _distance(lazy, step)) | _off(straight, closed, start.f0))
    for step in shown:
        bent = {split: predict(tun, full.states[step].theta, part) for split, part in data.items()}
        curves.append(row(FULL, step, bent, _distance(full, step)))

    tracker = Tracker.of(tun, problem.train, linear.tun, linear.data[0], kernel_examples=setting.drift_examples)
    drift = tracker.report(full, lazy, setting.drift_steps).table

    late: list[Row] = []
    for step in (0, *setting.late_steps):
        work.progress(f"linearized at step {step}, {name}", len(late), len(setting.late_steps) + 1)
        outputs = _later(problem, full, config, step) if step else straight
        gap = {k: gaps(bent[k], outputs[k], start.f0[k], data[k]["labels"]) for k in SPLITS}
        late.append({"linearize_at": step, **by_split(gap)})
    return {"curves": curves, "drift": drift, "late": late}


def _distance(run: TrainResult, step: int) -> float:
    return float(run.history[step - 1]["distance"]) if step else 0.0


def _off(found: Mapping[str, np.ndarray], closed: Mapping[str, np.ndarray], f0: Mapping[str, np.ndarray]) -> Row:
    """How far trained outputs are from the closed form: the largest difference, and relative to ‖f̄−f₀‖ if not 0."""
    off: dict[str, Row] = {}
    for split in SPLITS:
        gap, moved = found[split] - closed[split], float(np.linalg.norm(closed[split] - f0[split]))
        share = float(np.linalg.norm(gap)) / moved if moved else None
        off[split] = {"off": float(np.abs(gap).max()), "off_relative": share}
    return by_split(off)


def _later(problem: Problem, full: TrainResult, config: TrainConfig, step: int) -> dict[str, np.ndarray]:
    """Outputs at the end of what follows the full run up to a step and is linearized there."""
    begin = full.states[step]
    ready = prepare(linearize(problem.tun, at=begin.theta), problem.train, problem.eval)
    end = train(ready.tun, ready.data[0], config=config, start=begin).theta
    return {split: predict(ready.tun, end, part) for split, part in zip(SPLITS, ready.data, strict=True)}


def compute(setting: DynamicsSetting, work: Work) -> Tables:
    """Runs every λ of every task, seed by seed."""
    tables: dict[str, list[Row]] = {"curves": [], "drift": [], "late": []}
    runs = [(seed, task) for seed in range(setting.seeds) for task in setting.tasks]
    own = {field.name for field in dataclasses.fields(setting)} - {field.name for field in dataclasses.fields(Setting)}
    options = {name: getattr(setting, name) for name in sorted(own - {"lam_rel"})}
    for done, (seed, task) in enumerate(runs):
        problem = work.problem(task, seed)
        start = functools.cache(functools.partial(_Start.of, problem))

        def run(share: float, problem: Problem = problem, start: Callable[[], _Start] = start) -> dict[str, list[Row]]:
            with jax.default_matmul_precision("highest"):
                return _run(setting, work, problem, start(), share)

        for share in setting.lam_rel:
            work.progress("runs", done, len(runs))
            key = {"what": "dynamics", "lam_rel": share, "rank": setting.lora_rank, **options}
            found = work.get(problem, key, functools.partial(run, share))
            labels = {**problem.labels, "metric": problem.loaded.task.metrics[0], "lam_over_mu1": share}
            labels["kernel_examples"] = min(setting.drift_examples, len(problem.train))
            for name, rows in found.items():
                tables[name] += [{**labels, **row} for row in rows]
    keys = list(dict.fromkeys(key for row in tables["curves"] for key in row))
    return {**tables, "curves": [{key: row.get(key) for key in keys} for row in tables["curves"]]}


def _panels(table: Sequence[Row]) -> tuple[tuple[str, str], ...]:
    losses = tuple(
        (f"loss_{split}", f"{word} loss\n½‖f−y‖², mean")
        for split, word in (("train", "training"), ("eval", "validation"))
    )
    return (*losses, ("score_train", f"training {metric_of(table)}"), ("score_eval", f"validation {metric_of(table)}"))


def panel(axis: Axes, rows: Sequence[Row], column: str) -> None:
    """Draws a column against steps: full, linearized, and the closed form in the line that it is to lie on.

    Args:
        axis: Where.
        rows: Of the curves, of one task and λ.
        column: Of the ordinate.
    """
    for arm, width, alpha in ((LINEARIZED, 3.2, 0.45), (FULL, 1.4, 1.0)):
        look: dict[str, Any] = {"color": plots.COLOURS[arm], "label": plots.NAMES[arm]}
        band(axis, of(rows, arm=arm), "step", column, lw=width, alpha=alpha, **look)
    closed = of(rows, arm=CLOSED)  # whose seeds spread as those of the linearized model
    steps = sorted(distinct(closed, "step"))
    means = [values_of(of(closed, step=step), column).mean() for step in steps]
    axis.plot(steps, means, ":", color=plots.COLOURS[CLOSED], label=plots.NAMES[CLOSED])


def _curves(rows: Sequence[Row]) -> Figure:
    """Loss and score against steps, a column a λ, for each task."""
    tasks, shares = distinct(rows, "task"), sorted(distinct(rows, "lam_over_mu1"))
    figure, axes = plots.canvas(4 * len(tasks), len(shares), plots.COLUMN, 5.2 * len(tasks), sharex=True, sharey="row")
    with plots.drawing():
        for block, task in enumerate(tasks):
            for column, share in enumerate(shares):
                mine = of(rows, task=task, lam_over_mu1=share)
                for line, (key, name) in enumerate(_panels(mine)):
                    axis = axes[4 * block + line, column]
                    panel(axis, mine, key)
                    axis.set_ylabel("" if column else name)
                axes[4 * block, column].set_title(f"{name_of(task)}, λ/μ₁ = {number(share)}")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        axes[0, -1].legend()
        plots.headline(figure, f"Full-batch heavy ball; {sizes(rows)}")
    return figure


_DRIFT = (
    ("kernel_drift", "kernel drift", "‖K−K₀‖ / ‖K₀‖"),
    ("same_theta_gap_relative", "same-θ gap", "‖f(θ)−f̄(θ)‖ / ‖f(θ)−f₀‖"),
    ("trajectory_gap_relative", "trajectory gap", "‖f(θ)−f̄(θ̄)‖ / ‖f(θ)−f₀‖"),
)
_LATE = tuple(
    (f"output_gap_relative_{split}", f"{name} examples", "‖f−f̄‖ / ‖f−f₀‖")
    for split, name in (("train", "training"), ("eval", "validation"))
)
"""Panels: column, title, and what is measured."""


def _against(
    rows: Sequence[Row], across: str, panels: Sequence[tuple[str, str, str]], label: str, scale: str, title: str
) -> Figure:
    """Draws some columns against another, a line a λ, a row a task."""
    tasks, shares = distinct(rows, "task"), sorted(distinct(rows, "lam_over_mu1"))
    figure, axes = plots.canvas(len(tasks), len(panels), plots.COLUMN, 2.0 * len(tasks) + 0.3)
    with plots.drawing():
        for line, task in enumerate(tasks):
            for column, (key, name, unit) in enumerate(panels):
                axis = axes[line, column]
                axis.set_yscale(scale)
                for share in shares:
                    colour, mark = plots.lam_look(share)
                    mine = of(rows, task=task, lam_over_mu1=share)
                    band(axis, mine, across, key, fmt=f"{mark}-", color=colour, label=f"λ/μ₁ = {number(share)}")
                axis.set(xlabel=label, ylabel=unit, title=f"{name_of(task)}: {name}")
                axis.set_xticks(sorted(distinct(rows, across)))
                if scale == "linear":
                    axis.set_ylim(bottom=0)
        axes[0, 0].legend()
        plots.headline(figure, title)
    return figure


def draw(tables: Tables) -> dict[str, Figure]:
    """Draws the curves, the kernel's drift with the gaps, and late linearization."""
    late, when = tables["late"], "linearized at step k of the full run"
    caption, kernel = sizes(late), max(distinct(late, "kernel_examples"))
    along = f"Along the runs; {caption};\nK of {kernel} training examples"
    return {
        "curves": _curves(tables["curves"]),
        "drift": _against(tables["drift"], "step", _DRIFT, "step", "linear", along),
        "late": _against(late, "linearize_at", _LATE, when, "log", f"At the end of the runs; {caption}"),
    }


_ROUNDING = 1e-3
"""Difference from the closed form, relative to ‖f̄−f₀‖, up to which it counts as rounding of float32."""
_ROUNDING_OF_OUTPUTS = 2e-6
"""That of an output, likewise: where the pull is strong the outputs, of order 1, hardly move."""


def findings(tables: Tables) -> dict[str, str]:
    """Says how exact the closed form is, where the runs end, how the kernel drifts, what late linearizing gains."""
    return {
        "closed_form": _exact(tables["curves"]),
        "ends": _ends(tables["curves"]),
        "drift": _drifts(tables["drift"]),
        "late": _gained(tables["late"], max(distinct(tables["curves"], "step"))),
    }


def off_closed_form(rows: Sequence[Row]) -> float:
    """The largest difference of the trained linearized model from its closed form, relative to ‖f̄−f₀‖."""
    return float(max(values_of(of(rows, arm=LINEARIZED), f"off_relative_{split}").max() for split in SPLITS))


def _largest_off(rows: Sequence[Row]) -> float:
    return float(max(values_of(of(rows, arm=LINEARIZED), f"off_{split}").max() for split in SPLITS))


def exact_to_rounding(rows: Sequence[Row]) -> bool:
    """Whether the trained linearized model differs from its closed form by rounding of float32 only."""
    return off_closed_form(rows) <= _ROUNDING or _largest_off(rows) <= _ROUNDING_OF_OUTPUTS


def _exact(rows: Sequence[Row]) -> str:
    mine, off, share = of(rows, arm=LINEARIZED), _largest_off(rows), off_closed_form(rows)
    word = "holds to rounding" if exact_to_rounding(rows) else "does **not** hold to rounding"
    return (
        f"**The closed form {word}.** Over all λ, seeds and steps compared ({len(mine)} in all), the outputs of the "
        f"linearized model, trained in float32, differ from the closed form by at most {number(off, '.2g')} on any "
        f"example; in norm, by at most {number(share, '.2g')} of what the outputs have moved."
    )


def _ends(rows: Sequence[Row]) -> str:
    """Losses and scores at θ₀ and at the last step, and by how much the curves of full and linearized differ."""
    lines = []
    last = max(distinct(rows, "step"))
    for task in distinct(rows, "task"):
        for share in sorted(distinct(rows, "lam_over_mu1")):
            mine = of(rows, task=task, lam_over_mu1=share)
            cells = []
            for key in ("loss_train", "loss_eval", "score_eval"):
                cells.append(written(values_of(of(mine, arm=FULL, step=0), key)))
                cells += [written(values_of(of(mine, arm=arm, step=last), key)) for arm in (FULL, LINEARIZED)]
            lines.append(f"| {name_of(task)} | {number(share)} | " + " | ".join(cells) + " |")
    what = ("training loss", "validation loss", f"validation {metric_of(rows)}")
    head = " | ".join(f"{name}: {when}" for name in what for when in ("start", "full", "linearized"))
    return (
        f"After {last} steps (mean over seeds, and range):\n\n| Task | λ/μ₁ | {head} |\n{'|---' * 11}|\n"
        + "\n".join(lines)
        + f"\n\n{_curve_gap(rows)}"
    )


def curve_gaps(rows: Sequence[Row]) -> dict[float, float]:
    """By λ/μ₁, how much the training losses of full and linearized differ at most, relative to the fall of the loss."""
    # The fall is of full fine-tuning, from θ₀ to the last step; without one the share is infinite.
    found = {}
    for share in sorted(distinct(rows, "lam_over_mu1")):
        mine = of(rows, lam_over_mu1=share)
        last = max(distinct(of(mine, arm=FULL), "step"))
        shares = []
        for row in of(mine, arm=FULL):
            where = {"task": row["task"], "seed": row["seed"]}
            (other,) = of(mine, arm=LINEARIZED, step=row["step"], **where)
            (start,) = of(mine, arm=FULL, step=0, **where)
            (end,) = of(mine, arm=FULL, step=last, **where)
            fall = start["loss_train"] - end["loss_train"]
            shares.append(abs(row["loss_train"] - other["loss_train"]) / fall if fall > 0 else math.inf)
        found[share] = max(shares)
    return found


def _curve_gap(rows: Sequence[Row]) -> str:
    found = curve_gaps(rows)
    said = ", ".join(f"{number(value, '.2g')} at λ/μ₁ = {number(share)}" for share, value in found.items())
    values = list(found.values())
    order = "falls" if values == sorted(values, reverse=True) else "does not fall steadily"
    return (
        f"The training losses of the two differ, anywhere along the runs, by at most these shares of what the full "
        f"run's loss falls by: {said}. The difference {order} as the pull grows."
    )


def _drifts(rows: Sequence[Row]) -> str:
    """The largest drift and gaps at each λ."""
    lines = []
    for task in distinct(rows, "task"):
        for share in sorted(distinct(rows, "lam_over_mu1")):
            mine = of(rows, task=task, lam_over_mu1=share)
            seeds = [of(mine, seed=seed) for seed in distinct(mine, "seed")]
            cells = []
            for key in ("distance", *(key for key, *_ in _DRIFT)):
                peaks = [found.max() for one in seeds if len(found := values_of(one, key))]
                cells.append(written(peaks) if peaks else "rounding")  # the report tells no gap of what has not moved
            lines.append(f"| {name_of(task)} | {number(share)} | " + " | ".join(cells) + " |")
    head = "| Task | λ/μ₁ | ‖θ−θ₀‖ | kernel drift | same-θ gap | trajectory gap |\n|---|---|---|---|---|---|\n"
    return f"The largest of each run (mean over seeds, and range):\n\n{head}" + "\n".join(lines)


def _gained(rows: Sequence[Row], last: int) -> str:
    """The gap by the step of linearization, and whether it falls faster than the steps left."""
    steps = sorted(distinct(rows, "linearize_at"))
    lines: list[str] = []
    left: dict[int, list[float]] = {step: [] for step in steps[1:]}
    for task in distinct(rows, "task"):
        for share in sorted(distinct(rows, "lam_over_mu1")):
            mine = of(rows, task=task, lam_over_mu1=share)
            by_step = [values_of(of(mine, linearize_at=step), "output_gap_relative_eval") for step in steps]
            means = [float(values.mean()) for values in by_step]
            for step, mean in zip(steps[1:], means[1:], strict=True):
                left[step].append(mean / means[0])
            lines.append(f"| {name_of(task)} | {number(share)} | " + " | ".join(map(written, by_step)) + " |")
    head = " | ".join(f"k = {step}" for step in steps)
    said = "; ".join(
        f"k = {step}, with {1 - step / last:.0%} of the steps left, leaves {spread(values, '.0%')} of it"
        for step, values in left.items()
    )
    first = steps[1]
    most = sum(value < 0.5 for value in left[first])
    return (
        "Gap ‖f−f̄‖/‖f−f₀‖ on validation examples at the end, where the full run is linearized at its step k and goes "
        f"on linearly:\n\n| Task | λ/μ₁ | {head} |\n{'|---' * (len(steps) + 2)}|\n"
        + "\n".join(lines)
        + f"\n\nAt k = {last} nothing is linearized and the gap is 0 by construction, so that it has to fall with k. "
        f"Of the gap at k = 0, over tasks and λ: {said}. The first {first} steps buy most of the gap in {most} of "
        f"{len(left[first])} cases (task and λ)."
    )


STUDY = Study(
    name="03_dynamics",
    title="Full and linearized fine-tuning step by step, and the closed form of the latter",
    fast=DynamicsSetting(
        **{**FAST, "num_train": 32, "num_eval": 32, "max_seq_length": 16},  # few lengths to compile for
        lam_rel=(1e-2, 1.0),
        steps=12,
        late_steps=(4,),
        drift_steps=(4, 8, 12),
        drift_examples=16,
        parts=2,
    ),
    full=DynamicsSetting(tasks=("sst2",)),
    paper=DynamicsSetting(**PAPER_MODEL, tasks=("sst2",)),  # the closed form needs the kernel of all training examples
    compute=compute,
    draw=draw,
    findings=findings,
)
