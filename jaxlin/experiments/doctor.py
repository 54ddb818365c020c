"""`jaxlin doctor`: what is installed, what runs, where models and data are found."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import jax
from threadpoolctl import threadpool_info

from jaxlin.data.files import tasks_in
from jaxlin.data.stdlib import load_stdlib_task
from jaxlin.models.resolve import EMBEDDED_MODEL, resolve_model
from jaxlin.ntk.neural_tangents import load_neural_tangents
from jaxlin.versions import versions


def _try(action: Callable[[], str]) -> str:
    """Returns what `action` says, or its error."""
    try:
        return action()
    except Exception as error:  # whatever is wrong is what a doctor reports
        return f"NOT USABLE: {error}"


def _data() -> str:
    folder = os.environ.get("JAXLIN_DATA")
    if not folder:
        return "JAXLIN_DATA is not set (data folders are named by --data_dir)"
    return f"{folder}: {', '.join(tasks_in(Path(folder))) or 'no task'}"


def _blas() -> str:
    """The library that NumPy multiplies matrices by, and whether it knows the processor."""
    found = next(library for library in threadpool_info() if library["user_api"] == "blas")
    architecture = found.get("architecture", "")
    said = f"{found['internal_api']} {found['version']}, for {architecture or 'this processor'}"
    cpu = Path("/proc/cpuinfo")
    if architecture in ("Haswell", "Zen") and cpu.exists() and "avx512f" in cpu.read_text():
        said += " though this one has AVX-512: OPENBLAS_CORETYPE=SkylakeX about doubles the rate of kernels' products"
    return said


def _stdlib() -> str:
    task = load_stdlib_task()
    return f"{len(task.train)} + {len(task.validation)} docstrings, sha256 {task.sha256()[:12]}…"


def report() -> dict[str, str]:
    """Returns what there is to know of this installation, by topic."""
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    heavy = {name: importlib.util.find_spec(name) is not None for name in ("torch", "tensorflow")}
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "devices": ", ".join(str(device) for device in jax.devices()),
        "matmul precision": f"{precision or 'the device default'} in training, highest in kernels",
        "BLAS": _try(_blas),
        "x64": "on" if jax.config.read("jax_enable_x64") else "off",
        "neural-tangents": _try(lambda: f"{load_neural_tangents().__version__}, bridged to jax {jax.__version__}"),
        "torch, tensorflow": ", ".join(f"{k} {'installed' if v else 'absent'} (not used)" for k, v in heavy.items()),
        "embedded model": _try(lambda: f"{resolve_model(EMBEDDED_MODEL)} (sha256 checked)"),
        "hub": f"cache {cache}, offline {bool(os.environ.get('HF_HUB_OFFLINE'))}",
        "embedded task": f"{_try(_stdlib)} of {sysconfig.get_path('stdlib')}",
        "data": _data(),
        "models": os.environ.get("JAXLIN_MODELS") or "JAXLIN_MODELS is not set",
        "python": sys.executable,
    }
