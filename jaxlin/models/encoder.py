"""A BERT-type text encoder with a classification head, in Flax Linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlin.tunable import CLASSIFIER, Batch

HEADS = ("mean", "cls", "pooler")


def gelu_tanh(x: Array) -> Array:
    """Returns GELU in the tanh approximation, as `x · sigmoid(2u)`.

    The usual form `½x(1 + tanh u)` meets a rewrite of XLA's CPU compiler (jaxlib <= 0.10.2) that makes
    `jit(vmap(jvp ∘ vjp))` wrong by 1e-3 in float32; this one is the same function and does not.
    """
    u = 0.7978845608028654 * (x + 0.044715 * x**3)
    return x * jax.nn.sigmoid(2 * u)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. Compared by value, so that equal models share a compilation."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    type_vocab_size: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02


def _layer_norm(config: EncoderConfig, name: str) -> nn.LayerNorm:
    # The fast variance E[x²] - E[x]² loses digits that a kernel's small eigenvalues need.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name=name)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, summed and normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch) -> Float[Array, "B T D"]:
        """Returns the input of the first layer."""
        config, ids = self.config, jnp.asarray(batch["input_ids"])

        def embed(name: str, size: int, index: Array) -> Array:
            return nn.Embed(size, config.hidden_size, name=name)(index)

        x = embed("word", config.vocab_size, ids)
        x += embed("position", config.max_positions, jnp.arange(ids.shape[1])[None])
        x += embed("token_type", config.type_vocab_size, jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(ids))))
        return _layer_norm(config, "norm")(x)


class Attention(nn.Module):
    """Multi-head self-attention, by plain matrix products: it differentiates forwards and backwards."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the attention output before the residual sum; tokens with mask 0 are not attended to."""
        heads, width = self.config.num_heads, self.config.hidden_size

        def project(name: str) -> Array:
            y = nn.Dense(width, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, width // heads)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
        # A finite mask value: a fully masked row then stays finite instead of turning into NaN.
        scores = jnp.where(mask[:, None, None, :] != 0, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
        return nn.Dense(width, name="output")(y.reshape(x.shape))


class Mlp(nn.Module):
    """The two dense maps of a layer with the activation between them."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output before the residual sum."""
        x = nn.Dense(self.config.intermediate_size, name="up")(x)
        return nn.Dense(self.config.hidden_size, name="down")(ACTIVATIONS[self.config.activation](x))


class Layer(nn.Module):
    """One post-norm transformer layer."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the layer's output."""
        x = _layer_norm(self.config, "attention_norm")(x + Attention(self.config, name="attention")(x, mask))
        return _layer_norm(self.config, "mlp_norm")(x + Mlp(self.config, name="mlp")(x))


class Encoder(nn.Module):
    """The stack of layers, named `layer_<i>`."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the last hidden state."""
        for i in range(self.config.num_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask)
        return x


class SequenceClassifier(nn.Module):
    """Encoder, pooling, and a linear head.

    Computes in the dtype of its parameters. Dropout is left out: kernels, linearization and
    comparison are of the deterministic network.

    Attributes:
        config: Shape of the encoder.
        num_labels: Number of outputs C.
        head: What the linear head reads: `"mean"` of the token states, the state of the first token
            (`"cls"`), or BERT's `"pooler"` (first token, dense, tanh).
    """

    config: EncoderConfig
    num_labels: int
    head: str

    @nn.compact
    def __call__(self, batch: Batch, output_features: bool = False) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`, or the head's input `[B, D]` with `output_features`."""
        mask = jnp.asarray(batch["attention_mask"])
        x = Encoder(self.config, name="encoder")(Embeddings(self.config, name="embeddings")(batch), mask)
        if self.head == "mean":
            weight = mask.astype(x.dtype)
            weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
            features = jnp.einsum("bt,btd->bd", weight, x)
        else:
            features = x[:, 0]
            if self.head == "pooler":
                features = jnp.tanh(nn.Dense(self.config.hidden_size, name="pooler")(features))
        if output_features:
            return features
        return nn.Dense(self.num_labels, name=CLASSIFIER)(features)
