import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as Spec

import jaxlin as jl
from jaxlin import distributed
from jaxlin.mesh import make_mesh
from jaxlin.sharding import mesh_of, share_of, specs_of, spread
from jaxlin.tunable import leaf_paths
from tests import cases, shard_check
from tests.test_mesh import ROOT, free_port, run_processes


def one_device(**axes):
    return make_mesh(axes or {"data": 1, "model": 1}, devices=jax.devices()[:1])


@pytest.fixture(scope="module", params=["quick", pytest.param("slow", marks=pytest.mark.slow)])
def alone(request):
    """Pace, and the histories of one device without a mesh."""
    return request.param, shard_check.histories(None, request.param)


def test_a_mesh_of_one_device(alone):
    pace, expected = alone
    for name, history in shard_check.histories(one_device(), pace).items():
        np.testing.assert_allclose(history, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "count",
    [pytest.param(1, id="8-devices"), pytest.param(2, id="2-processes-of-4", marks=pytest.mark.slow)],
)
def test_many_devices_train_as_one(tmp_path, alone, count):
    pace, expected = alone
    first, *others = run_processes(tmp_path, count, pace, "tests.shard_check")
    assert {name.rpartition(": ")[2] for name in first} == expected.keys()
    for name, history in first.items():
        np.testing.assert_allclose(history, expected[name.rpartition(": ")[2]], rtol=3e-5, err_msg=name)
        for other in others:
            np.testing.assert_array_equal(other[name], history)


def test_linearizing_and_sharding_commute():
    tun, mesh = cases.mlp(3, width=6), one_device()
    data, theta = cases.vectors(5, num_labels=3), cases.moved(tun)
    first = jl.linearize(jl.shard(tun, mesh, shard_check.MLP_RULES))
    last = jl.shard(jl.linearize(tun), mesh, shard_check.MLP_RULES)
    for both in zip(jax.tree.leaves(first), jax.tree.leaves(last), strict=True):
        assert both[0].sharding == both[1].sharding
    expected = jl.predict(jl.linearize(tun), theta, data)
    for split in (first, last):
        np.testing.assert_allclose(jl.predict(split, theta, data), expected, atol=5e-6)


def test_a_run_goes_on_over_a_mesh():
    tun, data = cases.mlp(3, width=6), cases.vectors(22, num_labels=3)
    config = dataclasses.replace(shard_check.CONFIG, optimizer="adam")
    alone = jl.train(tun, data, config=config, keep=[2])
    on_mesh = jl.train(tun, data, config=config, keep=[3], mesh=one_device(), rules=shard_check.MLP_RULES)
    for start, mesh in (
        (alone.states[2], one_device()),
        (on_mesh.states[3], one_device(data=1)),
    ):
        rest = jl.train(tun, data, config=config, start=start, mesh=mesh)
        np.testing.assert_allclose(history(rest), history(alone)[start.step :], rtol=1e-5)
        assert mesh_of(rest.theta) == mesh


def test_moments_lie_as_their_parameters():
    tun = jl.shard(cases.mlp(3, width=6), one_device(), shard_check.MLP_RULES)
    state = jl.optim.proximal(optax.adam(0.1), 0.5).init(tun.theta0)
    for moment in (state.theta0, state.inner[0].mu, state.inner[0].nu):
        for leaf, parameter in zip(jax.tree.leaves(moment), jax.tree.leaves(tun.theta0), strict=True):
            assert leaf.sharding == parameter.sharding


def test_the_ready_rules_name_every_large_weight_of_an_encoder(model):
    split = jl.shard(jl.lora(model, rank=2, targets=r".*(attention|mlp)/\w+"), one_device(), jl.ENCODER_RULES)
    whole = {
        path
        for path, leaf in zip(leaf_paths(split), jax.tree.leaves(split), strict=True)
        if leaf.ndim == 2 and "model" not in leaf.sharding.spec
    }
    # What is left: the other factor of each pair, the head.
    assert all("classifier" in path or "lora_" in path or "pooler" in path for path in whole), whole
    assert {path.rpartition("/")[2] for path in whole if "lora_" in path} == {"lora_A", "lora_B"}


def test_frozen_weights_from_the_host():
    tun = cases.mlp(3, width=6)
    host = dataclasses.replace(tun, theta0=jax.tree.map(np.asarray, tun.theta0))
    there = jl.shard(host, one_device(), shard_check.MLP_RULES)
    assert mesh_of(there) == one_device()
    assert mesh_of(tun) is None
    again = jl.shard(there, one_device())  # without rules what lies on the mesh stays as it lies
    assert jax.tree.leaves(again)[0].sharding.spec == jax.tree.leaves(there)[0].sharding.spec == Spec("model")


BAD_RULES = {
    "axis": ([("hidden/bias$", Spec("pipe"))], r"hidden/bias, of shape \(6,\).*has no axis 'pipe'"),
    "size": ([("hidden/bias$", Spec("model"))], "size 6 cannot be split evenly over 4 devices .axis model."),
    "two axes": ([("out/kernel$", Spec(("data", "model")))], "size 6 cannot be split evenly over 8 devices"),
    "dimensions": ([("hidden/bias$", Spec(None, "model"))], "names 2 dimensions; expected at most 1"),
    "pattern": ([("hidden/(", Spec("model"))], "no regular expression"),
    "nothing": ([("attention", Spec("model"))], "no rule .attention. matches a parameter"),
}


@pytest.mark.parametrize("case", BAD_RULES)
def test_bad_rules(case):
    rules, message = BAD_RULES[case]
    with pytest.raises(jl.InputError, match=message):
        specs_of(cases.mlp(3, width=6), {"data": 2, "model": 4}, rules)


def test_bad_meshes():
    tun, data = cases.mlp(), cases.vectors(3)
    with pytest.raises(jl.InputError, match="none named 'data'"):
        jl.train(tun, data, mesh=one_device(model=1))
    with pytest.raises(jl.InputError, match="rules are given and no mesh"):
        jl.train(tun, data, rules=jl.ENCODER_RULES)


SHARES = {
    "one process": ([{0}, {0}], 0, (0, 1)),
    "two": ([{0}, {0}, {1}, {1}], 1, (1, 2)),
    "in another order": ([{1}, {0}], 1, (0, 2)),
    "a model over processes": ([{0, 1}, {0, 1}], 1, (0, 1)),
    "unequal": ([{0}, {0}, {1}], 1, (0, 1)),
    "by turns": ([{0}, {1}, {0}, {1}], 0, (0, 1)),
}


@pytest.mark.parametrize("case", SHARES)
def test_a_process_reads_its_share_where_it_has_one(case):
    owners, process, expected = SHARES[case]
    assert share_of(owners, process) == expected


@pytest.mark.parametrize("parts", [1, 3])
def test_added_rows_weigh_nothing(parts):
    batch = {"x": np.arange(10.0).reshape(5, 2), "weight": np.array([1, 1, 1, 1, 0], np.float32)}
    for mesh in (None, one_device()):
        found = spread(batch, mesh, parts)
        assert len(found["weight"]) == (5 if parts == 1 else 6)
        np.testing.assert_array_equal(found["x"][:5], batch["x"])
        np.testing.assert_array_equal(found["x"][5:], batch["x"][:1].repeat(len(found["x"]) - 5, 0))
        np.testing.assert_array_equal(found["weight"], ([1, 1, 1, 1, 0, 0])[: len(found["weight"])])


# --- a batch in parts -----------------------------------------------------------------------------------


def history(result):
    return np.array([[row[k] for k in shard_check.COLUMNS] for row in result.history])


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("linear", [False, True], ids=["full", "linearized"])
def test_a_batch_in_parts_is_the_batch(float64, parts, linear):
    tun = cases.mlp(3, dtype=jnp.float64)
    tun = jl.linearize(tun) if linear else tun
    data = cases.vectors(17, num_labels=3)  # the last batch holds 5 of 6
    config = dataclasses.replace(shard_check.CONFIG, max_steps=7, loss="cross_entropy")
    whole = jl.train(tun, data, config=config)
    split = jl.train(tun, data, config=dataclasses.replace(config, gradient_accumulation_steps=parts))
    np.testing.assert_allclose(history(split), history(whole), rtol=1e-12)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-13), split.theta, whole.theta))


def bag_of_words(theta, batch):
    mask = batch["attention_mask"][..., None]
    return jnp.tanh((theta["words"][batch["input_ids"]] * mask).sum(1) / mask.sum(1)) @ theta["out"]


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("linear", [False, True], ids=["full", "linearized"])
def test_a_batch_of_all_in_groups_of_like_length_is_the_batch(float64, parts, linear):
    rng = np.random.default_rng(0)
    tun = jl.Tunable(bag_of_words, {"words": rng.normal(size=(110, 4)), "out": rng.normal(size=(4, 3))})
    tun = jl.linearize(tun) if linear else tun
    data = cases.text_batch(17, longest=40)
    config = jl.TrainConfig(batch_size=17, max_steps=3, learning_rate=0.01, lam=0.5, seed=3)
    whole = jl.train(tun, data, config=config)
    config = dataclasses.replace(config, group_by_length=True, gradient_accumulation_steps=parts)
    grouped = jl.train(tun, data, config=config)
    np.testing.assert_allclose(history(grouped), history(whole), rtol=1e-11)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-11), grouped.theta, whole.theta))


def test_parts_hold_less():
    from jaxlin.training.step import loss_and_gradient

    tun = cases.mlp(3, width=64)
    batch = {**cases.vectors(512, num_labels=3), "weight": np.ones(512, np.float32)}

    def temporary(parts):
        step = jax.jit(lambda *given: loss_and_gradient("squared", *given, parts))
        return step.lower(tun.apply, tun.theta0, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(1) / 3


def test_bad_parts():
    for parts, message in ((7, "cuts a batch of 6 into more parts"), (0, "expected above 0")):
        with pytest.raises(jl.InputError, match=message):
            dataclasses.replace(shard_check.CONFIG, gradient_accumulation_steps=parts).check()


# --- failure ----------------------------------------------------------------------------------------------


def failing(message):
    def step(*_):
        raise jax.errors.JaxRuntimeError(message)

    return step


@pytest.mark.parametrize("mesh", [None, "one"])
def test_out_of_memory_says_what_to_lower(monkeypatch, model, mesh):
    from jaxlin.training import trainer

    compiled = trainer.step_of
    out = failing("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nmore")
    monkeypatch.setattr(trainer, "step_of", lambda *given: (compiled(*given)[0], out))
    tun, data = jl.linearize(jl.lora(model, rank=2)), cases.text_batch(20)
    config = jl.TrainConfig(batch_size=16, gradient_accumulation_steps=2)
    with pytest.raises(jl.DeviceMemoryError) as caught:
        jl.train(tun, data, config=config, mesh=mesh and one_device())
    text = str(caught.value)
    for words in (
        "out of memory in step 1, a batch of 16×20 tokens",
        "gradient_accumulation_steps from 2 to 4 (a device then holds the activations of 4 examples at a time in "
        "place of 8",
        "--gradient_checkpointing",
        "linear_mode='cached'",
        "compute_dtype='bfloat16'",
        "allocating 17179869184 bytes",
    ):
        assert words in text
    assert "more" not in text.rpartition("bytes.")[2]


def test_out_of_memory_tells_the_groups(monkeypatch, model):
    from jaxlin.training import trainer

    compiled = trainer.step_of
    monkeypatch.setattr(trainer, "step_of", lambda *given: (compiled(*given)[0], failing("RESOURCE_EXHAUSTED: 1")))
    config = jl.TrainConfig(batch_size=40, gradient_accumulation_steps=2, group_by_length=True)
    groups = "a batch of 32×16 tokens, 9×20 tokens.*"  # 31 of them, and one more for two equal parts
    with pytest.raises(jl.DeviceMemoryError, match=groups + "gradient_accumulation_steps from 2 to 4"):
        jl.train(jl.lora(model, rank=2), cases.text_batch(40), config=config)


def test_other_errors_of_a_device_stay(monkeypatch):
    from jaxlin.training import trainer

    compiled = trainer.step_of
    monkeypatch.setattr(trainer, "step_of", lambda *given: (compiled(*given)[0], failing("INTERNAL: odd")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: odd"):
        jl.train(cases.mlp(), cases.vectors(3))


BAD_PROCESSES = {
    "some": ({"num_processes": 2}, "num_processes=2 without coordinator_address and process_id; give all three"),
    "address": (
        {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
        "coordinator_address='host'; expected host:port",
    ),
    "index": (
        {"coordinator_address": "host:1", "num_processes": 2, "process_id": 2},
        "process_id=2 of num_processes=2; expected 0 to",
    ),
    "late": (
        {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1},
        "must be joined before anything",
    ),
}


@pytest.mark.parametrize("case", BAD_PROCESSES)
def test_bad_processes(case):
    jax.devices()
    arguments, message = BAD_PROCESSES[case]
    with pytest.raises(jl.InputError, match=message):
        distributed.initialize(**arguments)


def test_one_process_is_alone():
    distributed.initialize("host:1", 1, 0)
    assert jax.process_count() == 1


ENDLESS = """
import sys, jax, jaxlin as jl
from jaxlin.distributed import initialize
from tests import cases
initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
config = jl.TrainConfig(batch_size=8, max_steps=10**7)
jl.train(cases.mlp(), cases.vectors(8), config=config, mesh=jl.make_mesh(), log=lambda row: print(row, flush=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dying_process_ends_the_others(tmp_path, victim):
    port, running, logs = free_port(), [], [tmp_path / f"{i}.log" for i in range(2)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    try:
        for index, file in enumerate(logs):
            with file.open("w") as log:
                command = [sys.executable, "-c", ENDLESS, str(port), str(index)]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment))
        deadline = time.monotonic() + 180
        while not all("'step': 20," in file.read_text() for file in logs):
            assert time.monotonic() < deadline
            assert not any(process.poll() for process in running)
            time.sleep(0.1)
        running[victim].send_signal(signal.SIGKILL)
        begin, other = time.monotonic(), running[1 - victim]
        assert other.wait(timeout=60) != 0
        text = logs[1 - victim].read_text()[-6000:]
        print(f"ended after {time.monotonic() - begin:.0f} s")
        assert "ProcessLostError" in text or "JAX distributed service detected fatal errors" in text
    finally:
        for process in running:
            process.kill()
            process.wait()
