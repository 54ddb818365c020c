import os
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

from tests import cases

# Compilation makes the first example slow; the number of examples is what is bounded.
settings.register_profile("jaxlin", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jaxlin")


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
