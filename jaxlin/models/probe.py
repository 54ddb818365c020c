"""The linear probe: a closed-form ridge head on the frozen features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.models.decoder import DecoderClassifier
from jaxlin.models.encoder import SequenceClassifier
from jaxlin.models.model import Model, with_head
from jaxlin.tunable import CLASSIFIER

_CHUNK = 32
"""Examples a forward pass."""


@jax.jit
def _features(model: Model, batch: Mapping[str, Any]) -> jax.Array:
    return model.features(model.params, batch)


def frozen_features(model: Model, data: Dataset | Mapping[str, Any]) -> Float[np.ndarray, "N D"]:
    """Returns what the head reads for every example, float64 `[N, D]`."""
    data = as_dataset(data)
    model.check_batch(data.columns)
    return data.map(lambda part: _features(model, part), _CHUNK)


def probe_head(
    model: Model,
    batch: Dataset | Mapping[str, Any],
    y: Float[np.ndarray, "N C"],
    ridge: float | None = None,
) -> Model:
    """Returns `model` with the head of closed-form ridge regression on its frozen features (LP-FT's start).

    The head minimises `½‖features·W + b − y‖² + (ridge/2)‖W‖²`, summed over examples, the bias free; a decoder's head
    has none, and b is 0.

    Args:
        model: Its present head is ignored.
        batch: Training examples: a `Dataset` or a dict of arrays.
        y: Targets `[N, C]`: one-hot, or ±1 or the score for C = 1.
        ridge: Strength; `None` chooses it by leave-one-out error on a logarithmic grid relative to the
            features' largest squared singular value.

    Returns:
        The model with the new head, in the old head's dtype.

    Raises:
        InputError: If `y` does not fit the examples and outputs, `ridge` is negative, or the model is one of
            `from_linen`.
    """
    if not isinstance(model.module, SequenceClassifier | DecoderClassifier):
        raise InputError("probe_head needs a model of load_model, whose head reads known features")
    data, old = as_dataset(batch), model.params[CLASSIFIER]
    num_labels, has_bias = old["kernel"].shape[1], "bias" in old
    if np.shape(y) != (len(data), num_labels):
        raise InputError(f"y has shape {np.shape(y)}; expected (examples, outputs) = {(len(data), num_labels)}")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise InputError(f"ridge={ridge}; expected at least 0, or None to choose it")
    from sklearn.linear_model import RidgeCV

    features = frozen_features(model, data)
    top = np.linalg.norm(features - features.mean(axis=0) if has_bias else features, ord=2) ** 2
    if not top > 0:  # all features are the same, or 0: the bias is all there is
        flat = {"kernel": np.zeros((features.shape[1], num_labels)), "bias": np.mean(y, axis=0)}
        return with_head(model, {name: flat[name] for name in old})
    alphas = top * np.logspace(-7, 0, 22) if ridge is None else [max(ridge, 1e-12 * top)]
    fit = RidgeCV(alphas=alphas, fit_intercept=has_bias).fit(features, y)
    fitted = {"kernel": np.atleast_2d(fit.coef_).T, "bias": np.atleast_1d(fit.intercept_)}
    return with_head(model, {name: fitted[name] for name in old})
