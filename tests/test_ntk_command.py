"""`jaxlin ntk`: what it writes, what it says, what it refuses."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlin as jl
from jaxlin.experiments import kernel as command
from jaxlin.ntk import work
from tests import cases

ROOT = Path(__file__).parents[1]

words = functools.partial(cases.flags, command="ntk")


@pytest.fixture
def options(setting_arguments):
    return {**setting_arguments, "num_samples": 10}


def test_it_writes_a_store_a_spectrum_and_a_summary(run, options, tmp_path):
    code, out, err = run(*words({**options, "num_eval_samples": 4, "seed": 3}))
    assert code == 0, err
    folder = tmp_path / "out"
    kernel = jl.load_kernel(folder / "kernel.zarr")
    assert kernel.array.shape == (10, 10, 2, 2)
    assert {"classifier", "layer_0/lora_A", "layer_1/lora_B"} <= set(kernel.parts)
    assert jl.load_kernel(folder / "kernel_eval.zarr").array.shape == (4, 10, 2, 2)
    spec = jl.spectrum(kernel)
    np.testing.assert_allclose(
        [float(row["eigenvalue"]) for row in cases.rows(folder / "spectrum.csv")], spec.eigenvalues
    )
    summary = json.loads((folder / "all_results.json").read_text())["summary"]
    assert summary["condition_number"] == pytest.approx(spec.condition_number)
    assert summary["kernel"]["epsilon_J"] == kernel.info.epsilon_J
    for share in ("trace_share", "norm_share"):
        assert sum(float(row[share]) for row in cases.rows(folder / "table.csv")) == pytest.approx(1)
    assert (folder / "figures" / "spectrum.png").read_bytes()[:4] == b"\x89PNG"
    assert ET.parse(folder / "figures" / "spectrum.svg").getroot().tag.endswith("svg")
    assert "engine factored: chosen since every tuned parameter belongs to a module" in err
    assert "κ = " in out or "κ ≥ " in out
    log = (folder / "run.log").read_text()
    assert "10 training, 4 evaluation examples" in log
    assert "10/10" in log

    code, _, err = run("ntk", "--config", folder / "config.yaml", "--output_dir", tmp_path / "again", "--quiet")
    assert (code, err) == (0, "")
    np.testing.assert_array_equal(jl.load_kernel(tmp_path / "again" / "kernel.zarr").array, kernel.array)


def test_interrupted_it_says_how_to_go_on_and_does(run, options, tmp_path, monkeypatch):
    compute, steps = work.Derivatives.tile, []

    def interrupted(self, *args):
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return compute(self, *args)

    monkeypatch.setattr(work.Derivatives, "tile", interrupted)
    code, out, err = run(*words(options))
    assert code == 130
    last = out.strip().splitlines()[-1]
    assert "interrupted" in err
    assert not (tmp_path / "out" / "all_results.json").exists()
    assert "is not empty" in run(*words(options))[2]
    code, _, err = run(*words({**options, "resume": True, "seed": 1}))
    assert code == 2
    assert "is of other inputs" in err
    assert "seed: 0" in (tmp_path / "out" / "config.yaml").read_text()  # the record of the run is as it was
    count = len(steps)
    code, _, err = run(*last.partition("go on with: jaxlin ")[2].split())
    assert code == 0, err
    kernel = jl.load_kernel(tmp_path / "out" / "kernel.zarr")
    assert len(steps) - count == len(kernel.parts) - 2  # two were there
    assert "stopped: interrupted" in (tmp_path / "out" / "run.log").read_text()
    code, _, _ = run(*words({**options, "output_dir": tmp_path / "whole", "resume": True}))  # nothing there: a start
    assert code == 0
    np.testing.assert_array_equal(jl.load_kernel(tmp_path / "whole" / "kernel.zarr").array, kernel.array)


def files(folder):
    return sum(len(names) for _, _, names in os.walk(folder))


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(run, options, tmp_path):
    """kill -9, several times, in passes, tiles, and what follows them."""
    folder, rng, killed = tmp_path / "out", np.random.default_rng(0), 0
    main = [sys.executable, "-c", "from jaxlin.cli import main; main()"]
    command = [*main, *map(str, words({**options, "resume": True}))]
    assert run(*words({**options, "output_dir": tmp_path / "whole"}))[0] == 0
    count = files(tmp_path / "whole")
    for _ in range(4):
        least = rng.integers(3, count)  # files, of which every tile is one
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and files(folder) < least:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    assert killed
    code, _, err = run(*words({**options, "resume": True}))
    assert code == 0, err
    found, expected = (jl.load_kernel(path / "kernel.zarr") for path in (folder, tmp_path / "whole"))
    assert found.info == expected.info
    for block, part in expected.parts.items():
        np.testing.assert_array_equal(found.parts[block], part)
    for name in ("spectrum.csv", "table.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_of_another_command_is_left_alone(run, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"command": "compare"}')
    code, _, err = run(*words({**options, "resume": True}))
    assert code == 2
    assert "is of `jaxlin compare`; --resume goes on with a kernel" in " ".join(err.split())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]


def test_overwriting_replaces_the_store(run, options, tmp_path):
    for kind in ("trace", "pseudo"):
        code, _, err = run(*words({**options, "kind": kind, "overwrite_output_dir": True}))
        assert code == 0, err
        kernel = jl.load_kernel(tmp_path / "out" / "kernel.zarr")
        assert (kernel.kind, kernel.array.shape) == (kind, (10, 10))


def test_a_kernel_without_a_spectrum(run, options, tmp_path):
    code, out, _ = run(*words({**options, "kind": "asymmetric_signgd"}))
    assert code == 0
    assert "no spectrum: this kernel is not symmetric" in out
    assert not (tmp_path / "out" / "spectrum.csv").exists()
    code, out, _ = run(*words({**options, "kind": "asymmetric_signgd", "nearest_psd": True, "resume": True}))
    assert code == 0
    assert min(float(row["eigenvalue"]) for row in cases.rows(tmp_path / "out" / "spectrum.csv")) >= 0


@pytest.mark.parametrize("devices", [{}, {"mesh": "auto"}], ids=["one device", "mesh"])
@pytest.mark.filterwarnings("ignore:JAX was in use before")
def test_an_estimate_writes_nothing(run, options, tmp_path, devices):
    code, out, _ = run(*words({**options, **devices, "num_eval_samples": 4, "estimate": True}))
    assert code == 0
    what = ["engine", "time", "memory", "disk"]
    assert [line.split()[0] for line in out.splitlines()] == ["kernel.zarr:", *what, "kernel_eval.zarr:", *what]
    assert len(re.findall(r"of it passes over the data\), and \S+ s to compile", out)) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:JAX was in use before")
def test_a_mesh(run, options, tmp_path):
    code, _, err = run(*words({**options, "mesh": "auto"}))
    assert code == 0, err
    assert "in a ring" in err
    kernel = jl.load_kernel(tmp_path / "out" / "kernel.zarr")
    assert run(*words({**options, "output_dir": tmp_path / "alone"}))[0] == 0
    alone = jl.load_kernel(tmp_path / "alone" / "kernel.zarr")
    assert kernel.parts.keys() == alone.parts.keys()
    assert cases.relative_error(kernel.array, alone.array) < 5e-6
    code, out, err = run(*words({**options, "mesh": "auto", "resume": True}))
    assert code == 0, err
    assert "written to" in out


BAD = {
    "parameters over devices": ({"mesh": f"data={len(jax.devices())},model=1"}, "expected data=N or auto"),
    "no samples": ({"num_samples": 0}, "--num_samples 0: expected at least 1"),
    "memory": ({"memory_budget": 0}, "--memory_budget 0.0: expected GiB above 0"),
    "compare's": ({"max_train_samples": 5}, "--max_train_samples and --max_eval_samples are of compare"),
    "nearest": ({"nearest_psd": True}, "full is symmetric as it is"),
    "resume and overwrite": ({"resume": True, "overwrite_output_dir": True}, "contradict each other"),
    "kind": ({"kind": "ntk"}, "invalid choice"),
    "too small a budget": ({"memory_budget": 1e-7}, "more than memory_budget"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_writes_nothing(run, options, tmp_path, case):
    change, message = BAD[case]
    code, _, err = run(*words({**options, **change}))
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_shares_of_a_vanishing_kernel_are_blank():
    tun = jl.Tunable(lambda theta, batch: 0.0 * batch["x"] @ theta["w"], {"w": np.zeros((4, 2), np.float32)})
    table = command.block_table(jl.ntk(tun, {"x": np.ones((2, 4), np.float32)}))
    assert table == [{"block": "w", "leaves": 1, "trace_share": None, "norm_share": None}]
