"""What the commands share: their groups of arguments, and the model and data that these name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.data.labels import Scale, label_order, reorder, scale_of, standardise
from jaxlin.data.task import Task, TextSplit, subsample, tokenize
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.models.load import load_model
from jaxlin.models.model import Model
from jaxlin.models.probe import probe_head
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.peft.lora import lora
from jaxlin.peft.select import full, head_only
from jaxlin.training.compare import check_lams
from jaxlin.training.losses import targets
from jaxlin.training.trainer import TrainConfig, check_data, predict
from jaxlin.tunable import Tunable

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
        lam_rel: Pull strengths in units of μ₁, in place of lams (not for spd, whose λ has no unit).
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
        precision: Of matrix products on the device; highest is true float32.
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
    precision: Literal["highest", "high", "default"] = "highest"


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


def lam_grid(arguments: TrainingArguments) -> Sequence[float] | str:
    """Returns λ for the summed loss, or `"auto"`.

    Raises:
        InputError: If a value is no number, or λ is given in both units.
    """
    if arguments.lams == ("auto",):
        return "auto"
    if arguments.lam_rel:
        raise InputError("--lams and --lam_rel are both given; give one of them")
    try:
        return [float(lam) for lam in arguments.lams]
    except ValueError as error:
        raise InputError(f"--lams {' '.join(arguments.lams)}: expected numbers, or auto ({error})") from error


def train_config(arguments: TrainingArguments) -> TrainConfig:
    """Returns the trainer's configuration; λ is set apart."""
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
        precision=arguments.precision,
    )


def tune(model: Model, arguments: TunedArguments, seed: int) -> tuple[Tunable, dict[str, Tunable]]:
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
class Setting:
    """Everything loaded and checked, before anything long is done.

    `notes` are lines to be said in the log; `scale` is that of standardised scores, `None` for classes.
    """

    task: Task
    notes: tuple[str, ...]
    scale: Scale | None
    data: dict[str, Dataset]
    truncated: dict[str, int]
    max_length: int
    model: Model
    tun: Tunable
    extra_arms: dict[str, Tunable]
    baselines: dict[str, dict[str, np.ndarray]]


def _in_order_of_checkpoint(
    model: Model, task: Task, splits: dict[str, TextSplit]
) -> tuple[Task, dict[str, TextSplit], tuple[str, ...]]:
    """Counts the classes as the checkpoint's own head does, by their names, and says what was done."""
    if not task.label_names or model.source is None or model.source.head_is_new:
        return task, splits, ()
    order, note = label_order(task.label_names, model.config)
    notes = (note,) if note else ()
    if order is None:
        return task, splits, notes
    names = tuple(task.label_names[i] for i in np.argsort(order))
    train, validation = (reorder(split, order) for split in (task.train, task.validation))
    task = dataclasses.replace(task, label_names=names, train=train, validation=validation)
    return task, {name: reorder(split, order) for name, split in splits.items()}, notes


def prepare(
    model_arguments: ModelArguments,
    arguments: DataArguments,
    tuned: TunedArguments,
    training: TrainingArguments,
) -> Setting:
    """Loads model and data and checks that they fit.

    Args:
        model_arguments: Which model.
        arguments: Which data.
        tuned: What is tuned.
        training: Its loss and seed.

    Returns:
        The setting of the run; the only long part is one pass of the frozen model, for the probe.

    Raises:
        InputError: If anything given cannot be used.
    """
    seed = training.seed
    train_config(training).check()
    check_lams(lam_grid(training), training.lam_rel or None, training.pull)
    task = load_task(arguments)
    sizes = {"train": arguments.max_train_samples, "eval": arguments.max_eval_samples}
    splits = {
        name: subsample(split, sizes[name], seed) for name, split in (("train", task.train), ("eval", task.validation))
    }
    head_init = "random" if model_arguments.head_init == "probe" else model_arguments.head_init
    model = load_model(
        model_arguments.model_name_or_path,
        task.num_labels,
        head=model_arguments.head,
        head_init=head_init,
        rng=seed,
    )
    task, splits, notes = _in_order_of_checkpoint(model, task, splits)
    scale = None if task.label_names else scale_of(splits["train"])
    if scale:
        splits = {name: standardise(split, scale) for name, split in splits.items()}
        notes += (
            "scores are standardised: the loss is in units of the training variance "
            f"(mean {scale.mean:.4g}, standard deviation {scale.std:.4g})",
        )
    max_length = min(arguments.max_seq_length, model.module.config.max_length)
    token_types = model.module.config.type_vocab_size > 1
    data, truncated = {}, {}
    for name, split in splits.items():
        data[name], truncated[name] = tokenize(split, model.tokenizer, max_length, token_types)
        check_data(full(model), data[name], training.loss)
    tune(model, tuned, seed)  # for its errors, before the probe's pass over the data
    y = np.asarray(targets(data["train"]["labels"], task.num_labels), np.float64)
    probed = probe_head(model, data["train"], y)
    if model_arguments.head_init == "probe" and model.source is not None and model.source.head_is_new:
        model = probed
    probe = head_only(probed)
    baselines = {"linear_probe": {name: predict(probe, probe.theta0, part) for name, part in data.items()}}
    tun, extra_arms = tune(model, tuned, seed)
    return Setting(task, notes, scale, data, truncated, max_length, model, tun, extra_arms, baselines)
