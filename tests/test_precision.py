import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.ntk.jacobian import jacobian
from jaxlin.training.cached import cached_linearized
from jaxlin.training.precision import in_dtype
from tests import cases

EPS = 2.0**-8
"""Largest relative error of rounding to bfloat16."""


def rounded(tree):
    return jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf, jnp.bfloat16), np.float64), tree)


def test_it_is_the_function_of_rounded_weights_with_rounded_steps():
    tun, rows = cases.mlp(3), cases.vectors(6, num_labels=3)
    theta = cases.moved(tun)
    found = np.asarray(in_dtype(tun, "bfloat16").apply(theta, rows), np.float64)
    w, x = rounded(theta), rounded(rows["x"])
    by_hand = rounded(np.tanh(rounded(rounded(x @ w["hidden"]["kernel"]) + w["hidden"]["bias"]))) @ w["out"]["kernel"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_hand, atol=4 * EPS * np.abs(by_hand).max())
    exact = np.asarray(tun.apply(theta, rows), np.float64)
    assert 1e-4 < cases.relative_error(found, exact) < 8 * EPS


def test_a_small_step_from_at_is_not_rounded_away():
    """theta − at is formed in float32: in bfloat16 all of this step would vanish."""
    tun, rows = cases.mlp(3), cases.vectors(6, num_labels=3)
    theta = jax.tree.map(lambda leaf: leaf * (1 + 1e-4), tun.theta0)
    linear = jl.linearize(tun)
    moved = {
        name: np.asarray(one.apply(theta, rows), np.float64) - np.asarray(one.apply(tun.theta0, rows), np.float64)
        for name, one in {"exact": linear, "bf16": in_dtype(linear, "bfloat16")}.items()
    }
    assert cases.relative_error(moved["bf16"], moved["exact"]) < 10 * EPS


@pytest.mark.parametrize("linear", [False, True], ids=["full", "linearized"])
@pytest.mark.parametrize("parts", [1, 2])
def test_training_in_bfloat16(linear, parts):
    tun, rows = cases.mlp(3), cases.vectors(20, num_labels=3)
    tun = jl.linearize(tun) if linear else tun
    config = jl.TrainConfig(batch_size=8, max_steps=12, learning_rate=0.02, lam=0.1)
    plain = jl.train(tun, rows, config=config)
    less = jl.train(
        tun,
        rows,
        config=dataclasses.replace(config, compute_dtype="bfloat16", gradient_accumulation_steps=parts),
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(less.theta))
    losses = [np.array([row["loss"] for row in result.history]) for result in (plain, less)]
    assert 1e-5 < cases.relative_error(losses[1], losses[0]) < 0.02
    way = np.linalg.norm([row["distance"] for row in plain.history])
    apart = np.linalg.norm([a["distance"] - b["distance"] for a, b in zip(plain.history, less.history, strict=True)])
    assert apart < 0.02 * way


def test_a_held_jacobian_has_no_network():
    tun, rows = cases.mlp(), jl.Dataset.from_columns(cases.vectors(6))
    held, _ = cached_linearized(tun, [rows], [jacobian(tun, rows)])
    assert in_dtype(held, "bfloat16") is held


def test_statistics_are_float32(model, batch):
    """Softmax and LayerNorm of a bfloat16 network: no reduction of theirs has a bfloat16 input."""
    tun = in_dtype(jl.full(model), "bfloat16")
    text = str(jax.make_jaxpr(tun.apply)(tun.theta0, batch))
    reductions = [line for line in text.splitlines() if "reduce_max[" in line or "exp " in line or "rsqrt" in line]
    assert reductions
    assert not any("bf16[" in line.partition("=")[0] for line in reductions), reductions


def test_bad_dtype():
    with pytest.raises(jl.InputError, match="compute_dtype='float16' is unknown; expected one of float32, bfloat16"):
        jl.TrainConfig(compute_dtype="float16").check()
