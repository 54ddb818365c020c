import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.models.encoder import EncoderConfig, SequenceClassifier
from jaxlin.models.model import Model
from tests import cases


@jax.jit
def value_and_gradient(apply, theta, batch):
    return jax.value_and_grad(lambda p: jnp.sum(jnp.sin(apply(p, batch))))(theta)


@pytest.mark.parametrize(
    ("peft", "linear"),
    [
        ("lora", True),
        pytest.param("lora", False, marks=pytest.mark.slow),
        pytest.param("dora", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_the_same(model, batch, peft, linear):
    plain, less = (cases.PEFT[peft](one) for one in (model, jl.with_remat(model)))
    theta = cases.moved(plain)  # under LoRA a module that the adapters miss would change the outputs
    if linear:
        plain, less = jl.linearize(plain), jl.linearize(less)
    expected, found = (value_and_gradient(tun.apply, theta, batch) for tun in (plain, less))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    primitives = str(jax.make_jaxpr(less.apply)(theta, batch))
    assert "remat2" in primitives or "checkpoint[" in primitives


CONFIG = EncoderConfig(50, 32, 6, 2, 64, 40, 0)
AS_ON_ACCELERATORS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""On a CPU XLA takes the barriers away that keep what is computed anew apart from what was computed before."""


@pytest.mark.slow
@pytest.mark.parametrize("linear", [False, True], ids=["full", "linearized"])
def test_a_step_holds_less(linear):
    batch = cases.text_batch(16, longest=32, ids=50)
    module = SequenceClassifier(CONFIG, 2, "mean")
    params = jax.eval_shape(module.init, jax.random.key(0), batch)["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)

    def temporary(config):
        tun = jl.full(Model(params, module.clone(config=config)))
        tun = jl.linearize(tun) if linear else tun
        compiled = value_and_gradient.lower(tun.apply, tun.theta0, batch).compile(AS_ON_ACCELERATORS)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(dataclasses.replace(CONFIG, remat=True)) < temporary(CONFIG) / 2


@pytest.mark.slow
def test_the_factored_engine_turns_it_off(model, batch):
    kernels = [
        jl.ntk(jl.lora(one, rank=2, layers=[1]), batch, engine=engine, check_examples=0).matrix()
        for one, engine in ((model, "jacobian"), (jl.with_remat(model), "factored"))
    ]
    assert cases.relative_error(kernels[1], kernels[0]) < 1e-5


class Wrapped(nn.Module):
    """A user's module with layers of nn.remat."""

    @nn.compact
    def __call__(self, batch):
        hidden = nn.remat(nn.Dense)(5, name="hidden")(jnp.asarray(batch["x"], jnp.float32))
        return nn.Dense(2, name="classifier")(jnp.tanh(hidden))


def test_the_factored_engine_refuses_what_it_cannot_see_into():
    rows = cases.vectors(4)
    tun = jl.full(jl.from_linen(Wrapped(), Wrapped().init(jax.random.key(0), rows)["params"]))
    with pytest.raises(jl.InputError, match="does not see into modules under"):
        jl.ntk(tun, rows, engine="factored")
    kernel = jl.ntk(tun, rows)
    jac, _ = cases.reference_jacobian(tun, rows)
    assert cases.relative_error(kernel.matrix(), jac @ jac.T) < 1e-5


def test_other_modules_are_refused():
    params = Wrapped().init(jax.random.key(0), cases.vectors(4))["params"]
    with pytest.raises(jl.InputError, match="wrap the layers in"):
        jl.with_remat(jl.from_linen(Wrapped(), params))
