import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# Half of the time of the tests is XLA's, for programs that run once: on a CPU it optimizes less here, as far as it
# knows these flags (another ends a process). `XLA_FLAGS= pytest` tests what users run; `.ci/run` does, too.
if "XLA_FLAGS" not in os.environ and not (find_spec("jax_plugins") or find_spec("libtpu")):
    os.environ["XLA_FLAGS"] = ""
    for flag in ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"):
        flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(command, env={**os.environ, **flags}, capture_output=True).returncode == 0:
            os.environ |= flags

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from jaxlin import cli
from tests import cases

# Compilation makes the first example slow; the number of examples is what is bounded.
settings.register_profile("jaxlin", deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxlin")

MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_programs():
    """Lets compiled programs go: each takes some ten memory maps, and Linux ends a process that wants over 65530."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(params=[False, True], ids=["x64-off", "x64-on"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def model():
    return cases.tiny_model()


@pytest.fixture(scope="session")
def batch():
    return cases.text_batch(6)


def _folder(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"the environment variable {variable} names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def data_folder():
    return _folder("JAXLIN_DATA")


@pytest.fixture(scope="session")
def models_folder():
    return _folder("JAXLIN_MODELS")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["jaxlin", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    before = jax.config.jax_compilation_cache_dir
    yield call
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = {}
    for name, size in (("train", 24), ("validation", 10)):
        rows = [
            ("good film in a way" if i % 2 else "bad and dull") + f" {rng.integers(9999)}\t{i % 2}" for i in range(size)
        ]
        paths[name] = tmp_path / f"{name}.tsv"
        paths[name].write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return paths


@pytest.fixture
def setting_arguments(tmp_path, files):
    """Options that every command takes."""
    return {
        "model_name_or_path": cases.TINY_BERT,
        "head": "mean",
        "train_file": files["train"],
        "validation_file": files["validation"],
        "lora_rank": 2,
        "output_dir": tmp_path / "out",
    }


@pytest.fixture
def arguments(setting_arguments):
    return {**setting_arguments, "max_steps": 3, "per_device_train_batch_size": 8}
