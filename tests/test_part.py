"""A part of theta, masked or alone: the same function, the same derivatives."""

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.peft.part import only, part_of
from jaxlin.tunable import leaf_paths
from tests import cases

BLOCKS = ("encoder/layer_1/attention/value/lora_A", "encoder/layer_1/attention/value/lora_B", "classifier")


@pytest.fixture(scope="module")
def tun(model):
    return jl.lora(model, rank=2)


@pytest.mark.slow
def test_a_part_is_the_function_of_its_leaves(tun, batch):
    part = part_of(tun, BLOCKS)
    moved = cases.moved(part)
    whole = part.apply.whole(moved)
    assert set(part.theta0) == {path for name in BLOCKS for path in tun.blocks[name]}
    np.testing.assert_array_equal(part.apply(moved, batch), tun.apply(whole, batch))
    jac, columns = cases.reference_jacobian(tun, batch, whole)
    own, own_columns = cases.reference_jacobian(part, batch, moved)
    order = np.concatenate([np.flatnonzero(columns == path) for path in dict.fromkeys(own_columns)])
    np.testing.assert_allclose(own, jac[:, order], atol=1e-12)
    kernel = jl.ntk(part, batch, theta=moved, check_examples=0)
    assert cases.relative_error(kernel.matrix(), own @ own.T) < 1e-5
    assert set(kernel.parts) == set(BLOCKS)


@pytest.mark.slow
def test_training_what_is_masked_is_training_the_part(tun, batch):
    config = jl.TrainConfig(batch_size=3, max_steps=4, learning_rate=0.05, lam=1.0)
    masked = jl.train(only(tun, BLOCKS), batch, config=config)
    part = part_of(tun, BLOCKS)
    alone = jl.train(part, batch, config=config)
    theta = dict(zip(leaf_paths(masked.theta), jax.tree.leaves(masked.theta), strict=True))
    start = dict(zip(leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), strict=True))
    for path, leaf in theta.items():
        expected = alone.theta.get(path, start[path])
        np.testing.assert_allclose(leaf, expected, atol=2e-5)
    assert [row["loss"] for row in masked.history] == pytest.approx([row["loss"] for row in alone.history], rel=1e-4)


def test_masks_share_a_compilation(tun, batch):
    traced = jax.jit(lambda apply, theta: apply(theta, batch))
    for blocks in (BLOCKS, BLOCKS[:1], ()):
        traced(only(tun, blocks).apply, tun.theta0)
    assert traced._cache_size() == 1
