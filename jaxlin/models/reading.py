"""What is read of a language model: its logits at one place, those of some words, its loss."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlin.models.decoder import CausalLm, DecoderConfig
from jaxlin.models.encoder import EncoderConfig, MaskedLm


@dataclasses.dataclass(frozen=True)
class Reading:
    """A function of a language model's outputs, in the place of a module of `Model`; compared by value.

    Attributes:
        module: The language model.
    """

    module: CausalLm | MaskedLm

    @property
    def config(self) -> DecoderConfig | EncoderConfig:
        """Shape of the language model."""
        return self.module.config

    def clone(self, config: Any) -> Reading:
        """Returns the same of the language model in another configuration, as Flax's modules do."""
        return dataclasses.replace(self, module=self.module.clone(config=config))
