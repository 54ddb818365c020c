"""Optax transformations: `jaxlin.optim.proximal`."""

from jaxlin.training.optim import MODES, ProximalState, proximal

__all__ = ["MODES", "ProximalState", "proximal"]
