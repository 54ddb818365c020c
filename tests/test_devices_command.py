"""`jaxlin compare` over a mesh and over several processes."""

import contextlib
import csv
import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments.device_arguments import mesh_axes
from jaxlin.mesh import make_mesh
from jaxlin.sharding import mesh_of
from tests import cases, shard_check
from tests.test_mesh import ROOT, free_port


def assert_same(tables, rtol):
    for ours, theirs in zip(*tables, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float) and theirs[name] is not None:
                np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=rtol, err_msg=f"{ours['arm']} {name}")
            else:
                assert value == theirs[name]


@pytest.mark.parametrize("linear_mode", ["cached", "streaming"])
def test_a_comparison_on_a_mesh(linear_mode):
    mesh = make_mesh({"data": 1, "model": 1}, devices=jax.devices()[:1])
    given = cases.mlp(3, width=6), cases.vectors(12, num_labels=3), cases.vectors(5, seed=1, num_labels=3)
    config = jl.TrainConfig(batch_size=5, max_steps=4)
    options = {"lams": [0.5], "linear_mode": linear_mode, "linearize_at": [2]}
    alone = jl.compare(*given, config, **options)
    there = jl.compare(*given, config, mesh=mesh, rules=shard_check.MLP_RULES, **options)
    assert_same((there.table, alone.table), 1e-4)
    for name in ("full", "linearized"):
        assert mesh_of(there.results[name, 0.5].theta) == mesh


def test_axes():
    assert mesh_axes("data=4,model=2") == {"data": 4, "model": 2}
    assert mesh_axes("model=2") == {"data": 1, "model": 2}
    for text in ("data", "data=x", "rows=2", "data=2,data=2", ""):
        with pytest.raises(jl.InputError, match="expected data=N or data=N,model=M"):
            mesh_axes(text)


@pytest.mark.filterwarnings("ignore:JAX was in use")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mesh": "data=3"}, "takes 3 devices and 1 were given"),
        ({"num_processes": 2}, "num_processes=2 without coordinator_address and process_id"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    ],
)
def test_bad_devices(run, arguments, tmp_path, given, message):
    code, out, err = run(*cases.flags({**arguments, **given}))
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def table_of(folder):
    with (folder / "table.csv").open() as stream:
        return [
            {name: value if name == "arm" or not value else float(value) for name, value in row.items()}
            for row in csv.DictReader(stream)
        ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:JAX was in use")
def test_parts_and_rematerialisation_change_nothing(run, arguments, tmp_path):
    plain = {**arguments, "lam_rel": [0.1], "linear_mode": "streaming"}
    less = {**plain, "output_dir": tmp_path / "less", "per_device_train_batch_size": 4, "mesh": "data=1,model=1"}
    less |= {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    for one in (plain, less):
        code, _, err = run(*cases.flags(one))
        assert code == 0, err
    assert_same([table_of(folder) for folder in (tmp_path / "less", tmp_path / "out")], 1e-3)


@contextlib.contextmanager
def two_processes(options):
    """The command in two processes of four devices each; they end with the block."""
    port, running = free_port(), []
    environment = cases.virtual_devices(4)
    many = {**options, "per_device_train_batch_size": 1, "mesh": "auto"}
    many |= {"coordinator_address": f"127.0.0.1:{port}", "num_processes": 2}
    try:
        for index in range(2):
            words = [str(word) for word in cases.flags({**many, "process_id": index})]
            command = [sys.executable, "-c", "from jaxlin.cli import main; main()", *words]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_two_processes_write_one_folder(run, arguments, tmp_path):
    plain = {**arguments, "lam_rel": [0.1], "linear_mode": "streaming"}
    assert run(*cases.flags(plain))[0] == 0
    with two_processes({**plain, "output_dir": tmp_path / "many"}) as running:
        said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert "written to" in said[0][0]
    assert all(line.startswith("[Gloo]") for line in said[1][0].splitlines())  # the library's own
    assert "training:" in said[0][1]
    assert "training:" not in said[1][1]
    assert len((tmp_path / "many" / "log.jsonl").read_text().splitlines()) == 2 * 3
    assert_same([table_of(tmp_path / name) for name in ("many", "out")], 1e-3)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_which_goes_on(run, arguments, tmp_path):
    plain = {**arguments, "lam_rel": [0.1], "linear_mode": "streaming", "max_steps": 60, "save_steps": 3}
    assert run(*cases.flags(plain))[0] == 0
    many = {**plain, "output_dir": tmp_path / "many", "resume_from_checkpoint": "latest"}
    log = tmp_path / "many" / "log.jsonl"
    with two_processes(many) as running:
        deadline = time.monotonic() + 300
        while not log.exists() or len(log.read_text().splitlines()) < 8:
            assert time.monotonic() < deadline
            assert running[0].poll() is None, running[0].communicate()
            time.sleep(0.02)
        running[1].kill()
        _, err = running[0].communicate(timeout=60)
        assert running[0].returncode not in (0, None)
        assert err
    assert len(log.read_text().splitlines()) < 2 * 60
    assert (tmp_path / "many" / "checkpoints").is_dir()
    with two_processes(many) as running:
        said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 61)] * 2
    assert_same([table_of(tmp_path / name) for name in ("many", "out")], 1e-3)
