import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import jaxlin as jl
from jaxlin.peft.function import PeftFunction
from jaxlin.tunable import leaf_paths
from tests import cases


@pytest.fixture(params=cases.PEFT)
def tun(request, model):
    return cases.PEFT[request.param](model)


def test_start_is_the_pretrained_model(tun, model, batch):
    np.testing.assert_allclose(tun.apply(tun.theta0, batch), model.apply(model.params, batch), atol=1e-6)


def test_merge_agrees(tun, model, batch):
    theta = cases.moved(tun)
    found = tun.apply(theta, batch)
    assert np.abs(found - model.apply(model.params, batch)).max() > 1e-3
    np.testing.assert_allclose(model.apply(jl.merge(tun, theta), batch), found, atol=2e-5)


def test_theta_and_frozen_weights_cover_the_model_once(tun, model):
    theta, frozen = set(leaf_paths(tun.theta0)), set(flatten_dict(tun.apply.frozen, sep="/"))
    assert not theta & frozen
    assert {p for p in theta | frozen if "lora_" not in p} == set(flatten_dict(model.params, sep="/"))


def test_blocks_partition_theta(tun):
    for by in (None, "layer", "module", "leaf"):
        groups = tun.grouped(by)
        assert sorted(path for paths in groups.values() for path in paths) == sorted(leaf_paths(tun.theta0))
    assert len(tun.grouped("leaf")) >= len(tun.grouped("module")) >= len(tun.grouped("layer"))
    for name in tun.grouped("layer"):  # LoRA's A and B are never in one block
        paths = tun.grouped("layer")[name]
        assert len({path.endswith("lora_A") for path in paths}) == 1


def test_tunable_is_a_pytree(tun, batch):
    again = jax.tree.map(lambda leaf: leaf, tun)
    assert again.blocks == tun.blocks
    assert jax.tree.structure(again) == jax.tree.structure(tun)
    compiled = jax.jit(lambda t, b: t.apply(t.theta0, b))
    np.testing.assert_allclose(compiled(tun, batch), tun.apply(tun.theta0, batch), atol=1e-6)


def test_blocks_of_lora(model):
    tun = jl.lora(model, rank=2, layers=[0])
    query = "encoder/layer_0/attention/query"
    assert tun.blocks[f"{query}/lora_A"] == (f"{query}/lora_A",)
    assert tun.grouped("layer") == {
        "classifier": ("classifier/bias", "classifier/kernel"),
        "layer_0/lora_A": (f"{query}/lora_A", "encoder/layer_0/attention/value/lora_A"),
        "layer_0/lora_B": (f"{query}/lora_B", "encoder/layer_0/attention/value/lora_B"),
    }
    assert tun.num_params == 2 * 2 * (32 * 2 + 2 * 32) // 2 + 33 * 3


def test_lora_formula_and_scale(batch):
    """x·W + (α/r)·(x·A)·B on a module that is one dense map."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return nn.Dense(3, name="map")(batch["x"])

    x, key = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32), jax.random.key(0)
    frozen = Linear().init(key, {"x": x})["params"]
    a, b = jax.random.normal(key, (5, 2)), jax.random.normal(key, (2, 3))
    apply = PeftFunction(frozen, Linear(), 1.5)
    found = apply({"map": {"lora_A": a, "lora_B": b}}, {"x": x})
    np.testing.assert_allclose(found, x @ frozen["map"]["kernel"] + frozen["map"]["bias"] + 1.5 * x @ a @ b, atol=1e-5)


def test_factors_that_the_module_never_calls_are_an_error(model, batch):
    tun = jl.lora(model, rank=2, layers=[0])
    theta = {**tun.theta0, "nowhere": {"lora_A": jnp.ones((32, 2)), "lora_B": jnp.ones((2, 32))}}
    with pytest.raises(RuntimeError, match="3 modules have LoRA factors, but 2 calls met one"):
        tun.apply(theta, batch)


def test_a_draw_depends_on_its_own_path_only(model):
    everything, some = jl.lora(model, rank=3, targets=r".*(attention|mlp)/\w+"), jl.lora(model, rank=3, layers=[1])
    path = ("encoder", "layer_1", "attention", "query", "lora_A")
    a, b = (flatten_dict(t.theta0)[path] for t in (everything, some))
    assert jnp.array_equal(a, b)
    assert jnp.abs(a).max() <= 32**-0.5
    assert a.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.2)
    assert not jnp.array_equal(a, flatten_dict(jl.lora(model, rank=3, rng=1).theta0)[path])


BAD = {
    "rank 0": ({"rank": 0}, "LoRA rank 0: expected 1 to 32"),
    "rank too large": ({"rank": 33}, "LoRA rank 33"),
    "no match": ({"targets": ("querry",)}, "'querry' matches no dense module; near: .*query"),
    "regex": ({"targets": "("}, "not a regular expression"),
    "regex matches nothing": ({"targets": "attention"}, "'attention' matches no dense module"),
    "layer": ({"layers": [2]}, r"layers=\[2\]: expected some of 0 to 1"),
    "no layer": ({"layers": []}, "expected some of 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lora_arguments(model, case):
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        jl.lora(model, **options)


def test_bad_selections(model):
    with pytest.raises(jl.InputError, match="matches no parameter; near: encoder"):
        jl.select(model, "layer_9")
    with pytest.raises(jl.InputError, match="not a regular expression"):
        jl.select(model, "[")


def test_a_zero_head_must_be_trained():
    model = cases.tiny_model(head="mean", head_init="zero")
    jl.lora(model)
    for tune in (lambda: jl.lora(model, train_head=False), lambda: jl.bias_only(model, train_head=False)):
        with pytest.raises(jl.InputError, match="zero and frozen"):
            tune()


def test_tunable_checks_its_blocks():
    theta = {"a": jnp.ones(2), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"missing, unknown or repeated: \['b'\]"):
        jl.Tunable(lambda t, b: t["a"], theta, {"only": ("a",)})
    with pytest.raises(ValueError, match="nothing to tune"):
        jl.Tunable(lambda t, b: b["x"], {})
    with pytest.raises(ValueError, match="unknown"):
        jl.Tunable(lambda t, b: t["a"], theta).grouped("layers")
