"""What it takes to read the checkpoints of one architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jaxlin.models.decoder import DECODER_HEADS, CausalLm, DecoderClassifier, DecoderConfig
from jaxlin.models.encoder import HEADS, EncoderConfig, MaskedLm, SequenceClassifier


@dataclasses.dataclass(frozen=True)
class Family:
    """How the checkpoints of one architecture map to our modules.

    Attributes:
        prefix: Prefix that a checkpoint with a head puts before the body's tensors.
        modules: Module names in the checkpoint to our paths; `{i}` stands for the layer.
        decoder: The language-modelling head's output map: where the configuration ties it, the word embedding under
            another name.
        config: Builds our configuration from the Hugging Face one.
        pretrained_pooler: Whether the dense map in front of the classifier is part of the pretrained body.
        fused: Module names in the checkpoint to the paths of ours whose outputs it holds side by side.
        untransposed: Prefix of our paths whose kernels the checkpoint stores as `[in, out]`; `None` for none.
        body: First words of the names of the body's own tensors; one of them that is not known is an error.
        is_decoder: Whether it reads from left to right.
    """

    prefix: str
    modules: Mapping[str, str]
    decoder: str
    config: Callable[[Any], EncoderConfig | DecoderConfig]
    pretrained_pooler: bool = False
    fused: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    untransposed: str | None = None
    body: tuple[str, ...] = ("embeddings", "encoder", "transformer")
    is_decoder: bool = False

    @property
    def heads(self) -> tuple[str, ...]:
        """What the map to the logits can read."""
        return DECODER_HEADS if self.is_decoder else HEADS

    @property
    def own_head(self) -> str:
        """What the map to the logits of its checkpoints for sequence classification reads."""
        return "last" if self.is_decoder else "pooler"

    @property
    def classifier(self) -> Callable[..., nn.Module]:
        """Makes the module of a configuration, a number of labels and a head."""
        return DecoderClassifier if self.is_decoder else SequenceClassifier

    @property
    def language_model(self) -> Callable[..., nn.Module]:
        """Makes the module of a configuration."""
        return CausalLm if self.is_decoder else MaskedLm
