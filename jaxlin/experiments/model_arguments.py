"""Which model a command uses: its arguments, and the model that they name, with a head or a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jaxlin.data.prompt import MASK, Template
from jaxlin.data.task import Task
from jaxlin.errors import InputError
from jaxlin.models.load import load_language_model, load_model
from jaxlin.models.model import Model
from jaxlin.models.next_token import next_token_loss
from jaxlin.models.prompt import prompt_classifier
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.peft.adapter import adapter_head, with_saved_modules


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Model.

    Attributes:
        model_name_or_path: Local folder in Hugging Face's layout, hub id, or the embedded default.
        model_revision: Branch, tag or commit of a hub model.
        adapter_name_or_path: Folder of a LoRA adapter of the peft library for it, which tuning starts from.
        head: What the classification head reads (decoders: last or mean); auto: as the checkpoint was trained.
        head_init: Start of a new head; probe: closed-form ridge on the frozen features.
        new_head: Draw the map to the logits anew where the checkpoint has one.
        template: Prompt for a language model in place of a head, such as "{text} It was {mask}."; pairs of texts:
            {text_a} and {text_b}.
        label_words: What fills {mask} for each class, in the order of the classes.
        next_token: Tune a decoder's language modelling itself: one output a text, the root of twice its loss in nats;
            labels are not used, and need not be there.
    """

    model_name_or_path: str = EMBEDDED_MODEL
    model_revision: str | None = None
    adapter_name_or_path: str | None = None
    head: Literal["auto", "mean", "cls", "pooler", "last"] = "auto"
    head_init: Literal["probe", "random", "zero"] = "probe"
    new_head: bool = False
    template: str | None = None
    label_words: tuple[str, ...] = ()
    next_token: bool = False

    @property
    def has_head(self) -> bool:
        """Whether the model gets a classification head, in place of a prompt or of language modelling."""
        return self.template is None and not self.next_token


_OF_A_HEAD = ("head", "head_init", "new_head")


def check_reading(arguments: ModelArguments, task: Task) -> None:
    """Checks that what stands in place of a head, if anything does, fits the other options and the task.

    Raises:
        InputError: If it is given in part or beside options of a head, or, of a prompt, its places for texts and label
            words are not those of the task, or, of language modelling, the texts are pairs.
    """
    if (arguments.template is None) != (not arguments.label_words):
        given, missing = ("label_words", "template") if arguments.template is None else ("template", "label_words")
        raise InputError(f"--{given} is given without --{missing}; a prompt needs both")
    if arguments.has_head:
        return
    if arguments.template is not None and arguments.next_token:
        raise InputError("--template and --next_token are both given; give one of them")
    option = "next_token" if arguments.next_token else "template"
    for name in _OF_A_HEAD:
        if getattr(arguments, name) != getattr(ModelArguments(), name):
            raise InputError(f"--{name} is given beside --{option}; there is no head then but the pretrained one")
    if arguments.template is None:
        if len(task.train.texts[0]) > 1:
            raise InputError(
                f"--next_token reads one text, and task {task.name} has pairs; name one column by --text_column_names"
            )
        return
    template = Template(arguments.template, MASK)  # with a mask: what a decoder would not read is for later
    template.check()
    template.check_texts(len(task.train.texts[0]))
    if not task.label_names:
        raise InputError(f"--template is for classes; task {task.name} has scores")
    if len(arguments.label_words) != task.num_labels:
        raise InputError(
            f"--label_words {' '.join(arguments.label_words)}: expected {task.num_labels}, one for each class in this "
            f"order: {', '.join(task.label_names)}"
        )


def prompt_note(arguments: ModelArguments, label_names: Sequence[str]) -> str:
    """Says which word of a prompt stands for which class."""
    answers = ", ".join(f"{w!r} ({name})" for w, name in zip(arguments.label_words, label_names, strict=True))
    return f"prompt {arguments.template!r}, answered by {answers}"


def pretrained(arguments: ModelArguments, num_labels: int, seed: int) -> Model:
    """Loads the model, with what an adapter stores whole in its place.

    Args:
        arguments: Which; a head that is to start as a probe starts at random.
        num_labels: Number of outputs.
        seed: Of a new head.

    Returns:
        The model.

    Raises:
        InputError: If it cannot be used.
    """
    adapter, head = arguments.adapter_name_or_path, str(arguments.head)
    if adapter is not None and head == "auto" and arguments.has_head:
        stored = adapter_head(adapter, arguments.model_name_or_path, arguments.model_revision)
        head = head if stored is None else stored[0]
    model = _pretrained(arguments, head, num_labels, seed)
    return model if adapter is None else with_saved_modules(model, adapter)


def _pretrained(arguments: ModelArguments, head: str, num_labels: int, seed: int) -> Model:
    if arguments.template is not None:
        model = load_language_model(arguments.model_name_or_path, revision=arguments.model_revision)
        return prompt_classifier(model, arguments.template, arguments.label_words)
    if arguments.next_token:
        return next_token_loss(load_language_model(arguments.model_name_or_path, revision=arguments.model_revision))
    return load_model(
        arguments.model_name_or_path,
        num_labels,
        head=head,
        head_init="random" if arguments.head_init == "probe" else arguments.head_init,
        new_head=arguments.new_head,
        rng=seed,
        revision=arguments.model_revision,
    )


def starts_as_probe(model: Model, arguments: ModelArguments) -> bool:
    """Whether the head is new and starts as a probe."""
    return arguments.head_init == "probe" and model.source is not None and model.source.head_is_new
