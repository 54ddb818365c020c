import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxlin as jl
from jaxlin.peft.function import PeftFunction
from jaxlin.tunable import ADAPTER_NAMES, leaf_paths
from tests import cases


@pytest.fixture(params=cases.PEFT)
def tun(request, model):
    return cases.PEFT[request.param](model)


def test_start_is_the_pretrained_model(tun, model, batch):
    np.testing.assert_allclose(cases.outputs(tun, batch), cases.outputs(model, batch), atol=5e-6)


def test_merge_agrees(tun, model, batch):
    theta = cases.moved(tun)
    found = cases.outputs(tun, batch, theta)
    assert np.abs(found - cases.outputs(model, batch)).max() > 1e-3
    np.testing.assert_allclose(cases.outputs(model, batch, jl.merge(tun, theta)), found, atol=2e-5)


def test_theta_and_frozen_weights_cover_the_model_once(tun, model):
    theta, frozen = set(leaf_paths(tun.theta0)), set(flatten_dict(tun.apply.frozen, sep="/"))
    assert not theta & frozen
    assert {p for p in theta | frozen if p.rpartition("/")[2] not in ADAPTER_NAMES} == set(
        flatten_dict(model.params, sep="/")
    )


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
    np.testing.assert_allclose(compiled(tun, batch), tun.apply(tun.theta0, batch), atol=5e-6)


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
    apply = PeftFunction(frozen, Linear(), (("map", 1.5),))
    found = apply({"map": {"lora_A": a, "lora_B": b}}, {"x": x})
    np.testing.assert_allclose(found, x @ frozen["map"]["kernel"] + frozen["map"]["bias"] + 1.5 * x @ a @ b, atol=1e-5)


class Mixer(nn.Module):
    """No text, no names of ours: a batch of matrices, mixed along both axes."""

    @nn.compact
    def __call__(self, x, scale):
        for i in range(2):
            x = x + nn.Dense(6, name=f"block_{i}_tokens")(x.swapaxes(1, 2)).swapaxes(1, 2)
            x = nn.LayerNorm(name=f"LayerNorm_{i}")(x + nn.tanh(nn.Dense(4, name=f"block_{i}_channels")(x)))
        return {"out": scale * nn.Dense(2, name="last", use_bias=False)(x.mean(axis=1))}


def mixer_inputs(batch):
    return {"x": batch["image"], "scale": 2.0}


def mixer_logits(output):
    return output["out"]


@pytest.fixture(scope="module")
def mixer():
    batch = {"image": np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32), "labels": np.arange(5) % 2}
    params = Mixer().init(jax.random.key(0), batch["image"], 2.0)["params"]
    return jl.from_linen(Mixer(), params, inputs=mixer_inputs, logits=mixer_logits), batch


MIXER_PEFT = {
    "lora": lambda model: jl.lora(model, rank=2, targets=r"block_\d_(tokens|channels)", modules_to_save=("last",)),
    "dora": lambda model: jl.lora(model, rank=2, targets=("last", "block_0_tokens"), use_dora=True),
    "ia3": lambda model: jl.ia3(model, targets=("block_0_tokens",), feedforward=("last",)),
    "norms": jl.layer_norm_only,
    "full": jl.full,
}


@pytest.mark.parametrize(
    "peft", [pytest.param(name, marks=() if name == "lora" else pytest.mark.slow) for name in MIXER_PEFT]
)
def test_a_module_that_is_no_text_model(mixer, peft):
    model, batch = mixer
    tun = MIXER_PEFT[peft](model)
    cases.check(tun, batch, model)
    table = jl.compare(tun, batch, batch, jl.TrainConfig(max_steps=3), lam_rel=[0, 1]).table
    assert {row["arm"] for row in table} >= {"full", "linearized", "kernel_regression"}


def test_a_head_of_several_modules_of_ones_own():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2, name="out_proj")(nn.tanh(nn.Dense(4, name="dense")(x)))

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return Head(name="classifier")(nn.Dense(4, name="body")(batch["x"]))

    batch = cases.vectors(3)
    model = jl.from_linen(Whole(), Whole().init(jax.random.key(0), batch)["params"])
    for tun in (jl.lora(model, rank=2, targets=("body",), train_head=False), jl.select(model, "body")):
        assert tun.apply(tun.theta0, batch).shape == (3, 2)
    assert set(jl.head_only(model).blocks) == {"classifier/dense", "classifier/out_proj"}
    for method in (jl.layer_norm_only, lambda m: jl.layer_norm_only(m, train_head=False)):
        with pytest.raises(jl.InputError, match="the model has no LayerNorm outside its head"):
            method(model)


def test_from_linen_refuses_what_it_cannot_use(mixer):
    model, batch = mixer
    with pytest.raises(jl.InputError, match="params is a list; expected the nested dict"):
        jl.from_linen(Mixer(), [1, 2])
    with pytest.raises(jl.InputError, match="probe_head needs a model of load_model"):
        jl.probe_head(model, batch, np.eye(2)[batch["labels"]])
    with pytest.raises(jl.InputError, match="None: the model has no numbered layers"):
        jl.lora(model, targets=("last",), layers=[0])
    with pytest.raises(jl.InputError, match="modules_to_save: 'lost' matches no module; near: last"):
        jl.lora(model, rank=2, targets=("last",), modules_to_save=("lost",))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.List([nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, batch):
        x = batch["x"]
        for layer in self.inner:
            x = self.drop(jnp.tanh(layer(x)))
        return self.last(x)


def test_nnx_module_by_filter():
    net, batch = Net(nnx.Rngs(0)), cases.vectors(6, num_labels=3)
    batch["x"] = batch["x"].astype(np.float32)
    net.eval()
    tun = jl.from_nnx(net)
    np.testing.assert_allclose(tun.apply(tun.theta0, batch), net(batch), atol=5e-6)
    last = jl.from_nnx(net, wrt=nnx.All(nnx.Param, lambda path, value: "last" in path))
    assert leaf_paths(last.theta0) == ("last/bias", "last/kernel")
    theta = cases.moved(tun)
    changed = nnx.clone(net)
    changed.inner[1].kernel[...] = theta["inner"][1]["kernel"]
    changed.last.bias[...] = theta["last"]["bias"]
    partly = {**tun.theta0, "inner": {0: tun.theta0["inner"][0], 1: {**tun.theta0["inner"][1]}}}
    partly["inner"][1]["kernel"] = theta["inner"][1]["kernel"]
    partly["last"] = {**tun.theta0["last"], "bias": theta["last"]["bias"]}
    np.testing.assert_allclose(tun.apply(partly, batch), changed(batch), atol=5e-6)
    for tunable in (tun, last):
        cases.check(tunable, batch)
    assert jl.train(tun, batch, None, jl.TrainConfig(max_steps=2)).history[-1]["distance"] > 0
    with pytest.raises(jl.InputError, match="selects nothing of the Net"):
        jl.from_nnx(net, wrt=nnx.BatchStat)


def test_dora_and_ia3_are_their_formulas():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, batch):
            return nn.Dense(3, name="second")(jnp.tanh(nn.Dense(4, name="first")(batch["x"])))

    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    model = jl.from_linen(Two(), Two().init(jax.random.key(1), {"x": x})["params"])
    w, v = model.params["first"]["kernel"], model.params["second"]["kernel"]
    tun = jl.lora(model, rank=2, alpha=3, targets=("first",), use_dora=True)
    theta = cases.moved(tun)["first"]
    weight = w + 1.5 * theta["lora_A"] @ theta["lora_B"]
    weight = theta["dora_magnitude"] * weight / np.linalg.norm(weight, axis=0)
    np.testing.assert_allclose(tun.apply({"first": theta}, {"x": x}), np.tanh(x @ weight) @ v, atol=1e-5)
    assert np.allclose(tun.theta0["first"]["dora_magnitude"], np.linalg.norm(w, axis=0))

    tun = jl.ia3(model, targets=("first",), feedforward=("second",))
    theta = cases.moved(tun)
    hidden = np.tanh((x @ w) * theta["first"]["ia3_out"]) * theta["second"]["ia3_in"]
    np.testing.assert_allclose(tun.apply(theta, {"x": x}), hidden @ v, atol=1e-5)
    with pytest.raises(jl.InputError, match="among targets and feedforward"):
        jl.ia3(model, targets=("first",), feedforward=("first",))
    dead = jl.from_linen(Two(), {**model.params, "first": {"kernel": w.at[:, 2].set(0), "bias": jnp.zeros(4)}})
    with pytest.raises(jl.InputError, match="first has an output with all weights zero"):
        jl.lora(dead, rank=2, targets=("first",), use_dora=True)


def test_ranks_and_scales_by_pattern(model):
    tun = jl.lora(
        model, rank=2, alpha=3, use_rslora=True, rank_pattern={"value": 4}, alpha_pattern={"layer_1/.*/query": 5}
    )
    scales = {path.removeprefix("encoder/"): value for path, value in tun.apply.scales}
    assert scales == {
        "layer_0/attention/query": 3 / 2**0.5,
        "layer_0/attention/value": 3 / 4**0.5,
        "layer_1/attention/query": 5 / 2**0.5,
        "layer_1/attention/value": 3 / 4**0.5,
    }
    assert tun.theta0["encoder"]["layer_0"]["attention"]["value"]["lora_A"].shape == (32, 4)
    with pytest.raises(jl.InputError, match="rank_pattern: 'keys' matches none of the adapted modules; near"):
        jl.lora(model, rank_pattern={"keys": 2})
    with pytest.raises(jl.InputError, match=r"LoRA rank 40: expected 1 to 32, the smallest side of .*value"):
        jl.lora(model, rank_pattern={"value": 40})


def test_factors_that_the_module_never_calls_are_an_error(model, batch):
    tun = jl.lora(model, rank=2, layers=[0])
    theta = {**tun.theta0, "nowhere": {"lora_A": jnp.ones((32, 2)), "lora_B": jnp.ones((2, 32))}}
    with pytest.raises(RuntimeError, match="3 modules have adapters, but 2 calls met one"):
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
