"""Kernels on disk: the same to the bit whatever happens to the process, and nothing wrong is ever read."""

import errno
import functools
import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.hashing import fingerprint
from jaxlin.ntk import engine as engines
from jaxlin.ntk import rows, store, work
from jaxlin.ntk.tiles import transposed
from tests import cases

OPTIONS = {"engine": "factored", "blocks": "layer", "memory_budget": 133_000, "check_examples": 1}
"""Several chunks, several tiles a block."""


def tuned(model):
    return jl.select(model, "layer_1/mlp|word")


def tiles(path):
    return sorted(file for file in (path / "blocks" / "c").rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A kernel that was stored without interruption."""
    path = tmp_path_factory.mktemp("whole") / "k"
    kernel = jl.ntk(tuned(cases.tiny_model()), cases.text_batch(6), store=path, **OPTIONS)
    return path, {name: np.array(part) for name, part in kernel.parts.items()}


def assert_same(path, whole):
    """Equal to the bit."""
    kernel = jl.load_kernel(path)
    assert list(kernel.parts) == list(whole[1])
    for name, part in whole[1].items():
        np.testing.assert_array_equal(kernel.parts[name], part)
    assert kernel.info == jl.load_kernel(whole[0]).info


def test_what_is_stored_is_the_kernel_and_others_can_read_it(model, batch, whole):
    path, parts = whole
    kernel = jl.load_kernel(path)
    assert kernel.symmetric
    assert kernel.info.engine == "factored"
    assert kernel.info.epsilon_J is None  # the float64 Jacobian of one example does not fit
    memory = jl.ntk(tuned(model), batch, **OPTIONS)
    for name in parts:
        np.testing.assert_array_equal(memory.parts[name], parts[name])
    np.testing.assert_array_equal(memory.array, kernel.array)
    dense, _ = cases.reference_jacobian(tuned(model), batch)
    assert cases.relative_error(kernel.matrix(), dense @ dense.T) < 5e-6
    layer = kernel.subset(["layer_1"])  # reads that block alone
    np.testing.assert_array_equal(layer.array, parts["layer_1"])
    np.testing.assert_allclose(kernel.weighted({"word": 2.0}).array, kernel.array + parts["embeddings"], rtol=1e-12)

    group = zarr.open_group(path, mode="r")
    assert group["blocks"].shape == (2, 6, 6, 3, 3)
    assert group["blocks"].metadata.dimension_names == ("block", "example_1", "example_2", "output_1", "output_2")
    about = group.attrs["jaxlin"]
    assert about["inputs"]["kind"] == "full"
    assert {"theta_sha256", "model_sha256", "data_sha256", "versions", "precision"} <= set(about["inputs"])
    assert about["plan"]["row_block"] < 6
    assert not (path / "rows").exists()
    assert not [file for file in path.rglob("*") if file.suffix in (".pkl", ".npy", ".partial")]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("phase", [work.PASSES, work.TILES])
def test_interrupted_anywhere_it_ends_the_same(model, batch, whole, tmp_path, phase):
    """Stopped after every new step, and resumed: no step is done twice."""
    path, steps = tmp_path / "k", [0]

    def stop(name, done, total):
        if name == phase and done > steps[-1]:
            steps.append(done)
            raise Stopped

    for _ in range(100):
        try:
            jl.ntk(tuned(model), batch, store=path, resume=True, progress=stop, **OPTIONS)
            break
        except Stopped:
            continue
    assert len(steps) > 4
    if phase == work.TILES:
        assert steps == list(range(len(steps)))  # each attempt adds just one tile
    assert_same(path, whole)


@pytest.mark.slow
def test_the_measured_error_is_kept(model, batch, tmp_path):
    path, options = tmp_path / "k", {**OPTIONS, "memory_budget": 400_000}

    def stop(name, *_):
        if name == work.TILES:
            raise Stopped

    with pytest.raises(Stopped):
        jl.ntk(tuned(model), batch, store=path, progress=stop, **options)
    epsilon = jl.load_kernel(path).info.epsilon_J
    assert 1e-9 < epsilon < 1e-5
    kernel = jl.ntk(tuned(model), batch, store=path, resume=True, **{**options, "check_examples": 0})
    assert kernel.info.epsilon_J == epsilon


def test_it_can_be_read_while_it_grows(model, batch, whole, tmp_path):
    path, seen = tmp_path / "k", []

    def look(name, done, total):
        if name == work.TILES and done == total - 1:
            growing = jl.load_kernel(path)
            first, *_, last = growing.parts
            np.testing.assert_array_equal(growing.parts[first], whole[1][first])
            with pytest.raises(jl.InputError, match="is not complete; resume=True goes on"):
                growing.parts[last]
            assert np.isnan(zarr.open_group(path, mode="r")["blocks"][-1]).any()
            seen.append(done)

    jl.ntk(tuned(model), batch, store=path, progress=look, **OPTIONS)
    assert seen


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_a_damaged_tile_is_found_and_computed_again(model, batch, whole, tmp_path, damage):
    path = tmp_path / "k"
    jl.ntk(tuned(model), batch, store=path, **OPTIONS)
    file = tiles(path)[-1]
    content = bytearray(file.read_bytes())
    content[11] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes({"flip": content, "truncate": content[:50], "empty": b""}[damage])
    with pytest.raises(jl.InputError, match="is not complete" if damage == "remove" else "is corrupt: .*checksum"):
        _ = jl.load_kernel(path).array
    jl.ntk(tuned(model), batch, store=path, resume=True, **OPTIONS)
    assert_same(path, whole)


def test_a_damaged_chunk_of_the_passes_is_computed_again(model, batch, whole, tmp_path):
    path = tmp_path / "k"

    def stop(name, done, total):
        if name == work.TILES:
            raise Stopped

    with pytest.raises(Stopped):
        jl.ntk(tuned(model), batch, store=path, progress=stop, **OPTIONS)
    chunks = sorted((path / "rows" / "rows").glob("*.safetensors"))
    content = bytearray(chunks[0].read_bytes())
    content[-20] ^= 1
    chunks[0].write_bytes(content)
    chunks[1].write_bytes(chunks[1].read_bytes()[:-5])
    seen = []
    jl.ntk(tuned(model), batch, store=path, resume=True, progress=lambda *step: seen.append(step), **OPTIONS)
    assert_same(path, whole)


def test_a_store_of_other_inputs_is_refused(model, batch, whole, tmp_path):
    path, other = whole[0], cases.text_batch(6, seed=5)
    tun = tuned(model)
    for message, change in {
        "kind was full, is trace": {"kind": "trace"},
        "precision was highest, is default": {"precision": "default"},
        "dtype was float32, is float64": {"dtype": "float64"},
        "theta_sha256 was": {"theta": cases.moved(tun)},
        "blocks was": {"blocks": "leaf"},
        "engine was factored, is jacobian": {"engine": "jacobian", "memory_budget": 10_000_000},
        "other_data_sha256 was None": {"x2": other},
    }.items():
        with pytest.raises(jl.InputError, match=f"is of other inputs .*{message}"):
            jl.ntk(tun, batch, store=path, resume=True, **{**OPTIONS, **change})
    with pytest.raises(
        jl.InputError, match=r"other inputs \(data_sha256 was \w+…, is \w+…; lengths was .*, is .*\); give another path"
    ):
        jl.ntk(tun, other, store=path, resume=True, **OPTIONS)
    with pytest.raises(jl.InputError, match="model_sha256 was"):
        jl.ntk(tuned(cases.tiny_model(head="mean", new_head=True)), batch, store=path, resume=True, **OPTIONS)
    with pytest.raises(jl.InputError, match=r"is there already; resume it \(resume=True, --resume\)"):
        jl.ntk(tun, batch, store=path, **OPTIONS)
    for wrong, match in ((tmp_path, "holds no kernel"), (tmp_path / "none", "holds no kernel")):
        with pytest.raises(jl.InputError, match=match):
            jl.load_kernel(wrong)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(jl.InputError, match="is there already"):
        jl.ntk(tun, batch, store=file, **OPTIONS)
    assert jl.ntk(tun, batch, store=path, resume=True, **OPTIONS).array.shape == (6, 6, 3, 3)


@pytest.mark.slow
def test_train_test_kinds_and_unsymmetric_kernels_are_stored(model, batch, tmp_path):
    tun, other = jl.lora(model, rank=2), cases.text_batch(3, 9)
    options = {"memory_budget": 600_000, "check_examples": 0}
    for i, (x2, kind) in enumerate([(other, "full"), (None, "trace"), (None, "asymmetric_signgd"), (None, "diagonal")]):
        stored = jl.ntk(tun, batch, x2, kind=kind, store=tmp_path / str(i), **options)
        again = jl.load_kernel(tmp_path / str(i))
        np.testing.assert_array_equal(stored.array, jl.ntk(tun, batch, x2, kind=kind, **options).array)
        np.testing.assert_array_equal(again.array, stored.array)
        assert (again.kind, again.symmetric) == (kind, x2 is None and kind != "asymmetric_signgd")


def test_out_of_memory_halves_the_chunk_and_says_so(model, batch, monkeypatch, tmp_path):
    tun, run = jl.lora(model, rank=2), work.Work._pass

    def full_at_four(self, batch, *rest):
        if len(batch["input_ids"]) > 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return run(self, batch, *rest)

    options = {"engine": "jacobian", "check_examples": 0}
    exact = jl.ntk(tun, batch, **options)
    monkeypatch.setattr(work.Work, "_pass", full_at_four)
    kernel = jl.ntk(tun, batch, store=tmp_path / "k", **options)
    assert "out of memory in a pass of 6 examples: 3 from then on" in kernel.info.note
    assert cases.relative_error(kernel.array, exact.array) < 1e-6
    plan = json.loads((tmp_path / "k" / "zarr.json").read_text())["attributes"]["jaxlin"]["plan"]
    assert plan["chunk"] == 3
    monkeypatch.setattr(work.Work, "_pass", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        jl.ntk(tun, batch, **options)


def test_out_of_memory_in_a_tile_halves_the_slabs(model, batch, monkeypatch):
    tun, tile, exact = tuned(model), work.Derivatives.tile, jl.ntk(tuned(model), batch, check_examples=0)

    def full(self, paths, left, right, slab_bytes):
        if slab_bytes > 1 << 26:
            raise MemoryError
        return tile(self, paths, left, right, slab_bytes)

    monkeypatch.setattr(work.Derivatives, "tile", full)
    kernel = jl.ntk(tun, batch, engine="factored", check_examples=0)
    assert kernel.info.note.count("out of memory in a tile") == 2
    assert cases.relative_error(kernel.array, exact.array) < 1e-6


@pytest.mark.parametrize("kind", ["full", "trace", "asymmetric_signgd"])
@pytest.mark.parametrize("x2", [None, cases.vectors(4, seed=1)], ids=["itself", "others"])
def test_out_of_memory_in_a_tile_computes_it_in_parts(kind, x2, monkeypatch):
    tun, data, tile = cases.mlp(2), cases.vectors(7), work.Derivatives.tile
    exact = jl.ntk(tun, data, x2, kind=kind)

    def full(self, paths, left, right, slab_bytes):
        if len(left) > 2:
            raise MemoryError
        return tile(self, paths, left, right, slab_bytes)

    monkeypatch.setattr(work.Derivatives, "tile", full)
    kernel = jl.ntk(tun, data, x2, kind=kind, engine="jacobian")
    assert "out of memory in a tile of 7 × " in kernel.info.note
    np.testing.assert_allclose(kernel.array, exact.array, rtol=1e-12)
    if kernel.symmetric:
        np.testing.assert_array_equal(kernel.array, transposed(kernel.array))
    monkeypatch.setattr(work.Derivatives, "tile", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        jl.ntk(tun, data, engine="jacobian")


def test_what_epsilon_needs_may_not_fit(monkeypatch, tmp_path):
    tun, data = cases.mlp(2), cases.vectors(7)
    one = 2 * tun.num_params * 8
    assert jl.ntk(tun, data, engine="jacobian", memory_budget=4 * one).info.epsilon_J is not None
    small = work.EpsilonCheck(tun, as_dataset(data), None, 2, "highest", 2 * one - 1)
    assert small.epsilon() is None  # a row is held twice

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    exact = jl.ntk(tun, data, engine="jacobian")
    monkeypatch.setattr(work, "EpsilonCheck", full)
    kernel = jl.ntk(tun, data, engine="jacobian")
    assert kernel.info.epsilon_J is None
    event = "out of memory in the float64 rows that ε_J is measured by"
    assert event in kernel.info.note
    np.testing.assert_array_equal(kernel.array, exact.array)
    for _ in range(3):  # gone on with, it tells once
        stored = jl.ntk(tun, data, engine="jacobian", store=tmp_path / "k", resume=True)
        assert stored.info.note.count(event) == 1


def test_files_that_do_not_fit_are_refused_before_work(model, batch, monkeypatch, tmp_path):
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(jl.InputError, match=r"passes give and the kernel take .* GiB in .* which has 0.0 GiB free"):
        jl.ntk(tuned(model), batch, store=tmp_path / "k", **OPTIONS)


def scaled(factor):
    return lambda theta, batch: jnp.tanh(factor * (batch["x"] @ theta["w"]))


def test_a_store_of_another_function_is_refused(tmp_path):
    data, theta = {"x": np.eye(2, dtype=np.float32)}, {"w": jnp.ones((2, 1))}
    kernel = jl.ntk(jl.Tunable(scaled(2.0), theta), data, store=tmp_path / "k")
    again = jl.ntk(jl.Tunable(scaled(2.0), theta), data, store=tmp_path / "k", resume=True)
    np.testing.assert_array_equal(again.array, kernel.array)
    others = scaled(3.0), scaled(np.ones(1)), lambda theta, batch: jnp.sin(2.0 * (batch["x"] @ theta["w"]))
    for other in (*others, functools.partial(helped, factor=2.0)):
        with pytest.raises(jl.InputError, match=r"of other inputs .*model_sha256"):
            jl.ntk(jl.Tunable(other, theta), data, store=tmp_path / "k", resume=True)


def helped(theta, batch, factor):
    return helper(batch["x"] @ theta["w"], factor)


def helper(x, factor):
    return SHIFT + x * factor


SHIFT = 0.0


def test_what_a_function_reads_counts(monkeypatch):
    def found():
        tun = jl.Tunable(functools.partial(helped, factor=2.0), {"w": jnp.ones((2, 1))})
        return fingerprint(tun, tun.theta0)["model_sha256"]

    first = found()
    assert found() == first
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", 1.0)
    assert found() != first
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", 0.0)
    assert found() == first
    monkeypatch.setattr(sys.modules[__name__], "helper", lambda x, factor: x)
    assert found() != first


def test_an_empty_folder_is_planned_for(tmp_path):
    tun, data = cases.mlp(2), cases.vectors(3)
    (tmp_path / "k").mkdir()
    plan = jl.ntk_plan(tun, data, store=tmp_path / "k", resume=True)
    assert plan == jl.ntk_plan(tun, data)
    assert jl.ntk(tun, data, store=tmp_path / "k", resume=True).array.shape == (3, 3, 2, 2)


@pytest.mark.slow
def test_an_estimate(model):
    tun, batch = tuned(model), cases.text_batch(40)
    small = jl.ntk_estimate(tun, batch, engine="factored", memory_budget=400_000, blocks="layer")
    large = jl.ntk_estimate(tun, batch, engine="factored", blocks="layer", stored=True)
    assert small.plan.spilled
    assert not large.plan.spilled
    assert small.kernel_bytes == large.kernel_bytes == 2 * 40 * 40 * 9 * 8
    assert small.memory_bytes < 400_000 + small.kernel_bytes
    assert large.disk_bytes > large.kernel_bytes
    assert small.plan == jl.ntk_plan(tun, batch, engine="factored", memory_budget=400_000, blocks="layer")
    assert 0 < large.pass_seconds <= large.seconds < 10
    assert small.compile_seconds >= 0
    assert work.Timed.of_two(1, 8, 10) == (2, 5)
    assert work.Timed.of_two(1, 2, 4) == (2, 0)
    with pytest.raises(jl.InputError, match="makes no plan"):
        jl.ntk_estimate(tun, batch, engine="neural_tangents")


@pytest.mark.parametrize("engine", ["factored", pytest.param("jacobian", marks=pytest.mark.slow)])
def test_an_estimate_counts_what_tiles_read(model, monkeypatch, engine):
    tun, batch = tuned(model), cases.text_batch(40)
    options = {"engine": engine, "memory_budget": 600_000, "blocks": "layer"}
    work, _ = engines._work(tun, batch, None, **options)
    plan, plain, read = work.plan(), rows.Rows.arrays, []
    assert plan.spilled

    def arrays(*given):
        found = plain(*given)
        read.extend(array.nbytes for array in found)
        return found

    monkeypatch.setattr(rows.Rows, "arrays", arrays)
    jl.ntk(tun, batch, check_examples=0, **options)
    assert 0.8 < work._read_bytes(plan) / sum(read) < 1.25


def test_one_process_at_a_time(model, batch, tmp_path):
    path, seen = tmp_path / "k", []

    def second(*_):
        if not seen:
            seen.append(1)
            with pytest.raises(jl.InputError, match="is being computed by another process"):
                jl.ntk(tuned(model), batch, store=path, resume=True, **OPTIONS)

    jl.ntk(tuned(model), batch, store=path, progress=second, **OPTIONS)
    assert seen
    assert [file.name for file in tmp_path.iterdir()] == ["k"]  # no lock is left


def test_what_the_system_says_of_a_file_is_told(tmp_path):
    kept, limits = rows.Rows(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        kept.put(0, np.arange(2), {"a": np.zeros((2, 1 << 12))})
        with pytest.raises(OSError) as caught:
            kept.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_so_and_loses_nothing(model, batch, whole, monkeypatch, tmp_path):
    path, write, written = tmp_path / "k", store.KernelStore.write, []

    def full(self, *tile):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(tile)
        write(self, *tile)

    monkeypatch.setattr(store.KernelStore, "write", full)
    with pytest.raises(jl.InputError, match=r"no space is left .* what is done is kept"):
        jl.ntk(tuned(model), batch, store=path, **OPTIONS)
    monkeypatch.setattr(store.KernelStore, "write", write)
    jl.ntk(tuned(model), batch, store=path, resume=True, **OPTIONS)
    assert_same(path, whole)


HASHED = """
import flax.linen as nn, jax, numpy as np
import jaxlin as jl
from jaxlin.hashing import fingerprint
module = nn.Dense(2)
model = jl.from_linen(module, module.init(jax.random.key(0), np.ones((1, 3)))["params"], inputs=lambda b: (b["x"],))
plain = jl.Tunable(lambda theta, batch: batch["x"] @ theta["w"], {"w": np.ones((2, 1))})
for tun in (jl.full(model), plain):
    print(fingerprint(tun, tun.theta0))
"""


@pytest.mark.slow
def test_other_processes_find_the_same_hashes():
    command = [sys.executable, "-c", HASHED]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert found[0] == found[1]
    assert found[0].count("model_sha256") == 2


KILLED = """
import sys, time
import jaxlin as jl
from tests import cases, test_store
slow = lambda *step: (print(*step, flush=True), time.sleep(0.05))
jl.ntk(test_store.tuned(cases.tiny_model()), cases.text_batch(6), store=sys.argv[1], resume=True, progress=slow,
       **test_store.OPTIONS)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments_it_ends_the_same(whole, tmp_path, seed):
    """kill -9, several times in one run, in passes and in tiles."""
    path = tmp_path / "k"
    command = [sys.executable, "-c", KILLED, str(path)]
    assert len(cases.killed_at_random(command, seed, env={**os.environ, "PYTHONPATH": "."})) >= 2
    assert_same(path, whole)
