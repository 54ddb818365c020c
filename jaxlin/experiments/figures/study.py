"""What a study is, and what all of them share: setting, problems, tables."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.data_arguments import STDLIB, DataArguments, check_tasks
from jaxlin.experiments.model_arguments import ModelArguments, starts_as_probe
from jaxlin.experiments.run_folder import write_csv
from jaxlin.experiments.setting import Loaded, load
from jaxlin.hashing import fingerprint
from jaxlin.models.model import Model
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.peft.lora import lora
from jaxlin.training.config import TrainConfig
from jaxlin.tunable import Tunable
from jaxlin.versions import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]
"""Name to rows of equal keys, as a CSV file holds them."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a study is run on; each has its own options besides.

    Attributes:
        tasks: Names of tasks.
        seeds: Draws of training examples, A, head and data order.
        num_train: Training examples; `WHOLE` of them: all.
        num_eval: Validation examples; `None`: all.
        max_seq_length: Tokens a text is truncated to.
        model_name_or_path: Encoder; a new head starts as a probe.
        data_dir: Folder of tasks; `None`: the environment variable JAXLIN_DATA.
        lora_rank: Rank and α of LoRA on every query and value.
    """

    optimizer: ClassVar[str] = ""
    """How a study trains, in words; its numbers are in the setting."""

    tasks: tuple[str, ...] = ("cola", "sst2", "mrpc", "qqp")
    seeds: int = 3
    num_train: int = 1000
    num_eval: int | None = None
    max_seq_length: int = 64
    model_name_or_path: str = EMBEDDED_MODEL
    data_dir: Path | None = None
    lora_rank: int = 8

    def model_arguments(self) -> ModelArguments:
        """Which model, and how its head starts."""
        return ModelArguments(self.model_name_or_path)

    def sizes(self) -> dict[str, int | None]:
        """How many training and validation examples are loaded."""
        return {"train": self.num_train, "eval": self.num_eval}

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            InputError: If something is.
        """
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise InputError(f"--tasks {' '.join(self.tasks)}: expected at least one, each once")
        check_tasks(self.tasks, self.data_dir)
        self.require_positive("seeds", "num_train", "max_seq_length", "lora_rank")

    def require_positive(self, *names: str) -> None:
        """Refuses whole numbers below 1.

        Raises:
            InputError: Naming the first.
        """
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected at least 1")


@dataclasses.dataclass(frozen=True)
class AdamSetting(Setting):
    """Of a study that fine-tunes as most people do: by Adam, whose rate decays linearly to 0, like lengths together.

    Attributes:
        num_train_epochs: Passes over the training examples.
        batch_size: Examples a step.
        learning_rate: At the start, or after the warm-up.
        warmup_ratio: Share of the steps with linearly growing rate.
        gradient_accumulation_steps: Parts that a step's batch is computed in, for less memory.
    """

    optimizer: ClassVar[str] = "Adam, its rate decaying linearly to 0"

    num_train_epochs: float = 3.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup_ratio: float = 0.0
    gradient_accumulation_steps: int = 1

    def training(self, seed: int, **others: Any) -> TrainConfig:
        """Returns how to train; `others` are of `TrainConfig` too."""
        return TrainConfig(
            learning_rate=self.learning_rate,
            lr_scheduler_type="linear",
            warmup_ratio=self.warmup_ratio,
            batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            num_train_epochs=self.num_train_epochs,
            seed=seed,
            group_by_length=True,
            **others,
        )


FAST: dict[str, Any] = {"tasks": (STDLIB,), "seeds": 2, "num_train": 64, "num_eval": 64, "max_seq_length": 32}
"""Options of `Setting` with which a study takes one to three minutes on two cores, on embedded data."""

WHOLE = 10**9
"""More training examples than any set has."""
PAPER_MODEL: dict[str, Any] = {"model_name_or_path": "roberta-base", "max_seq_length": 128}
"""Options of `Setting` for the paper's model (LoRA of rank and α 8 is what every study has)."""
PAPER_KERNEL = 32
"""Examples of a kernel in the paper's public script."""
PAPER_ADAM: dict[str, Any] = {
    **PAPER_MODEL,
    "num_train": WHOLE,
    "num_train_epochs": 10.0,
    "batch_size": 64,
    "gradient_accumulation_steps": 4,
    "learning_rate": 4e-4,
    "warmup_ratio": 0.06,
}
"""Options of `AdamSetting` for the paper's training, by its public script, which has the rate 4e-3 too."""


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One task with one draw: model, what is tuned, data.

    Attributes:
        loaded: Task, data and model; its head is random.
        setting: Of the study.
        seed: Of training examples, A, head and data order.
        identity: All that results depend on beside options, for the cache.
    """

    loaded: Loaded
    setting: Setting
    seed: int
    identity: Mapping[str, Any]

    @functools.cached_property
    def model(self) -> Model:
        """The model, its head fitted on the training examples where it is to be a probe: not before it is asked for."""
        loaded = self.loaded
        return loaded.probed() if starts_as_probe(loaded.model, self.setting.model_arguments()) else loaded.model

    @functools.cached_property
    def tun(self) -> Tunable:
        """LoRA on its queries and values, and the head."""
        return _lora(self.model, self.setting, self.seed)

    @property
    def train(self) -> Dataset:
        """Training examples."""
        return self.loaded.data["train"]

    @property
    def eval(self) -> Dataset:
        """Validation examples."""
        return self.loaded.data["eval"]

    @property
    def labels(self) -> Row:
        """Columns that every table begins with."""
        sizes = {"train_examples": len(self.train), "eval_examples": len(self.eval)}
        return {"task": self.loaded.task.name, "seed": self.seed, **sizes}


class Work:
    """What computes a study: problems, results through the cache, progress."""

    def __init__(self, setting: Setting, cache: Cache, progress: Callable[[str, int, int], None]) -> None:
        """Loads nothing yet.

        Args:
            setting: Of the study.
            cache: Where results are kept.
            progress: Called with a phase's name, units done and in all.
        """
        self.setting, self.cache, self.progress = setting, cache, progress
        self._problem: Problem | None = None
        self.data_sha256: dict[str, str] = {}
        self.cut: dict[str, dict[str, float]] = {}

    def problem(self, task: str, seed: int) -> Problem:
        """Returns a task with one draw of training examples, A and data order; the last one is kept.

        Raises:
            InputError: If model or data cannot be used.
        """
        held = self._problem
        if held is None or (held.loaded.task.name, held.seed) != (task, seed):
            self._problem = held = self.made(self.setting, task, seed)
        return held

    def made(self, setting: Setting, task: str, seed: int) -> Problem:
        """Returns a problem in a setting of its own, such as with another start of the head; it is not kept.

        Raises:
            InputError: If model or data cannot be used.
        """
        problem = _problem(setting, task, seed)
        self.note(task, seed, problem.loaded)
        return problem

    def note(self, task: str, seed: int, loaded: Loaded) -> None:
        """Notes for the record what was loaded: the data's hash, and how many texts of the first draw are cut."""
        self.data_sha256[task] = loaded.task.sha256()
        if not seed:
            self.cut[task] = cut_shares(loaded)

    def get(self, problem: Problem, options: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Returns a result on a problem, computed if it is not kept; `options` are what else it depends on."""
        return self.cache.get({**problem.identity, **options}, compute)


def _lora(model: Model, setting: Setting, seed: int) -> Tunable:
    return lora(model, setting.lora_rank, float(setting.lora_rank), rng=seed)


def load_draw(setting: Setting, task: str, seed: int) -> Loaded:
    """Returns model and data of a task with one draw of training examples.

    Raises:
        InputError: If they cannot be used.
    """
    arguments = DataArguments(task_name=task, data_dir=setting.data_dir, max_seq_length=setting.max_seq_length)
    return load(setting.model_arguments(), arguments, setting.sizes(), seed, "squared")


def cut_shares(loaded: Loaded) -> dict[str, float]:
    """Returns by split the share of the texts that are longer than what they are cut at."""
    return {split: loaded.truncated[split] / len(part) for split, part in loaded.data.items()}


def _problem(setting: Setting, task: str, seed: int) -> Problem:
    loaded = load_draw(setting, task, seed)
    before = _lora(loaded.model, setting, seed)
    identity = {
        "model": fingerprint(before, before.theta0),  # a probe is the same to rounding only
        "data": [part.sha256() for part in loaded.data.values()],
        "seed": seed,
        "versions": versions(),
    }
    return Problem(loaded, setting, seed, identity)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: what a notebook tells.

    Attributes:
        name: Of notebook and results, such as `02_regularization_and_linearity`.
        title: What is shown, in one sentence.
        fast: Setting of one to three minutes on embedded data.
        full: Setting of the results kept.
        compute: Gives the tables; whatever is long goes through the cache.
        draw: Makes the figures of the tables, by name; each says its sample sizes and seeds.
        findings: Says what the tables show, by name: Markdown whose every number is of the tables.
        paper: The paper's own setting, for a GPU; `None`: the study has no part in the paper.
    """

    name: str
    title: str
    fast: Setting
    full: Setting
    compute: Callable[[Any, Work], Tables]
    draw: Callable[[Tables], dict[str, Figure]]
    findings: Callable[[Tables], dict[str, str]]
    paper: Setting | None = None


def write_tables(folder: Path, tables: Tables) -> None:
    """Writes `<name>.csv` for each table, numbers with six digits: tables are to be kept. One without rows is empty."""
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", [{key: _rounded(value) for key, value in row.items()} for row in rows])
        else:
            (folder / f"{name}.csv").write_text("")


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float | np.floating) else value


def read_tables(folder: Path) -> dict[str, list[Row]]:
    """Reads the tables of a folder; an empty field is `None`, numbers and truth values are what they were."""
    tables = {}
    for file in sorted(folder.glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as stream:
            tables[file.stem] = [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(stream)]
    return tables


def _value(text: str) -> Any:
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    if "_" in text:  # a name: Python would read 1_0 as 10
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
