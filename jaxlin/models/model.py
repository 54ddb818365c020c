"""A pretrained model as a pytree: Flax module and parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxlin.errors import InputError
from jaxlin.tunable import CLASSIFIER, CLASSIFIER_DENSE, Batch


def named_key(rng: int | Array, name: str) -> Array:
    """Returns a PRNG key that depends on `rng` and a name only, not on what else is drawn."""
    key = jax.random.key(rng) if isinstance(rng, int | np.integer) else rng
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model came from; outside the pytree's leaves, compared by value.

    Attributes:
        name: The name it was asked for by.
        folder: Local folder with `config.json`, weights and tokenizer.
        head_is_new: Whether the classification head was not in the checkpoint.
        adapter: Folder of the adapter that its head is of, and that its tuning starts from, on the command line.
    """

    name: str
    folder: str
    head_is_new: bool
    adapter: str | None = None


@functools.lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions on a damaged file
        raise InputError(f"no usable tokenizer in {folder} (tokenizer.json or vocab.txt): {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers 5 makes an empty one where there is no file
        raise InputError(f"no usable tokenizer in {folder}: it has no tokenizer.json, vocab.txt or the like")
    return tokenizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A Flax Linen module with its pretrained parameters.

    Attributes:
        params: Nested dict of parameters; the leaves of this pytree.
        module: The Linen module, or what applies one; `module.apply({"params": params}, batch)` gives logits.
        source: Where it came from.
    """

    params: PyTree
    module: Any = dataclasses.field(metadata={"static": True})
    source: ModelSource | None = dataclasses.field(default=None, metadata={"static": True})

    def apply(self, params: PyTree, batch: Batch) -> Float[Array, "*B C"]:
        """Returns logits `[B, C]` in the dtype of `params` (`[B, T, V]` of a masked-LM head).

        Args:
            params: Parameters, like `self.params`.
            batch: `input_ids` and `attention_mask` `[B, T]`, optionally `token_type_ids`; host (NumPy)
                arrays are validated by `check_batch`, traced and device arrays are not.
        """
        if all(isinstance(value, np.ndarray) for value in batch.values()):
            self.check_batch(batch)
        return cast(Array, self.module.apply({"params": params}, batch))

    def features(self, params: PyTree, batch: Batch) -> Float[Array, "B D"]:
        """Returns what the classification head reads, `[B, D]`."""
        return cast(Array, self.module.apply({"params": params}, batch, output_features=True))

    def check_batch(self, batch: Batch) -> None:
        """Checks inputs on the host; see `check_text_batch`."""
        check_text_batch(self.module, batch)

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`; empty for a model that came from no folder."""
        return json.loads((Path(self.source.folder) / "config.json").read_text()) if self.source else {}

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when first used.

        Raises:
            InputError: If the model came from no folder, or the folder holds no tokenizer.
        """
        if self.source is None:
            raise InputError("this model was not loaded from a checkpoint, so it has no tokenizer")
        return _tokenizer(self.source.folder)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def check_text_batch(module: Any, batch: Batch) -> None:
    """Checks that text inputs lie within what `module` can look up.

    A lookup outside a table raises nothing on a device: it clamps, or gives NaN.

    Args:
        module: A text module with an `EncoderConfig` or `DecoderConfig` as `config`; others are not checked.
        batch: Host arrays `input_ids`, `attention_mask`, optionally `token_type_ids`, all `[B, T]`, and
            `positions` `[B]`.

    Raises:
        InputError: If a column is missing or of another shape, if T exceeds the number of positions, if
            an id or token type lies outside its table, if an example has no live token, or if `module` has a check of
            its own (`check_batch`) that fails.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "vocab_size"):
        return
    for name in ("input_ids", "attention_mask"):
        if name not in batch:
            raise InputError(f"the batch has no {name!r}; it has {sorted(batch)}")
    shape = np.shape(batch["input_ids"])
    limits = {
        "input_ids": (config.vocab_size, "the vocabulary"),
        "attention_mask": (2, "a 0/1 mask"),
        "token_type_ids": (max(config.type_vocab_size, 1), "the model's token types"),
        "positions": (np.shape(batch["input_ids"])[-1], "the tokens"),
    }
    for name, (limit, what) in limits.items():
        if name not in batch:
            continue
        values = np.asarray(batch[name])
        if name == "positions":
            if values.shape != shape[:1]:
                raise InputError(f"positions has shape {values.shape}; expected one token an example, {shape[:1]}")
        elif values.shape != shape or values.ndim != 2:
            raise InputError(f"{name} has shape {values.shape}; expected [B, T] like input_ids, {shape}")
        if values.size and not 0 <= values.min() <= values.max() < limit:
            wrong = values.min() if values.min() < 0 else values.max()
            raise InputError(f"{name} holds {wrong}, outside {what} (0 to {limit - 1})")
    if shape[1] > config.max_length:
        raise InputError(f"the batch is {shape[1]} tokens long; the model has {config.max_length} positions")
    empty = np.flatnonzero(~np.asarray(batch["attention_mask"]).astype(bool).any(axis=1))
    if empty.size:
        raise InputError(f"example {empty[0]} has no live token (attention_mask is all 0)")
    own = getattr(module, "check_batch", None)
    if own is not None:
        own(batch)


HEAD_STARTS = ("random", "zero")


def new_head(
    kind: str, rng: int | Array, width: int, num_labels: int, scale: float, bias: bool = True
) -> dict[str, Array]:
    """Returns a fresh linear head, `kernel [D, C]` and `bias [C]`, float32 (the same draw with x64 on and off).

    Args:
        kind: One of `HEAD_STARTS`: normal with standard deviation `scale`, or zero.
        rng: Seed or key; the head's stream is its own.
        width: D.
        num_labels: C.
        scale: Standard deviation of the random kernel.
        bias: Whether it has one.
    """
    shape = (width, num_labels)
    kernel = jax.random.normal(named_key(rng, f"head:{CLASSIFIER}/kernel"), shape, jnp.float32) * scale
    zeros = jnp.zeros(shape, jnp.float32)
    head = {"kernel": kernel if kind == "random" else zeros}
    return head | {"bias": jnp.zeros(num_labels, jnp.float32)} if bias else head


def new_dense(rng: int | Array, width: int, scale: float) -> dict[str, Array]:
    """Returns the dense map of a classification head, drawn as `new_head` draws."""
    kernel = jax.random.normal(named_key(rng, f"head:{CLASSIFIER_DENSE}/kernel"), (width, width), jnp.float32) * scale
    return {"kernel": kernel, "bias": jnp.zeros(width, jnp.float32)}


def with_head(model: Model, head: Mapping[str, Array | np.ndarray]) -> Model:
    """Returns `model` with another classification head."""
    old = model.params[CLASSIFIER]
    new = {name: jnp.asarray(value, old[name].dtype) for name, value in head.items()}
    return dataclasses.replace(model, params={**model.params, CLASSIFIER: new})
