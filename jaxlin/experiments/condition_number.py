"""Does the condition number of K₀ predict fine-tuning? The paper's claim, tested over choices of what is tuned.

    python -m jaxlin.experiments.condition_number --data_dir FOLDER --output_dir out

For every task, draw of (A, head, data order) and choice of layers × {query, key, value} that get LoRA factors: what K₀
says before training (`jaxlin.theory.criteria`), and what fine-tuning then gives, (i) in the paper's way: a random head
that is tuned too, Adam at a fixed rate, cross-entropy, no pull; and (ii) in the theory's: a probe head, frozen, descent
on squared loss at η = c/(μ₁ + λ), with a pull. The fixed rate and c are chosen on held-out rows of the training file,
once a task.

The primary predictor, named before the runs that are kept (a trial of 16 came first): log κ of the kernel of the LoRA
factors at θ₀, which is what differs between choices (as in the paper's script), the outcome final training loss under
(i), pooled over tasks. All else is secondary, and with this many correlations some of it will look significant by
chance. Under (i) the kernel of all that is tuned is nearly that of the head alone: a new head's weights are small,
LoRA's kernel of their square.

Under (ii) the probe is fitted on the training examples, as what is then trained starts from it: leave-one-out error,
marginal likelihood and alignment there are of labels that the head has seen.

Every run is kept in `runs/` by a hash of all that it depends on: killed, it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.experiments.correlations import ALONE, PAPER, STABLE, correlations
from jaxlin.experiments.data_arguments import DataArguments
from jaxlin.experiments.model_arguments import ModelArguments
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.run_folder import RunFolder, write_csv, write_json
from jaxlin.experiments.setting import Loaded, load
from jaxlin.models.load import load_model
from jaxlin.models.model import Model
from jaxlin.models.probe import probe_head
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.ntk.engine import ntk
from jaxlin.ntk.kinds import contrast_basis
from jaxlin.ntk.store import fingerprint
from jaxlin.peft.lora import lora
from jaxlin.peft.part import only
from jaxlin.theory.criteria import criteria
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import evaluate, targets, to_mean
from jaxlin.training.trainer import predict, train
from jaxlin.tunable import Tunable, layer_index, leaf_paths
from jaxlin.versions import versions

MODULES = {"q": "query", "k": "key", "v": "value"}
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class ConditionNumberConfig:
    """Does the condition number predict fine-tuning?

    Attributes:
        output_dir: Folder for runs, tables and log; what is there already is not computed again.
        data_dir: Folder of <task>/{train,validation}.tsv; default: the environment variable JAXLIN_DATA.
        model_name_or_path: Encoder.
        tasks: Two-class tasks.
        layer_sets: Sets of layers, each as digits joined by commas; default: eight of a model of six layers.
        module_sets: Sets of modules, letters of q, k and v.
        draws: Draws of A, head and data order.
        num_train: Training examples.
        num_tune: Held-out examples of the training file, on which rates are chosen.
        num_eval: Validation examples.
        num_kernel: Training examples that make the kernel.
        max_seq_length: Tokens a text is truncated to.
        lora_rank: Rank, and α.
        batch_size: Examples a step.
        num_train_epochs: Passes over the training examples.
        paper_learning_rates: Fixed rates of Adam, of which one is chosen a task.
        stable_factors: c of η = c/(μ₁ + λ), of which one is chosen a task.
        lam_rel: λ of (ii) in units of μ₁; criteria that need a λ use the same.
        resamples: Bootstrap resamples and permutations.
    """

    output_dir: Path
    data_dir: Path | None = None
    model_name_or_path: str = EMBEDDED_MODEL
    tasks: tuple[str, ...] = ("cola", "sst2", "mrpc", "rte", "uci_yelp")
    layer_sets: tuple[str, ...] = ("0,1", "2,3", "4,5", "0,5", "0,1,2", "3,4,5", "0,2,4", "0,1,2,3,4,5")
    module_sets: tuple[str, ...] = ("q", "k", "v", "qv", "qkv")
    draws: int = 3
    num_train: int = 128
    num_tune: int = 96
    num_eval: int = 200
    num_kernel: int = 64
    max_seq_length: int = 48
    lora_rank: int = 8
    batch_size: int = 16
    num_train_epochs: float = 3.0
    paper_learning_rates: tuple[float, ...] = (4e-3, 4e-4)
    stable_factors: tuple[float, ...] = (0.1, 0.3, 1.0)
    lam_rel: float = 1e-3
    resamples: int = 1000


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layers and modules that get LoRA factors."""

    layers: tuple[int, ...]
    modules: str

    @property
    def name(self) -> str:
        """Such as `0,1:qv`."""
        return f"{','.join(map(str, self.layers))}:{self.modules}"

    def tuned(self, way: str) -> tuple[str, ...]:
        """Blocks that are tuned: the head too in the paper's way."""
        return (*self.blocks, HEAD) if way == PAPER else self.blocks

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks of the Tunable that it is made of."""
        return tuple(f"layer_{layer}/{MODULES[m]}" for layer in self.layers for m in self.modules)


def choices_of(config: ConditionNumberConfig) -> tuple[Choice, ...]:
    """Returns every layer set with every module set.

    Raises:
        InputError: If one is none, or is given twice.
    """
    found = []
    for words in config.layer_sets:
        for letters in config.module_sets:
            parts = words.split(",")
            if not all(part.isdecimal() for part in parts) or not letters or set(letters) - set(MODULES):
                raise InputError(f"{words}:{letters} is no choice; expected layers such as 0,1 and letters of q, k, v")
            found.append(Choice(tuple(sorted(map(int, parts))), letters))
    names = [choice.name for choice in found]
    if len(set(names)) < len(names) or len(names) < 3:
        raise InputError(f"{len(names)} choices, {len(set(names))} of them different; expected at least 3, each once")
    return tuple(found)


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


class Cache:
    """Results by a hash of what they depend on, a JSON file each, written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder, which may be there."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of `key`, computed if it is not there."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
        path = self.folder / f"{name}.json"
        if not path.exists():
            write_json(path, {"key": key, "result": compute()})
        return dict(json.loads(path.read_text(), object_hook=_numbers)["result"])


def _numbers(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: `write_json` makes words of them."""
    words = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
    return {key: words.get(value, value) if isinstance(value, str) else value for key, value in content.items()}


def _load(config: ConditionNumberConfig, task: str) -> Loaded:
    arguments = DataArguments(task_name=task, data_dir=config.data_dir, max_seq_length=config.max_seq_length)
    sizes = {"train": config.num_train + config.num_tune, "eval": config.num_eval}
    model = ModelArguments(config.model_name_or_path, head_init="random", new_head=True)
    return load(model, arguments, sizes, 0, "squared")


def _check(config: ConditionNumberConfig) -> None:
    choices_of(config)
    for name in ("draws", "num_train", "num_tune", "num_eval", "num_kernel", "batch_size", "resamples"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: expected at least 1")
    if not config.tasks or not config.paper_learning_rates or not config.stable_factors:
        raise InputError("--tasks, --paper_learning_rates and --stable_factors each need at least one value")
    if not config.lam_rel > 0:
        raise InputError(f"--lam_rel {config.lam_rel}: expected above 0")


def _drawn(config: ConditionNumberConfig, loaded: Loaded, draw: int) -> _Draw:
    """Draws A and head, and groups what is tuned by module."""
    if loaded.task.num_labels != 2:
        raise InputError(f"task {loaded.task.name} has {loaded.task.num_labels} outputs; expected two classes")
    whole, order = loaded.data["train"], np.random.default_rng(0).permutation(len(loaded.data["train"]))
    if len(order) < config.num_train + config.num_tune:
        raise InputError(
            f"task {loaded.task.name} has {len(order)} training rows; expected --num_train {config.num_train} and "
            f"--num_tune {config.num_tune} of them"
        )
    parts = whole.take(order[: config.num_train]), whole.take(order[config.num_train :])
    model = load_model(config.model_name_or_path, 2, head=loaded.model.module.head, new_head=True, rng=draw)
    probed = probe_head(model, parts[0], np.asarray(targets(parts[0]["labels"], 2), np.float64))
    depth = model.module.config.num_layers
    if beyond := [choice.name for choice in choices_of(config) if max(choice.layers) >= depth]:
        raise InputError(f"--layer_sets: {beyond[0]} names a layer that the model has not; it has {depth}, from 0")
    tuns = {way: _tunable(start, config.lora_rank, draw) for way, start in ((PAPER, model), (STABLE, probed))}
    identity = {
        "models": {way: fingerprint(tun, tun.theta0) for way, tun in tuns.items()},
        "data": [part.sha256() for part in (*parts, loaded.data["eval"])],
        "versions": versions(),
    }
    return _Draw(
        loaded.task.name, draw, tuns, *parts, loaded.data["eval"], metric=loaded.task.metrics[0], identity=identity
    )


def _tunable(model: Model, rank: int, draw: int) -> Tunable:
    """LoRA on every query, key and value, and the head; a block each."""
    tun = lora(model, rank, rank, tuple(MODULES.values()), rng=draw)
    blocks: dict[str, tuple[str, ...]] = {}
    for path in leaf_paths(tun.theta0):
        layer = layer_index(path)
        name = HEAD if layer is None else f"layer_{layer}/{path.split('/')[-2]}"
        blocks[name] = (*blocks.get(name, ()), path)
    return dataclasses.replace(tun, blocks=blocks)


def _predictors(
    config: ConditionNumberConfig, drawn: _Draw, way: str, choices: Sequence[Choice]
) -> dict[str, dict[str, Any]]:
    """What K₀ says of every choice, from one pass of block kernels: of the contrasts of logits, as softmax sees them.

    With a probe head LoRA's kernel vanishes along the constant direction, so that κ of all of it would be infinite.

    Returns:
        By name of the choice.
    """
    tun, some = drawn.tuns[way], drawn.train.take(np.arange(min(config.num_kernel, len(drawn.train))))
    kernel, basis = ntk(tun, some).contrasts(), contrast_basis(2)
    f0 = predict(tun, tun.theta0, some) @ basis
    y = np.asarray(targets(some["labels"], 2), np.float64) @ basis
    found: dict[str, dict[str, Any]] = {}
    for choice in choices:
        row: dict[str, Any] = {}
        for prefix, blocks in (("", choice.tuned(way)), (ALONE, choice.blocks)):
            one = criteria(kernel.subset(blocks), y, f0, lam_rel=config.lam_rel)
            row |= {prefix + name: value for name, value in one.values.items()}
            row[f"{prefix}condition_number_is_bound"] = one.condition_number_is_bound
        found[choice.name] = row
    return found


def _train_config(config: ConditionNumberConfig, way: str, strength: float, mu1: float, drawn: _Draw) -> TrainConfig:
    """How to train; `strength` is the rate of (i), and c of (ii)."""
    common: dict[str, Any] = {
        "batch_size": config.batch_size,
        "num_train_epochs": config.num_train_epochs,
        "seed": drawn.draw,
        "group_by_length": True,
    }
    if way == PAPER:
        schedule: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_ratio": 0.06}
        return TrainConfig(loss="cross_entropy", optimizer="adam", learning_rate=strength, **schedule, **common)
    n = len(drawn.train)
    top = mu1 * n / min(config.num_kernel, n)  # of all training examples: μ grows with their number
    lam = config.lam_rel * top
    rate = to_mean(strength / (top + lam), n, "learning_rate")
    return TrainConfig(loss="squared", optimizer="sgd", learning_rate=rate, lam=lam, **common)


def _fine_tune(drawn: _Draw, choice: Choice, way: str, config: TrainConfig, held_out: Dataset) -> dict[str, Any]:
    """Trains one choice; what diverged has no numbers."""
    tun = only(drawn.tuns[way], choice.tuned(way))
    try:
        result = train(tun, drawn.train, None, config)
    except TrainingDivergedError:
        return {"diverged": True, "train_loss": None, "eval_loss": None, "metric": None, "distance": None}
    on_train, on_held_out = (
        evaluate(predict(tun, result.theta, part), part["labels"], config.loss) for part in (drawn.train, held_out)
    )
    return {
        "diverged": False,
        "train_loss": on_train["loss"],
        "eval_loss": on_held_out["loss"],
        "metric": on_held_out[drawn.metric],
        "distance": result.history[-1]["distance"],
    }


class Study:
    """The experiment, one result at a time through its cache."""

    def __init__(self, config: ConditionNumberConfig, say: Callable[[str], None]) -> None:
        """Checks the configuration; nothing is loaded yet."""
        _check(config)
        self.config, self.say = config, say
        self.choices = choices_of(config)
        self.cache = Cache(config.output_dir / "runs")
        self._loaded: dict[str, Loaded] = {}
        self._strengths: dict[str, dict[str, float]] = {}
        self._drawn: dict[tuple[str, int], _Draw] = {}

    def drawn(self, task: str, draw: int) -> _Draw:
        """A task with one draw of A and head."""
        if task not in self._loaded:
            self._loaded[task] = _load(self.config, task)
        if (task, draw) not in self._drawn:
            self._drawn = {key: value for key, value in self._drawn.items() if key[0] == task}  # models are large
            self._drawn[task, draw] = _drawn(self.config, self._loaded[task], draw)
        return self._drawn[task, draw]

    def data_hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of each task's data."""
        return {task: loaded.task.sha256() for task, loaded in self._loaded.items()}

    def predictors(self, task: str, draw: int, way: str) -> dict[str, Any]:
        """What K₀ says of every choice."""
        drawn, config = self.drawn(task, draw), self.config
        key = {
            "what": "predictors",
            "way": way,
            "of": dict(drawn.identity),
            "num_kernel": config.num_kernel,
            "lam_rel": config.lam_rel,
            "choices": [choice.name for choice in self.choices],
        }
        return self.cache.get(key, lambda: _predictors(config, drawn, way, self.choices))

    def run(self, task: str, draw: int, choice: Choice, way: str, strength: float, *, tuning: bool) -> dict[str, Any]:
        """What fine-tuning of a choice gives."""
        drawn = self.drawn(task, draw)
        mu1 = self.predictors(task, draw, way)[choice.name]["mu_max"]
        training = _train_config(self.config, way, strength, mu1, drawn)
        key = {"what": "run", "of": dict(drawn.identity), "choice": choice.name, "way": way, "tuning": tuning}
        key["training"] = dataclasses.asdict(training)
        held_out = drawn.tune if tuning else drawn.eval
        result = self.cache.get(key, lambda: _fine_tune(drawn, choice, way, training, held_out))
        return {**result, "learning_rate": training.learning_rate}

    def strengths(self, task: str) -> dict[str, float]:
        """The rate of (i) and the c of (ii) whose held-out loss is least, over the smallest, a middle and all."""
        if task in self._strengths:
            return self._strengths[task]
        by_size = sorted(self.choices, key=lambda choice: len(choice.blocks))
        some = [by_size[0], by_size[len(by_size) // 2], by_size[-1]]
        chosen = {}
        for way, values in ((PAPER, self.config.paper_learning_rates), (STABLE, self.config.stable_factors)):
            losses = {}
            for value in values:
                rows = [self.run(task, 0, choice, way, value, tuning=True) for choice in some]
                each = [np.inf if row["diverged"] else row["eval_loss"] for row in rows]
                losses[value] = float(np.mean(each)) if np.isfinite(each).all() else np.inf
            if not np.isfinite(min(losses.values())):
                raise InputError(f"task {task}: every strength {list(values)} of {way!r} diverges; give smaller ones")
            chosen[way] = min(values, key=losses.__getitem__)
            shown = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in losses.items())
            self.say(f"{task}, {way}: held-out loss by strength {shown}; chosen {chosen[way]:g}")
        self._strengths[task] = chosen
        return chosen

    def rows(self, progress: Callable[[str, int, int], None]) -> Iterable[dict[str, Any]]:
        """Yields a row a task, draw, choice and way; first all of draw 0, so that a part is a whole of fewer draws."""
        config = self.config
        total, done = config.draws * len(config.tasks) * len(self.choices) * 2, 0
        for draw in range(config.draws):
            for task in config.tasks:
                strengths = self.strengths(task)
                predictors = {way: self.predictors(task, draw, way) for way in strengths}
                tuns = self.drawn(task, draw).tuns
                for choice in self.choices:
                    for way, tun in tuns.items():
                        result = self.run(task, draw, choice, way, strengths[way], tuning=False)
                        done += 1
                        progress("runs", done, total)
                        yield {
                            "task": task,
                            "draw": draw,
                            "choice": choice.name,
                            "num_modules": len(choice.blocks),
                            "num_params": _num_params(tun, choice.tuned(way)),
                            "way": way,
                            "strength": strengths[way],
                            **result,
                            **predictors[way][choice.name],
                        }


def _num_params(tun: Tunable, blocks: Sequence[str]) -> int:
    sizes = dict(zip(leaf_paths(tun.theta0), (leaf.size for leaf in jax.tree.leaves(tun.theta0)), strict=True))
    return sum(sizes[path] for block in blocks for path in tun.blocks[block])


def _whole_draws(table: Sequence[dict[str, Any]], config: ConditionNumberConfig) -> list[dict[str, Any]]:
    """Leaves out a draw that not all tasks and choices have."""
    each = len(config.tasks) * len(choices_of(config)) * 2
    counts = {draw: sum(row["draw"] == draw for row in table) for draw in range(config.draws)}
    return [row for row in table if counts[row["draw"]] == each]


def run(config: ConditionNumberConfig) -> list[dict[str, Any]]:
    """Runs the experiment and writes `table.csv`, `correlations.csv` and `all_results.json`.

    Args:
        config: What to run.

    Returns:
        The correlations.

    Raises:
        InputError: If anything given cannot be used.
        KeyboardInterrupt: If interrupted; the runs so far are kept, and the same command goes on.
    """
    _check(config)
    folder = RunFolder(config.output_dir, overwrite=False, resume=True)
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    record = {"command": "condition_number", "arguments": arguments, "versions": versions()}
    folder.open(record, "")
    table: list[dict[str, Any]] = []
    try:
        with ProgressReporter(folder.line) as progress:
            study = Study(config, progress.say)
            for row in study.rows(progress.update):
                table.append(row)
    finally:
        folder.close()
        if whole := _whole_draws(table, config):
            write_csv(config.output_dir / "table.csv", [_rounded(row) for row in whole])
    found = correlations(table, config.resamples)
    write_csv(config.output_dir / "correlations.csv", [_rounded(row) for row in found])
    primary = next(row for row in found if row["primary"])
    write_json(config.output_dir / "all_results.json", {**record, "primary": primary, "data": study.data_hashes()})
    return found


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Six digits: the tables are to be kept."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    """Runs it from the command line."""
    import tyro

    from jaxlin.cli import one_sentence, set_up

    set_up()
    prog = "python -m jaxlin.experiments.condition_number"
    config = tyro.cli(ConditionNumberConfig, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    with one_sentence():
        primary = next(row for row in run(config) if row["primary"])
    spearman, partial = (
        f"{primary[name]:.2f} [{primary[f'{name}_interval_low']:.2f}, {primary[f'{name}_interval_high']:.2f}]"
        for name in ("spearman", "partial")
    )
    print(
        f"log κ of LoRA's K₀ against final training loss, pooled over tasks: Spearman {spearman}, "
        f"p = {primary['p_value']:.3g}; partial {partial}; {primary['choices']} choices, {primary['problems']} tasks, "
        f"{primary['draws']} draws"
    )


if __name__ == "__main__":
    main()
