"""Does the condition number of K₀ predict fine-tuning? The paper's claim, tested over choices of what is tuned.

For every task, draw of (A, head, data order) and choice of layers × {query, key, value} that get LoRA factors: what K₀
says before training (`jaxlin.theory.criteria`), and what fine-tuning then gives, (i) in the paper's way: a random head
that is tuned too, Adam at a fixed rate, cross-entropy, no pull; and (ii) in the theory's: a probe head, frozen, descent
on squared loss at η = c/(μ₁ + λ), with a pull. Where several are given, the fixed rate and c are chosen on held-out
rows of the training file, once a task.

The primary predictor, named before all runs but a trial of 16: log κ of the kernel of the LoRA factors at θ₀, which is
what differs between choices (as in the paper's script), the outcome final training loss under (i), pooled over tasks.
All else is secondary, and with this many correlations some of it will look significant by chance. Under (i) the kernel
of all that is tuned is nearly that of the head alone: a new head's weights are small, LoRA's kernel of their square.

Under (ii) the probe is fitted on the training examples, as what is then trained starts from it: leave-one-out error,
marginal likelihood and alignment there are of labels that the head has seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.experiments.figures import condition_number_page as page
from jaxlin.experiments.figures.choices import HEAD, Choice, choices_of, depth_of, num_params, tunable
from jaxlin.experiments.figures.correlations import ALONE, PAPER, STABLE, correlations
from jaxlin.experiments.figures.study import (
    FAST,
    PAPER_KERNEL,
    PAPER_MODEL,
    WHOLE,
    Row,
    Setting,
    Study,
    Tables,
    Work,
    load_draw,
)
from jaxlin.experiments.figures.summary import NEVER_POOLED
from jaxlin.experiments.model_arguments import ModelArguments
from jaxlin.experiments.setting import Loaded
from jaxlin.hashing import fingerprint
from jaxlin.models.load import load_model
from jaxlin.models.probe import probe_head
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.kinds import contrast_basis
from jaxlin.theory.criteria import criteria
from jaxlin.training.choices import train_choices
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import evaluate, targets, to_mean
from jaxlin.training.metrics import metrics
from jaxlin.training.trainer import predict
from jaxlin.tunable import Tunable
from jaxlin.versions import versions

_TOKENS = {"cpu": 1 << 13}
"""Tokens of a step, of all the choices that are trained together; elsewhere four times as many."""
_CHUNK = 128
"""Examples that are evaluated at a time."""


@dataclasses.dataclass(frozen=True)
class ConditionNumberSetting(Setting):
    """Does the condition number predict fine-tuning? Tasks must be of classes; seeds are draws of A, head, data order.

    Attributes:
        layer_sets: Sets of layers, each as digits joined by commas; default: eight of a model of six layers.
        module_sets: Sets of modules, letters of q, k and v.
        num_tune: Held-out examples of the training file, on which rates are chosen.
        num_kernel: Training examples that make the kernel.
        batch_size: Examples a step.
        num_train_epochs: Passes over the training examples.
        paper_learning_rates: Fixed rates of Adam, of which one is chosen a task.
        stable_factors: c of η = c/(μ₁ + λ), of which one is chosen a task; none: only the paper's way.
        lam_rel: λ of (ii) in units of μ₁; criteria that need a λ use the same.
        resamples: Bootstrap resamples and permutations.
    """

    optimizer: ClassVar[str] = (
        "Adam, its rate warmed up over the first 6 % of the steps, then decaying linearly to 0; and plain descent at "
        "the constant rate c/(μ₁+λ)"
    )

    tasks: tuple[str, ...] = ("cola", "sst2", "mrpc", "rte", "qnli", "qqp")
    max_seq_length: int = 128
    layer_sets: tuple[str, ...] = ("0,1", "2,3", "4,5", "0,5", "0,1,2", "3,4,5", "0,2,4", "0,1,2,3,4,5")
    module_sets: tuple[str, ...] = ("q", "k", "v", "qv", "qkv")
    num_tune: int = 96
    num_kernel: int = 64
    batch_size: int = 16
    num_train_epochs: float = 2.0
    paper_learning_rates: tuple[float, ...] = (4e-3, 4e-4)
    stable_factors: tuple[float, ...] = (0.1, 0.3, 1.0)
    lam_rel: float = 1e-3
    resamples: int = 1000

    def model_arguments(self) -> ModelArguments:
        """Which model; its head is new, and starts at random."""
        return ModelArguments(self.model_name_or_path, head_init="random", new_head=True)

    def sizes(self) -> dict[str, int | None]:
        """How many examples are loaded: those that rates are chosen on are of the training file."""
        return {"train": self.num_train + self.num_tune, "eval": self.num_eval}

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: If something is.
        """
        super().check()
        self.require_positive("num_tune", "num_kernel", "batch_size", "resamples")
        if not set(self.tasks) - set(NEVER_POOLED):
            raise InputError(f"--tasks {' '.join(self.tasks)}: expected one with enough examples to conclude from")
        if not self.paper_learning_rates:
            raise InputError("--paper_learning_rates needs at least one value")
        if not self.lam_rel > 0:
            raise InputError(f"--lam_rel {self.lam_rel}: expected above 0")
        choices_of(self.layer_sets, self.module_sets)


def tuned(choice: Choice, way: str) -> tuple[str, ...]:
    """Returns the blocks that are tuned: the head too in the paper's way."""
    return (*choice.blocks, HEAD) if way == PAPER else choice.blocks


@dataclasses.dataclass(frozen=True, eq=False)
class _Draw:
    """One task with one draw of A and head: what is tuned in each way, and the data."""

    task: str
    draw: int
    tuns: Mapping[str, Tunable]
    train: Dataset
    tune: Dataset
    eval: Dataset
    metric: str
    identity: Mapping[str, Any]


def _num_train(setting: ConditionNumberSetting, loaded: Loaded) -> int:
    """Training examples: those asked for, or all but those on which rates are chosen."""
    return setting.num_train if setting.num_train < WHOLE else len(loaded.data["train"]) - setting.num_tune


def _load(setting: ConditionNumberSetting, task: str) -> Loaded:
    loaded = load_draw(setting, task, 0)
    if loaded.task.num_labels < 2:
        raise InputError(f"task {task} has {loaded.task.num_labels} output; expected classes")
    rows = len(loaded.data["train"])
    if rows < max(_num_train(setting, loaded), 1) + setting.num_tune:
        raise InputError(
            f"task {task} has {rows} training rows; expected --num_train {setting.num_train} and --num_tune "
            f"{setting.num_tune} of them"
        )
    return loaded


def _drawn(setting: ConditionNumberSetting, loaded: Loaded, draw: int) -> _Draw:
    """Draws A and head, and groups what is tuned by module."""
    classes, whole, n = loaded.task.num_labels, loaded.data["train"], _num_train(setting, loaded)
    order = np.random.default_rng(0).permutation(len(whole))
    parts = whole.take(order[:n]), whole.take(order[n:])
    model = load_model(setting.model_name_or_path, classes, head=loaded.model.module.head, new_head=True, rng=draw)
    probed = probe_head(model, parts[0], np.asarray(targets(parts[0]["labels"], classes), np.float64))
    starts = {PAPER: model, STABLE: probed} if setting.stable_factors else {PAPER: model}
    tuns = {way: tunable(start, setting.lora_rank, draw) for way, start in starts.items()}
    depth = depth_of(tuns[PAPER])
    choices = choices_of(setting.layer_sets, setting.module_sets)
    if beyond := [choice.name for choice in choices if max(choice.layers) >= depth]:
        raise InputError(f"--layer_sets: {beyond[0]} names a layer that the model has not; it has {depth}, from 0")
    identity = {
        "models": {way: fingerprint(tun, tun.theta0) for way, tun in tuns.items()},
        "data": [part.sha256() for part in (*parts, loaded.data["eval"])],
        "versions": versions(),
    }
    return _Draw(
        loaded.task.name, draw, tuns, *parts, loaded.data["eval"], metric=loaded.task.metrics[0], identity=identity
    )


def _predictors(
    setting: ConditionNumberSetting, drawn: _Draw, way: str, choices: Sequence[Choice]
) -> dict[str, dict[str, Any]]:
    """What K₀ says of every choice, from one pass of block kernels: of the contrasts of logits, as softmax sees them.

    With a probe head LoRA's kernel vanishes along the constant direction, so that κ of all of it would be infinite.

    Returns:
        By name of the choice.
    """
    tun, some = drawn.tuns[way], drawn.train.take(np.arange(min(setting.num_kernel, len(drawn.train))))
    kernel, outputs = ntk(tun, some).contrasts(), predict(tun, tun.theta0, some)
    basis = contrast_basis(outputs.shape[1])
    f0 = outputs @ basis
    y = np.asarray(targets(some["labels"], outputs.shape[1]), np.float64) @ basis
    found: dict[str, dict[str, Any]] = {}
    for choice in choices:
        row: dict[str, Any] = {}
        for prefix, blocks in (("", tuned(choice, way)), (ALONE, choice.blocks)):
            one = criteria(kernel.subset(blocks), y, f0, lam_rel=setting.lam_rel)
            row |= {prefix + name: value for name, value in one.values.items()}
            row[f"{prefix}condition_number_is_bound"] = one.condition_number_is_bound
        found[choice.name] = row
    return found


def _train_config(setting: ConditionNumberSetting, way: str, strength: float, mu1: float, drawn: _Draw) -> TrainConfig:
    """How to train; `strength` is the rate of (i), and c of (ii)."""
    common: dict[str, Any] = {
        "batch_size": setting.batch_size,
        "num_train_epochs": setting.num_train_epochs,
        "seed": drawn.draw,
        "group_by_length": True,
    }
    if way == PAPER:
        schedule: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06}
        return TrainConfig(loss="cross_entropy", optimizer="adam", learning_rate=strength, **schedule, **common)
    n = len(drawn.train)
    top = mu1 * n / min(setting.num_kernel, n)  # of all training examples: μ grows with their number
    lam = setting.lam_rel * top
    rate = to_mean(strength / (top + lam), n, "learning_rate")
    return TrainConfig(loss="squared", optimizer="sgd", learning_rate=rate, lam=lam, **common)


def _fine_tune(
    drawn: _Draw, choices: Sequence[Choice], way: str, configs: Sequence[TrainConfig], held_out: Dataset, size: int
) -> list[dict[str, Any]]:
    """Trains choices together, each by its own λ and rate; what diverged has no numbers."""
    tun, loss = drawn.tuns[way], configs[0].loss
    every = [*range(len(choices)), *[len(choices) - 1] * (size - len(choices))]  # always as many: one program
    sweep = train_choices(
        tun,
        drawn.train,
        config=configs[0],
        choices=[tuned(choices[k], way) for k in every],
        lams=[configs[k].lam for k in every],
        learning_rates=[configs[k].learning_rate for k in every],
    )
    found: list[dict[str, Any]] = []
    for k, result in enumerate(sweep.results[: len(choices)]):
        if k in sweep.diverged:
            found.append({"diverged": True, "train_loss": None, "eval_loss": None, "metric": None, "distance": None})
            continue
        on_train, on_held_out = (
            evaluate(predict(tun, result.theta, part, chunk=_CHUNK), part["labels"], loss)
            for part in (drawn.train, held_out)
        )
        found.append(
            {
                "diverged": False,
                "train_loss": on_train["loss"],
                "eval_loss": on_held_out["loss"],
                "metric": on_held_out[drawn.metric],
                "distance": result.history[-1]["distance"],
            }
        )
    return found


def _majority(drawn: _Draw, classes: int) -> float | None:
    """The metric on validation examples of answering with the training examples' most frequent class."""
    shares = np.asarray(targets(drawn.train["labels"], classes), np.float64).mean(axis=0)
    return metrics(np.tile(shares, (len(drawn.eval), 1)), drawn.eval["labels"])[drawn.metric]


def _at_once(drawn: _Draw, choices: int, batch_size: int) -> int:
    """How many of the choices are trained together: as many as memory, and on a CPU its caches, take well."""
    longest = drawn.train.buckets[-1] if drawn.train.buckets else 1
    most = max(1, _TOKENS.get(jax.default_backend(), 1 << 15) // (batch_size * longest))
    return -(-choices // -(-choices // most))


class Runs:
    """The runs of the study, as many at a time as are trained together, through the cache."""

    def __init__(self, setting: ConditionNumberSetting, work: Work) -> None:
        """Loads nothing yet."""
        self.setting, self.work = setting, work
        self.choices = choices_of(setting.layer_sets, setting.module_sets)
        self._loaded: dict[str, Loaded] = {}
        self._strengths: dict[str, dict[str, float]] = {}
        self._drawn: dict[tuple[str, int], _Draw] = {}

    def loaded(self, task: str) -> Loaded:
        """A task's data, and the model."""
        if task not in self._loaded:
            self._loaded[task] = _load(self.setting, task)
            self.work.note(task, 0, self._loaded[task])
        return self._loaded[task]

    def drawn(self, task: str, draw: int) -> _Draw:
        """A task with one draw of A and head."""
        if (task, draw) not in self._drawn:
            self._drawn = {key: value for key, value in self._drawn.items() if key[0] == task}  # models are large
            self._drawn[task, draw] = _drawn(self.setting, self.loaded(task), draw)
        return self._drawn[task, draw]

    def predictors(self, task: str, draw: int, way: str) -> dict[str, Any]:
        """What K₀ says of every choice."""
        drawn, setting = self.drawn(task, draw), self.setting
        key = {
            "what": "predictors",
            "way": way,
            "of": dict(drawn.identity),
            "num_kernel": setting.num_kernel,
            "lam_rel": setting.lam_rel,
            "choices": [choice.name for choice in self.choices],
        }
        return dict(self.work.cache.get(key, lambda: _predictors(setting, drawn, way, self.choices)))

    def runs(
        self, task: str, draw: int, way: str, wanted: Sequence[tuple[Choice, float]], *, tuning: bool
    ) -> Iterator[dict[str, Any]]:
        """Yields what fine-tuning gives for choices with their strengths, evaluated on the rows to tune on or not."""
        drawn, said = self.drawn(task, draw), self.predictors(task, draw, way)
        held_out = drawn.tune if tuning else drawn.eval
        size = _at_once(drawn, len(self.choices), self.setting.batch_size)
        for part in (wanted[k : k + size] for k in range(0, len(wanted), size)):
            configs = [
                _train_config(self.setting, way, strength, said[choice.name]["mu_max"], drawn)
                for choice, strength in part
            ]
            choices = [choice for choice, _ in part]
            key = {"what": "runs", "of": dict(drawn.identity), "way": way, "tuning": tuning}
            key |= {"choices": [choice.name for choice in choices], "training": list(map(dataclasses.asdict, configs))}
            results = self.work.cache.get(
                key, functools.partial(_fine_tune, drawn, choices, way, configs, held_out, size)
            )
            for result, config in zip(results, configs, strict=True):
                yield {**result, "learning_rate": config.learning_rate}

    def strengths(self, task: str) -> dict[str, float]:
        """The rate of (i) and the c of (ii) whose held-out loss is least, over the smallest, a middle and all.

        Returns:
            By way; where one value is given, that.

        Raises:
            InputError: If all of them diverge.
        """
        if task in self._strengths:
            return self._strengths[task]
        by_size = sorted(self.choices, key=lambda choice: len(choice.blocks))
        some = [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
        given = {PAPER: self.setting.paper_learning_rates, STABLE: self.setting.stable_factors}
        chosen = {way: values[0] for way, values in given.items() if len(values) == 1}
        for way, values in given.items():
            if len(values) < 2:
                continue
            wanted = [(choice, value) for value in values for choice in some]
            rows = self.runs(task, 0, way, wanted, tuning=True)
            each = np.array([np.inf if row["diverged"] else row["eval_loss"] for row in rows])
            losses = dict(zip(values, each.reshape(len(values), -1).mean(axis=1), strict=True))
            if not np.isfinite(min(losses.values())):
                raise InputError(f"task {task}: every strength {list(values)} of {way!r} diverges; give smaller ones")
            chosen[way] = min(values, key=losses.__getitem__)
        self._strengths[task] = chosen
        return chosen

    def rows(self) -> Iterator[Row]:
        """Yields a row a task, draw, way and choice."""
        setting = self.setting
        ways = 2 if setting.stable_factors else 1
        total, done = setting.seeds * len(setting.tasks) * ways * len(self.choices), 0
        for task in setting.tasks:
            for draw in range(setting.seeds):
                strengths, drawn = self.strengths(task), self.drawn(task, draw)
                majority = _majority(drawn, self.loaded(task).task.num_labels)
                for way, tun in drawn.tuns.items():
                    predictors = self.predictors(task, draw, way)
                    results = self.runs(
                        task, draw, way, [(choice, strengths[way]) for choice in self.choices], tuning=False
                    )
                    for choice, result in zip(self.choices, results, strict=True):
                        yield {
                            "task": task,
                            "draw": draw,
                            "choice": choice.name,
                            "num_modules": len(choice.blocks),
                            "num_params": num_params(tun, tuned(choice, way)),
                            "way": way,
                            "strength": strengths[way],
                            **result,
                            "majority_metric": majority,
                            **predictors[choice.name],
                            "train_examples": len(drawn.train),
                            "eval_examples": len(drawn.eval),
                            "kernel_examples": min(setting.num_kernel, len(drawn.train)),
                        }
                        done += 1
                        self.work.progress("runs", done, total)


def compute(setting: ConditionNumberSetting, work: Work) -> Tables:
    """Runs all, and correlates every criterion with every outcome."""
    runs = Runs(setting, work)
    for task in setting.tasks:  # for its error, before the first task's hours
        runs.loaded(task)
    table = list(runs.rows())
    found = correlations(table, setting.resamples, functools.partial(work.progress, "correlations"))
    return {"table": table, "correlations": found}


STUDY = Study(
    name="06_condition_number_predicts",
    title="Whether the condition number of the kernel before training predicts what fine-tuning gives",
    fast=ConditionNumberSetting(
        **{**FAST, "seeds": 1, "num_eval": 32},
        num_tune=16,
        num_kernel=16,
        layer_sets=("0,1", "4,5"),
        module_sets=("q", "v"),
        num_train_epochs=1.0,
        resamples=100,
        paper_learning_rates=(4e-3,),
        stable_factors=(0.3,),
    ),
    full=ConditionNumberSetting(),
    paper=ConditionNumberSetting(
        **PAPER_MODEL,
        tasks=("cola", "sst2", "mrpc", "rte", "qnli"),
        num_train=WHOLE,
        num_eval=None,
        num_kernel=PAPER_KERNEL,
        batch_size=64,
        num_train_epochs=10.0,
        layer_sets=(
            *("0,1,2,3", "4,5,6,7", "8,9,10,11", "0,11", "0,1,2,3,4,5", "6,7,8,9,10,11", "0,2,4,6,8,10"),
            "0,1,2,3,4,5,6,7,8,9,10,11",
        ),
    ),
    compute=compute,
    draw=page.draw,
    findings=page.findings,
)
