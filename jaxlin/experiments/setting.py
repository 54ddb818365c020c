"""What the commands share: their groups of arguments, and the model and data that these name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.data.labels import Scale, label_order, reorder, scale_of, standardise
from jaxlin.data.prompt import tokenize_prompts
from jaxlin.data.task import Task, TextSplit, subsample, tokenize
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.device_arguments import DeviceArguments
from jaxlin.experiments.model_arguments import ModelArguments, check_reading, pretrained, prompt_note, starts_as_probe
from jaxlin.experiments.tuned_arguments import TunedArguments, pairs, tune
from jaxlin.models.load import with_remat
from jaxlin.models.model import Model
from jaxlin.models.next_token import NextTokenLoss, next_token_batch
from jaxlin.models.probe import probe_head
from jaxlin.models.prompt import PromptClassifier
from jaxlin.peft.select import full, head_only
from jaxlin.training.checkpoint import Checkpoints
from jaxlin.training.compare import check_lams
from jaxlin.training.config import TrainConfig
from jaxlin.training.losses import targets
from jaxlin.training.trainer import check_blocks, check_data, predict
from jaxlin.tunable import Tunable


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """The comparison.

    Attributes:
        lams: Pull strengths λ for the summed loss; auto: 0, 1e-3, 1e-2, 1e-1, 1 in units of μ₁.
        lam_rel: Pull strengths in units of μ₁, in place of lams (not for spd, whose λ has no unit).
        lam_blocks: Factors of λ by block, as regex=factor for the paths of parameters.
        pull: How the pull acts; see jaxlin.optim.proximal.
        linearize_at: Also linearize after so many steps, such as 0,10,50.
        track_linearization: Report gaps and kernel drift at these steps, such as 0,10,50: is it lazy?
        with_frozen_A: Train one more arm: full, with LoRA's A frozen.
        linear_mode: Train the linearized arm from Jacobians computed once (cached) or by jvp (streaming).
        trunk_cache: Compute activations below what is tuned once; on: on disk where memory is short.
        kernel_examples: At most so many training examples make the kernel.
    """

    lams: tuple[str, ...] = ("auto",)
    lam_rel: tuple[float, ...] = ()
    lam_blocks: tuple[str, ...] = ()
    pull: Literal["coupled", "selective", "decoupled", "prox", "spd"] = "coupled"
    linearize_at: tuple[str, ...] = ()
    track_linearization: tuple[str, ...] = ()
    with_frozen_A: bool = False
    linear_mode: Literal["auto", "cached", "streaming"] = "auto"
    trunk_cache: Literal["auto", "on", "off"] = "auto"
    kernel_examples: int = 1024


@dataclasses.dataclass(frozen=True)
class TrainingArguments:
    """Training.

    Attributes:
        loss: Squared loss on one-hot targets (the theory's) or cross_entropy.
        optimizer: One of sgd, momentum, adam, rmsprop, lion.
        learning_rate: For the mean loss.
        learning_rate_blocks: Factors of it by block, as regex=factor for the paths of parameters.
        loraplus_lr_ratio: Factor of it for LoRA's B (LoRA+).
        lr_scheduler_type: Learning rate over the steps.
        warmup_ratio: Share of the steps with growing rate.
        per_device_train_batch_size: Examples that a device has at a time; a step has these of each device along data,
            as often as gradient_accumulation_steps says.
        num_train_epochs: Passes over the training examples.
        max_steps: Number of steps, in place of num_train_epochs.
        group_by_length: Batches of like length: less padding.
        eval_steps: Evaluate every so many steps; else at the end only.
        seed: Of head, A, subsets and data order.
        precision: Of matrix products on the device; highest is true float32.
        profile: Write a JAX trace of a few steps of every arm, for Perfetto or TensorBoard.
    """

    loss: Literal["squared", "cross_entropy"] = "squared"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    learning_rate_blocks: tuple[str, ...] = ()
    loraplus_lr_ratio: float | None = None
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.0
    per_device_train_batch_size: int = 32
    num_train_epochs: float = 6.0
    max_steps: int | None = None
    group_by_length: bool = True
    eval_steps: int | None = None
    seed: int = 0
    precision: Literal["highest", "high", "default"] = "highest"
    profile: bool = False


@dataclasses.dataclass(frozen=True)
class CheckpointArguments:
    """Checkpoints.

    Attributes:
        save_steps: Save every so many steps, and when interrupted; 0: never.
        save_total_limit: Latest checkpoints of a run that are kept while it goes on.
        metric_for_best_model: Keep the best checkpoint too, by loss, accuracy, …
        resume_from_checkpoint: Go on with the run in this folder, with the options it was begun with; latest: with the
            one in output_dir, if there is one.
    """

    save_steps: int = 500
    save_total_limit: int = 2
    metric_for_best_model: str | None = None
    resume_from_checkpoint: str | None = None


@dataclasses.dataclass(frozen=True)
class OutputArguments:
    """Output.

    Attributes:
        output_dir: Folder for tables, logs and figures; default: a new one under runs/.
        overwrite_output_dir: Replace the run in output_dir.
        config: YAML file of options, such as a run's config.yaml; what stands beside it counts more.
        quiet: No progress, only the tables.
        debug: Show tracebacks.
    """

    output_dir: Path | None = None
    overwrite_output_dir: bool = False
    config: Path | None = None
    quiet: bool = False
    debug: bool = False


def lam_grid(arguments: SweepArguments) -> Sequence[float] | str:
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


def checkpoints_in(folder: Path, arguments: CheckpointArguments) -> Checkpoints | None:
    """Returns where and when a run in `folder` is saved; `None`: never.

    Raises:
        InputError: If a number is negative, or a limit is not at least 1.
    """
    if arguments.save_steps < 0:
        raise InputError(f"--save_steps {arguments.save_steps}; expected a number of steps, or 0")
    if arguments.save_total_limit < 1:
        raise InputError(f"--save_total_limit {arguments.save_total_limit}; expected at least 1")
    metric = arguments.metric_for_best_model
    if metric is not None:
        metric = f"eval_{metric.removeprefix('eval_')}"
    if arguments.save_steps == 0:
        return None
    return Checkpoints(folder / "checkpoints", arguments.save_steps, arguments.save_total_limit, metric)


STEP_OPTIONS = ("linearize_at", "track_linearization")


def steps_of(arguments: SweepArguments, option: str) -> list[int]:
    """Returns the steps of `--linearize_at` or `--track_linearization`, separated by commas or blanks.

    Raises:
        InputError: If one is no whole number, or negative.
    """
    given = getattr(arguments, option)
    words = [word for part in given for word in part.split(",") if word]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--{option} {' '.join(given)}: expected steps, such as 0,10,50")
    return [int(word) for word in words]


def train_config(
    arguments: TrainingArguments, sweep: SweepArguments, devices: DeviceArguments, sharing: int = 1
) -> TrainConfig:
    """Returns the trainer's configuration; λ is set apart.

    Args:
        arguments: Of training.
        sweep: Of the pull.
        devices: Of parts of a batch and bfloat16.
        sharing: Number of devices that share a batch.

    Raises:
        InputError: If a factor by block is none, or the rate of LoRA's B is given twice.
    """
    parts = devices.gradient_accumulation_steps
    rates = pairs(arguments.learning_rate_blocks, "learning_rate_blocks")
    if arguments.loraplus_lr_ratio is not None:
        if "lora_B" in rates:
            raise InputError("--loraplus_lr_ratio and --learning_rate_blocks lora_B=… are both given; give one of them")
        rates["lora_B"] = arguments.loraplus_lr_ratio  # last: a narrower pattern that is given counts first
    return TrainConfig(
        loss=arguments.loss,
        optimizer=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type=arguments.lr_scheduler_type,
        warmup_ratio=arguments.warmup_ratio,
        batch_size=arguments.per_device_train_batch_size * sharing * max(parts, 1),
        gradient_accumulation_steps=parts,
        compute_dtype="bfloat16" if devices.bf16 else "float32",
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        pull=sweep.pull,
        lam_blocks=pairs(sweep.lam_blocks, "lam_blocks"),
        learning_rate_blocks=rates,
        seed=arguments.seed,
        group_by_length=arguments.group_by_length,
        eval_steps=arguments.eval_steps,
        precision=arguments.precision,
    )


NEXT_TOKEN_NOTE = "the loss is a text's next-token loss, in nats, summed over its tokens; labels are not used"
_SPLITS = {"train": "training", "eval": "evaluation"}


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A model and the data for it.

    `notes` are lines to be said in the log; `scale` is that of standardised scores, `None` for classes
    """

    task: Task
    notes: tuple[str, ...]
    scale: Scale | None
    data: dict[str, Dataset]
    truncated: dict[str, int]
    max_length: int
    model: Model

    def probed(self) -> Model:
        """Returns the model with a ridge head on its frozen features, from one pass over the training examples."""
        y = np.asarray(targets(self.data["train"]["labels"], self.task.num_labels), np.float64)
        return probe_head(self.model, self.data["train"], y)

    def lines(self, what: str, num_params: int, head_init: str) -> list[str]:
        """Returns what a log begins with.

        Args:
            what: Is tuned.
            num_params: How many parameters that are.
            head_init: How a new head starts.
        """
        source = self.model.source
        assert source is not None  # loaded by name
        sizes = {name: len(part) for name, part in self.data.items()}
        counted = ", ".join(f"{sizes[k]} {long}" for k, long in _SPLITS.items() if k in sizes) + " examples"
        first = (
            f"{source.name} with head {self.model.module.head!r}, {what} ({num_params:,} trainable parameters), task "
            f"{self.task.name}: {counted}, {self.task.num_labels} output(s)"
        )
        lines = [first]
        if source.head_is_new:
            lines.append(f"the checkpoint has no head of this kind: a new one starts as {head_init}")
        lines += self.notes
        for name, count in self.truncated.items():
            if count:
                whole = f"{count} of {sizes[name]} {name} texts"
                lines.append(f"{whole} are longer than {self.max_length} tokens and were truncated")
        dropped = self.task.provenance["train_rows_also_in_validation_dropped"]
        if dropped:
            lines.append(f"{dropped} training rows whose text is also in validation were dropped")
        return lines


@dataclasses.dataclass(frozen=True, eq=False)
class Setting(Loaded):
    """Everything loaded and checked, before anything long is done."""

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


def _tokenized(split: TextSplit, model: Model, max_length: int) -> tuple[Dataset, int]:
    if isinstance(model.module, PromptClassifier):
        return tokenize_prompts(split, model.tokenizer, model.module.template, max_length)
    if isinstance(model.module, NextTokenLoss):
        texts = [text for (text,) in split.texts]
        whole = model.tokenizer(texts, truncation=False, padding=False, verbose=False)["input_ids"]
        batch = next_token_batch(model, texts, max_length)
        return Dataset.from_columns(batch), sum(len(ids) > max_length for ids in whole)
    return tokenize(split, model.tokenizer, max_length, model.module.config.type_vocab_size > 1)


def load(
    model_arguments: ModelArguments, arguments: DataArguments, sizes: Mapping[str, int | None], seed: int, loss: str
) -> Loaded:
    """Loads model and data and checks that they fit.

    Args:
        model_arguments: Which model; a head that is to start as a probe starts at random.
        arguments: Which data.
        sizes: Most examples of `train` and `eval`; 0 leaves a split out, `None` takes all.
        seed: Of a new head and of subsets.
        loss: Squared or cross_entropy.

    Returns:
        What was loaded.

    Raises:
        InputError: If anything given cannot be used.
    """
    task = load_task(arguments, labelled=not model_arguments.next_token)
    check_reading(model_arguments, task)
    if model_arguments.next_token and loss != "squared":
        raise InputError(
            f"--loss {loss} is given beside --next_token, whose squared output is the tokens' cross-entropy"
        )
    whole = {"train": task.train, "eval": task.validation}
    splits = {name: subsample(split, sizes[name], seed) for name, split in whole.items() if sizes[name] != 0}
    model = pretrained(model_arguments, task.num_labels, seed)
    if model_arguments.next_token:
        notes: tuple[str, ...] = (NEXT_TOKEN_NOTE,)
    elif model_arguments.template is None:
        task, splits, notes = _in_order_of_checkpoint(model, task, splits)
    else:  # its label words are in the task's order
        notes = (prompt_note(model_arguments, task.label_names),)
    # A checkpoint's own regression head speaks in the units that it was trained in.
    own_head = model.source is not None and not model.source.head_is_new
    scale = None if task.label_names or own_head else scale_of(splits["train"])
    if scale:
        splits = {name: standardise(split, scale) for name, split in splits.items()}
        notes += (
            "scores are standardised: the loss is in units of the training variance "
            f"(mean {scale.mean:.4g}, standard deviation {scale.std:.4g})",
        )
    max_length = min(arguments.max_seq_length, model.module.config.max_length)
    data, truncated = {}, {}
    for name, split in splits.items():
        data[name], truncated[name] = _tokenized(split, model, max_length)
        check_data(full(model), data[name], loss)
    return Loaded(task, notes, scale, data, truncated, max_length, model)


def prepare(
    model_arguments: ModelArguments,
    arguments: DataArguments,
    tuned: TunedArguments,
    sweep: SweepArguments,
    training: TrainingArguments,
    devices: DeviceArguments,
) -> Setting:
    """Loads model and data and checks that they fit.

    Args:
        model_arguments: Which model.
        arguments: Which data.
        tuned: What is tuned.
        sweep: Pulls, extra arms.
        training: Loss and seed.
        devices: Of memory.

    Returns:
        The setting of the run; the only long part is one pass of the frozen model, for the probe.

    Raises:
        InputError: If anything given cannot be used.
    """
    seed = training.seed
    config = train_config(training, sweep, devices)
    config.check()
    check_lams(lam_grid(sweep), sweep.lam_rel or None, sweep.pull)
    for option in STEP_OPTIONS:
        steps_of(sweep, option)
    sizes = {"train": arguments.max_train_samples, "eval": arguments.max_eval_samples}
    loaded = load(model_arguments, arguments, sizes, seed, training.loss)
    if devices.gradient_checkpointing:
        loaded = dataclasses.replace(loaded, model=with_remat(loaded.model))
    # For its errors, before the probe's pass over the data.
    check_blocks(tune(loaded.model, tuned, seed, sweep.with_frozen_A)[0], config)
    model, baselines = loaded.model, {}
    if model_arguments.has_head:  # else there is none to probe with
        probed = loaded.probed()
        model = probed if starts_as_probe(loaded.model, model_arguments) else loaded.model
        probe = head_only(probed)
        baselines["linear_probe"] = {name: predict(probe, probe.theta0, part) for name, part in loaded.data.items()}
    tun, extra_arms = tune(model, tuned, seed, sweep.with_frozen_A)
    return Setting(**{**vars(loaded), "model": model}, tun=tun, extra_arms=extra_arms, baselines=baselines)
