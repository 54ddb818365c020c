import errno
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

import jaxlin as jl
from jaxlin.data.dataset import Dataset
from jaxlin.mesh import Share, fetch, make_mesh, place
from jaxlin.ntk import engine, ring, rows, work
from jaxlin.ntk.factored import find_sites
from jaxlin.ntk.kinds import KINDS
from jaxlin.ntk.tiles import transposed
from jaxlin.ntk.work import PASSES, TILES
from jaxlin.tunable import leaf_paths
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


@pytest.mark.parametrize(
    "x2",
    [
        pytest.param(None, id="itself"),
        pytest.param(cases.text_batch(3, seed=1, longest=9), id="others", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", [pytest.param("signgd", marks=pytest.mark.slow), "asymmetric_signgd"])
def test_kinds_of_signs(mesh, kind, x2):
    tun, x1 = jl.select(cases.tiny_model(), "embeddings/word|layer_1/attention"), cases.text_batch(5, longest=14)
    options = {"kind": kind, "dtype": "float64", "blocks": "leaf", "check_examples": 0}
    alone = jl.ntk(tun, x1, x2, engine="factored", **options)
    # Of one word, and of one row of a weight, at a time; and of all.
    for budget in (300_000, 1 << 30):
        found = jl.ntk(tun, x1, x2, mesh=mesh, memory_budget=budget, **options)
        assert found.symmetric == (x2 is None and kind == "signgd")
        assert "1 key biases left out" in found.info.note
        for block, part in alone.parts.items():
            scale = max(1, np.abs(part).max())
            assert np.abs(found.parts[block] - part).max() <= 1e-12 * scale + 2 * (kind == "signgd")
            assert not block.endswith("key/bias") or not found.parts[block].any()


@pytest.mark.parametrize("x2", [None, cases.vectors(3, seed=1)], ids=["itself", "others"])
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.of_signs])
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
    leaves, kind = ((ring._Leaf("w", 1 << 17, None),),), KINDS["diagonal" if diagonal else "full"]
    round_trip = ring._Ring(mesh, "data", leaves, (), kind, 2, np.dtype(np.float32))
    rows = {"w": jnp.zeros((8, 2, 1 << 17), jnp.float32)}
    with jax.enable_x64(True):
        program = ring._meet.lower(rows, rows, ring=round_trip, passes=False, slab_bytes=0).compile()
    assert program.memory_analysis().temp_size_in_bytes < rows["w"].nbytes / 4


@pytest.mark.parametrize("kind", ["full", "signgd"])
@pytest.mark.parametrize("pattern", ["embeddings/word", "layer_1/mlp/up/kernel", "layer_1"])
def test_what_is_formed_is_what_the_plan_counts(mesh, pattern, kind):
    tun, data = jl.select(cases.tiny_model(), pattern), cases.text_batch(24, longest=14)
    work, _ = engine._work(tun, data, None, mesh=mesh, kind=kind, memory_budget=1_500_000)
    plan = work.plan()
    held = work._empty(next(iter(work._shares(plan).values())))
    with jax.enable_x64(True):
        program = ring._meet.lower(held, held, ring=work._ring, passes=False, slab_bytes=plan.slab_bytes).compile()
    rows = len(next(iter(held.values())))
    tile = 8 * (3 * rows) ** 2
    assert program.memory_analysis().temp_size_in_bytes <= work._formed(plan, rows) + 4 * tile


def test_frozen_weights_are_not_compiled_in(mesh, model, batch):
    tun = jl.lora(model, rank=3)
    data = Dataset.from_columns(batch)
    sites = find_sites(tun, data, tun.theta0, 3)
    sizes = {path: leaf.size for path, leaf in flatten_dict(tun.theta0, sep="/").items() if path.endswith("lora_B")}
    leaves = [ring._Leaf(path, size, None) for path, size in sizes.items()]
    some = ring._Ring(mesh, "data", (tuple(leaves),), sites, KINDS["full"], 3, np.dtype(np.float32))
    columns = {name: jnp.asarray(value) for name, value in data.batch(np.arange(6)).items()}
    weights = (tun.apply, tun.theta0, jnp.eye(3))
    rows = {leaf.path: jnp.zeros((6, 3, leaf.size)) for leaf in leaves}
    closed = jax.make_jaxpr(lambda *given: ring._fill(*given, ring=some))(rows, jnp.int32(0), columns, weights)
    assert all(np.size(const) < 200 for const in closed.consts)


def test_chunks_and_progress(mesh, monkeypatch):
    tun, x1, x2 = cases.mlp(2), cases.vectors(7), cases.vectors(3, seed=1)
    whole, seen = kernel(mesh, tun, x1, x2), []
    monkeypatch.setattr(work, "MAX_CHUNK", 2)
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
    monkeypatch.setattr(ring.RingWork, "_timed_pass", lambda _, rows, *others: (work.Timed(1, 20), rows))
    monkeypatch.setattr(ring.RingWork, "_timed_meeting", lambda *_: work.Timed(1000, 10_000))
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
        assert cost.compile_seconds == 10_020
        if x2 is None:
            np.testing.assert_array_equal(found, transposed(found))


def test_store(mesh, tmp_path):
    tun, x1, path = jl.lora(cases.tiny_model(), rank=3, layers=[1]), cases.text_batch(9, longest=14), tmp_path / "K"
    options = {"blocks": "layer", "mesh": mesh, "memory_budget": 90_000}
    assert 1 < jl.ntk_plan(tun, x1, **options).row_block < 9
    alone = jl.ntk(tun, x1, **options)
    stored = jl.ntk(tun, x1, **options, store=path)
    assert stored.info.epsilon_J == alone.info.epsilon_J < 1e-5
    assert stored.info.note == alone.info.note
    assert alone.info.note.endswith("belongs to a module that is called once; 1 device in a ring")
    for block, part in alone.parts.items():
        np.testing.assert_array_equal(stored.parts[block], part)
    with pytest.raises(jl.InputError, match="is there already"):
        jl.ntk(tun, x1, **options, store=path)
    with pytest.raises(jl.InputError, match=r"of other inputs .*devices was 1, is None"):
        jl.ntk(tun, x1, **{**options, "mesh": None}, store=path, resume=True)
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


@pytest.mark.slow
@pytest.mark.parametrize("away", [False, True])
def test_zero_derivatives_are_neither_held_nor_passed_on(mesh, batch, away, monkeypatch):
    tun = jl.lora(cases.tiny_model(), rank=3, layers=[1])
    theta = cases.moved(tun) if away else tun.theta0
    alone = jl.ntk(tun, batch, theta=theta, blocks="leaf", engine="jacobian", check_examples=0)
    seen = []
    plain = ring.RingWork._filled

    def filled(self, rows, *others):
        seen.append({name for name in rows if name.endswith("lora_A")})
        return plain(self, rows, *others)

    monkeypatch.setattr(ring.RingWork, "_filled", filled)
    found = jl.ntk(tun, batch, theta=theta, blocks="leaf", mesh=mesh, check_examples=0)
    of_a = {path for path in leaf_paths(theta) if path.endswith("lora_A")}
    assert seen
    assert all(names == (of_a if away else set()) for names in seen)
    for block, part in alone.parts.items():
        assert np.abs(found.parts[block] - part).max() <= 2e-6 * np.abs(alone.array).max()
        assert part.any() == found.parts[block].any() == (away or not block.endswith("lora_A"))


def test_where_not_all_parts_fit_they_are_computed_anew(mesh, monkeypatch):
    """Memory runs out in the third part's first pass, while the second is held for later tiles."""
    tun, x1 = cases.mlp(2), cases.vectors(12)
    options = {"mesh": mesh, "memory_budget": 10_000}
    plan = jl.ntk_plan(tun, x1, **options)
    assert (plan.row_block, plan.spilled) == (4, False)
    alone, passes = kernel(**options, tun=tun, x1=x1), []

    def third(*_, **__):
        passes.append(None)
        return len(passes) == 2 * -(-4 // plan.chunk) + 1

    too_small(monkeypatch, "_fill", third)
    found = jl.ntk(tun, x1, check_examples=0, **options)
    assert "from then on it holds what the passes give of one tile's examples only" in found.info.note
    np.testing.assert_array_equal(found.array, alone)
    assert len(passes) > 3 * -(-4 // plan.chunk) + 1


@pytest.mark.slow
def test_passes_outlive_the_process(mesh, tmp_path, monkeypatch):
    """Interrupted in its first tile, it goes on without a pass, on what is of its own only."""
    tun, x1, path = jl.full(cases.tiny_model()), cases.text_batch(9, longest=14), tmp_path / "K"
    options = {"mesh": mesh, "check_examples": 0, "store": path}
    whole = jl.ntk(tun, x1, **{**options, "store": tmp_path / "whole"})

    def stop(phase, *_):
        if phase == TILES:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jl.ntk(tun, x1, **options, progress=stop)
    assert len(list((path / "rows").rglob("*.safetensors"))) == 1
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(ring.RingWork, "_filled", None)
        again = jl.ntk(tun, x1, **options, resume=True, progress=lambda *now: seen.append(now))
    assert seen == [(PASSES, 9, 9), (TILES, 1, 1)]
    np.testing.assert_array_equal(again.array, whole.array)
    assert not (path / "rows").exists()


@pytest.mark.slow
def test_the_other_examples_may_be_longer(mesh):
    """Whose lengths are less, but in wider arrays."""
    tun, x1 = jl.select(cases.tiny_model(), "layer_1/mlp"), cases.text_batch(5, longest=10)
    x2 = {
        name: np.pad(value, ((0, 0), (0, 16 - value.shape[1]))) if value.ndim > 1 else value
        for name, value in cases.text_batch(3, seed=1, longest=9).items()
    }
    alone = jl.ntk(tun, x1, x2, check_examples=0).array
    assert cases.relative_error(kernel(mesh, tun, x1, x2), alone) < 1e-6


@pytest.mark.parametrize("over", [False, True], ids=["one device", "mesh"])
def test_signs_of_nan_are_nan(mesh, over):
    tun = cases.mlp()
    theta = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), tun.theta0)
    found = jl.ntk(tun, cases.vectors(3), theta=theta, kind="signgd", mesh=mesh if over else None, check_examples=0)
    assert np.isnan(found.array).all()


def test_nothing_that_has_a_sign(mesh, tmp_path):
    tun, x1 = jl.select(cases.tiny_model(), "key/bias"), cases.text_batch(3)
    for options in ({}, {"store": tmp_path / "K"}):
        found = jl.ntk(tun, x1, kind="signgd", mesh=mesh, check_examples=0, **options)
        assert found.array.shape == (3, 3, 3, 3)
        assert not found.array.any()


@pytest.mark.slow
def test_a_disk_that_is_full_after_all_keeps_no_passes(mesh, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    tun, x1 = jl.select(cases.tiny_model(), "layer_1/mlp"), cases.text_batch(5)
    with monkeypatch.context() as patch:
        patch.setattr(rows.os, "replace", full)
        kept = rows.Rows(tmp_path / "rows")
        kept.put(0, np.arange(2), {"a": np.zeros(2)})
        for ask in (kept.wait, lambda: kept.put(2, np.arange(2), {"a": np.zeros(2)})):
            with pytest.raises(OSError, match="No space"):
                ask()
    assert not list((tmp_path / "rows").iterdir())
    monkeypatch.setattr(rows.Rows, "put", full)
    found = jl.ntk(tun, x1, mesh=mesh, check_examples=0, store=tmp_path / "K")
    np.testing.assert_array_equal(found.array, kernel(mesh, tun, x1))


def test_a_disk_without_room_for_passes_has_none(mesh, tmp_path, monkeypatch):
    tun, x1 = cases.mlp(), cases.vectors(7)
    work = engine._work(tun, x1, None, mesh=mesh)[0]
    monkeypatch.setattr(ring, "free_bytes", lambda folder: (work.disk_bytes(work.plan()) - 1, folder))
    seen = []
    stored = jl.ntk(
        tun, x1, mesh=mesh, store=tmp_path / "K", progress=lambda *_: seen.append((tmp_path / "K" / "rows").exists())
    )
    assert seen
    assert not any(seen)
    np.testing.assert_array_equal(stored.array, jl.ntk(tun, x1, mesh=mesh).array)


KILLED = """
import sys, time
import jax
import jaxlin as jl
from jaxlin.mesh import make_mesh
from tests import cases
path, *processes = sys.argv[1:]
if processes:
    port, count, index = map(int, processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, initialization_timeout=60)
slow = lambda *step: (print(*step, flush=True), time.sleep(0.05))
jl.ntk(jl.lora(cases.tiny_model(), rank=3, layers=[1]), cases.text_batch(13, longest=14), blocks="layer", progress=slow,
       mesh=make_mesh(), memory_budget=30_000 if processes else 45_000, store=path, resume=True)
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


def killed_together(path, after):
    """Runs two processes of four devices, killed (-9) both after so many steps of the first; returns the steps."""
    port, environment = free_port(), cases.virtual_devices(4)
    running = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(port), "2", str(index)],
            stdout=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for index in range(2)
    ]
    seen = []
    for line in running[0].stdout:
        if line.startswith((PASSES, TILES)):  # not gloo's
            phase, done, total = line.rsplit(maxsplit=2)
            seen.append((phase, int(done), int(total)))
        if len(seen) == after:
            for process in running:
                process.kill()
            break
    running[0].stdout.close()
    codes = [process.wait(TIMEOUT) for process in running]
    assert codes == ([0, 0] if len(seen) != after else [-9, -9])
    return seen


@pytest.mark.slow
def test_processes_that_are_killed_lose_a_tile_at_most(tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "killed"
    killed_together(whole, None)
    reached = 0
    for after in (2, 7, 9, 20, None):
        done = [step for phase, step, _ in killed_together(path, after) if phase == TILES]
        assert not done or done[0] > reached - 8  # steps of a round, in which a tile of every block is found
        reached = max([reached, *done])
    expected, found = jl.load_kernel(whole), jl.load_kernel(path)
    assert "8 devices in a ring" in found.info.note
    for block, part in expected.parts.items():
        np.testing.assert_array_equal(found.parts[block], part)


BAD = {
    "memory": ({"memory_budget": 100}, "each of 1 devices has to hold"),
    "engine": ({"engine": "neural_tangents"}, "mesh: no options of engine"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(mesh, case):
    options, message = BAD[case]
    with pytest.raises(jl.InputError, match=message):
        kernel(mesh, cases.mlp(), cases.vectors(3), **options)


def no_memory(*_, **__):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.\nmore")


def test_a_full_device_is_told(mesh, monkeypatch):
    monkeypatch.setattr(ring, "_meet", no_memory)
    with pytest.raises(jl.DeviceMemoryError, match=r"of one example on each: tune less, .* 17 bytes\.$"):
        kernel(mesh, cases.mlp(), cases.vectors(3))
    monkeypatch.setattr(ring.RingWork, "several_processes", True)
    monkeypatch.setattr(ring.RingWork, "agree", lambda _, here: here)
    with pytest.raises(jl.DeviceMemoryError, match=r"passes of 3 .* tiles of 3: lower memory_budget=.* 17 bytes\.$"):
        kernel(mesh, cases.mlp(), cases.vectors(3))


def test_other_errors_of_a_device_come_as_they_are(mesh, monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(ring, "_meet", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        kernel(mesh, cases.mlp(), cases.vectors(3))


def too_small(monkeypatch, name, limit):
    """Lets memory run out in a function of the ring's where its arguments are too large."""
    plain = getattr(ring, name)
    monkeypatch.setattr(ring, name, lambda *a, **k: no_memory() if limit(*a, **k) else plain(*a, **k))


# Function, when memory runs out in it, and what is told.
FULL_DEVICES = {
    "passes": (
        "_fill",
        lambda _, start, batch, *others, **options: len(batch["labels"]) > 2,
        [r"in a pass of 4 examples a device: 2 from then on"],
    ),
    "slabs": (
        "_meet",
        lambda *_, slab_bytes, **options: slab_bytes > 1500,
        [r"in a tile with slabs of 9375 bytes: half", r"in a tile with slabs of 2343 bytes: half"],
    ),
    "parts": (
        "_meet",
        lambda held, *_, **options: len(next(iter(held.values()))) > 2,
        [
            r"in a tile with slabs of 146 bytes: half",
            r"in a tile of \d × \d examples: computed in parts",
            r"in a tile of 3 × \d examples: computed in parts",
        ],
    ),
}


@pytest.mark.parametrize(
    "case", ["passes", *(pytest.param(case, marks=pytest.mark.slow) for case in ("slabs", "parts"))]
)
@pytest.mark.parametrize("x2", [None, cases.text_batch(6, seed=1, longest=14)], ids=["itself", "others"])
def test_where_memory_runs_out_it_goes_on_with_less(mesh, case, x2, monkeypatch, tmp_path):
    name, limit, events = FULL_DEVICES[case]
    tun, x1 = jl.select(cases.tiny_model(), "layer_1/mlp"), cases.text_batch(13, longest=14)
    options = {"blocks": "leaf", "check_examples": 0, "mesh": mesh, "memory_budget": 300_000}
    alone, seen = jl.ntk(tun, x1, x2, **options), []
    monkeypatch.setattr(ring, "SMALLEST_SLAB", 100)
    too_small(monkeypatch, name, limit)
    found = jl.ntk(tun, x1, x2, **options, store=tmp_path / "K", progress=lambda *now: seen.append(now))
    for event in events:
        assert re.search(f"out of memory {event}", found.info.note)
    for block, part in alone.parts.items():
        assert cases.relative_error(found.parts[block], part) < 1e-6
    for phase in (PASSES, TILES):
        done = [(count, total) for name, count, total in seen if name == phase]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


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
