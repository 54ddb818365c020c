"""The table of checks: every encoder × PEFT method × kind of task, against the dense float64 reference."""

import numpy as np
import pytest

import jaxlin as jl
from tests import cases

KINDS = {
    "scores": (1, "squared", lambda labels: labels + 0.25),
    "two classes": (2, "cross_entropy", lambda labels: labels % 2),
    "three classes": (3, "squared", lambda labels: labels),
}
TABLE = [(family, peft, kind) for family in cases.FAMILIES for peft in cases.PEFT for kind in KINDS]
FAST = ("bert", "lora", "scores")  # compiling takes long: the rest is slow


def text_for(family, kind):
    batch = cases.text_batch(4, longest=8, ids=40, padding_id=1 if family == "roberta" else 0)
    if family in ("roberta", "distilbert"):
        del batch["token_type_ids"]
    return {**batch, "labels": KINDS[kind][2](batch["labels"])}


@pytest.mark.parametrize(
    ("family", "peft", "kind"),
    [pytest.param(*row, marks=() if row == FAST else pytest.mark.slow, id="-".join(row)) for row in TABLE],
)
def test_every_check(family, peft, kind):
    num_outputs, loss, _ = KINDS[kind]
    model, batch = cases.encoder(family, num_outputs), text_for(family, kind)
    tun = cases.PEFT[peft](model)
    assert tun.apply(tun.theta0, batch).shape == (4, num_outputs)
    cases.check(tun, batch, model)
    result = jl.train(tun, batch, batch, jl.TrainConfig(loss=loss, max_steps=1, lam=0.1))
    assert result.history[-1]["distance"] > 0
    assert np.isfinite(result.history[-1]["eval_loss"])
