"""Kernels that are multiplied where the network runs, as on a GPU, against those of the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.ntk import on_device, work
from jaxlin.ntk.store import KernelStore
from tests import cases


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice alone is made as there; the device is whichever there is."""

    def choose(there):
        monkeypatch.setattr(work, "multiplies_on_device", lambda: there)

    return choose


def both(choose, *args, check_examples=0, **options):
    choose(False)
    expected = jl.ntk(*args, check_examples=check_examples, **options)
    choose(True)
    return jl.ntk(*args, check_examples=check_examples, **options), expected


def test_a_gpu_is_where_it_multiplies():
    assert on_device.multiplies_on_device() == (jax.default_backend() == "gpu")


POINTS = [(name, away) for name in ("lora", "ia3", "full") for away in (False, True)]


@pytest.mark.parametrize(
    ("name", "away"),
    [
        pytest.param(
            *point,
            marks=() if point == ("lora", True) else pytest.mark.slow,
            id=f"{point[0]}-{'elsewhere' if point[1] else 'theta0'}",
        )
        for point in POINTS
    ],
)
def test_it_equals_the_host(model, batch, name, away, as_on_a_gpu):
    tun = cases.PEFT[name](model)
    theta = cases.moved(tun) if away else None
    found, expected = both(as_on_a_gpu, tun, batch, theta=theta, blocks="leaf", check_examples=1)
    assert found.info.engine == "factored"
    assert list(found.parts) == list(expected.parts)
    for block, part in expected.parts.items():
        assert np.abs(found.parts[block] - part).max() < 1e-6 * np.abs(expected.array).max()
    np.testing.assert_array_equal(found.matrix(), found.matrix().T)
    # Rounding that is measured: it differs with the order of sums, which XLA chooses for each machine.
    assert found.info.epsilon_J == pytest.approx(expected.info.epsilon_J, rel=0.5)
    dense, _ = cases.reference_jacobian(tun, batch, theta)
    assert cases.relative_error(found.matrix(), dense @ dense.T) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("trace", "factored"),
        ("pseudo", "factored"),
        ("diagonal", "factored"),
        ("signgd", "factored"),
        ("asymmetric_signgd", "factored"),
        ("trace", "jacobian"),
        ("signgd", "jacobian"),
    ],
)
def test_kinds_engines_and_other_examples(model, batch, kind, engine, as_on_a_gpu):
    tun, other = jl.select(model, "layer_1/mlp/up|word"), cases.text_batch(4, seed=9, longest=12)
    for x2 in (None, other):
        found, expected = both(as_on_a_gpu, tun, batch, x2, kind=kind, engine=engine)
        assert cases.relative_error(found.array, expected.array) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["factored", "jacobian"])
def test_other_precisions(batch, engine, as_on_a_gpu):
    for model, dtype, tolerance in (
        (cases.tiny_model(), "float64", 1e-12),
        (cases.tiny_model(dtype=jnp.bfloat16), None, 1e-6),
    ):
        tun = jl.select(model, "layer_1/mlp|pooler")
        found, expected = both(as_on_a_gpu, tun, batch, engine=engine, dtype=dtype)
        assert cases.relative_error(found.array, expected.array) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [133_000, 100_000], ids=["in memory", "in files"])
def test_invariance_to_chunks_tiles_and_slabs(model, batch, memory_budget, as_on_a_gpu):
    tun = jl.select(model, "layer_1/mlp|word")
    found, expected = both(as_on_a_gpu, tun, batch, memory_budget=memory_budget, blocks="layer")
    whole = jl.ntk(tun, batch, blocks="layer")
    for name, part in expected.parts.items():
        assert cases.relative_error(found.parts[name], part) < 1e-6
        assert cases.relative_error(found.parts[name], whole.parts[name]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [1, 3])
def test_memory_that_runs_out_in_a_pass_that_is_on_its_way(model, batch, fails_at, as_on_a_gpu, monkeypatch):
    """A device says so when a result is waited for, with the next pass begun."""
    tun, keep, calls, seen = jl.select(model, "layer_1/mlp/up/bias"), work.Work._keep, [], []

    def keep_or_fail(self, rows, position, examples, found):
        calls.append(len(examples))
        if len(calls) == fails_at:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        keep(self, rows, position, examples, found)

    expected = jl.ntk(tun, batch, check_examples=0)
    as_on_a_gpu(True)
    monkeypatch.setattr(work, "_GPU_CHUNK", 2)
    monkeypatch.setattr(work.Work, "_keep", keep_or_fail)
    found = jl.ntk(tun, batch, check_examples=0, progress=lambda *step: seen.append(step))
    assert cases.relative_error(found.array, expected.array) < 1e-6
    assert "out of memory in a pass of 2 examples: 1 from then on" in found.info.note
    assert set(calls[fails_at:]) == {1}
    assert sum(calls) - calls[fails_at - 1] == 6
    assert [done for phase, done, _ in seen if phase == work.PASSES][-1] == 6


def test_memory_that_runs_out_in_a_tile(model, batch, as_on_a_gpu, monkeypatch):
    tun, tile, calls = jl.select(model, "layer_1/mlp/up/kernel"), on_device.DeviceDerivatives.tile, []

    def tile_or_fail(self, paths, left, right, slab_bytes):
        calls.append(slab_bytes)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return tile(self, paths, left, right, slab_bytes)

    expected = jl.ntk(tun, batch, check_examples=0)
    as_on_a_gpu(True)
    monkeypatch.setattr(on_device.DeviceDerivatives, "tile", tile_or_fail)
    found = jl.ntk(tun, batch, check_examples=0)
    assert cases.relative_error(found.array, expected.array) < 1e-6
    assert calls[1] == calls[0] // 2
    assert "out of memory in a tile" in found.info.note


def test_examples_of_a_pass(model, as_on_a_gpu, monkeypatch):
    """As many as make products large; by the texts' tokens, also where the tuned module reads one position or none."""
    as_on_a_gpu(True)
    monkeypatch.setattr(work, "_GPU_TOKENS", 40)
    batch = cases.text_batch(6, longest=10)
    for tun in (jl.head_only(model), jl.select(model, "word"), jl.lora(model, rank=2)):
        assert jl.ntk_plan(tun, batch).chunk == 4
    monkeypatch.setattr(work, "_GPU_TOKENS", 1 << 13)
    groups = as_dataset(batch).groups()
    assert jl.ntk_plan(tun, batch).chunk == max(map(len, groups)) < 6


@pytest.mark.slow
def test_a_store_that_is_gone_on_with_and_its_estimate(model, batch, tmp_path, as_on_a_gpu, monkeypatch):
    as_on_a_gpu(True)
    tun, write = jl.lora(model, rank=2), KernelStore.write
    expected, calls = jl.ntk(tun, batch, blocks="layer"), []

    def write_once(self, *tile):
        calls.append(tile)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *tile)

    with monkeypatch.context() as patch:
        patch.setattr(KernelStore, "write", write_once)
        with pytest.raises(KeyboardInterrupt):
            jl.ntk(tun, batch, blocks="layer", store=tmp_path / "kernel")
    stored = jl.ntk(tun, batch, blocks="layer", store=tmp_path / "kernel", resume=True)
    for block, part in expected.parts.items():
        np.testing.assert_array_equal(stored.parts[block], part)
    assert jl.ntk_estimate(tun, batch).seconds > 0
