"""Weights that are a function of their name: a checkpoint need not be stored to be the same everywhere."""

import zlib

import numpy as np


def weights(shapes):
    """Returns name -> float32 array for name -> shape; norms near 1, nothing zero."""
    out = {}
    for name, shape in shapes.items():
        value = 0.3 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
        norm = "norm" in name.lower() and name.endswith("weight")
        out[name] = (value + 1 if norm else value).astype(np.float32)
    return out
