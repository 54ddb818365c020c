"""`import jaxlin` costs little, and what is heavy comes only when it is used."""

import json
import subprocess
import sys

HEAVY = (
    *("datasets", "transformers", "tokenizers", "pandas", "pyarrow"),
    *("sklearn", "matplotlib", "zarr", "neural_tangents", "grain", "orbax", "tensorboardX", "tyro"),
    *("torch", "tensorflow"),
)
CODE = f"""
import json, sys
import jaxlin
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""


def test_import():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []
