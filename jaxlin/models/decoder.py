"""Decoders (GPT-2, the Llama family, Gemma) with a classification or a language-modelling head, in Flax Linen."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlin.models.encoder import ACTIVATIONS, mean_state
from jaxlin.models.rope import Rope, Turns, rotated
from jaxlin.tunable import CLASSIFIER, Batch

DECODER_HEADS = ("last", "mean")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder. Compared by value, so that equal models share a compilation.

    Attributes:
        vocab_size: Rows of the word embedding.
        hidden_size: Width D of the layers.
        num_layers: Number of layers.
        num_heads: Query heads a layer.
        num_key_value_heads: Key and value heads a layer; each serves `num_heads / num_key_value_heads` query heads.
        head_dim: Width of a head.
        intermediate_size: Width of the MLP.
        max_positions: Tokens that the model was made for.
        rope: Rotary positions; `None` for an embedding of `max_positions` rows (GPT-2).
        rms_norm: Whether norms only scale (RMSNorm); else LayerNorm.
        norm_eps: ε of every norm.
        norm_offset: What RMSNorm adds to its weight (Gemma: 1).
        scaled_embeddings: Whether word embeddings are multiplied by √D before the first layer (Gemma).
        activation: Of the MLP; a name of `ACTIVATIONS`.
        gated: Whether the MLP has a `gate`, the activation of which multiplies `up`.
        qkv_bias: Whether query, key and value have a bias.
        output_bias: Whether the attention's output has one.
        mlp_bias: Whether the MLP's maps have one.
        qk_norm: Whether every head's queries and keys are normalised (Qwen3).
        windows: How many tokens, itself counted, a token of each layer attends to; `None` for all, and so in all
            layers if empty.
        tied: Whether the language-modelling head is the word embedding.
        initializer_range: Standard deviation of what is drawn anew.
        remat: As in `EncoderConfig`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    rope: Rope | None = None
    rms_norm: bool = True
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    tied: bool = True
    initializer_range: float = 0.02
    remat: bool = False

    @property
    def max_length(self) -> int:
        """Tokens that an input can have."""
        return self.max_positions

    @property
    def type_vocab_size(self) -> int:
        """Token types that it tells apart: none."""
        return 0


class OffsetRMSNorm(nn.Module):
    """RMSNorm whose scale is its weight plus an offset, so that a weight of 0 may leave the scale at 1.

    Attributes:
        epsilon: ε.
        offset: What is added to the weight.
    """

    epsilon: float
    offset: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Returns x over its root mean square, scaled."""
        normed = nn.RMSNorm(epsilon=self.epsilon, use_scale=False, name="norm")(x)
        return normed * (self.offset + self.param("scale", nn.initializers.zeros, (x.shape[-1],)))


def _norm(config: DecoderConfig, name: str) -> nn.Module:
    # Both take their statistics in float32 at least: half precision is widened, float64 stays.
    if config.norm_offset:
        return OffsetRMSNorm(config.norm_eps, config.norm_offset, name=name)
    if config.rms_norm:
        return nn.RMSNorm(epsilon=config.norm_eps, name=name)
    return nn.LayerNorm(epsilon=config.norm_eps, use_fast_variance=False, name=name)


def positions_of(mask: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the position of every live token, counted from 0 over the live ones; that of others lies in range."""
    return jnp.maximum(jnp.cumsum((mask != 0).astype(jnp.int32), axis=1) - 1, 0)


def last_live(mask: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Returns the index of the last live token of every example; 0 where there is none."""
    return jnp.max(jnp.where(mask != 0, jnp.arange(mask.shape[1]), 0), axis=1)


def _at(x: Array, index: Int[Array, " B"] | None) -> Array:
    """The token at `index` of every example, as the only one of axis 1; all tokens for `None`."""
    if index is None:
        return x
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)


class Embeddings(nn.Module):
    """Word embeddings, with those of positions added where the model has them."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, batch: Batch) -> Float[Array, "B T D"]:
        """Returns the input of the first layer."""
        config = self.config
        x = nn.Embed(config.vocab_size, config.hidden_size, name="word")(jnp.asarray(batch["input_ids"]))
        if config.scaled_embeddings:
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        if config.rope is not None:
            return x
        positions = positions_of(jnp.asarray(batch["attention_mask"]))
        return x + nn.Embed(config.max_positions, config.hidden_size, name="position")(positions)


class Attention(nn.Module):
    """Causal self-attention with grouped heads, by plain matrix products: it differentiates forwards and backwards.

    Attributes:
        config: Shape of the decoder.
        window: How many tokens, itself counted, a token attends to; `None` for all before it.
    """

    config: DecoderConfig
    window: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], turns: Turns | None, at: Int[Array, " B"] | None
    ) -> Float[Array, "B Q D"]:
        """Returns what the tokens, or those at `at` alone, attend to in x, before the residual sum."""
        config, groups = self.config, self.config.num_key_value_heads

        def project(name: str, x: Array, heads: int, turns: Turns | None) -> Array:
            y = nn.Dense(heads * config.head_dim, use_bias=config.qkv_bias, name=name)(x)
            y = y.reshape(*y.shape[:-1], heads, config.head_dim)
            if turns is None:
                return y
            return rotated(_norm(config, f"{name}_norm")(y) if config.qk_norm else y, turns)

        query = project("query", _at(x, at), config.num_heads, turns and (_at(turns[0], at), _at(turns[1], at)))
        key = project("key", x, groups, turns)
        value = project("value", x, groups, None)
        query = query.reshape(*query.shape[:2], groups, -1, config.head_dim)
        scores = jnp.einsum("bqkgd,btkd->bkgqt", query, key) * config.head_dim**-0.5
        there = jnp.arange(x.shape[1])
        here = there[None] if at is None else at[:, None]
        seen = (there <= here[..., None]) & (mask[:, None] != 0)
        if self.window is not None:
            seen &= there > here[..., None] - self.window
        # A finite mask value: a fully masked row then stays finite instead of turning into NaN.
        scores = jnp.where(seen[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
        y = jnp.einsum("bkgqt,btkd->bqkgd", weights.astype(value.dtype), value)
        output = nn.Dense(config.hidden_size, use_bias=config.output_bias, name="output")
        return output(y.reshape(*y.shape[:2], -1))


class Mlp(nn.Module):
    """The dense maps of a layer with the activation between them."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output before the residual sum."""
        config, act = self.config, ACTIVATIONS[self.config.activation]

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=config.mlp_bias, name=name)

        up = dense(config.intermediate_size, "up")(x)
        inner = act(dense(config.intermediate_size, "gate")(x)) * up if config.gated else act(up)
        return dense(config.hidden_size, "down")(inner)


class Layer(nn.Module):
    """One pre-norm transformer layer; `window` as in `Attention`."""

    config: DecoderConfig
    window: int | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], turns: Turns | None, at: Int[Array, " B"] | None
    ) -> Float[Array, "B Q D"]:
        """Returns the layer's output: of all tokens, or of those at `at` alone where nothing reads the others'."""
        normed = _norm(self.config, "attention_norm")(x)
        x = _at(x, at) + Attention(self.config, self.window, name="attention")(normed, mask, turns, at)
        return x + Mlp(self.config, name="mlp")(_norm(self.config, "mlp_norm")(x))


class Decoder(nn.Module):
    """The stack of layers, named `layer_<i>`, and the norm behind it."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Int[Array, "B T"], at: Int[Array, " B"] | None = None
    ) -> Float[Array, "B Q D"]:
        """Returns the last hidden state: of all tokens, or of the one at `at` alone (Q = 1), which takes less."""
        config, last = self.config, self.config.num_layers - 1
        turns = None if config.rope is None else config.rope.turns(positions_of(mask), config.head_dim, x.dtype)
        layer = nn.remat(Layer) if config.remat else Layer
        for i, window in enumerate(config.windows or (None,) * config.num_layers):
            x = layer(config, window, name=f"layer_{i}")(x, mask, turns, at if i == last else None)
        return _norm(config, "norm")(x)


class DecoderClassifier(nn.Module):
    """Decoder, the state of one token or the mean of all, and a linear head without a bias, as transformers' `score`.

    Computes in the dtype of its parameters. Dropout is left out, as in `SequenceClassifier`.

    Attributes:
        config: Shape of the decoder.
        num_labels: Number of outputs C.
        head: What the linear head reads: the state of the last token that is not padding (`"last"`), or the `"mean"`
            of the token states.
    """

    config: DecoderConfig
    num_labels: int
    head: str

    @nn.compact
    def __call__(self, batch: Batch, output_features: bool = False) -> Float[Array, "B C"]:
        """Returns logits `[B, C]`, or the head's input `[B, D]` with `output_features`."""
        mask = jnp.asarray(batch["attention_mask"])
        embedded = Embeddings(self.config, name="embeddings")(batch)
        at = last_live(mask) if self.head == "last" else None
        x = Decoder(self.config, name="decoder")(embedded, mask, at)
        features = mean_state(x, mask) if at is None else x[:, 0]
        if output_features:
            return features
        return nn.Dense(self.num_labels, use_bias=False, name=CLASSIFIER)(features)


class CausalLm(nn.Module):
    """Decoder with its language-modelling head.

    Attributes:
        config: Shape of the decoder.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, batch: Batch) -> Float[Array, "*B V"]:
        """Returns the next token's logits after every token `[B, T, V]`, or `[B, V]` after `batch["positions"]` alone.

        `positions` are indices into the row, padding counted.
        """
        embeddings = Embeddings(self.config, name="embeddings")
        at = jnp.asarray(batch["positions"]) if "positions" in batch else None
        x = Decoder(self.config, name="decoder")(embeddings(batch), jnp.asarray(batch["attention_mask"]), at)
        x = x if at is None else x[:, 0]
        if self.config.tied:
            return x @ embeddings.variables["params"]["word"]["embedding"].T
        return nn.Dense(self.config.vocab_size, use_bias=False, name="lm_head")(x)
