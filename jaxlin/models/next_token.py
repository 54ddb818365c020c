"""Next-token language modelling as something to tune: logits of the next token, or a text's loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, Shaped

from jaxlin.data.task import padded, padding_id
from jaxlin.errors import InputError
from jaxlin.models.decoder import CausalLm, last_live
from jaxlin.models.model import Model
from jaxlin.models.reading import Reading
from jaxlin.tunable import Batch


@dataclasses.dataclass(frozen=True)
class NextTokenLogits(Reading):
    """The logits of the token that follows a text.

    Attributes:
        tokens: Ids of the tokens whose logits are the outputs; `None` for the whole vocabulary.
    """

    tokens: tuple[int, ...] | None

    @property
    def head(self) -> str:
        """What makes the outputs, for logs and records."""
        return "next token"

    def apply(self, variables: Mapping[str, PyTree], batch: Batch) -> Float[Array, "B C"]:
        """Returns the logits `[B, C]` after the last live token."""
        at = last_live(jnp.asarray(batch["attention_mask"]))
        logits = cast(Array, self.module.apply(variables, {**batch, "positions": at}))
        return logits if self.tokens is None else logits[:, jnp.array(self.tokens)]


@dataclasses.dataclass(frozen=True)
class NextTokenLoss(Reading):
    """The root of twice a text's loss."""

    @property
    def head(self) -> str:
        """What makes the output, for logs and records."""
        return "next-token loss"

    def apply(self, variables: Mapping[str, PyTree], batch: Batch) -> Float[Array, "B 1"]:
        """Returns `√(2ℓ)` `[B, 1]`."""
        ids, live = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"]) != 0
        logits = cast(Array, self.module.apply(variables, batch))
        # In half precision the sum over many tokens would lose them.
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:])
        return root(jnp.where(live[:, :-1] & live[:, 1:], losses, 0).sum(axis=1))[:, None]

    def check_batch(self, batch: Batch) -> None:
        """Checks that there is something to predict.

        Raises:
            InputError: If an example has no token that follows another.
        """
        live = np.asarray(batch["attention_mask"]) != 0
        empty = np.flatnonzero(~(live[:, :-1] & live[:, 1:]).any(axis=1))
        if empty.size:
            raise InputError(f"example {empty[0]} has no token that follows another; expected at least two live tokens")


def root(loss: Float[Array, " B"]) -> Float[Array, " B"]:
    """Returns `√(2ℓ)`; where ℓ has come to 0 by rounding, with the derivative 0 that it tends to there.

    That of `√(2ℓ)` is `∂ℓ/√(2ℓ)`, and ∂ℓ goes to 0 as ℓ itself does.
    """
    positive = loss > 0
    return jnp.where(positive, jnp.sqrt(2 * jnp.where(positive, loss, 1)), 0)


def _causal(model: Model, what: str) -> CausalLm:
    if not isinstance(model.module, CausalLm):
        raise InputError(
            f"{what} got a model whose module is a {type(model.module).__name__}; expected one of load_causal_lm"
        )
    return model.module


def next_token_logits(model: Model, tokens: Sequence[int] | None = None) -> Model:
    """Makes a model of the logits of the token that follows a text, of all tokens or of a chosen subset.

    An example is a text up to some token, its label the token that comes next. Outputs `[B, C]` are the logits
    `z_c(x)` of the chosen tokens after the last live token of x. Trained with `loss="cross_entropy"`, on the whole
    vocabulary this is language modelling, and so is its linearization, which is linear in the logits; on a subset the
    loss is that of the distribution restricted to it, `z_c − log Σ_{c′ chosen} exp z_c′`. A kernel is of C × C blocks,
    so that with a real vocabulary it needs a subset, or the loss-weighted kernel of `next_token_loss`.

    Args:
        model: Of `load_causal_lm`.
        tokens: Ids of the tokens, in the order of the outputs; `None` for the whole vocabulary.

    Returns:
        The model, for `lora` and every other way of tuning; `next_token_batch` makes its examples.

    Raises:
        InputError: If the model is another, or the tokens are none, the same, or outside the vocabulary.
    """
    module = _causal(model, "next_token_logits")
    chosen = None if tokens is None else tuple(map(int, tokens))
    if chosen is not None:
        size = module.config.vocab_size
        if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < size:
            raise InputError(
                f"tokens={list(chosen)[:20]}; expected at least one id, each once, of the vocabulary (0 to {size - 1})"
            )
    return dataclasses.replace(model, module=NextTokenLogits(module, chosen))


def next_token_loss(model: Model) -> Model:
    """Makes a model whose one output is the root of twice a text's next-token loss, for the loss-weighted kernel.

    With `ℓ(x) = −Σ_t log p(x_{t+1} | x_1 … x_t)`, in nats, summed over the tokens of a text, the output `[B, 1]` is
    `f(x) = √(2ℓ(x))`. Its squared loss to the target 0 is `½f² = ℓ`: full fine-tuning of it by `train`, with
    `loss="squared"` and labels 0.0, is language modelling, and the theory's R is `Σ_x ℓ(x)` (theory 0).

    Its kernel is that of all logits of all tokens, `J(x)J(x′)ᵀ`, weighted by the loss's derivative in the logits:
    `K(x, x′) = w(x)ᵀ J(x) J(x′)ᵀ w(x′)`, with `w_t(x) = (p_t − e_{x_{t+1}})/f(x)`, p_t the distribution after token t
    and e the unit vector of the token that came. So `f(x) K(x, x′) f(x′) = ⟨∇ℓ(x), ∇ℓ(x′)⟩`: by how much a gradient
    step on one text changes the loss of the other. Its linearization is linear in f (a Gauss-Newton model of the loss,
    of one direction a text), and not in the logits; for that take `next_token_logits`.

    Args:
        model: Of `load_causal_lm`.

    Returns:
        The model, for `lora` and every other way of tuning; `next_token_batch` makes its examples.

    Raises:
        InputError: If the model is another.
    """
    return dataclasses.replace(model, module=NextTokenLoss(_causal(model, "next_token_loss")))


def next_token_batch(
    model: Model, texts: Sequence[str], max_length: int | None = None
) -> dict[str, Shaped[np.ndarray, "N ..."]]:
    """Returns texts as labelled examples of next-token language modelling, for `Dataset.from_columns` or as a batch.

    Args:
        model: Of `next_token_logits` or `next_token_loss`.
        texts: At least one, each of at least two tokens with those that the tokenizer adds.
        max_length: Tokens that a text is cut to, at most the model's own limit, which `None` stands for.

    Returns:
        `input_ids` and `attention_mask`, int32 `[N, T]`, padded on the right, and `labels` `[N]`. Of
        `next_token_loss`: the texts, labels 0.0. Of `next_token_logits`: text by text what stands before each token
        that is one of the outputs, in order, and the index of the output that it is.

    Raises:
        InputError: If the model is another, there is no text, one has fewer than two tokens, or no token of the texts
            is one of the outputs.
    """
    module = model.module
    if not isinstance(module, NextTokenLogits | NextTokenLoss):
        raise InputError("next_token_batch needs a model of next_token_logits or next_token_loss")
    if not texts:
        raise InputError("next_token_batch got no text; expected at least one")
    limit = min(max_length or module.config.max_length, module.config.max_length)
    # Every option explicit: a tokenizer.json may embed truncation and padding of its own.
    encoded = model.tokenizer(list(texts), truncation=False, padding=False, verbose=False)
    rows = [ids[:limit] for ids in encoded["input_ids"]]
    for i, ids in enumerate(rows):
        if len(ids) < 2:
            raise InputError(f"text {i} has {len(ids)} token(s) of at most {limit}; expected at least two")
    labels: np.ndarray = np.zeros(len(rows), np.float32)
    if isinstance(module, NextTokenLogits):
        output = {token: c for c, token in enumerate(module.tokens or range(module.config.vocab_size))}
        ends = [(ids, t) for ids in rows for t in range(1, len(ids)) if ids[t] in output]
        if not ends:
            raise InputError("no token of the texts, but the first of each, is one of the model's outputs")
        rows, labels = [ids[:t] for ids, t in ends], np.array([output[ids[t]] for ids, t in ends])
    mask = padded([[1] * len(ids) for ids in rows], 0)
    return {"input_ids": padded(rows, padding_id(model.tokenizer)), "attention_mask": mask, "labels": labels}
