"""The bounds of theory 3 to 6 on real models: every one that applies holds, and what was measured is what it says."""

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.ntk.change import distance
from jaxlin.ntk.jacobian import to_float64
from jaxlin.training.bound_sweep import SCALINGS, bound_sweep, measured_steps
from tests import cases

LAM_REL = (0.0, 0.3, 10.0, 300.0)


@pytest.fixture(scope="module")
def transformer():
    return jl.lora(cases.tiny_model(), rank=2), cases.text_batch(6, longest=8)


@pytest.fixture(scope="module")
def sweep(transformer):
    return bound_sweep(*transformer, lam_rel=LAM_REL, steps=12, directions=2)


def test_every_bound_holds_on_a_tuned_transformer(sweep):
    assert len(sweep.table) == 11 * len(LAM_REL)
    for row in sweep.table:
        assert row["holds"] is (True if row["applies"] else None), row
        assert (row["failing"] is None) == row["applies"]
        assert 0 <= row["tightness_end"] <= row["tightness"] <= 1
    not_applicable = {(row["bound"][:4], row["lam"]) for row in sweep.table if not row["applies"]}
    assert {("4(a)", 0.0), ("4(b)", 0.0)} <= not_applicable
    for row in sweep.table:  # with a pull, all of sections 4 and 5 apply
        assert row["applies"] or row["lam"] == 0 or row["bound"].startswith("3"), row
