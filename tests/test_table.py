"""The table of checks: every encoder × PEFT method × kind of task, against the dense float64 reference."""

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxlin as jl
from jaxlin.tunable import leaf_paths
from tests import cases

KINDS = {
    "scores": (1, "squared", lambda labels: labels + 0.25),
    "two classes": (2, "cross_entropy", lambda labels: labels % 2),
    "three classes": (3, "squared", lambda labels: labels),
}
TABLE = [(family, peft, kind) for family in cases.FAMILIES for peft in cases.PEFT for kind in KINDS]
# A Latin square runs by default: every method once, every encoder and kind with many; the rest is slow.
DIAGONAL = {
    (cases.FAMILIES[i % len(cases.FAMILIES)], peft, tuple(KINDS)[(i + i // 4) % len(KINDS)])
    for i, peft in enumerate(cases.PEFT)
}


def text_for(family, kind):
    batch = cases.text_batch(4, longest=8, ids=40, padding_id=1 if family == "roberta" else 0)
    if family in ("roberta", "distilbert"):
        del batch["token_type_ids"]
    return {**batch, "labels": KINDS[kind][2](batch["labels"])}


@pytest.mark.parametrize(
    ("family", "peft", "kind"),
    [pytest.param(*row, marks=() if row in DIAGONAL else pytest.mark.slow, id="-".join(row)) for row in TABLE],
)
def test_every_check(family, peft, kind):
    num_outputs, loss, _ = KINDS[kind]
    model, batch = cases.encoder(family, num_outputs), text_for(family, kind)
    tun = cases.PEFT[peft](model)
    f0 = np.asarray(tun.apply(tun.theta0, batch))
    assert f0.shape == (4, num_outputs)
    np.testing.assert_allclose(f0, model.apply(model.params, batch), atol=1e-5)

    theta = cases.moved(tun)
    flat, unravel = ravel_pytree(theta)
    assert flat.size == tun.num_params
    assert jax.tree.all(jax.tree.map(np.array_equal, unravel(flat), theta))
    np.testing.assert_allclose(model.apply(jl.merge(tun, theta), batch), tun.apply(theta, batch), atol=1e-4)

    jac, columns = cases.reference_jacobian(tun, batch)
    step = flat - ravel_pytree(tun.theta0)[0]
    first_order = f0.reshape(-1) + jac @ np.asarray(step, np.float64)
    linear = np.asarray(jax.jit(jl.linearize(tun).apply)(theta, batch))
    assert cases.relative_error(linear.reshape(-1), first_order) < 1e-4

    for at in (tun.theta0, theta):
        jac, _ = cases.reference_jacobian(tun, batch, at)
        kernel = jl.ntk(tun, batch, theta=at, blocks="leaf", check_examples=0)
        assert cases.relative_error(kernel.matrix(), jac @ jac.T) < 1e-4
        assert set(kernel.parts) == set(leaf_paths(tun.theta0))
        for name, block in kernel.blocks.items():
            of_block = jac[:, columns == name]
            assert np.abs(block.matrix() - of_block @ of_block.T).max() < 1e-4 * np.abs(jac @ jac.T).max()

    result = jl.train(tun, batch, batch, jl.TrainConfig(loss=loss, max_steps=1, lam=0.1))
    assert result.history[-1]["distance"] > 0
    assert np.isfinite(result.history[-1]["eval_loss"])
