"""Streaming, trunk, cached, cached in bfloat16, batched: one trajectory, and what chooses among them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.ntk.jacobian import jacobian, jacobian_bytes
from jaxlin.training.cached import CachedLinear, index_column
from jaxlin.training.losses import targets, to_mean
from tests import cases

LAMS, RATES = [0.0, 0.5, 3.0], [0.05, 0.02, 0.05]


def same_history(found, expected, tolerance):
    assert len(found) == len(expected)
    for row, other in zip(found, expected, strict=True):
        assert list(row) == list(other)
        for key, value in other.items():
            assert row[key] == (None if value is None else pytest.approx(value, abs=tolerance, rel=tolerance)), key


def ready(tun, *data, **options):
    return jl.prepare(jl.linearize(tun), *data, **options)


# --- batched sweeps ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 4, "eval_steps": 3},
        {"batch_size": 50, "optimizer": "momentum", "pull": "prox"},  # full-batch: rows are not copied
        {"batch_size": 11, "loss": "cross_entropy", "lr_scheduler_type": "linear", "warmup_ratio": 0.3},
        {"batch_size": 4, "pull": "spd", "learning_rate_blocks": {"bias": 2.0}, "lam_blocks": {"out": 0.5}},
    ],
)
def test_a_sweep_is_its_runs_one_at_a_time(change, float64):
    tun = cases.mlp(dtype=jnp.float64)
    train, held_out = cases.vectors(11), cases.vectors(5, seed=1)
    form = ready(tun, train, held_out)
    config = jl.TrainConfig(max_steps=7, **change)
    sweep = jl.train_sweep(form.tun, *form.data, config, lams=LAMS, learning_rates=RATES, keep=(0, 4))
    assert not sweep.diverged
    for result, lam, rate in zip(sweep.results, LAMS, RATES, strict=True):
        one = dataclasses.replace(config, lam=lam, learning_rate=rate)
        for tuned, data in ((form.tun, form.data), (jl.linearize(tun), (train, held_out))):
            expected = jl.train(tuned, *data, one, keep=(0, 4))
            same_history(result.history, expected.history, 1e-10)
            for k in (0, 4):
                ours, theirs = (jax.tree.leaves((r.states[k].theta, r.states[k].optimizer)) for r in (result, expected))
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_allclose(a, b, atol=1e-10)
        going_on = jl.train(form.tun, *form.data, one, start=result.states[4])
        same_history(going_on.history, result.history[4:], 1e-10)


def test_every_mode_is_the_closed_form(float64):
    """Theory 2: descent on the linearized model; in bfloat16 as far as the error that is told."""
    n, steps = 9, 40
    train, held_out = cases.vectors(n), cases.vectors(5, seed=1)
    tun = cases.mlp(dtype=jnp.float64)
    kernel, cross = jl.ntk(tun, train), jl.ntk(tun, held_out, train)
    mu1 = np.linalg.eigvalsh(kernel.matrix())[-1]
    lams = [0.0, 0.1 * mu1]
    rate = 0.5 / mu1
    config = jl.TrainConfig(
        optimizer="sgd", learning_rate=to_mean(rate, n, "learning_rate"), batch_size=n, max_steps=steps
    )
    y = np.asarray(targets(train["labels"], 2))
    f0, f0_test = (jl.predict(tun, tun.theta0, data) for data in (train, held_out))
    exact, narrow = ready(tun, train, held_out), ready(tun, train, held_out, mode="cached", jacobian_dtype="bfloat16")
    assert exact.jacobian_error == 0
    assert 1e-4 < narrow.jacobian_error < 2**-8
    assert "bfloat16" in narrow.reason
    assert f"{narrow.jacobian_error:.1e}" in narrow.reason
    for form, tolerance in ((exact, 1e-10), (narrow, 20 * narrow.jacobian_error)):
        sweep = jl.train_sweep(form.tun, *form.data, config, lams=lams)
        for lam, result in zip(lams, sweep.results, strict=True):
            fit = jl.kernel_regression(kernel, y, f0, lam)
            moved = np.abs(fit.train(steps, learning_rate=rate) - f0).max()
            found = jl.predict(form.tun, result.theta, form.data[0])
            np.testing.assert_allclose(found, fit.train(steps, learning_rate=rate), atol=tolerance * moved)
            found = jl.predict(form.tun, result.theta, form.data[1])
            expected = fit.test(cross, f0_test, steps, learning_rate=rate)
            np.testing.assert_allclose(found, expected, atol=tolerance * moved)


def test_the_error_of_storage_is_that_of_all_rows(model, batch):
    tun, data = jl.head_only(model), as_dataset(batch)
    exact, narrow = jacobian(tun, data), jacobian(tun, data, storage="bfloat16")
    error = sum(np.sum((narrow.rows[k].astype(np.float64) - exact.rows[k]) ** 2) for k in exact.rows)
    scale = sum(np.sum(exact.rows[k].astype(np.float64) ** 2) for k in exact.rows)
    assert narrow.storage_error == pytest.approx((error / scale) ** 0.5, rel=1e-3)
    assert narrow.nbytes * 2 == exact.nbytes
    assert exact.storage_error == 0
    assert 2 * jacobian_bytes(tun, data, "bfloat16") == jacobian_bytes(tun, data)
    assert jacobian(tun, data, storage="bfloat16", memory_budget=jacobian_bytes(tun, data) // 2 + 1).storage_error > 0


def test_one_that_diverges_leaves_the_others():
    train, held_out = cases.vectors(11), cases.vectors(5, seed=1)
    form = ready(cases.mlp(), train, held_out)
    config = jl.TrainConfig(optimizer="sgd", max_steps=300, batch_size=4, eval_steps=100)
    sweep = jl.train_sweep(form.tun, *form.data, config, learning_rates=[0.05, 1e20, 0.02])
    assert list(sweep.diverged) == [1]
    assert "run 1 of the sweep (λ = 0, learning rate 1e+20)" in str(sweep.diverged[1])
    with pytest.raises(jl.TrainingDivergedError, match=f"at step {len(sweep.results[1].history) + 1} of 300"):
        jl.train(form.tun, form.data[0], config=dataclasses.replace(config, learning_rate=1e20))
    for k, rate in ((0, 0.05), (2, 0.02)):
        expected = jl.train(form.tun, *form.data, dataclasses.replace(config, learning_rate=rate))
        same_history(sweep.results[k].history, expected.history, 1e-4)


def test_a_sweep_is_traced_once_whatever_its_values(monkeypatch):
    train = cases.vectors(40)
    form = ready(cases.mlp(), train)
    traces = []
    original = CachedLinear.__call__
    monkeypatch.setattr(CachedLinear, "__call__", lambda *a: traces.append(0) or original(*a))
    config = jl.TrainConfig(max_steps=600, batch_size=8, learning_rate=0.0123)
    jl.train_sweep(form.tun, *form.data, config=config, lams=[0.0, 1.0])
    first = len(traces)
    assert first <= 8  # programs of 256 and of 88 steps, the number of outputs
    jl.train_sweep(form.tun, *form.data, config=config, lams=[2.0, 5.0])
    assert len(traces) - first <= 1  # the number of outputs


BAD_SWEEPS = {
    "nothing": ({}, "at least one value"),
    "empty": ({"lams": []}, "at least one value"),
    "lengths": ({"lams": [0.0], "learning_rates": [0.1, 0.2]}, "as many of both"),
    "negative": ({"lams": [-1.0]}, "lam=-1.0"),
    "rate": ({"learning_rates": [0.0]}, "learning_rate=0.0"),
    "own rate": ({"learning_rates": [0.1], "config": jl.TrainConfig(optimizer=optax.sgd(0.1))}, "rate of their own"),
    "keep": ({"lams": [0.0], "keep": (99,), "config": jl.TrainConfig(max_steps=3)}, "step 99"),
}


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_bad_sweeps(case):
    options, message = BAD_SWEEPS[case]
    form = ready(cases.mlp(), cases.vectors(6))
    with pytest.raises(jl.InputError, match=message):
        jl.train_sweep(form.tun, *form.data, **options)


def test_only_cached_models_are_swept():
    with pytest.raises(jl.InputError, match="PlainFunction"):
        jl.train_sweep(cases.mlp(), as_dataset(cases.vectors(4)), lams=[0.0])


# --- prepare -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auto_takes_the_fastest_that_fits(model):
    batch = cases.text_batch(8)
    tun = jl.lora(model, rank=3, layers=[1])
    lin = jl.linearize(tun)
    taken = jacobian_bytes(tun, as_dataset(batch))
    activations = 8 * 20 * 32 * 4
    assert activations < taken
    choices = {
        (lin, 2 * taken): ("cached", "within half the budget"),
        (lin, 2 * taken - 1): ("trunk", "more than half the budget"),
        (lin, activations): ("trunk", "'encoder/layer_0'"),
        (lin, activations - 1): ("streaming", "more than the budget"),
        (tun, 1 << 40): ("trunk", "20.0 KiB"),
        (jl.linearize(jl.full(model)), 100): ("streaming", "no trunk to cache"),
        (cases.mlp(), 1 << 40): ("streaming", "made of a Model"),
    }
    for (tuned, budget), (mode, words) in choices.items():
        data = cases.vectors(4) if tuned.theta0.keys() == {"hidden", "out"} else batch
        form = jl.prepare(tuned, data, memory_budget=budget)
        assert form.mode == mode
        assert words in form.reason
    assert index_column(0) in jl.prepare(lin, batch).data[0].columns


@pytest.mark.parametrize("mode", ["streaming", "trunk", "cached"])
def test_every_mode_of_late_linearization_is_one_trajectory(mode, model):
    """Linearized away from where it starts: f̄ is expanded at `at`, and begins and is pulled to theta0."""
    batch, held_out = cases.text_batch(8, longest=8), cases.text_batch(5, seed=1, longest=8)
    tun = jl.lora(model, rank=2, layers=[1])
    late = jl.linearize(tun, cases.moved(tun))
    config = jl.TrainConfig(max_steps=5, batch_size=4, lam=0.5, learning_rate=0.01)
    expected = jl.train(late, batch, held_out, config)
    form = jl.prepare(late, batch, held_out, mode=mode)
    assert form.mode == mode
    assert form.reason == f"{mode}, as asked for"
    same_history(jl.train(form.tun, *form.data, config).history, expected.history, 1e-4)


BAD_MODES = {
    "unknown": ({"mode": "fast"}, "auto, streaming, trunk, cached"),
    "full": ({"mode": "cached"}, "linearize"),
    "dtype": ({"jacobian_dtype": "float16"}, "bfloat16"),
    "trunk": ({"mode": "trunk"}, "made of a Model"),
}


@pytest.mark.parametrize("case", BAD_MODES)
def test_bad_modes(case):
    options, message = BAD_MODES[case]
    with pytest.raises(jl.InputError, match=message):
        jl.prepare(cases.mlp(), cases.vectors(4), **options)


def test_data_that_cannot_be_prepared():
    lin = jl.linearize(cases.mlp())
    with pytest.raises(jl.InputError, match="needs the data"):
        jl.prepare(lin)
    with pytest.raises(jl.InputError, match="labels"):
        jl.prepare(lin, {"x": np.ones((3, 4))})
    with pytest.raises(jl.InputError, match="more than memory_budget=100 bytes"):
        jl.prepare(lin, cases.vectors(4), mode="cached", memory_budget=100)
