import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jaxlin as jl
from jaxlin.data.dataset import Dataset
from jaxlin.mesh import Share, fetch, make_mesh, place
from jaxlin.ntk import ring
from jaxlin.ntk.kinds import KINDS
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import PASSES, TILES
from tests import cases, ring_check

ROOT = Path(__file__).parents[1]
TIMEOUT = 180  # seconds


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


def references(pace):
    """Problem and block to the dense float64 kernel."""
    dense = {}
    for name, (tun, theta, x1, x2, _) in ring_check.problems(pace).items():
        jac1, columns = cases.reference_jacobian(tun, x1, theta)
        jac2 = jac1 if x2 is None else cases.reference_jacobian(tun, x2, theta)[0]
        for block, paths in tun.grouped("layer").items():
            of_block = np.isin(columns, paths)
            dense[f"{name}: {block}"] = jac1[:, of_block] @ jac2[:, of_block].T
    return dense


@pytest.fixture(scope="module", params=["quick", pytest.param("slow", marks=pytest.mark.slow)])
def expected(request, mesh):
    """Pace, what one device finds, and the reference."""
    return request.param, ring_check.kernels(mesh, request.param), references(request.param)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_processes(folder, count, pace, module="tests.ring_check"):
    """What each of some processes found, that have 8 virtual CPU devices together."""
    environment = cases.virtual_devices(8 // count)
    port, deadline, running = free_port(), time.monotonic() + TIMEOUT, []
    try:
        for index in range(count):
            together = [str(port), str(count), str(index)] if count > 1 else []
            command = [sys.executable, "-m", module, str(folder / f"{index}.npz"), pace, *together]
            with open(folder / f"{index}.log", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
            running.append(process)
        codes = [0] * count
        while time.monotonic() < deadline and None in (codes := [process.poll() for process in running]):
            if any(codes):  # without one process the others wait for ever
                break
            time.sleep(0.1)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0] * count, "\n".join((folder / f"{index}.log").read_text()[-2000:] for index in range(count))
    return [dict(np.load(folder / f"{index}.npz")) for index in range(count)]


@pytest.mark.parametrize(
    "count",
    [pytest.param(1, id="8-devices"), pytest.param(2, id="2-processes-of-4", marks=pytest.mark.slow)],
)
def test_many_devices_are_one(tmp_path, expected, count):
    pace, alone, reference = expected
    first, *others = run_processes(tmp_path, count, pace)
    more = {name for name in first if name.startswith(ring_check.MORE)}
    assert first.keys() - more == alone.keys() == reference.keys()
    assert len(more) == (4 if pace == "quick" else 0)
    for name, part in first.items():
        plain = next((name.removeprefix(more) for more in ring_check.MORE if name.startswith(more)), name)
        double = plain.startswith("float64")
        assert part.dtype == np.float64
        assert cases.relative_error(part, reference[plain]) < (1e-12 if double else 5e-6)
        assert cases.relative_error(part, alone[plain]) < (1e-14 if double else 2e-6)
        if "others" not in plain:
            np.testing.assert_array_equal(part, part.T)
        for other in others:
            np.testing.assert_array_equal(other[name], part)  # to the bit, in every process


def test_one_device(expected):
    _, alone, reference = expected
    for name, part in alone.items():
        assert cases.relative_error(part, reference[name]) < (1e-12 if name.startswith("float64") else 5e-6)


def kernel(mesh, tun, x1, x2=None, **options):
    return jl.ntk(tun, x1, x2, mesh=mesh, **{"check_examples": 0, **options}).array


@pytest.mark.parametrize("x2", [None, cases.vectors(3, seed=1)], ids=["itself", "others"])
@pytest.mark.parametrize("kind", ["full", "trace", "diagonal", "logit_difference", "pseudo"])
def test_kinds(mesh, kind, x2):
    tun, x1 = cases.mlp(2), cases.vectors(7)
    jac1, jac2 = (
        cases.reference_jacobian(tun, x)[0].reshape(-1, 2, tun.num_params) for x in (x1, x1 if x2 is None else x2)
    )
    expected = KINDS[kind].of_full(np.einsum("iap,jbp->ijab", jac1, jac2))
    found = kernel(mesh, tun, x1, x2, kind=kind, dtype="float64")
    assert found.shape == expected.shape
    assert cases.relative_error(found, expected) < 1e-14
    if x2 is None:
        np.testing.assert_array_equal(found, transposed(found))


def linear(theta, batch):
    return (jnp.asarray(batch["x"], theta["w"].dtype) @ theta["w"])[:, None]


def test_products_of_float32_rows_are_summed_in_float64(mesh):
    x = np.random.default_rng(0).normal(size=(5, 9001)).astype(np.float32)  # more than two parts of the columns
    tun = jl.Tunable(linear, {"w": jnp.zeros(9001)})
    exact = x.astype(np.float64) @ x.astype(np.float64).T
    for kind in ("full", "diagonal"):
        assert cases.relative_error(kernel(mesh, tun, {"x": x}, kind=kind).reshape(5, 5), exact) < 1e-14


@pytest.mark.parametrize("diagonal", [False, True])
def test_no_float64_copy_of_the_rows_is_made(mesh, diagonal):
    round_trip = ring._Ring(mesh, "data", (0,), (1 << 17,), diagonal)
    rows = jnp.zeros((8, 2, 1 << 17), jnp.float32)
    with jax.enable_x64(True):
        program = ring._meet.lower(rows, rows, ring=round_trip, passes=False).compile()
    assert program.memory_analysis().temp_size_in_bytes < rows.nbytes / 4


def test_frozen_weights_are_not_compiled_in(mesh, model, batch):
    tun = jl.lora(model, rank=3)
    some = ring._Ring(mesh, "data", tuple(range(len(jax.tree.leaves(tun.theta0)))), (tun.num_params,), False)
    columns = {name: jnp.asarray(value) for name, value in batch.items()}
    weights = (tun.apply, tun.theta0, jnp.eye(3))
    rows = jnp.zeros((6, 3, tun.num_params))
    closed = jax.make_jaxpr(lambda *given: ring._fill(*given, ring=some))(rows, jnp.int32(0), columns, weights)
    assert all(np.size(const) < 200 for const in closed.consts)


def test_chunks_and_progress(mesh, monkeypatch):
    tun, x1, x2 = cases.mlp(2), cases.vectors(7), cases.vectors(3, seed=1)
    whole, seen = kernel(mesh, tun, x1, x2), []
    monkeypatch.setattr(ring, "MAX_CHUNK", 2)
    found = kernel(mesh, tun, x1, x2, progress=lambda *now: seen.append(now))
    assert cases.relative_error(found, whole) < 1e-6
    assert seen == [*((PASSES, done, 10) for done in (2, 4, 6, 7, 9, 10)), (TILES, 1, 1)]


# Budget of a device to how many examples a side of a tile has, and whether rows of J are computed anew.
PLANS = {
    "itself": (None, {40_000: (8, False), 8_000: (4, False), 4_000: (2, True), 2_000: (1, True)}),
    "others": (cases.vectors(7, seed=1), {40_000: (8, False), 10_600: (4, False), 6_000: (3, True), 2_000: (1, True)}),
}


@pytest.mark.parametrize("of", PLANS)
def test_parts_of_the_examples(mesh, of, monkeypatch):
    monkeypatch.setattr(ring.RingWork, "_seconds_of_a_pass", lambda _, rows, *others: (1.0, rows))
    monkeypatch.setattr(ring.RingWork, "_seconds_of_a_meeting", lambda *_: 1000.0)
    tun, x1, (x2, plans) = cases.mlp(2), cases.vectors(8), PLANS[of]
    whole = kernel(mesh, tun, x1, x2)
    for budget, expected in plans.items():
        plan = jl.ntk_plan(tun, x1, x2, mesh=mesh, memory_budget=budget)
        assert (plan.row_block, plan.spilled) == expected
        seen = []
        found = kernel(mesh, tun, x1, x2, memory_budget=budget, progress=lambda *now, seen=seen: seen.append(now))
        assert cases.relative_error(found, whole) < 1e-6
        for phase in (PASSES, TILES):
            done = [(count, total) for name, count, total in seen if name == phase]
            assert done == sorted(set(done))
            assert done[-1][0] == done[-1][1]
        cost = jl.ntk_estimate(tun, x1, x2, mesh=mesh, memory_budget=budget)
        assert cost.seconds - cost.pass_seconds == 1000 * done[-1][1]
        assert cost.pass_seconds == sum(phase == PASSES for phase, *_ in seen)
        if x2 is None:
            np.testing.assert_array_equal(found, transposed(found))


def test_store(mesh, tmp_path):
    tun, x1, path = jl.lora(cases.tiny_model(), rank=3, layers=[1]), cases.text_batch(9, longest=14), tmp_path / "K"
    options = {"blocks": "layer", "mesh": mesh, "memory_budget": 130_000}
    assert 1 < jl.ntk_plan(tun, x1, **options).row_block < 9
    alone = jl.ntk(tun, x1, **options)
    stored = jl.ntk(tun, x1, **options, store=path)
    assert stored.info.epsilon_J == alone.info.epsilon_J < 1e-5
    assert stored.info.note == alone.info.note == "chosen since the Jacobian is to be held; 1 device in a ring"
    for block, part in alone.parts.items():
        np.testing.assert_array_equal(stored.parts[block], part)
    with pytest.raises(jl.InputError, match="is there already"):
        jl.ntk(tun, x1, **options, store=path)
    with pytest.raises(jl.InputError, match=r"of other inputs .*devices was 1, is None"):
        jl.ntk(tun, x1, **{**options, "mesh": None}, engine="jacobian", store=path, resume=True)
    tiles = sorted(file for file in (path / "blocks").rglob("*") if file.is_file() and file.name != "zarr.json")
    tiles[0].write_bytes(tiles[0].read_bytes()[:-1])
    parts = -(-9 // jl.ntk_plan(tun, x1, **options).row_block)
    rounds = parts * (parts + 1) // 2
    seen, before = [], {tile: tile.stat().st_mtime_ns for tile in tiles[1:]}
    again = jl.ntk(tun, x1, **options, store=path, resume=True, progress=lambda *now: seen.append(now))
    assert [now for now in seen if now[0] == TILES] == [(TILES, rounds, rounds)]
    assert before == {tile: tile.stat().st_mtime_ns for tile in tiles[1:]}
    for block, part in alone.parts.items():
        np.testing.assert_array_equal(again.parts[block], part)


KILLED = """
import sys, time
import jaxlin as jl
from jaxlin.mesh import make_mesh
from tests import cases
slow = lambda *step: (print(*step, flush=True), time.sleep(0.05))
jl.ntk(jl.lora(cases.tiny_model(), rank=3, layers=[1]), cases.text_batch(13, longest=14), blocks="layer", progress=slow,
       mesh=make_mesh(), memory_budget=130_000, store=sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    """kill -9 of two devices' process, in passes and in tiles."""
    whole, path = tmp_path / "whole", tmp_path / "killed"
    command, environment = [sys.executable, "-c", KILLED], cases.virtual_devices(2)
    assert cases.killed_at_random([*command, str(whole)], 0, most=0, cwd=ROOT, env=environment) == []
    assert len(cases.killed_at_random([*command, str(path)], 1, cwd=ROOT, env=environment)) >= 2
    expected, found = jl.load_kernel(whole), jl.load_kernel(path)
    assert found.info == expected.info
    assert "2 devices in a ring" in found.info.note
    for block, part in expected.parts.items():
        np.testing.assert_array_equal(found.parts[block], part)


BAD = {
    "memory": ({"memory_budget": 100}, "each of 1 devices has to hold"),
    "engine": ({"engine": "factored"}, "mesh goes with engine"),
    "kind": ({"kind": "signgd"}, "mesh goes with engine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(mesh, case):
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        kernel(mesh, cases.mlp(), cases.vectors(3), **options)


def test_a_full_device_is_told(mesh, monkeypatch):
    def full(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore")

    monkeypatch.setattr(ring, "_meet", full)
    with pytest.raises(jl.DeviceMemoryError, match=r"passes of 3 .* tiles of 3: lower memory_budget=.* 17 bytes\.$"):
        kernel(mesh, cases.mlp(), cases.vectors(3))


def test_the_budget_counts_rows_and_tiles(mesh):
    tun, x1 = cases.mlp(), cases.vectors(3)
    rows, in_float64 = 3 * 2 * 4 * tun.num_params, 2 * 3 * 2 * 8 * tun.num_params
    tile = 2 * 8 * (3 * 2) ** 2  # of two blocks
    assert jl.ntk_plan(tun, x1, mesh=mesh, memory_budget=rows + in_float64 + tile).row_block == 3
    assert jl.ntk_plan(tun, x1, mesh=mesh, memory_budget=rows + in_float64 + tile - 1).row_block < 3


def test_the_plan_of_many_examples(mesh):
    plan = jl.ntk_plan(cases.mlp(2), cases.vectors(20_000), mesh=mesh, blocks="leaf", memory_budget=2_000_000)
    assert plan.spilled
    assert plan.row_block > 50


def test_make_mesh():
    one = jax.devices()[:1]
    found = make_mesh({"data": 1, "model": 1}, devices=one)
    assert dict(found.shape) == {"data": 1, "model": 1}
    assert found.axis_types == (AxisType.Auto, AxisType.Auto)
    assert dict(make_mesh().shape) == {"data": len(jax.devices())}
    for axes, message in (
        ({"data": 3}, r"axes {'data': 3} takes 3 devices and 1 were given"),
        ({"data": 0}, "expected positive ones"),
        ({}, "takes at least 1 devices and 1 were given"),
    ):
        with pytest.raises(jl.InputError, match=message):
            make_mesh(axes, devices=one)


def test_place_and_fetch(mesh, x64):
    tree = {"a": np.arange(6.0).reshape(3, 2), "b": np.arange(3)}
    for axis in (None, "data"):
        there = place(tree, mesh, axis)
        assert there["a"].dtype == (np.float64 if x64 else np.float32)
        assert there["a"].sharding.mesh == mesh
        np.testing.assert_array_equal(fetch(there["a"]), tree["a"])
        np.testing.assert_array_equal(fetch(there["b"]), tree["b"])
    again = place(there, mesh)
    assert again["a"] is there["a"]  # what lies on the mesh stays


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_every_example_is_on_one_device_at_its_own_length(devices):
    data = Dataset.from_columns(cases.text_batch(29, longest=40))
    assert len(data.buckets) > 2
    share = Share.of(data, devices, 2)
    rows = share.examples.reshape(devices, -1, share.chunk)
    assert sorted(rows[rows >= 0]) == list(range(29))
    for slot, (indices, batch) in enumerate(data.chunks(devices * share.chunk)):
        here = rows[:, slot].reshape(-1)
        np.testing.assert_array_equal(here[here >= 0], indices)
        np.testing.assert_array_equal(batch["weight"], here >= 0)
    assert slot == rows.shape[1] - 1
    np.testing.assert_array_equal(share.on(0)[1], share.examples[0][share.on(0)[0]])
