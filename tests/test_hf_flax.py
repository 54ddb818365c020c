"""`from_hf_flax` needs transformers 4.57, which this environment does not have: it runs in one of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlin as jl

REQUIREMENTS = (
    *("transformers==4.57.6", "jax>=0.10", "flax>=0.12", "optax", "scikit-learn", "jaxtyping", "tyro", "rich"),
    *("matplotlib", "tensorboardX", "frozendict", "safetensors", "scipy", "beartype", "zarr", "matfree"),
)


def _environment(folder: Path) -> Path:
    """Makes an environment with transformers 4.57; skips where there is no way to."""
    python = folder / "bin" / "python"
    if shutil.which("uv"):
        commands = [
            ["uv", "venv", "-q", "--python", sys.executable, str(folder)],
            ["uv", "pip", "install", "-q", "--python", str(python), *REQUIREMENTS],
            ["uv", "pip", "install", "-q", "--python", str(python), "--no-deps", "neural-tangents"],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "-q", *REQUIREMENTS],
            [str(python), "-m", "pip", "install", "-q", "--no-deps", "neural-tangents"],
        ]
    for command in commands:
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no environment with transformers 4.57 can be made: {made.stderr.strip().splitlines()[-1:]}")
    return python


@pytest.mark.slow
def test_classes_of_transformers_4(tmp_path):
    python = _environment(tmp_path / "venv")
    root = Path(__file__).parent.parent
    command = [str(python), str(root / "tests" / "hf_flax_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bert", "ok", "roberta", "ok", "gpt2", "ok"]


def test_other_objects_are_refused():
    with pytest.raises(jl.InputError, match=r"got a dict; expected a Flax model of transformers 4\.57"):
        jl.from_hf_flax({})
