"""The tasks known by name: where the hub keeps them, their columns, classes and metrics."""

from __future__ import annotations

import dataclasses

CLASS_METRICS = ("accuracy",)
SCORE_METRICS = ("pearson", "spearman")


@dataclasses.dataclass(frozen=True)
class KnownTask:
    """A task of the literature.

    Attributes:
        hub: Id of the data set on the Hugging Face hub.
        config: Its configuration; `None` where it has one only.
        text_columns: One text column, or the two of a pair.
        label_names: Class names by id; empty for scores.
        metrics: Names of `jaxlin.training.metrics.METRICS`, the primary one first.
        validation_split: Name of the labelled split to evaluate on.
        folder: Name of its local folder where that is not the task's own.
    """

    hub: str
    config: str | None
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = CLASS_METRICS
    validation_split: str = "validation"
    folder: str | None = None


_GLUE = "nyu-mll/glue"
_PAIR = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_POLARITY = ("negative", "positive")
_NEWS = ("World", "Sports", "Business", "Sci/Tech")
_MNLI = KnownTask(_GLUE, "mnli", ("premise", "hypothesis"), _NLI, validation_split="validation_matched")

KNOWN_TASKS: dict[str, KnownTask] = {
    "cola": KnownTask(_GLUE, "cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": KnownTask(_GLUE, "sst2", ("sentence",), _POLARITY),
    "mrpc": KnownTask(_GLUE, "mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": KnownTask(_GLUE, "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": KnownTask(_GLUE, "stsb", _PAIR, (), SCORE_METRICS),
    "mnli": _MNLI,
    "mnli_mismatched": dataclasses.replace(_MNLI, validation_split="validation_mismatched", folder="mnli"),
    "qnli": KnownTask(_GLUE, "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "rte": KnownTask(_GLUE, "rte", _PAIR, ("entailment", "not_entailment")),
    "wnli": KnownTask(_GLUE, "wnli", _PAIR, ("not_entailment", "entailment")),
    "imdb": KnownTask("stanfordnlp/imdb", None, ("text",), _POLARITY, validation_split="test"),
    "yelp": KnownTask("fancyzhx/yelp_polarity", None, ("text",), _POLARITY, validation_split="test"),
    "ag_news": KnownTask("fancyzhx/ag_news", None, ("text",), _NEWS, validation_split="test"),
}
"""Metrics as GLUE reports them; class names by the hub's ids (IMDb's and Yelp's, `neg`/`pos` and `1`/`2` there,
spelt out)."""


def known_task_of(dataset: str, config: str | None) -> KnownTask | None:
    """Returns the known task that a hub data set is, or `None`."""
    found = (task for task in KNOWN_TASKS.values() if (task.hub, task.config) == (dataset, config))
    return next(found, None)
