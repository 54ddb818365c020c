"""BERT-type text encoders with a classification or a masked-LM head, in Flax Linen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlin.tunable import CLASSIFIER, CLASSIFIER_DENSE, Batch

HEADS = ("mean", "cls", "pooler")


def gelu(x: Array) -> Array:
    """Returns GELU as PyTorch computes it; by `erf`, which is a few times faster on a CPU than JAX's form by `erfc`."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x: Array) -> Array:
    """Returns GELU in the tanh approximation, as `x · sigmoid(2u)`.

    The usual form `½x(1 + tanh u)` meets a rewrite of XLA's CPU compiler (jaxlib <= 0.10.2) that makes
    `jit(vmap(jvp ∘ vjp))` wrong by 1e-3 in float32; this one is the same function and does not.
    """
    u = 0.7978845608028654 * (x + 0.044715 * x**3)
    return x * jax.nn.sigmoid(2 * u)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder. Compared by value, so that equal models share a compilation.

    Attributes:
        vocab_size: Rows of the word embedding.
        hidden_size: Width D of the layers.
        num_layers: Number of layers.
        num_heads: Attention heads a layer.
        intermediate_size: Width of the MLP.
        max_positions: Rows of the position embedding.
        type_vocab_size: Rows of the token-type embedding; 0 for none (DistilBERT).
        activation: Of the MLP; a name of `ACTIVATIONS`.
        layer_norm_eps: ε of every LayerNorm.
        initializer_range: Standard deviation of what is drawn anew.
        embedding_size: Width of the embeddings where it is not D (ELECTRA).
        padding_id: Where positions count from `padding_id + 1` over the tokens that are not padding (RoBERTa):
            the id of the padding token; `None` where they count from 0.
        head_activation: Of the dense map between the first token's state and the logits.
        dense_in_head: Whether that map belongs to the classification head and is trained with it (RoBERTa,
            DistilBERT, ELECTRA), and not to the pretrained body (BERT's pooler).
        lm_activation: Of the masked-LM head.
        remat: Whether a derivative computes the activations of each layer anew instead of keeping them
            (rematerialisation, gradient checkpointing): less memory, one more forward pass.
    """

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
    embedding_size: int | None = None
    padding_id: int | None = None
    head_activation: str = "tanh"
    dense_in_head: bool = False
    lm_activation: str = "gelu"
    remat: bool = False

    @property
    def max_length(self) -> int:
        """Tokens that an input can have."""
        return self.max_positions - (0 if self.padding_id is None else self.padding_id + 1)


def set_remat(module: Any, value: bool) -> Any:
    """Returns a module with `config.remat` set; one whose configuration knows no such thing as it is."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "remat", value) == value:
        return module
    return module.clone(config=dataclasses.replace(config, remat=value))


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
        width = config.embedding_size or config.hidden_size

        def embed(name: str, size: int, index: Array) -> Array:
            return nn.Embed(size, width, name=name)(index)

        positions = jnp.arange(ids.shape[1])[None]
        if config.padding_id is not None:
            live = (ids != config.padding_id).astype(ids.dtype)
            positions = jnp.cumsum(live, axis=1) * live + config.padding_id
        x = embed("word", config.vocab_size, ids) + embed("position", config.max_positions, positions)
        if config.type_vocab_size:
            types = jnp.asarray(batch.get("token_type_ids", jnp.zeros_like(ids)))
            x += embed("token_type", config.type_vocab_size, types)
        x = _layer_norm(config, "norm")(x)
        return x if width == config.hidden_size else nn.Dense(config.hidden_size, name="project")(x)


class Attention(nn.Module):
    """Multi-head self-attention, by plain matrix products: it differentiates forwards and backwards."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], reading: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        """Returns what the tokens `reading` attend to in x, before the residual sum; none with mask 0."""
        heads, width = self.config.num_heads, self.config.hidden_size

        def project(name: str, x: Array) -> Array:
            y = nn.Dense(width, name=name)(x)
            return y.reshape(*y.shape[:-1], heads, width // heads)

        query, key, value = project("query", reading), project("key", x), project("value", x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (width // heads) ** -0.5
        # A finite mask value: a fully masked row then stays finite instead of turning into NaN.
        scores = jnp.where(mask[:, None, None, :] != 0, scores, jnp.finfo(scores.dtype).min)
        # In bfloat16 the sum of many small weights would lose them.
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
        return nn.Dense(width, name="output")(y.reshape(reading.shape))


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
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], first: int | None = None
    ) -> Float[Array, "B Q D"]:
        """Returns the layer's output, for the first tokens alone where nothing reads the others'."""
        reading = x if first is None else x[:, :first]
        attended = Attention(self.config, name="attention")(x, mask, reading)
        x = _layer_norm(self.config, "attention_norm")(reading + attended)
        return _layer_norm(self.config, "mlp_norm")(x + Mlp(self.config, name="mlp")(x))


class Encoder(nn.Module):
    """The stack of layers, named `layer_<i>`."""

    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], first: int | None = None
    ) -> Float[Array, "B Q D"]:
        """Returns the last hidden state: of all tokens, or of the first ones alone, which takes less."""
        last = self.config.num_layers - 1
        layer = nn.remat(Layer, static_argnums=3) if self.config.remat else Layer  # 3: `first`, self counted
        for i in range(self.config.num_layers):
            x = layer(self.config, name=f"layer_{i}")(x, mask, first if i == last else None)
        return x


def mean_state(x: Float[Array, "B T D"], mask: Int[Array, "B T"]) -> Float[Array, "B D"]:
    """Returns the mean of the live tokens' states; zero where there is none."""
    weight = mask.astype(x.dtype)
    weight /= jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("bt,btd->bd", weight, x)


class SequenceClassifier(nn.Module):
    """Encoder, pooling, and a linear head.

    Computes in the dtype of its parameters. Dropout is left out: kernels, linearization and
    comparison are of the deterministic network.

    Attributes:
        config: Shape of the encoder.
        num_labels: Number of outputs C.
        head: What the linear head reads: `"mean"` of the token states, the state of the first token
            (`"cls"`), or that state after a dense map and an activation (`"pooler"`).
    """

    config: EncoderConfig
    num_labels: int
    head: str

    @nn.compact
    def __call__(self, batch: Batch, output_features: bool = False) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`, or the head's input `[B, D]` with `output_features`."""
        mask = jnp.asarray(batch["attention_mask"])
        embedded = Embeddings(self.config, name="embeddings")(batch)
        x = Encoder(self.config, name="encoder")(embedded, mask, None if self.head == "mean" else 1)
        if self.head == "mean":
            features = mean_state(x, mask)
        else:
            features = x[:, 0]
            if self.head == "pooler":
                name = CLASSIFIER_DENSE if self.config.dense_in_head else "pooler"
                features = nn.Dense(self.config.hidden_size, name=name)(features)
                features = ACTIVATIONS[self.config.head_activation](features)
        if output_features:
            return features
        return nn.Dense(self.num_labels, name=CLASSIFIER)(features)


class LmHead(nn.Module):
    """Dense map, activation, norm, and the logits of every token by the (tied) word embedding."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], words: Float[Array, "V E"]) -> Float[Array, "*B V"]:
        """Returns the vocabulary's logits."""
        x = nn.Dense(words.shape[1], name="dense")(x)
        x = _layer_norm(self.config, "norm")(ACTIVATIONS[self.config.lm_activation](x))
        return x @ words.T + self.param("bias", nn.initializers.zeros, (self.config.vocab_size,))


class MaskedLm(nn.Module):
    """Encoder with its masked-language-model head.

    Attributes:
        config: Shape of the encoder.
    """

    config: EncoderConfig

    @nn.compact
    def __call__(self, batch: Batch) -> Float[Array, "*B V"]:
        """Returns the vocabulary's logits at every token `[B, T, V]`, or `[B, V]` at `batch["positions"]` alone."""
        embeddings = Embeddings(self.config, name="embeddings")
        x = Encoder(self.config, name="encoder")(embeddings(batch), jnp.asarray(batch["attention_mask"]))
        if "positions" in batch:
            x = jnp.take_along_axis(x, jnp.asarray(batch["positions"])[:, None, None], axis=1)[:, 0]
        return LmHead(self.config, name="lm_head")(x, embeddings.variables["params"]["word"]["embedding"])
