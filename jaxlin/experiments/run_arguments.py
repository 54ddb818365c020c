"""Arguments that say how a command runs: the pulls, training, checkpoints, output; and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxlin.errors import InputError
from jaxlin.experiments.device_arguments import DeviceArguments
from jaxlin.experiments.tuned_arguments import pairs
from jaxlin.training.checkpoint import Checkpoints
from jaxlin.training.config import TrainConfig


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
