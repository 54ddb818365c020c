"""Texts put into a template whose blank a language model fills."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlin.data.task import padded, padding_id
from jaxlin.errors import InputError

TEXT, MASK = "{text}", "{mask}"


@dataclasses.dataclass(frozen=True)
class Template:
    """A sentence with a place for a text and a blank, such as `"{text} It was {mask}."`.

    Attributes:
        text: The sentence, `{text}` and `{mask}` once each.
        mask_token: What stands in the blank (a masked-LM's token); `None` where the blank is what follows (a causal
            LM): what stands before it, without trailing blanks, is then the whole prompt.
    """

    text: str
    mask_token: str | None = None

    def check(self) -> None:
        """Checks the sentence.

        Raises:
            InputError: If `{text}` or `{mask}` is not there once, or text follows the blank of a causal LM.
        """
        for name in (TEXT, MASK):
            if self.text.count(name) != 1:
                raise InputError(f"template {self.text!r} has {name} {self.text.count(name)} times; expected once")
        if self.mask_token is None and TEXT in self.text.partition(MASK)[2]:
            raise InputError(
                f"template {self.text!r}: a causal LM reads only what stands before {MASK}; expected {TEXT} there"
            )

    def filled(self, text: str) -> str:
        """Returns the prompt of a text."""
        before, _, after = self.text.partition(MASK)
        prompt = before.rstrip() if self.mask_token is None else f"{before}{self.mask_token}{after}"
        return prompt.replace(TEXT, text)

    def answer(self, word: str) -> str:
        """Returns a word as it follows what stands before the blank: behind a space where the template has one."""
        return f" {word}" if self.text.partition(MASK)[0].endswith(" ") else word


def prompt_columns(
    texts: Sequence[str], tokenizer: Any, template: Template, max_length: int
) -> tuple[dict[str, Int[np.ndarray, "N T"]], int]:
    """Tokenizes texts in a template; where the prompt is too long its text is cut, never the template.

    Args:
        texts: The texts.
        tokenizer: A fast Hugging Face tokenizer.
        template: What they are put into.
        max_length: Tokens of a prompt, special tokens counted.

    Returns:
        `input_ids` and `attention_mask`, int32, padded on the right; and how many texts were cut.

    Raises:
        InputError: If `max_length` leaves no room for text, or a text holds the mask token.
    """
    fixed = len(_encoded(tokenizer, template.filled("")))
    if max_length <= fixed:
        raise InputError(f"max_seq_length={max_length} leaves no room for text beside {fixed} tokens of the template")
    rows, cut = [], 0
    for i, text in enumerate(texts):
        if template.mask_token is not None and template.mask_token in text:
            raise InputError(f"text {i} holds {template.mask_token!r}, which marks the template's blank")
        ids = _encoded(tokenizer, template.filled(text))
        if len(ids) > max_length:
            ids, cut = _shortened(tokenizer, template, text, len(ids) - max_length, max_length), cut + 1
        rows.append(ids)
    mask = padded([[1] * len(ids) for ids in rows], 0)
    return {"input_ids": padded(rows, padding_id(tokenizer)), "attention_mask": mask}, cut


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    # Every option explicit: a tokenizer.json may embed truncation and padding of its own.
    return list(tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"])


def _shortened(tokenizer: Any, template: Template, text: str, excess: int, max_length: int) -> list[int]:
    """The prompt of as much of the text's beginning as fits: cut between its tokens, and encoded anew as a whole."""
    options = {"truncation": False, "padding": False, "verbose": False, "add_special_tokens": False}
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True, **options)["offset_mapping"]]
    for keep in range(len(ends) - excess, 0, -1):
        ids = _encoded(tokenizer, template.filled(text[: ends[keep - 1]]))
        if len(ids) <= max_length:
            return ids
    return _encoded(tokenizer, template.filled(""))
