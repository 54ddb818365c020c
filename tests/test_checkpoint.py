"""Checkpoints: an interrupted run that goes on is the run without interruption, to the bit, whatever happens to it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlin as jl
from jaxlin.data.dataset import Dataset
from jaxlin.training.input import StepSource, epoch_order, step_input
from tests import cases

CONFIG = jl.TrainConfig(batch_size=4, max_steps=9, learning_rate=0.01, lam=0.5)


class Stopped(Exception):
    pass


def stop_after(step):
    def log(row):
        if row["step"] == step:
            raise Stopped

    return log


def assert_same(found, expected):
    """Equal to the bit, in all that a run gives."""
    assert found.history == expected.history
    assert sorted(found.states) == sorted(expected.states)
    for a, b in [(found, expected), *((found.states[k], expected.states[k]) for k in expected.states)]:
        assert jax.tree.structure(a.theta) == jax.tree.structure(b.theta)
        jax.tree.map(np.testing.assert_array_equal, a.theta, b.theta)
        assert jax.tree.map(lambda x: x.dtype, a.theta) == jax.tree.map(lambda x: x.dtype, b.theta)


# --- input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("group", [False, True])
def test_the_shards_of_the_processes_are_the_batch(group, count):
    data = Dataset.from_columns(cases.text_batch(11, longest=40))
    config = jl.TrainConfig(batch_size=4, max_steps=7, group_by_length=group)
    shards = [StepSource(data, config, index, count) for index in range(count)]
    assert [len(shard) for shard in shards] == [7] * count
    for step in range(7):
        parts = [shard[step] for shard in shards]
        epoch, within = divmod(step, 3)
        order = epoch_order(data, config, epoch)[4 * within : 4 * within + 4]
        rows = -(-4 // count) * count
        whole = data.batch(order, rows)
        for indices, part in parts:
            np.testing.assert_array_equal(indices, order)
            assert {len(value) for value in part.values()} == {rows // count}
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for _, part in parts]), value)
        assert whole["weight"].sum() == len(order)


def test_the_input_goes_on_where_it_was():
    data = Dataset.from_columns(cases.vectors(10))
    whole = list(step_input(data, CONFIG))
    assert len(whole) == 9
    first = step_input(data, CONFIG)
    for _ in range(4):
        next(first)
    state = first.get_state()
    other = step_input(data, CONFIG)
    other.set_state(state)
    for found, expected in zip(other, whole[4:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for found, expected in zip(step_input(data, CONFIG, 7), whole[7:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    first.close()


# --- resume --------------------------------------------------------------------------------------------

RUNS = {
    "adam": {},
    "momentum": {"optimizer": "momentum", "pull": "prox", "lr_scheduler_type": "cosine", "warmup_ratio": 0.3},
    "lion": {"optimizer": "lion", "pull": "spd", "lam": 0.1},
    "noise": {"optimizer": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(3)), optax.sgd(0.01))},
    "blocks": {"lam_blocks": {"bias": 0.0}, "learning_rate_blocks": {"out": 2.0}, "pull": "selective"},
    "full batch": {"batch_size": 10, "loss": "cross_entropy"},
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize("evaluated", [False, True])
def test_an_interrupted_run_is_the_whole_run(tmp_path, case, evaluated):
    tun, data = cases.mlp(), cases.vectors(10)
    held_out = cases.vectors(5, seed=1) if evaluated else None
    config = dataclasses.replace(CONFIG, eval_steps=2 if evaluated else None, **RUNS[case])
    options = {"keep": [0, 3, 9]} if evaluated else {}
    whole = jl.train(tun, data, held_out, config, **options)
    saving = jl.Checkpoints(tmp_path / "run", every=2)
    for step in (1, 5, 8):
        with pytest.raises(Stopped):
            jl.train(tun, data, held_out, config, **options, checkpoints=saving, resume=True, log=stop_after(step))
    logged, replayed = [], []
    options |= {"log": logged.append, "replay": replayed.append}
    result = jl.train(tun, data, held_out, config, **options, checkpoints=saving, resume=True)
    assert_same(result, whole)
    assert replayed + logged == whole.history
    assert len(replayed) == 6
    again = jl.train(tun, data, held_out, config, **options, checkpoints=saving, resume=True)
    assert len(logged) == 3  # nothing was run again
    assert_same(again, whole)


def test_float64_stays_float64(tmp_path, x64):
    tun, data = cases.mlp(dtype=jnp.float64 if x64 else jnp.float32), cases.vectors(10)
    whole = jl.train(tun, data, config=CONFIG)
    saving = jl.Checkpoints(tmp_path / "run", every=2)
    with pytest.raises(Stopped):
        jl.train(tun, data, config=CONFIG, checkpoints=saving, log=stop_after(5))
    assert_same(jl.train(tun, data, config=CONFIG, checkpoints=saving, resume=True), whole)


# --- sweeps --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep():
    """A sweep over arms and λ that is interrupted nowhere; late and tracked, so that states on the way count."""
    tun, other = cases.mlp(), cases.mlp(seed=1)
    arguments = tun, cases.vectors(10), cases.vectors(6, seed=1), dataclasses.replace(CONFIG, max_steps=6, eval_steps=3)
    options = {
        "lam_rel": [0.0, 0.1],
        "linearize_at": [2, 6],
        "track_linearization": [0, 3, 6],
        "extra_arms": {"other": other},
    }
    rows = []
    return arguments, options, jl.compare(*arguments, **options, log=rows.append), rows


@pytest.mark.parametrize("mode", ["cached", pytest.param("streaming", marks=pytest.mark.slow)])
def test_a_sweep_goes_on_in_the_middle(sweep, tmp_path, mode):
    arguments, options, whole, rows = sweep
    options = {**options, "linear_mode": mode}
    if mode == "streaming":
        rows = []
        whole = jl.compare(*arguments, **options, log=rows.append)
    saving = jl.Checkpoints(tmp_path / "sweep", every=4)
    for last in (3, 20, 41):  # rows, in all: in several arms, at both λ
        seen = []

        def stop(row, seen=seen, last=last):
            seen.append(row)
            if len(seen) == last:
                raise Stopped

        with pytest.raises(Stopped):
            jl.compare(*arguments, **options, checkpoints=saving, resume=True, log=stop, replay=seen.append)
        assert seen == rows[:last]
    replayed, new = [], []
    logs = {"log": new.append, "replay": replayed.append}
    result = jl.compare(*arguments, **options, checkpoints=saving, resume=True, **logs)
    assert result.table == whole.table
    assert len(replayed) == 40
    assert new == rows[40:]
    assert list(result.results) == list(whole.results)
    for key, run in whole.results.items():
        assert_same(result.results[key], run)
    for lam, report in whole.linearization.items():
        assert result.linearization[lam].table == report.table
        assert result.linearization[lam].summary == report.summary
    again = jl.compare(*arguments, **options, checkpoints=saving, resume=True, log=lambda row: pytest.fail(str(row)))
    assert again.table == whole.table


# --- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def long_run(arguments):
    """Two λ of 120 steps, saved every 50."""
    return {**arguments, "max_steps": 120, "lam_rel": [0, 0.1], "save_steps": 50, "linearize_at": "60"}


def results(folder):
    """All that a run wrote but for times."""
    found = json.loads((folder / "all_results.json").read_text())
    times = ("seconds", "compile_seconds", "step_seconds", "peak_memory_bytes")
    summary = {name: value for name, value in found["summary"].items() if name not in times}
    tables = {name: (folder / name).read_text() for name in ("table.csv", "history.csv", "log.jsonl")}
    return {"summary": summary, "table": found["table"], **tables}


def start_of(arguments):
    command = [sys.executable, "-m", "jaxlin", *map(str, cases.flags(arguments))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(process, folder, count):
    log, limit = folder / "log.jsonl", time.monotonic() + 300
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(run, long_run, tmp_path, signum):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, err = run(*cases.flags({**long_run, "output_dir": whole}))
    assert code == 0, err
    process = start_of({**long_run, "output_dir": cut})
    wait_for_rows(process, cut, 130)  # in the second arm, between two checkpoints
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    last = err.splitlines()[-1]
    assert "interrupted after step" in last
    assert f"go on with: jaxlin compare --resume_from_checkpoint {cut}" in last
    rows = (cut / "log.jsonl").read_text().splitlines()
    code, _, err = run(*last.partition("go on with: jaxlin ")[2].split())
    assert code == 0, err
    assert results(cut) == results(whole)
    assert (cut / "log.jsonl").read_text().splitlines()[: len(rows)] == rows
    boards = sorted(file.parent.name for file in (cut / "tensorboard").glob("*/events.*"))
    assert boards == sorted(file.parent.name for file in (whole / "tensorboard").glob("*/events.*"))

    # Again with the same words, where nothing is left to do; and with others.
    code, _, err = run(*cases.flags({**long_run, "output_dir": cut, "resume_from_checkpoint": "latest"}))
    assert code == 0, err
    assert results(cut) == results(whole)
    for change, message in (
        ({"learning_rate": 0.01}, "--learning_rate was 0.001, is 0.01"),
        ({"lam_rel": [0, 0.2]}, r"--lam_rel was [0.0, 0.1], is [0.0, 0.2]"),
        ({"overwrite_output_dir": True}, "contradict each other"),
    ):
        again = {**long_run, "output_dir": cut, "resume_from_checkpoint": cut, **change}
        code, _, err = run(*cases.flags(again))
        assert code == 2
        assert message in err
    assert results(cut) == results(whole)  # untouched by what was refused


@pytest.mark.slow
def test_killed_at_random_moments_the_results_are_those_of_the_whole_run(run, long_run, tmp_path):
    """kill -9, several times, at random rows: also while checkpoints are written, which is after every second step."""
    whole, cut, rng = tmp_path / "whole", tmp_path / "cut", np.random.default_rng(0)
    code, _, err = run(*cases.flags({**long_run, "output_dir": whole}))
    assert code == 0, err
    again = {**long_run, "output_dir": cut, "resume_from_checkpoint": "latest", "save_steps": 2, "save_total_limit": 1}
    for last in (20, 150, 290, 400):
        process = start_of(again)
        wait_for_rows(process, cut, last)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    code, _, err = run(*cases.flags(again))
    assert code == 0, err
    assert results(cut) == results(whole)


def test_there_must_be_a_run_to_go_on_with(run, arguments, tmp_path):
    for options, message in (
        ({"resume_from_checkpoint": tmp_path}, "is no run; expected the --output_dir of one, or latest"),
        ({"resume_from_checkpoint": "latest", "output_dir": False}, "needs the --output_dir to go on in"),
        ({"save_steps": -1}, "--save_steps -1; expected a number of steps, or 0"),
        ({"save_total_limit": 0}, "--save_total_limit 0; expected at least 1"),
        ({"metric_for_best_model": "accuracy"}, "best='eval_accuracy' needs evaluation data and eval_steps"),
    ):
        code, _, err = run(*cases.flags({**arguments, **options}))
        assert code == 2
        assert message in err
