"""The decoders whose checkpoints are read: configuration and tensor names to ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlin.errors import InputError
from jaxlin.models.decoder import DecoderConfig
from jaxlin.models.encoder import ACTIVATIONS
from jaxlin.models.family import Family
from jaxlin.models.rope import Rope
from jaxlin.tunable import CLASSIFIER


def _checked(config: DecoderConfig) -> DecoderConfig:
    if config.activation not in ACTIVATIONS:
        raise InputError(f"activation {config.activation!r} is not supported; supported: {sorted(ACTIVATIONS)}")
    if config.num_heads % config.num_key_value_heads:
        raise InputError(
            f"num_attention_heads={config.num_heads} is no multiple of num_key_value_heads={config.num_key_value_heads}"
        )
    if config.rope is not None and config.head_dim % 2:
        raise InputError(f"head_dim={config.head_dim}; rotary positions need an even one")
    return config


def _gpt2_config(hf: Any) -> DecoderConfig:
    supported = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in supported.items():
        if getattr(hf, name, value) != value:
            raise InputError(f"{name}={getattr(hf, name)} is not supported; only {value} is")
    if hf.n_embd % hf.n_head:
        raise InputError(f"n_embd={hf.n_embd} is no multiple of n_head={hf.n_head}")
    return _checked(
        DecoderConfig(
            vocab_size=hf.vocab_size,
            hidden_size=hf.n_embd,
            num_layers=hf.n_layer,
            num_heads=hf.n_head,
            num_key_value_heads=hf.n_head,
            head_dim=hf.n_embd // hf.n_head,
            intermediate_size=hf.n_inner or 4 * hf.n_embd,
            max_positions=hf.n_positions,
            rms_norm=False,
            norm_eps=hf.layer_norm_epsilon,
            activation=hf.activation_function,
            gated=False,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            tied=hf.tie_word_embeddings,
            initializer_range=hf.initializer_range,
        )
    )


def _windows(hf: Any) -> tuple[int | None, ...]:
    """The window of every layer, as Mistral (all) and Qwen (some, by `layer_types`) name it."""
    window = getattr(hf, "sliding_window", None)
    if window is None or not getattr(hf, "use_sliding_window", True):
        return ()
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    if not set(kinds) <= {"sliding_attention", "full_attention"} or len(kinds) != hf.num_hidden_layers:
        raise InputError(f"layer_types={kinds}: expected 'sliding_attention' or 'full_attention' for every layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama_config(hf: Any) -> DecoderConfig:
    bias = getattr(hf, "attention_bias", False)
    return _checked(
        DecoderConfig(
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            num_layers=hf.num_hidden_layers,
            num_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
            intermediate_size=hf.intermediate_size,
            max_positions=hf.max_position_embeddings,
            rope=Rope.of(hf),
            norm_eps=hf.rms_norm_eps,
            activation=hf.hidden_act,
            qkv_bias=bias or hf.model_type == "qwen2",
            output_bias=bias,
            mlp_bias=getattr(hf, "mlp_bias", False),
            qk_norm=hf.model_type == "qwen3",
            windows=() if hf.model_type in ("llama", "gemma") else _windows(hf),
            tied=hf.tie_word_embeddings,
            initializer_range=hf.initializer_range,
        )
    )


def _gemma_config(hf: Any) -> DecoderConfig:
    activation = getattr(hf, "hidden_activation", None) or hf.hidden_act
    # Checkpoints of the first release name the exact GELU and mean the tanh form that they were trained with.
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    config = dataclasses.replace(_llama_config(hf), activation=activation)
    return _checked(dataclasses.replace(config, norm_offset=1.0, scaled_embeddings=True))


def _of_layers(stem: str, modules: Mapping[str, str]) -> dict[str, str]:
    """Names and paths within a layer, as those of every layer `{i}`."""
    return {f"{stem}.{{i}}.{theirs}": f"decoder/layer_{{i}}/{ours}" for theirs, ours in modules.items()}


_LLAMA = Family(
    prefix="model.",
    modules={
        "embed_tokens": "embeddings/word",
        **_of_layers(
            "layers",
            {
                "input_layernorm": "attention_norm",
                "self_attn.q_proj": "attention/query",
                "self_attn.k_proj": "attention/key",
                "self_attn.v_proj": "attention/value",
                "self_attn.q_norm": "attention/query_norm",
                "self_attn.k_norm": "attention/key_norm",
                "self_attn.o_proj": "attention/output",
                "post_attention_layernorm": "mlp_norm",
                "mlp.gate_proj": "mlp/gate",
                "mlp.up_proj": "mlp/up",
                "mlp.down_proj": "mlp/down",
            },
        ),
        "norm": "decoder/norm",
        "lm_head": "lm_head",
        "score": CLASSIFIER,
    },
    decoder="lm_head",
    config=_llama_config,
    body=("embed_tokens", "layers", "norm"),
    is_decoder=True,
)

_GEMMA = dataclasses.replace(_LLAMA, config=_gemma_config)

_GPT2 = Family(
    prefix="transformer.",
    modules={
        "wte": "embeddings/word",
        "wpe": "embeddings/position",
        **_of_layers(
            "h",
            {
                "ln_1": "attention_norm",
                "attn.c_proj": "attention/output",
                "ln_2": "mlp_norm",
                "mlp.c_fc": "mlp/up",
                "mlp.c_proj": "mlp/down",
            },
        ),
        "ln_f": "decoder/norm",
        "lm_head": "lm_head",
        "score": CLASSIFIER,
    },
    decoder="lm_head",
    config=_gpt2_config,
    fused={"h.{i}.attn.c_attn": tuple(f"decoder/layer_{{i}}/attention/{part}" for part in ("query", "key", "value"))},
    untransposed="decoder/",
    body=("wte", "wpe", "h", "ln_f"),
    is_decoder=True,
)

DECODERS: Mapping[str, Family] = {
    "gpt2": _GPT2,
    "gemma": _GEMMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""By `model_type` of `config.json`."""
