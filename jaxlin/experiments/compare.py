"""`jaxlin compare`: full against linearized fine-tuning of a pretrained transformer on real text."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxlin import plots
from jaxlin.data.dataset import Dataset
from jaxlin.data.files import load_folder_task, load_tsv_task
from jaxlin.data.stdlib import load_stdlib_task
from jaxlin.data.task import Task, subsample, tokenize
from jaxlin.errors import InputError, TrainingDivergedError
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.run_folder import RunFolder, versions, write_csv, write_json
from jaxlin.models.load import EMBEDDED_MODEL, load_model
from jaxlin.models.model import Model
from jaxlin.models.probe import probe_head
from jaxlin.peft.lora import lora
from jaxlin.peft.select import full, head_only
from jaxlin.training.compare import Comparison, check_lams, compare
from jaxlin.training.losses import targets
from jaxlin.training.trainer import TrainConfig, check_data, predict
from jaxlin.tunable import Tunable

STDLIB = "stdlib"
FROZEN_A = "full_A_frozen"


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Model.

    Attributes:
        model_name_or_path: Local folder in Hugging Face's layout, hub id, or the embedded default.
        head: What the classification head reads; auto: as the checkpoint was trained.
        head_init: Start of a new head; probe: closed-form ridge on the frozen features.
    """

    model_name_or_path: str = EMBEDDED_MODEL
    head: Literal["auto", "mean", "cls", "pooler"] = "auto"
    head_init: Literal["probe", "random", "zero"] = "probe"


@dataclasses.dataclass(frozen=True)
class DataArguments:
    """Data.

    Attributes:
        task_name: stdlib (embedded: docstrings of Python's standard library), or a task in data_dir.
        data_dir: Folder of <task>/{train,validation}.tsv; default: the environment variable JAXLIN_DATA.
        train_file: Training TSV with a label column, in place of task_name.
        validation_file: Validation TSV.
        max_seq_length: Tokens a text is truncated to.
        max_train_samples: Use so many training examples, stratified.
        max_eval_samples: Use so many validation examples, stratified.
    """

    task_name: str = STDLIB
    data_dir: Path | None = None
    train_file: Path | None = None
    validation_file: Path | None = None
    max_seq_length: int = 64
    max_train_samples: int | None = None
    max_eval_samples: int | None = None


@dataclasses.dataclass(frozen=True)
class TunedArguments:
    """What is tuned.

    Attributes:
        peft: LoRA, the head alone, or every parameter.
        lora_rank: Rank r.
        lora_alpha: Scale α.
        lora_targets: Modules that LoRA adapts, by the end of their path.
        lora_layers: Layers that LoRA adapts; all if not given.
        train_head: Whether the head is tuned beside LoRA.
        with_frozen_A: Train a third arm: full, with LoRA's A frozen.
    """

    peft: Literal["lora", "head", "full"] = "lora"
    lora_rank: int = 8
    lora_alpha: float = 8.0
    lora_targets: tuple[str, ...] = ("query", "value")
    lora_layers: tuple[int, ...] = ()
    train_head: bool = True
    with_frozen_A: bool = False


@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """Training.

    Attributes:
        lams: Pull strengths λ for the summed loss; auto: 0, 1e-3, 1e-2, 1e-1, 1 in units of μ₁.
        lam_rel: Pull strengths in units of μ₁, in place of lams.
        pull: How the pull acts; see jaxlin.optim.proximal.
        loss: Squared loss on one-hot targets (the theory's) or cross_entropy.
        optimizer: One of sgd, momentum, adam, rmsprop, lion.
        learning_rate: For the mean loss.
        lr_scheduler_type: Learning rate over the steps.
        warmup_ratio: Share of the steps with growing rate.
        per_device_train_batch_size: Examples a step.
        num_train_epochs: Passes over the training examples.
        max_steps: Number of steps, in place of num_train_epochs.
        group_by_length: Batches of like length: less padding.
        eval_steps: Evaluate every so many steps; else at the end only.
        linear_mode: Train the linearized arm from Jacobians computed once (cached) or by jvp (streaming).
        kernel_examples: At most so many training examples make the kernel.
        seed: Of head, A, subsets and data order.
    """

    lams: tuple[str, ...] = ("auto",)
    lam_rel: tuple[float, ...] = ()
    pull: Literal["coupled", "selective", "decoupled", "prox", "spd"] = "coupled"
    loss: Literal["squared", "cross_entropy"] = "squared"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.0
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 6.0
    max_steps: int | None = None
    group_by_length: bool = True
    eval_steps: int | None = None
    linear_mode: Literal["auto", "cached", "streaming"] = "auto"
    kernel_examples: int = 1024
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OutputArguments:
    """Output.

    Attributes:
        output_dir: Folder for tables, logs and figures; default: a new one under runs/.
        overwrite_output_dir: Replace the run in output_dir.
        quiet: No progress, only the tables.
        debug: Show tracebacks.
    """

    output_dir: Path | None = None
    overwrite_output_dir: bool = False
    quiet: bool = False
    debug: bool = False


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Fine-tune a model in full and linearized, over a sweep of pulls λ, and say how close the two are.

    Attributes:
        model: The model.
        data: The data.
        tuned: What is tuned.
        training: How.
        output: Where results go.
    """

    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    tuned: TunedArguments = dataclasses.field(default_factory=TunedArguments)
    training: TrainingArguments = dataclasses.field(default_factory=TrainingArguments)
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def _lams(arguments: TrainingArguments) -> Sequence[float] | str:
    if arguments.lams == ("auto",):
        return "auto"
    if arguments.lam_rel:
        raise InputError("--lams and --lam_rel are both given; give one of them")
    try:
        return [float(lam) for lam in arguments.lams]
    except ValueError as error:
        raise InputError(f"--lams {' '.join(arguments.lams)}: expected numbers, or auto ({error})") from error


def _train_config(arguments: TrainingArguments) -> TrainConfig:
    return TrainConfig(
        loss=arguments.loss,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.lr_scheduler_type,
        warmup_ratio=arguments.warmup_ratio,
        batch_size=arguments.per_device_train_batch_size,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        pull=arguments.pull,
        seed=arguments.seed,
        group_by_length=arguments.group_by_length,
        eval_steps=arguments.eval_steps,
    )


def load_task(arguments: DataArguments) -> Task:
    """Loads the task that the arguments name.

    Returns:
        The task, whole.

    Raises:
        InputError: If they contradict each other, or the data cannot be used.
    """
    files = (arguments.train_file, arguments.validation_file)
    if any(files):
        if arguments.train_file is None or arguments.validation_file is None:
            raise InputError("--train_file and --validation_file belong together; only one of them is given")
        if arguments.task_name != STDLIB:
            raise InputError("--task_name and --train_file are both given; give one of them")
        return load_tsv_task(arguments.train_file.stem, arguments.train_file, arguments.validation_file)
    if arguments.task_name == STDLIB:
        if arguments.data_dir is not None:
            raise InputError("--data_dir is given without --task_name; name a task in it")
        return load_stdlib_task()
    data_dir = arguments.data_dir or os.environ.get("JAXLIN_DATA")
    if data_dir is None:
        raise InputError(
            f"--task_name {arguments.task_name} needs --data_dir FOLDER (or JAXLIN_DATA), a folder with "
            f"{arguments.task_name}/train.tsv and validation.tsv; without it the only task is {STDLIB}"
        )
    return load_folder_task(Path(data_dir), arguments.task_name)


def _tune(model: Model, arguments: TunedArguments, seed: int) -> tuple[Tunable, dict[str, Tunable]]:
    """Returns what is tuned, and the extra arms."""
    if arguments.peft != "lora":
        if arguments.with_frozen_A:
            raise InputError(f"--with_frozen_A needs --peft lora; it is {arguments.peft}")
        return (head_only if arguments.peft == "head" else full)(model), {}
    options: dict[str, Any] = {
        "rank": arguments.lora_rank,
        "alpha": arguments.lora_alpha,
        "targets": arguments.lora_targets,
        "layers": arguments.lora_layers or None,
        "rng": seed,
        "train_head": arguments.train_head,
    }
    extra = {FROZEN_A: lora(model, **options, freeze_A=True)} if arguments.with_frozen_A else {}
    return lora(model, **options), extra


@dataclasses.dataclass(frozen=True, eq=False)
class _Setting:
    """Everything loaded and checked, before anything long is done."""

    task: Task
    data: dict[str, Dataset]
    truncated: dict[str, int]
    model: Model
    tun: Tunable
    extra_arms: dict[str, Tunable]
    baselines: dict[str, dict[str, np.ndarray]]


def prepare(config: CompareConfig) -> _Setting:
    """Loads model and data and checks that they fit.

    Returns:
        The setting of the run; the only long part is one pass of the frozen model, for the probe.

    Raises:
        InputError: If anything given cannot be used.
    """
    arguments, seed = config.data, config.training.seed
    train_config = _train_config(config.training)
    train_config.check()
    lams = _lams(config.training)
    check_lams(config.training.lam_rel or lams)
    task = load_task(arguments)
    sizes = {"train": arguments.max_train_samples, "eval": arguments.max_eval_samples}
    splits = {
        name: subsample(split, sizes[name], seed) for name, split in (("train", task.train), ("eval", task.validation))
    }
    head_init = "random" if config.model.head_init == "probe" else config.model.head_init
    model = load_model(
        config.model.model_name_or_path,
        task.num_labels,
        head=config.model.head,
        head_init=head_init,
        rng=seed,
    )
    limit = model.module.config.max_positions
    data, truncated = {}, {}
    for name, split in splits.items():
        data[name], truncated[name] = tokenize(split, model.tokenizer, min(arguments.max_seq_length, limit))
        check_data(full(model), data[name], train_config.loss)
    _tune(model, config.tuned, seed)  # for its errors, before the probe's pass over the data
    y = np.asarray(targets(data["train"]["labels"], task.num_labels), np.float64)
    probed = probe_head(model, data["train"], y)
    if config.model.head_init == "probe" and model.source is not None and model.source.head_is_new:
        model = probed
    probe = head_only(probed)
    baselines = {"linear_probe": {name: predict(probe, probe.theta0, part) for name, part in data.items()}}
    tun, extra_arms = _tune(model, config.tuned, seed)
    return _Setting(task, data, truncated, model, tun, extra_arms, baselines)


def _resolved(config: CompareConfig, setting: _Setting) -> dict[str, Any]:
    """The configuration with all that is needed to repeat the run."""
    arguments = {group: dataclasses.asdict(value) for group, value in vars(config).items()}
    return {
        "command": "compare",
        "arguments": {
            group: {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
            for group, values in arguments.items()
        },
        "model": dataclasses.asdict(setting.model.source) if setting.model.source else None,
        "head": setting.model.module.head,
        "task": {"name": setting.task.name, "labels": setting.task.label_names, **setting.task.provenance},
        "data_sha256": setting.task.sha256(),
        "tokenized_sha256": {name: part.sha256() for name, part in setting.data.items()},
        "truncated": setting.truncated,
        "versions": versions(),
        "device": str(jax.devices()[0]),
    }


def _show(value: Any, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def gap_tables(table: Sequence[Mapping[str, Any]], arm: str = "full") -> list[Table]:
    """Lays out how far an arm is from the linearized one, in parameters and in outputs, a row a λ."""
    title = f"{plots.NAMES[arm]} (θ, f) against linearized (θ̄, f̄)"
    linear = {row["lam"]: row for row in table if row["arm"] == "linearized"}
    rows = [row for row in table if row["arm"] == arm]
    parts = [part for part in ("A", "B", "head", "other") if rows[0].get(f"parameter_gap_{part}") is not None]
    parameters = {"λ": "lam", "‖θ−θ₀‖": "distance", "‖θ̄−θ₀‖": "", "‖θ−θ̄‖": "parameter_gap"}
    parameters |= {f"in {part}": f"parameter_gap_{part}" for part in parts}
    outputs: dict[str, str] = {}
    for split in ("train", "eval"):
        outputs |= {f"‖f−f̄‖ {split}": f"output_gap_{split}", f"of ‖f−f₀‖ {split}": f"output_gap_relative_{split}"}
    outputs |= {"KL(f‖f̄) eval": "kl_eval", "agree eval": "agreement_eval"}
    tables = []
    for what, columns in (("parameters", parameters), ("outputs", outputs)):
        out = Table("λ/μ₁", *columns, title=f"{title}: {what}", title_justify="left")
        for column in out.columns:
            column.justify, column.no_wrap = "right", True
        for row in rows:
            cells = [row[key] if key else linear[row["lam"]]["distance"] for key in columns.values()]
            out.add_row(*map(_show, [row["lam_over_mu1"], *cells]))
        tables.append(out)
    return tables


def score_table(table: Sequence[Mapping[str, Any]]) -> Table:
    """Lays out loss and metric of every arm and baseline."""
    out = Table(title="Loss and accuracy", title_justify="left")
    out.add_column("λ/μ₁", justify="right")
    out.add_column("model")
    for name in ("loss train", "loss eval", "acc. train", "acc. eval", "agrees with f₀"):
        out.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in table:
        out.add_section() if row["lam"] != last else None
        last = row["lam"]
        out.add_row(
            _show(row["lam_over_mu1"]),
            plots.NAMES.get(row["arm"], row["arm"]),
            *(_show(row[f"{key}"], ".4f") for key in ("loss_train", "loss_eval")),
            *(_show(row[f"{key}"], ".3f") for key in ("accuracy_train", "accuracy_eval", "agreement_f0_eval")),
        )
    return out


def spectrum_line(summary: Mapping[str, Any]) -> str:
    """Says what the kernel's spectrum is, in one line."""
    sign = "≥" if summary["condition_number_is_lower_bound"] else "="
    epsilon = summary["kernel"]["epsilon_J"]
    return (
        f"NTK at θ₀ ({summary['kernel_examples']} examples × {summary['outputs']} outputs): "
        f"μ_max = {summary['mu_max']:.4g}, μ_min = {summary['mu_min']:.3g}, "
        f"κ {sign} {summary['condition_number']:.3g}, "
        f"κ on the range = {summary['condition_number_on_range']:.3g}, "
        f"rank {summary['rank']} of {summary['kernel_size']}, "
        f"noise floor {summary['noise_floor']:.2g} (ε_J = {epsilon:.1g})"
    )


def _write(folder: RunFolder, resolved: Mapping[str, Any], result: Comparison, title: str, seconds: float) -> None:
    write_csv(folder.path / "table.csv", result.table)
    history = {key: value.history for key, value in result.results.items()}
    figures = folder.path / "figures"
    plots.save(plots.comparison(result.table, history, title), figures / "compare")
    examples = result.summary["kernel_examples"]
    plots.save(plots.spectrum(result.spectrum, f"Spectrum of K₀, {examples} examples"), figures / "spectrum")
    results = {"summary": {**result.summary, "seconds": seconds}, "table": result.table, "config": resolved}
    write_json(folder.path / "all_results.json", results)  # last: its presence says that the run is whole


def run(config: CompareConfig) -> Comparison:
    """Runs the comparison and writes its folder.

    Args:
        config: What to run.

    Returns:
        The comparison.

    Raises:
        InputError: If anything given cannot be used; nothing has been written then.
        TrainingDivergedError: If an arm diverges; the logs up to there are kept.
        KeyboardInterrupt: If interrupted; likewise.
    """
    begin = time.monotonic()
    default = Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    folder = RunFolder(config.output.output_dir or default, config.output.overwrite_output_dir)
    setting = prepare(config)
    resolved = _resolved(config, setting)
    folder.open(resolved)
    source, train_config = setting.model.source, _train_config(config.training)
    assert source is not None  # loaded by name
    sizes = {name: len(part) for name, part in setting.data.items()}
    try:
        with ProgressReporter(folder.line, config.output.quiet) as progress:
            progress.say(
                f"{source.name}, {config.tuned.peft} ({setting.tun.num_params:,} trainable parameters), task "
                f"{setting.task.name}: {sizes['train']} training, {sizes['eval']} evaluation examples, "
                f"{setting.task.num_labels} output(s)"
            )
            if source.head_is_new:
                progress.say(f"the checkpoint has no head of this kind: a new one starts as {config.model.head_init}")
            for name, count in setting.truncated.items():
                if count:
                    limit = config.data.max_seq_length
                    progress.say(
                        f"{count} of {sizes[name]} {name} texts are longer than {limit} tokens and were truncated"
                    )
            dropped = setting.task.provenance["train_rows_also_in_validation_dropped"]
            if dropped:
                progress.say(f"{dropped} training rows whose text is also in validation were dropped")
            result = compare(
                setting.tun,
                setting.data["train"],
                setting.data["eval"],
                train_config,
                lams=_lams(config.training),
                lam_rel=config.training.lam_rel or None,
                extra_arms=setting.extra_arms,
                baselines=setting.baselines,
                linear_mode=config.training.linear_mode,
                kernel_examples=config.training.kernel_examples,
                log=folder.step,
                progress=progress.update,
            )
        title = (
            f"{source.name}, {setting.task.name}: {sizes['train']} training and {sizes['eval']} evaluation examples, "
            f"{result.summary['steps']} steps, seed {config.training.seed}"
        )
        _write(folder, resolved, result, title, time.monotonic() - begin)
    except (TrainingDivergedError, KeyboardInterrupt) as error:
        folder.line(f"stopped: {error or 'interrupted'}")
        if isinstance(error, TrainingDivergedError):
            raise TrainingDivergedError(f"{error}; the log is in {folder.path}") from error
        raise
    finally:
        folder.close()
    _print(result, folder.path, time.monotonic() - begin)
    return result


def _print(result: Comparison, path: Path, seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(spectrum_line(result.summary), highlight=False, soft_wrap=True)
    for arm in ("full", FROZEN_A):
        if any(row["arm"] == arm for row in result.table):
            console.print(*gap_tables(result.table, arm))
    console.print(score_table(result.table))
    console.print(f"written to {path} in {seconds:.0f} s", highlight=False)
