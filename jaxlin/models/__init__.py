"""Pretrained models as Flax modules and parameters."""
