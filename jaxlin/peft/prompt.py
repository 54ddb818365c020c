"""Prompt tuning: learned vectors in front of the text."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from jaxlin.errors import InputError
from jaxlin.models.model import Model, check_text_batch, named_key
from jaxlin.models.next_token import NextTokenLoss
from jaxlin.peft.function import split_params
from jaxlin.peft.select import require_live_head
from jaxlin.tunable import Batch, Tunable, in_head

PROMPT = "prompt"
"""Name of the leaf of theta that holds the vectors."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PromptFunction:
    """`(theta, batch) -> logits` of a text module that reads learned vectors before each text.

    The text is lengthened by tokens whose embeddings are replaced by the vectors, so that positions, masks and heads
    are the module's own.

    Attributes:
        frozen: Nested dict of the weights that are not tuned.
        module: The text module.
        table: Path of its word embedding.
        filler: Id of the token that stands for a vector; not of padding, which positions may skip.
        count: Number of vectors.
    """

    frozen: PyTree
    module: Any = dataclasses.field(metadata={"static": True})
    table: str = dataclasses.field(metadata={"static": True})
    filler: int = dataclasses.field(metadata={"static": True})
    count: int = dataclasses.field(metadata={"static": True})

    def __call__(self, theta: PyTree, batch: Batch) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`."""
        head = {name: value for name, value in theta.items() if name != PROMPT}
        leaves = {**flatten_dict(self.frozen, sep="/"), **flatten_dict(head, sep="/")}
        vectors = theta[PROMPT]

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            out = next_fun(*args, **kwargs)
            called = context.method_name == "__call__" and "/".join(context.module.path) == self.table
            return out.at[:, : self.count].set(vectors) if called else out

        with nn.intercept_methods(interceptor):
            variables = {"params": unflatten_dict(leaves, sep="/")}
            return cast(Array, self.module.apply(variables, self._lengthened(batch)))

    def _lengthened(self, batch: Batch) -> dict[str, Array]:
        fill = {"input_ids": self.filler, "attention_mask": 1, "token_type_ids": 0}
        out = {name: jnp.asarray(value) for name, value in batch.items() if name in fill}
        return {
            name: jnp.concatenate([jnp.full((len(value), self.count), fill[name], value.dtype), value], axis=1)
            for name, value in out.items()
        }

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs on the host; see `jaxlin.models.model.check_text_batch`.

        Args:
            batch: Host arrays; their width is that of the texts alone.

        Raises:
            InputError: If they do not fit.
        """
        check_text_batch(self.module, batch)
        width, limit = np.shape(batch["input_ids"])[-1], self.module.config.max_length
        if width + self.count > limit:
            raise InputError(
                f"the batch is {width} tokens long and the prompt {self.count}; the model has {limit} positions"
            )


def prompt_tuning(
    model: Model,
    num_virtual_tokens: int = 8,
    *,
    init_text: str | None = None,
    train_head: bool = True,
    rng: int | Array = 0,
) -> Tunable:
    """Tunes vectors that stand before each text in place of word embeddings, and the head.

    θ₀ is a prompt of real words, so that f(θ₀) are outputs with that prompt, not those of the model without one. A head
    that reads the first token reads the first vector's place, and one that takes the mean counts the vectors too.

    Args:
        model: A text model of `load_model` or `prompt_classifier`.
        num_virtual_tokens: Number of vectors p; texts may have at most the model's positions less p tokens.
        init_text: Text whose tokens' embeddings they start as, repeated or cut to p; `None`: of p words drawn from the
            vocabulary.
        train_head: Whether the classification head is part of theta.
        rng: Seed or key of the draw.

    Returns:
        A Tunable whose theta has `prompt` `[p, width of the embedding]`, and the head.

    Raises:
        InputError: If the model is no text model of this package or one of `next_token_loss`, p is out of range, the
            text has no token, or the head is zero and frozen.

    References:
        Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning".
    """
    config = getattr(model.module, "config", None)
    if config is None or not hasattr(config, "vocab_size"):
        raise InputError(f"prompt_tuning needs a text model; the module of this one is a {type(model.module).__name__}")
    if isinstance(model.module, NextTokenLoss):
        raise InputError("prompt_tuning would have the vectors' places predicted, as next_token_loss does every token")
    if not 1 <= num_virtual_tokens < config.max_length:
        raise InputError(
            f"num_virtual_tokens={num_virtual_tokens}; expected at least 1, and fewer than the model's positions, "
            f"{config.max_length}"
        )
    if not train_head:
        require_live_head(model)
    params = flatten_dict(model.params, sep="/")
    (table,) = (path for path in params if path.endswith("word/embedding"))
    if init_text is None:
        ids = jax.random.randint(named_key(rng, PROMPT), (num_virtual_tokens,), 0, config.vocab_size)
    else:
        tokens = model.tokenizer(init_text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"init_text={init_text!r} has no token; expected at least one")
        ids = jnp.asarray(np.resize(tokens, num_virtual_tokens))
    head, frozen = split_params(model.params, lambda path: train_head and in_head(path))
    padding = getattr(config, "padding_id", None)
    fn = PromptFunction(frozen, model.module, table.rpartition("/")[0], 1 if padding == 0 else 0, num_virtual_tokens)
    return Tunable(fn, {PROMPT: params[table][ids], **head})
