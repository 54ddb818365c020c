"""Checkpoints: an interrupted run that goes on is the run without interruption, to the bit, whatever happens to it."""

import dataclasses
import functools
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
        parts = [(indices, batch) for indices, (batch,) in parts]
        for indices, part in parts:
            np.testing.assert_array_equal(indices, order)
            assert {len(value) for value in part.values()} == {rows // count}
        for name, value in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for _, part in parts]), value)
        assert whole["weight"].sum() == len(order)


@pytest.mark.parametrize("count", [1, 3])
def test_all_examples_at_once_are_read_by_length(count):
    data = Dataset.from_columns(cases.text_batch(11, longest=40))
    config = jl.TrainConfig(batch_size=11, max_steps=2, group_by_length=True)
    read = [StepSource(data, config, index, count)[1] for index in range(count)]
    lengths = []
    for k in range(len(data.buckets)):
        rows = {name: np.concatenate([batches[k][name] for _, batches in read]) for name in read[0][1][k]}
        lengths += [rows["input_ids"].shape[1]] * int(rows["weight"].sum())
    assert len(lengths) == 11
    for indices, _ in read:
        assert sorted(indices) == list(range(11))
        assert lengths == [data.buckets[b] for b in np.searchsorted(data.buckets, data.lengths[indices])]


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


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cached", "streaming"])
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
    order, new = [], []
    logs = {"log": lambda row: (order.append(row), new.append(row)), "replay": order.append}
    result = jl.compare(*arguments, **options, checkpoints=saving, resume=True, **logs)
    assert result.table == whole.table
    assert order == rows

    def saved(rows):  # the cached arm is trained anew: that takes less than to save it
        return [row for row in rows if not (mode == "cached" and row["arm"] == "linearized")]

    assert saved(new) == rows[40:]
    assert list(result.results) == list(whole.results)
    for key, run in whole.results.items():
        assert_same(result.results[key], run)
    for lam, report in whole.linearization.items():
        assert result.linearization[lam].table == report.table
        assert result.linearization[lam].summary == report.summary
    again = jl.compare(*arguments, **options, checkpoints=saving, resume=True, log=(new := []).append)
    assert again.table == whole.table
    assert saved(new) == []


# --- the command line ----------------------------------------------------------------------------------


@pytest.fixture
def long_run(arguments):
    """Two λ of 60 steps, saved every 25."""
    return {**arguments, "max_steps": 60, "lam_rel": [0, 0.1], "save_steps": 25, "linearize_at": "30"}


def results(folder):
    """All that a run wrote but for times."""
    found = json.loads((folder / "all_results.json").read_text())
    times = ("seconds", "compile_seconds", "step_seconds", "peak_memory_bytes")
    summary = {name: value for name, value in found["summary"].items() if name not in times}
    tables = {name: (folder / name).read_text() for name in ("table.csv", "history.csv", "log.jsonl")}
    return {"summary": summary, "table": found["table"], **tables}


def start_of(arguments):
    command = [sys.executable, "-m", "jaxlin", *map(str, cases.flags(arguments))]
    # Ctrl-C as on a terminal, also where the tests run in a shell's background, which ignores it.
    with_interrupt = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, preexec_fn=with_interrupt)


def wait_for_rows(process, folder, count):
    log, limit = folder / "log.jsonl", time.monotonic() + 300
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(run, long_run, tmp_path, signum):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, _, err = run(*cases.flags({**long_run, "output_dir": whole}))
    assert code == 0, err
    process = start_of({**long_run, "output_dir": cut})
    wait_for_rows(process, cut, 30)  # between two checkpoints
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, err
    last = err.splitlines()[-1]
    assert last.startswith(("jaxlin: interrupted", "jaxlin: terminated"))  # in a step, or between two arms
    assert f"go on with: jaxlin compare --resume_from_checkpoint {cut}" in last
    rows = (cut / "log.jsonl").read_text().splitlines()
    code, _, err = run(*last.partition("go on with: jaxlin ")[2].split())
    assert code == 0, err
    assert results(cut) == results(whole)
    assert (cut / "log.jsonl").read_text().splitlines()[: len(rows)] == rows
    boards = sorted(file.parent.name for file in (cut / "tensorboard").glob("*/events.*"))
    assert boards == sorted(file.parent.name for file in (whole / "tensorboard").glob("*/events.*"))

    for change, message in (
        ({"learning_rate": 0.01}, "--learning_rate was 0.001, is 0.01"),
        ({"lam_rel": [0, 0.2]}, r"--lam_rel was [0.0, 0.1], is [0.0, 0.2]"),
        ({"overwrite_output_dir": True}, "contradict each other"),
    ):
        code, _, err = run(*cases.flags({**long_run, "output_dir": cut, "resume_from_checkpoint": cut, **change}))
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
    for last in (10, 70, 150, 200):
        process = start_of(again)
        wait_for_rows(process, cut, last)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
    for _ in range(2):  # the second time, nothing is left to do
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


# --- what can go wrong ---------------------------------------------------------------------------------


def run_with(folder, **options):
    """The same small run; `options` are of `train` or of its configuration."""
    tun = options.pop("tun", cases.mlp())
    data = options.pop("data", cases.vectors(10))
    keywords = {name: options.pop(name) for name in ("keep", "log", "resume", "mesh") if name in options}
    saving = jl.Checkpoints(folder, **{name: options.pop(name) for name in ("every", "best") if name in options})
    config = dataclasses.replace(CONFIG, **options)
    held_out = None if config.eval_steps is None else cases.vectors(5, seed=1)
    return jl.train(tun, data, held_out, config, checkpoints=saving, **keywords)


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_only_the_same_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    run_with(folder, every=4)
    assert len(run_with(folder, resume=True).history) == 9
    other = cases.mlp(seed=1)
    for options, message in (
        ({"learning_rate": 0.1}, "learning_rate was 0.01, is 0.1"),
        ({"seed": 7, "lam": 0.0}, "lam was 0.5, is 0.0; seed was 0, is 7"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer was adam, is optax"),
        ({"lam_blocks": {"out": 2.0}}, "lam_blocks was None, is"),
        ({"max_steps": 12}, "max_steps was 9, is 12"),
        ({"keep": [3]}, r"keep was \[\], is \[3\]"),
        ({"data": cases.vectors(10, seed=5)}, "train_sha256 was"),
        ({"eval_steps": 3}, "eval_sha256 was None, is"),
        ({"tun": other}, "theta_sha256 was"),
        ({"tun": jl.linearize(cases.mlp())}, "model_sha256 was"),
    ):
        with pytest.raises(jl.InputError, match=f"is of another run .*{message}.* resume with the same"):
            run_with(folder, resume=True, **options)
    with pytest.raises(jl.InputError, match="holds checkpoints already; go on with resume=True"):
        run_with(folder)
    for options, message in (
        ({"every": 0}, "every=0; expected at least 1"),
        ({"best": "eval_loss"}, "needs evaluation data and eval_steps"),
        ({"best": "eval_loss", "every": 3, "eval_steps": 2}, "every=3 is no multiple of eval_steps=2"),
    ):
        with pytest.raises(jl.InputError, match=message):
            run_with(tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


def test_the_latest_the_best_and_what_is_kept_stay(tmp_path):
    folder = tmp_path / "run"
    options = {"every": 1, "eval_steps": 1, "best": "eval_loss", "keep": [3], "max_steps": 30, "learning_rate": 0.2}
    with pytest.raises(Stopped):
        run_with(folder, **options, log=stop_after(21))
    result = run_with(folder, **options, resume=True, log=(rows := []).append)
    assert rows[0]["step"] == 21
    losses = {row["step"]: row["eval_loss"] for row in result.history}
    best = min(losses, key=losses.get)
    assert 3 < best < 20  # overfitted, and known only from before the interruption
    assert steps_in(folder) == sorted({3, best, 30})
    tun = cases.mlp()
    for found, step in (({}, 30), ({"best": "eval_loss"}, best), ({"step": 3}, 3)):
        theta = jl.load_checkpoint(folder, tun, **found)
        outputs = jl.predict(tun, theta, cases.vectors(5, seed=1))
        y = np.eye(2)[cases.vectors(5, seed=1)["labels"]]
        assert 0.5 * np.sum((outputs - y) ** 2) / 5 == pytest.approx(losses[step], rel=1e-6)
    jax.tree.map(np.testing.assert_array_equal, jl.load_checkpoint(folder, tun, step=3), result.states[3].theta)
    for options, message in (
        ({"step": 4}, "has no checkpoint of step 4; it has"),
        ({"best": "eval_f2"}, "no checkpoint in .* has 'eval_f2'"),
    ):
        with pytest.raises(jl.InputError, match=message):
            jl.load_checkpoint(folder, tun, **options)
    with pytest.raises(jl.InputError, match="is no folder of checkpoints"):
        jl.load_checkpoint(tmp_path / "none", tun)


def test_while_a_run_goes_on_the_latest_two_stay(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        run_with(folder, every=2, log=stop_after(7))
    assert steps_in(folder) == [4, 6]


def largest(folder):
    """Where the array is, which Orbax holds in a file beside its index."""
    return max(folder.glob("ocdbt*/d/*"), key=lambda file: file.stat().st_size)


def flip(file, at=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def flip_a_number(folder):
    file = folder / "about" / "metadata"
    text = file.read_text()
    at = text.index('"loss": 0.') + len('"loss": 0.')
    flip(file, at)


DAMAGES = {
    "an array, truncated": lambda folder: os.truncate(largest(folder / "optimizer"), 40),
    "an array, missing": lambda folder: largest(folder / "optimizer").unlink(),
    "an array, changed": lambda folder: flip(largest(folder / "theta")),  # which Orbax would not see
    "the index, missing": lambda folder: shutil.rmtree(folder / "theta" / "d"),
    "the record, truncated": lambda folder: os.truncate(folder / "about" / "metadata", 200),
    "the record, missing": lambda folder: (folder / "about" / "metadata").unlink(),
    "the record, changed": flip_a_number,
    "all": shutil.rmtree,
}


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run that was stopped after its step 7, and what it is without that."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    options = {"every": 2, "keep": [3], "tun": cases.mlp(width=300)}  # large enough for files of its own
    with pytest.raises(Stopped):
        run_with(folder, **options, log=stop_after(7))
    assert steps_in(folder) == [3, 4, 6]
    return folder, options, run_with(folder.with_name("whole"), **options)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_left_for_the_one_before(cut_run, tmp_path, damage, recwarn):
    whole_folder, options, whole = cut_run
    folder, rows = tmp_path / "run", []
    shutil.copytree(whole_folder, folder)
    DAMAGES[damage](folder / "6")
    result = run_with(folder, **options, resume=True, log=rows.append)
    told = [str(warning.message) for warning in recwarn if "damaged" in str(warning.message)]
    if damage != "all":
        assert len(told) == 1
        assert "the checkpoint of step 6 is damaged (" in told[0]
        assert "going on from step 4" in told[0]
    assert rows[0]["step"] == 5
    assert_same(result, whole)
    assert steps_in(folder) == [3, 9]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own, of a reader it gave up
def test_what_comes_before_a_damaged_state_that_is_kept_is_needed(cut_run, tmp_path):
    whole_folder, options, _ = cut_run
    folder = tmp_path / "run"
    shutil.copytree(whole_folder, folder)
    os.truncate(largest(folder / "3" / "theta"), 40)
    with pytest.raises(jl.InputError, match=r"no checkpoint in .* can be read: the checkpoint of step 3 is damaged"):
        run_with(folder, **options, resume=True)  # no other is there from before it
    assert steps_in(folder) == [3, 4, 6]


def test_what_was_being_written_is_never_loaded(cut_run, tmp_path):
    whole_folder, options, whole = cut_run
    folder = tmp_path / "run"
    shutil.copytree(whole_folder, folder)
    (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")
    assert_same(run_with(folder, **options, resume=True), whole)
    assert steps_in(folder) == [3, 9]


def test_divergence_names_the_last_checkpoint(tmp_path):
    config = jl.TrainConfig(optimizer="sgd", learning_rate=1e12, max_steps=60)
    tun = jl.Tunable(lambda theta, batch: theta["w"] ** 3 * batch["x"][:, :2], {"w": jnp.float32(1.0)})
    saving = jl.Checkpoints(tmp_path / "run", every=1)
    with pytest.raises(jl.TrainingDivergedError) as stopped:
        jl.train(tun, cases.vectors(4), config=config, checkpoints=saving)
    last = max(steps_in(tmp_path / "run"))
    assert f"at step {last + 1} of 60 (examples [0, 1, 2, 3])" in str(stopped.value)
    assert f"the last checkpoint, of step {last}, is in {tmp_path / 'run'}" in str(stopped.value)
    assert np.isfinite(float(jl.load_checkpoint(tmp_path / "run", tun)["w"]))


def test_control_c_saves_the_step_that_was_taken(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def interrupt(row):
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(jl.Interrupted, match=r"interrupted after step 5 of 9, which is saved in .*run") as stopped:
        run_with(tmp_path / "run", log=interrupt)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = run_with(tmp_path / "run", resume=True, log=(rows := []).append)
    assert [row["step"] for row in rows] == [6, 7, 8, 9]
    assert_same(result, run_with(tmp_path / "whole"))
    signal.signal(signal.SIGINT, before)


FULL = """
import os, resource, signal, sys
import jax.numpy as jnp, numpy as np
import jaxlin as jl
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def log(row):
    if row["step"] == 4:  # a file may grow to 10 kB from here on: the arrays do not fit
        while not os.path.isdir(f"{sys.argv[1]}/2"):
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
data = {"x": np.eye(4, 9000, dtype=np.float32), "labels": np.array([0, 1, 0, 1])}
theta = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(9000, 2)), jnp.float32)}
tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], theta)
try:
    jl.train(tun, data, config=jl.TrainConfig(max_steps=9), checkpoints=jl.Checkpoints(sys.argv[1], every=2), log=log)
except jl.InputError as error:
    print("refused:", error)
"""


def test_a_full_disk_says_so_and_leaves_the_last_checkpoint(tmp_path):
    """What a process cannot write: the system's own error, in the threads that write."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "refused: no space is left for the checkpoint of step" in done.stdout, done.stderr
    assert f"in {tmp_path / 'run'}" in done.stdout
    assert "that of step 2 is whole: free some and go on" in done.stdout
    theta = {"w": jnp.zeros((9000, 2), jnp.float32)}
    tun = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], theta)
    assert np.abs(jl.load_checkpoint(tmp_path / "run", tun)["w"]).max() > 1
    half = jl.Tunable(tun.apply, {"w": theta["w"].astype(jnp.bfloat16)})
    with pytest.raises(jl.InputError, match="holds theta in float32; expected bfloat16, as the model's is"):
        jl.load_checkpoint(tmp_path / "run", half)


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    free = type("Usage", (), {"free": 10})()

    def fill(row):
        if row["step"] == 4:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: free)

    with pytest.raises(
        jl.InputError, match=r"of step 4, which takes .* MiB, in .* where 0.0 MiB are free; that of step 2 is"
    ):
        run_with(tmp_path / "run", every=2, log=fill)
    monkeypatch.undo()
    assert_same(run_with(tmp_path / "run", every=2, resume=True), run_with(tmp_path / "whole", every=2))


KILLED = """
import sys, time
import jaxlin as jl
from tests import cases, test_checkpoint
def log(row):
    print(row["step"], flush=True)
    time.sleep(0.01)
test_checkpoint.killed_run(sys.argv[1], log)
"""


def killed_run(folder, log=None):
    return run_with(folder, every=1, keep=[7], max_steps=60, resume=True, tun=cases.mlp(width=20_000), log=log)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_it_ends_the_same(tmp_path, seed):
    """kill -9, several times in one run, in steps and while a checkpoint is written, which is nearly always."""
    rng, folder = np.random.default_rng(seed), tmp_path / "run"
    command = [sys.executable, "-c", KILLED, str(folder)]
    reached, half_written = [], 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
        last = rng.integers(4, 18)
        for count, line in enumerate(process.stdout, start=1):
            if count == last:
                time.sleep(rng.uniform(0, 0.02))
                process.kill()
                reached.append(int(line))
                break
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        half_written += any("tmp" in path.name for path in folder.iterdir())
    assert len(reached) == 4
    assert half_written
    rows = []
    result = killed_run(folder, rows.append)
    assert rows[0]["step"] > reached[-1] - 4  # nothing is lost but the steps since the last checkpoint
    assert_same(result, run_with(tmp_path / "whole", keep=[7], max_steps=60, tun=cases.mlp(width=20_000)))


ON_FOUR = """
import json, sys
import jax
import jaxlin as jl
from tests import cases, test_checkpoint
assert jax.device_count() == 4
mesh = jl.make_mesh()
result = test_checkpoint.run_with(sys.argv[1], every=2, resume=True, mesh=mesh)
print("history", json.dumps(result.history))
"""


@pytest.mark.slow
def test_on_other_devices_it_goes_on_to_rounding(tmp_path):
    folder = tmp_path / "run"
    whole = run_with(tmp_path / "whole")
    with pytest.raises(Stopped):
        run_with(folder, every=2, log=stop_after(5))
    command = [sys.executable, "-c", ON_FOUR, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=cases.virtual_devices(4))
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout.rpartition("history ")[2])
    assert history[:4] == whole.history[:4]
    for found, expected in zip(history, whole.history, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    # And back: what four devices wrote, one reads.
    assert run_with(folder, every=2, resume=True).history == history
