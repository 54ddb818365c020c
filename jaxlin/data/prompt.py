"""Texts put into a template whose blank a language model fills."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxlin.data.dataset import Dataset
from jaxlin.data.task import TextSplit, padded, padding_id
from jaxlin.errors import InputError

MASK = "{mask}"
_ONE, _PAIR = ("text",), ("text_a", "text_b")
_PLACE = re.compile(r"\{(\w+)\}")


def _shown(places: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in places)


@dataclasses.dataclass(frozen=True)
class Template:
    """A sentence with a place for each text and a blank, such as `"{text} It was {mask}."`.

    Attributes:
        text: The sentence: `{text}`, or `{text_a}` and `{text_b}` for the two of a pair, and `{mask}`, once each.
        mask_token: What stands in the blank (a masked-LM's token); `None` where the blank is what follows (a causal
            LM): what stands before it, without trailing blanks, is then the whole prompt.
    """

    text: str
    mask_token: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the places for texts, in the order of an example's texts."""
        return _PAIR if set(_PAIR) & set(_PLACE.findall(self.text)) else _ONE

    def check(self) -> None:
        """Checks the sentence.

        Raises:
            InputError: If a place is unknown or not there once, or a text follows the blank of a causal LM.
        """
        names = _PLACE.findall(self.text)
        for name in names:
            if name not in (*self.places, "mask"):
                raise InputError(
                    f"template {self.text!r} has {{{name}}}; expected {_shown(_ONE)}, or {_shown(_PAIR)} for a pair of "
                    f"texts, and {MASK}"
                )
        for name in (*self.places, "mask"):
            if names.count(name) != 1:
                raise InputError(f"template {self.text!r} has {{{name}}} {names.count(name)} times; expected once")
        if self.mask_token is None and _PLACE.search(self.text.partition(MASK)[2]):
            raise InputError(
                f"template {self.text!r}: a causal LM reads only what stands before {MASK}; expected "
                f"{_shown(self.places)} there"
            )

    def check_texts(self, number: int) -> None:
        """Checks that there is a place for each text of an example.

        Args:
            number: Of texts that an example has.

        Raises:
            InputError: If there is not, or there is one for a text that is not there.
        """
        if number != len(self.places):
            raise InputError(
                f"template {self.text!r} has {_shown(self.places)}, and an example has {number} text(s); expected "
                f"{_shown(_ONE)} for one text, {_shown(_PAIR)} for the two of a pair"
            )

    def filled(self, *texts: str) -> str:
        """Returns the prompt of an example's texts."""
        before, _, after = self.text.partition(MASK)
        prompt = before.rstrip() if self.mask_token is None else f"{before}{self.mask_token}{after}"
        given = dict(zip(self.places, texts, strict=True))
        # At once: a text may itself hold what looks like a place.
        return _PLACE.sub(lambda place: given[place[1]], prompt)

    def answer(self, word: str) -> str:
        """Returns a word as it follows what stands before the blank: behind a space where the template has one."""
        return f" {word}" if self.text.partition(MASK)[0].endswith(" ") else word


def prompt_columns(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, template: Template, max_length: int
) -> tuple[dict[str, Int[np.ndarray, "N T"]], int]:
    """Tokenizes texts in a template; where the prompt is too long its texts are cut, never the template.

    Args:
        texts: The texts of each example: one, or a pair, the longer of which is cut.
        tokenizer: A fast Hugging Face tokenizer.
        template: What they are put into.
        max_length: Tokens of a prompt, special tokens counted.

    Returns:
        `input_ids` and `attention_mask`, int32, padded on the right; and how many prompts were cut.

    Raises:
        InputError: If `max_length` leaves no room for text, an example has another number of texts than the template,
            or a text holds the mask token.
    """
    fixed = len(_encoded(tokenizer, template.filled(*("" for _ in template.places))))
    if max_length <= fixed:
        raise InputError(f"max_seq_length={max_length} leaves no room for text beside {fixed} tokens of the template")
    rows, cut = [], 0
    for i, parts in enumerate(texts):
        template.check_texts(len(parts))
        if template.mask_token is not None and any(template.mask_token in part for part in parts):
            raise InputError(f"text {i} holds {template.mask_token!r}, which marks the template's blank")
        ids = _encoded(tokenizer, template.filled(*parts))
        if len(ids) > max_length:
            ids, cut = _shortened(tokenizer, template, parts, len(ids) - max_length, max_length), cut + 1
        rows.append(ids)
    mask = padded([[1] * len(ids) for ids in rows], 0)
    return {"input_ids": padded(rows, padding_id(tokenizer)), "attention_mask": mask}, cut


def tokenize_prompts(split: TextSplit, tokenizer: Any, template: Template, max_length: int) -> tuple[Dataset, int]:
    """Turns texts into a `Dataset` of prompts with `labels`, as `tokenize` does without a template; see there."""
    columns, cut = prompt_columns(split.texts, tokenizer, template, max_length)
    return Dataset.from_columns({**columns, "labels": split.labels}), cut


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    # Every option explicit: a tokenizer.json may embed truncation and padding of its own.
    return list(tokenizer(prompt, truncation=False, padding=False, verbose=False)["input_ids"])


def _shortened(tokenizer: Any, template: Template, texts: tuple[str, ...], excess: int, max_length: int) -> list[int]:
    """The prompt of as much of the texts' beginnings as fits: cut between tokens, and encoded anew as a whole."""
    options = {"truncation": False, "padding": False, "verbose": False, "add_special_tokens": False}
    ends = [[end for _, end in tokenizer(t, return_offsets_mapping=True, **options)["offset_mapping"]] for t in texts]
    keep = [len(own) for own in ends]
    while any(keep):
        keep[int(np.argmax(keep))] -= 1
        excess -= 1
        if excess > 0:
            continue
        shorter = (text[: own[k - 1]] if k else "" for text, own, k in zip(texts, ends, keep, strict=True))
        ids = _encoded(tokenizer, template.filled(*shorter))
        if len(ids) <= max_length:
            return ids
    return _encoded(tokenizer, template.filled(*("" for _ in texts)))
