"""Choices of blocks that are trained together, each against training it alone."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import jaxlin as jl
from jaxlin.peft.part import only
from jaxlin.sharding import shard
from jaxlin.training import choices as module
from jaxlin.tunable import leaf_paths
from tests import cases

LAYERS = ("encoder/layer_0/attention/value", "encoder/layer_1/attention/query")
CHOICES = [[f"{layer}/lora_{part}" for layer in layers for part in "AB"] for layers in (LAYERS[:1], LAYERS, LAYERS[1:])]
CHOICES[1].append("classifier")


def leaves(theta):
    return dict(zip(leaf_paths(theta), jax.tree.leaves(theta), strict=True))


def same(found, expected, tolerance=2e-5):
    for leaf, other in zip(jax.tree.leaves(found.theta), jax.tree.leaves(expected.theta), strict=True):
        np.testing.assert_allclose(leaf, other, atol=tolerance)
    for row, other in zip(found.history, expected.history, strict=True):
        assert row.keys() == other.keys()
        known = [name for name, value in other.items() if value is not None]
        assert [row[name] for name in known] == pytest.approx([other[name] for name in known], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"batch_size": 3, "max_steps": 5, "eval_steps": 2}, id="adam"),
        pytest.param(
            {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4, "group_by_length": True},
            id="accumulated",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"optimizer": "sgd", "loss": "squared", "batch_size": 6, "max_steps": 3, "group_by_length": True},
            id="whole",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_is_what_training_it_alone_gives(model, options):
    tun, train, held_out = jl.lora(model, rank=2), cases.text_batch(6), cases.text_batch(4, seed=5)
    config, rates, lams = jl.TrainConfig(**options), [0.05, 0.02, 0.01], [0.0, 1.0, 3.0]
    found = jl.train_choices(tun, train, held_out, config, choices=CHOICES, learning_rates=rates, lams=lams)
    assert not found.diverged
    for result, blocks, rate, lam in zip(found.results, CHOICES, rates, lams, strict=True):
        own = dataclasses.replace(config, learning_rate=rate, lam=lam)
        same(result, jl.train(only(tun, blocks), train, held_out, own))
        for name, paths in tun.blocks.items():
            if name not in blocks:
                for path in paths:
                    np.testing.assert_array_equal(leaves(result.theta)[path], leaves(tun.theta0)[path])


@pytest.mark.slow
def test_one_that_diverges_leaves_the_others(model, batch):
    tun, config = jl.lora(model, rank=2), jl.TrainConfig(optimizer="sgd", batch_size=3, max_steps=6)
    found = jl.train_choices(tun, batch, config=config, choices=CHOICES[:2], learning_rates=[0.1, 1e30])
    assert list(found.diverged) == [1]
    assert "choice 1, encoder/layer_0/attention/value/lora_A, " in str(found.diverged[1])
    assert f"at step {len(found.results[1].history) + 1} of 6" in str(found.diverged[1])
    alone = dataclasses.replace(config, learning_rate=0.1)
    same(found.results[0], jl.train(only(tun, CHOICES[0]), batch, config=alone))


def test_choices_and_rates_share_a_program(model, batch, monkeypatch):
    tun, config, traces = jl.lora(model, rank=2), jl.TrainConfig(batch_size=6, max_steps=3), []
    forward = type(tun.apply).__call__
    monkeypatch.setattr(type(tun.apply), "__call__", lambda *given: traces.append(0) or forward(*given))
    jl.train_choices(tun, batch, config=config, choices=CHOICES[:2])
    first = len(traces)
    jl.train_choices(tun, batch, config=config, choices=CHOICES[1:], learning_rates=[0.1, 0.2], lams=[1.0, 2.0])
    assert len(traces) - first <= 1  # the number of outputs


@pytest.mark.slow
def test_in_half_precision(model):
    tun, train = jl.lora(model, rank=2), cases.text_batch(6)
    config = jl.TrainConfig(batch_size=3, max_steps=4, learning_rate=0.02, compute_dtype="bfloat16")
    exact, found = (
        jl.train_choices(tun, train, config=how, choices=CHOICES[:1]).results[0]
        for how in (dataclasses.replace(config, compute_dtype="float32"), config)
    )
    expected = jl.train(only(tun, CHOICES[0]), train, config=config)
    assert found.history[0]["loss"] == pytest.approx(expected.history[0]["loss"], rel=1e-6)
    assert found.history[0]["loss"] != exact.history[0]["loss"]
    assert [row["loss"] for row in found.history] == pytest.approx([row["loss"] for row in expected.history], rel=0.02)


def test_the_rest_stays_whatever_the_optimizer_does():
    tun = jl.Tunable(cases.mlp_apply, cases.mlp().theta0, {name: (name,) for name in leaf_paths(cases.mlp().theta0)})
    first, *others = tun.blocks
    config = jl.TrainConfig(optimizer=optax.adamw(0.1, weight_decay=0.5), batch_size=4, max_steps=3)
    (result,) = jl.train_choices(tun, cases.vectors(8), config=config, choices=[[first]]).results
    for name in others:
        np.testing.assert_array_equal(leaves(result.theta)[name], leaves(tun.theta0)[name])
    moved = np.linalg.norm(leaves(result.theta)[first] - leaves(tun.theta0)[first])
    assert result.history[-1]["distance"] == pytest.approx(moved, rel=1e-5)


def test_memory_that_runs_out(model, batch, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(module, "_every", lambda step: full)
    with pytest.raises(jl.DeviceMemoryError, match=r"tokens in each of 3 runs. Lower, .* together, from 3 to 2; "):
        jl.train_choices(jl.lora(model, rank=2), batch, config=jl.TrainConfig(batch_size=3), choices=CHOICES)


def test_a_model_on_a_mesh_is_refused(model, batch):
    tun = shard(jl.lora(model, rank=2), jl.make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1]))
    with pytest.raises(jl.InputError, match="lies on a mesh"):
        jl.train_choices(tun, batch, choices=CHOICES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": []}, "choices is empty"),
        ({"choices": [[]]}, "choice 0 is \\[\\]; expected names of blocks"),
        ({"choices": [CHOICES[0], [*CHOICES[1], "layer_7"]]}, "choice 1 has 'layer_7', which is no block; there are "),
        ({"choices": ["classifier"]}, "choice 0 is 'classifier'"),
        ({"choices": CHOICES, "lams": [1.0]}, "lams has 1 values; expected one for each of 3 runs"),
        ({"choices": CHOICES[:1], "learning_rates": [0.0]}, "learning_rate=0.0"),
        (
            {"choices": CHOICES[:1], "learning_rates": [0.1], "config": jl.TrainConfig(optimizer=optax.sgd(0.1))},
            "rate of their own",
        ),
    ],
)
def test_bad_input(model, batch, options, message):
    with pytest.raises(jl.InputError, match=message):
        jl.train_choices(jl.lora(model, rank=2), batch, **options)
