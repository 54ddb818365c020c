"""What predictions are judged by: scikit-learn's and SciPy's metrics, blank where they are undefined."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
"""Of classes the first three, of scores the last two."""

_CONSTANT = 1e-12


def predicted(outputs: np.ndarray) -> np.ndarray:
    """Predicted class of each example: the largest output, or the sign for C = 1."""
    return outputs.argmax(axis=1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).astype(int)


def metrics(outputs: Float[np.ndarray, "N C"], labels: np.ndarray) -> dict[str, float | None]:
    """Returns every one of `METRICS`, `None` where it is undefined.

    Args:
        outputs: Of the model; `predicted` of them are its classes, and for C = 1 they are its scores.
        labels: `[N]`, integer classes or floating-point scores.

    Returns:
        For classes `accuracy`, `f1` (of class 1 where there are two classes, else the mean over classes) and
        `matthews`, both 0 where nothing is predicted right by more than chance, as scikit-learn has it. For scores
        `pearson` and `spearman`, `None` if either side is constant. The others are `None`.
    """
    found = _of_scores(outputs, labels) if labels.dtype.kind == "f" else _of_classes(outputs, labels)
    return {name: found.get(name) for name in METRICS}


def _of_classes(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    classes = predicted(outputs)
    average = "binary" if outputs.shape[1] <= 2 else "macro"
    with warnings.catch_warnings():  # a single class on both sides is said to be unusual; here it is an early step
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        return {
            "accuracy": float(np.mean(classes == labels)),
            "f1": float(f1_score(labels, classes, average=average, zero_division=0.0)),
            "matthews": float(matthews_corrcoef(labels, classes)),
        }


def _of_scores(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    scores = outputs[:, 0]
    if _is_constant(scores) or _is_constant(labels):
        return {}
    from scipy.stats import pearsonr, spearmanr

    return {name: float(f(scores, labels).statistic) for name, f in (("pearson", pearsonr), ("spearman", spearmanr))}


def _is_constant(values: np.ndarray) -> bool:
    """Whether all values are one but for rounding."""
    return bool(np.ptp(values) <= _CONSTANT * np.abs(values).max())
