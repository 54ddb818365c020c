import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxlin as jl
from jaxlin.ntk.jacobian import to_float64
from tests import cases


def wide(tun):
    """The Tunable in float64, for use under x64."""
    return jax.tree.map(jnp.asarray, to_float64(tun))


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "full"])  # the rest: tests/test_table.py
def test_first_order_by_finite_differences(model, batch, name):
    """The slope of f̄ is a central difference of f, to 1e-8."""
    tun = cases.PEFT[name](model)
    at = cases.moved(tun, 0.05)
    direction = jax.tree.map(jnp.subtract, cases.moved(tun, 0.05, seed=3), tun.theta0)
    with jax.enable_x64(True):
        apply, at, direction = to_float64((tun.apply, at, direction))
        text = {key: value for key, value in batch.items() if key != "labels"}
        lin = jl.linearize(jl.Tunable(apply, at))

        def shifted(t):
            return jax.tree.map(lambda a, d: a + t * d, at, direction)

        f = jax.jit(lambda t: apply(shifted(t), text))
        slope = cases.outputs(lin, text, shifted(1.0)) - f(0.0)
        step = 1e-4  # fourth order, so that truncation is below 1e-10
        central = (8 * (f(step) - f(-step)) - (f(2 * step) - f(-2 * step))) / (12 * step)
        assert slope.dtype == jnp.float64
        assert np.abs(slope).max() > 1e-3
        np.testing.assert_allclose(slope, central, atol=1e-8 * max(1, float(np.abs(slope).max())))


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_delta(seed, a, b):
    with jax.enable_x64(True):
        tun, batch = cases.mlp(dtype=jnp.float64), cases.vectors(5)
        lin = jl.linearize(tun)
        f0 = lin.apply(tun.theta0, batch)

        def response(delta):
            return lin.apply(jax.tree.map(jnp.add, tun.theta0, delta), batch) - f0

        u, v = (jax.tree.map(jnp.subtract, cases.moved(tun, 1.0, seed + i), tun.theta0) for i in (0, 1))
        mixed = jax.tree.map(lambda x, y: a * x + b * y, u, v)
        np.testing.assert_allclose(response(mixed), a * response(u) + b * response(v), atol=1e-12)


@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.slow)], indirect=True)
def test_value_at_the_point_and_late_linearization(model, batch, x64):
    tun = jl.lora(model, rank=3)
    at = cases.moved(tun)
    for lin, point in ((jl.linearize(tun), tun.theta0), (jl.linearize(tun, at), at)):
        np.testing.assert_array_equal(lin.apply(point, batch), tun.apply(point, batch))
        assert lin.blocks == tun.blocks
        assert jax.tree.structure(lin.theta0) == jax.tree.structure(tun.theta0)
    late = jl.linearize(tun, at)
    again = jl.linearize(late, cases.moved(tun, seed=5))  # a linear function is its own linearization
    there = cases.moved(tun, seed=6)
    np.testing.assert_allclose(cases.outputs(again, batch, there), cases.outputs(late, batch, there), atol=1e-5)


def test_transformations(model, batch):
    tun = jl.lora(model, rank=3)
    lin, theta = jl.linearize(tun), cases.moved(tun)
    text = {key: jnp.asarray(value) for key, value in batch.items() if key != "labels"}
    plain = lin.apply(theta, text)
    np.testing.assert_allclose(cases.outputs(lin, text, theta), plain, atol=1e-5)
    each = jax.jit(jax.vmap(lambda example: lin.apply(theta, {k: v[None] for k, v in example.items()})[0]))(text)
    np.testing.assert_allclose(each, plain, atol=1e-5)
    tangent = jax.tree.map(jnp.ones_like, theta)

    @jax.jit
    def products(t, at):
        _, pushed = jax.jvp(lambda p: t.apply(p, text), (at,), (tangent,))
        outputs, pullback = jax.vjp(lambda p: t.apply(p, text), at)
        return pushed, pullback(jnp.ones_like(outputs))[0]

    (pushed, pulled), (expected, wanted) = products(lin, theta), products(tun, tun.theta0)
    np.testing.assert_allclose(pushed, expected, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), pulled, wanted)
    grads = jax.jit(jax.grad(lambda p: lin.apply(p, text).sum()))(theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, pulled)


def test_a_step_is_one_primal_one_tangent_one_transpose(model, batch):
    """FLOPs as compiled: the gradient of f̄ costs 3 forwards for LoRA, that of f 2 (design: physical limits)."""
    tun = jl.lora(model, rank=1, targets=("query",))
    text = {key: jnp.asarray(value) for key, value in batch.items() if key != "labels"}

    def flops(f):
        return jax.jit(f).lower(tun, text).compile().cost_analysis()["flops"]

    forward = flops(lambda t, b: t.apply(t.theta0, b))
    full = flops(lambda t, b: jax.grad(lambda p: t.apply(p, b).sum())(t.theta0))
    linear = flops(lambda t, b: jax.grad(lambda p: jl.linearize(t).apply(p, b).sum())(t.theta0))
    assert full / forward < 2.5
    assert linear / forward < 4.2


def test_another_structure_is_refused(model):
    tun = jl.lora(model, rank=3)
    with pytest.raises(jl.InputError, match="structure and shapes of theta0"):
        jl.linearize(tun, jl.lora(model, rank=2).theta0)
