"""Language models as classifiers: the logits of label words in a template's blank, with no new head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxlin.data.prompt import Template, prompt_columns
from jaxlin.errors import InputError
from jaxlin.models.decoder import CausalLm, last_live
from jaxlin.models.encoder import MaskedLm
from jaxlin.models.model import Model
from jaxlin.models.reading import Reading
from jaxlin.tunable import Batch


@dataclasses.dataclass(frozen=True)
class PromptClassifier(Reading):
    """A language model read at the blank of a template.

    Attributes:
        template: What texts are put into.
        words: Ids of the label words, one a class.
        mask_id: Id of the token in the blank; `None` where the blank follows the last token (a causal LM).
    """

    template: Template
    words: tuple[int, ...]
    mask_id: int | None

    @property
    def head(self) -> str:
        """What makes the logits, for logs and records."""
        return "prompt"

    def apply(self, variables: Mapping[str, PyTree], batch: Batch) -> Float[Array, "B C"]:
        """Returns the label words' logits `[B, C]` in the blank."""
        if self.mask_id is None:
            at = last_live(jnp.asarray(batch["attention_mask"]))
        else:
            at = jnp.argmax(jnp.asarray(batch["input_ids"]) == self.mask_id, axis=1)
        logits = cast(Array, self.module.apply(variables, {**batch, "positions": at}))
        return logits[:, jnp.array(self.words)]

    def check_batch(self, batch: Batch) -> None:
        """Checks that every example has one blank.

        Raises:
            InputError: If one has not.
        """
        if self.mask_id is None:
            return
        blanks = (np.asarray(batch["input_ids"]) == self.mask_id).sum(axis=1)
        if (blanks != 1).any():
            first = int(np.argmax(blanks != 1))
            raise InputError(f"example {first} holds {blanks[first]} mask tokens; expected one, as prompt_batch makes")


def prompt_classifier(model: Model, template: str, label_words: Sequence[str]) -> Model:
    """Makes a classifier of a language model, with its pretrained head and no new one.

    The text is put into the template, and the logits `[B, C]` are those of the label words in its blank: where kernels
    describe fine-tuning best (Malladi et al. 2023, "A Kernel-Based View of Language Model Fine-Tuning").

    Args:
        model: Of `load_causal_lm` or `load_masked_lm`.
        template: A sentence with `{text}`, or `{text_a}` and `{text_b}` for pairs of texts, and `{mask}`, such as
            `"{text} It was {mask}."`. A causal LM reads what stands before `{mask}`, trailing blanks removed, and what
            follows is left out.
        label_words: One a class, in the order of the classes; each one token of the tokenizer, behind a space where
            the template has one before `{mask}`.

    Returns:
        The model, for `lora` and every other way of tuning; `prompt_batch` makes its inputs.

    Raises:
        InputError: If the model is no language model with a tokenizer, the template lacks a place or has another, or
            the label words are fewer than two, not one token each (the message names the tokens), or the same token.
    """
    if not isinstance(model.module, CausalLm | MaskedLm):
        raise InputError(
            f"prompt_classifier got a model whose module is a {type(model.module).__name__}; expected one of "
            "load_causal_lm or load_masked_lm"
        )
    masked = isinstance(model.module, MaskedLm)
    if masked and model.tokenizer.mask_token is None:
        raise InputError("the model's tokenizer has no mask token, which the blank of a masked LM is")
    sentence = Template(template, model.tokenizer.mask_token if masked else None)
    sentence.check()
    words = tuple(_word_id(model.tokenizer, sentence, word) for word in label_words)
    if len(words) < 2 or len(set(words)) < len(words):
        raise InputError(f"label words {list(label_words)}: expected at least two, of different tokens")
    module = PromptClassifier(model.module, sentence, words, model.tokenizer.mask_token_id if masked else None)
    return dataclasses.replace(model, module=module)


def _word_id(tokenizer: Any, template: Template, word: str) -> int:
    """Id of a label word as it stands in the blank."""
    answer = template.answer(word)

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"])

    if template.mask_token is None:
        # In context: a tokenizer may put a blank before the first word, and merge what it meets.
        context = template.filled(*("" for _ in template.places)).strip() or "It"
        before, whole = encoded(context), encoded(context + answer)
        ids = whole[len(before) :] if whole[: len(before)] == before else whole
    else:
        ids = encoded(answer)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        tokens = tokenizer.convert_ids_to_tokens(ids)
        raise InputError(
            f"label word {answer!r} is {len(ids)} token(s), {tokens}; expected one known token: choose another"
        )
    return ids[0]


def prompt_batch(
    model: Model, texts: Sequence[str | tuple[str, ...]], max_length: int | None = None
) -> dict[str, Int[np.ndarray, "N T"]]:
    """Returns texts in the model's template as its inputs, for `Dataset.from_columns` or as a batch.

    Args:
        model: Of `prompt_classifier`.
        texts: At least one; pairs `(text_a, text_b)` for a template of pairs.
        max_length: Tokens of a prompt, at most the model's own limit, which `None` stands for. A longer prompt loses
            the end of its text, or of the longer of a pair, never a part of the template.

    Returns:
        `input_ids` and `attention_mask`, int32 `[N, T]`, padded on the right.

    Raises:
        InputError: If the model is no prompt classifier, there is no text, the template is of pairs and the texts are
            not or the other way round, or `max_length` leaves no room for text.
    """
    if not isinstance(model.module, PromptClassifier):
        raise InputError("prompt_batch needs a model of prompt_classifier")
    if not texts:
        raise InputError("prompt_batch got no text; expected at least one")
    limit = min(max_length or model.module.config.max_length, model.module.config.max_length)
    parts = [(text,) if isinstance(text, str) else text for text in texts]
    return prompt_columns(parts, model.tokenizer, model.module.template, limit)[0]
