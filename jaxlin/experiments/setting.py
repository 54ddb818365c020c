"""The model and data that a command's arguments name, loaded and checked against each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxlin.data.dataset import Dataset
from jaxlin.data.labels import Scale, label_order, reorder, scale_of, standardise
from jaxlin.data.prompt import tokenize_prompts
from jaxlin.data.task import Task, TextSplit, subsample, tokenize
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import DataArguments, load_task
from jaxlin.experiments.device_arguments import DeviceArguments
from jaxlin.experiments.model_arguments import ModelArguments, check_reading, pretrained, prompt_note, starts_as_probe
from jaxlin.experiments.run_arguments import (
    STEP_OPTIONS,
    SweepArguments,
    TrainingArguments,
    lam_grid,
    steps_of,
    train_config,
)
from jaxlin.experiments.tuned_arguments import TunedArguments, tune
from jaxlin.models.load import with_remat
from jaxlin.models.model import Model
from jaxlin.models.next_token import NextTokenLoss, next_token_batch
from jaxlin.models.probe import probe_head
from jaxlin.models.prompt import PromptClassifier
from jaxlin.peft.select import full, head_only
from jaxlin.training.compare import check_lams
from jaxlin.training.losses import targets
from jaxlin.training.trainer import check_blocks, check_data, predict
from jaxlin.tunable import Tunable

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
