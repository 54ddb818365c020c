"""The architectures whose checkpoints are read: configuration and tensor names to ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlin.errors import InputError
from jaxlin.models.decoder_families import DECODERS
from jaxlin.models.encoder import ACTIVATIONS, EncoderConfig
from jaxlin.models.family import Family
from jaxlin.tunable import CLASSIFIER, CLASSIFIER_DENSE


def _checked(config: EncoderConfig, hf: Any) -> EncoderConfig:
    positions = getattr(hf, "position_embedding_type", "absolute") or "absolute"
    if positions != "absolute":
        raise InputError(f"position_embedding_type={positions!r} is not supported; only 'absolute' is")
    if getattr(hf, "is_decoder", False):
        raise InputError(f"the checkpoint is a {hf.model_type} decoder (is_decoder=true), which is not supported")
    if config.activation not in ACTIVATIONS:
        raise InputError(f"hidden_act={config.activation!r} is not supported; supported: {sorted(ACTIVATIONS)}")
    if config.hidden_size % config.num_heads:
        raise InputError(f"hidden_size={config.hidden_size} is no multiple of num_attention_heads={config.num_heads}")
    return config


def _bert_config(hf: Any, **changes: Any) -> EncoderConfig:
    config = EncoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        max_positions=hf.max_position_embeddings,
        type_vocab_size=hf.type_vocab_size,
        activation=hf.hidden_act,
        layer_norm_eps=hf.layer_norm_eps,
        initializer_range=hf.initializer_range,
        lm_activation=hf.hidden_act,
    )
    return _checked(dataclasses.replace(config, **changes), hf)


def _roberta_config(hf: Any) -> EncoderConfig:
    return _bert_config(hf, padding_id=hf.pad_token_id, dense_in_head=True, lm_activation="gelu")


def _electra_config(hf: Any) -> EncoderConfig:
    return _bert_config(
        hf, embedding_size=hf.embedding_size, head_activation="gelu", dense_in_head=True, lm_activation="gelu"
    )


def _distilbert_config(hf: Any) -> EncoderConfig:
    config = EncoderConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.dim,
        num_layers=hf.n_layers,
        num_heads=hf.n_heads,
        intermediate_size=hf.hidden_dim,
        max_positions=hf.max_position_embeddings,
        type_vocab_size=0,
        activation=hf.activation,
        initializer_range=hf.initializer_range,
        head_activation="relu",
        dense_in_head=True,
        lm_activation=hf.activation,
    )
    return _checked(config, hf)


_EMBEDDINGS = {
    "embeddings.word_embeddings": "embeddings/word",
    "embeddings.position_embeddings": "embeddings/position",
    "embeddings.token_type_embeddings": "embeddings/token_type",
    "embeddings.LayerNorm": "embeddings/norm",
}


def _layers(stem: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{stem}.{{i}}.{theirs}": f"encoder/layer_{{i}}/{ours}" for theirs, ours in names.items()}


_BERT_BODY = _EMBEDDINGS | _layers(
    "encoder.layer",
    {
        "attention.self.query": "attention/query",
        "attention.self.key": "attention/key",
        "attention.self.value": "attention/value",
        "attention.output.dense": "attention/output",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "mlp/up",
        "output.dense": "mlp/down",
        "output.LayerNorm": "mlp_norm",
    },
)

_DISTILBERT_BODY = _EMBEDDINGS | _layers(
    "transformer.layer",
    {
        "attention.q_lin": "attention/query",
        "attention.k_lin": "attention/key",
        "attention.v_lin": "attention/value",
        "attention.out_lin": "attention/output",
        "sa_layer_norm": "attention_norm",
        "ffn.lin1": "mlp/up",
        "ffn.lin2": "mlp/down",
        "output_layer_norm": "mlp_norm",
    },
)


def _lm_head(module: str, dense: str, norm: str) -> dict[str, str]:
    return {module: "lm_head", dense: "lm_head/dense", norm: "lm_head/norm"}


_ROBERTA = Family(
    prefix="roberta.",
    modules={
        **_BERT_BODY,
        "classifier.dense": CLASSIFIER_DENSE,
        "classifier.out_proj": CLASSIFIER,
        **_lm_head("lm_head", "lm_head.dense", "lm_head.layer_norm"),
    },
    decoder="lm_head.decoder",
    config=_roberta_config,
)

FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        prefix="bert.",
        modules={
            **_BERT_BODY,
            "pooler.dense": "pooler",
            "classifier": CLASSIFIER,
            **_lm_head("cls.predictions", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),
        },
        decoder="cls.predictions.decoder",
        config=_bert_config,
        pretrained_pooler=True,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Family(
        prefix="distilbert.",
        modules={
            **_DISTILBERT_BODY,
            "pre_classifier": CLASSIFIER_DENSE,
            "classifier": CLASSIFIER,
            **_lm_head("vocab_projector", "vocab_transform", "vocab_layer_norm"),
        },
        decoder="vocab_projector",
        config=_distilbert_config,
    ),
    "electra": Family(
        prefix="electra.",
        modules={
            **_BERT_BODY,
            "embeddings_project": "embeddings/project",
            "classifier.dense": CLASSIFIER_DENSE,
            "classifier.out_proj": CLASSIFIER,
            **_lm_head("generator_lm_head", "generator_predictions.dense", "generator_predictions.LayerNorm"),
        },
        decoder="generator_lm_head",
        config=_electra_config,
    ),
    **DECODERS,
}
"""By `model_type` of `config.json`."""
