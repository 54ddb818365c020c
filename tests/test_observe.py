"""The time of steps, apart from that of compiling and of what lies between runs."""

import jax
import jax.numpy as jnp
import pytest

from jaxlin.experiments import observe


def test_steps_without_compiling_and_without_what_lies_between_arms(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
    clock = observe.RunClock()
    with clock.running():
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 100.0)
        for arm, seconds in [("full", 900), ("full", 2), ("linearized", 70), ("linearized", 5), ("full", 40)]:
            now[0] += seconds
            clock.step(arm)
        jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 3.0)
        now[0] += 7
        clock.step("full")
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)  # of another run
    summary = clock.summary()
    assert summary["compile_seconds"] == 103
    assert summary["step_seconds"] == pytest.approx({"full": (2 + 7 - 3) / 2, "linearized": 5})


def test_compiling_is_seen():
    clock = observe.RunClock()
    with clock.running():
        jax.jit(lambda x: jnp.sin(x) @ x + 1.5)(jnp.ones((7, 7))).block_until_ready()
    assert 0 < clock.compile_seconds < 60


@pytest.mark.slow
def test_peak_memory_grows_with_what_is_held():
    before = observe.peak_memory()
    block = bytearray(before["peak_memory_bytes"])  # zeroed, so every page of it is there
    block[::4096] = b"\1" * len(block[::4096])
    assert observe.peak_memory()["peak_memory_bytes"] > 1.5 * before["peak_memory_bytes"]
