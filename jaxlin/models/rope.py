"""Rotary position embedding, with the scalings of its frequencies that are supported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlin.errors import InputError

ROPE_KINDS = ("default", "linear", "llama3")

Turns = tuple[Float[Array, "B T h"], Float[Array, "B T h"]]
"""Cosine and sine of the angle by which every token turns each of the h = head_dim/2 pairs of a head."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """How fast each pair of a head's coordinates turns with the position. Compared by value.

    Attributes:
        theta: Base: pair j of d/2 turns by `theta^(-2j/d)` a token.
        kind: `"default"`; `"linear"`: every frequency divided by `factor`; `"llama3"`: the low ones divided by it,
            the high ones kept, and a linear passage between them.
        factor: Of the scaling.
        low_freq_factor: A wavelength over `original_max_positions / low_freq_factor` is long (`"llama3"`).
        high_freq_factor: One under `original_max_positions / high_freq_factor` is short.
        original_max_positions: Positions of the pretraining that the scaling stretches.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0

    @classmethod
    def of(cls, hf: Any) -> Rope:
        """Reads a Hugging Face configuration, of transformers 5 or 4.

        Args:
            hf: The configuration.

        Returns:
            What it says of rotary positions.

        Raises:
            InputError: If the scaling is of a kind that is not supported, or a parameter of it is missing.
        """
        given = getattr(hf, "rope_parameters", None)
        if given is None:
            given = {"rope_theta": hf.rope_theta, **(getattr(hf, "rope_scaling", None) or {})}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in ROPE_KINDS:
            raise InputError(f"RoPE scaling {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if (share := given.get("partial_rotary_factor", 1.0)) != 1:
            raise InputError(f"partial_rotary_factor={share} is not supported; only 1 is")
        return cls(given["rope_theta"], kind, **_scaling(given, kind, hf.max_position_embeddings))

    def frequencies(self, head_dim: int) -> Float[np.ndarray, " h"]:
        """Returns the angle a token of every pair, float64 `[head_dim/2]`."""
        plain = self.theta ** (-np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        # How often a pair turns within the pretraining's context: at most `low` is a long wavelength, at least
        # `high` a short one.
        turns = self.original_max_positions * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor

    def turns(self, positions: Int[Array, "B T"], head_dim: int, dtype: Any) -> Turns:
        """Returns cosines and sines in `dtype`; the angles are computed in at least float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        angles = positions[..., None].astype(wide) * jnp.asarray(self.frequencies(head_dim), wide)
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _scaling(given: Mapping[str, Any], kind: str, max_positions: int) -> dict[str, Any]:
    """Parameters of a scaling, by the names of `Rope`."""
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    missing = [name for name in needed if given.get(name) is None]
    if missing:
        raise InputError(f"RoPE scaling {kind!r} lacks {', '.join(missing)}; the configuration has {sorted(given)}")
    scaling = {name: float(given[name]) for name in needed}
    if kind == "llama3":
        scaling["original_max_positions"] = given.get("original_max_position_embeddings") or max_positions
        if not 0 < scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            raise InputError(f"RoPE scaling 'llama3': expected 0 < low_freq_factor < high_freq_factor; got {scaling}")
    if kind != "default" and not scaling["factor"] > 0:
        raise InputError(f"RoPE scaling {kind!r} has factor {scaling['factor']}; expected more than 0")
    return scaling


def rotated(x: Float[Array, "B T H d"], turns: Turns) -> Float[Array, "B T H d"]:
    """Returns every head of x with its pairs (coordinates j and j + d/2) turned."""
    cos, sin = (part[:, :, None] for part in turns)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
