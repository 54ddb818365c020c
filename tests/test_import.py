"""`import jaxlin` costs little, and what is heavy comes only when it is used."""

import json
import subprocess
import sys

HEAVY = (
    *("datasets", "transformers", "tokenizers", "pandas", "pyarrow"),
    *("sklearn", "matplotlib", "neural_tangents", "grain", "orbax", "tensorboardX", "tyro"),
    *("torch", "tensorflow"),
)
CODE = f"""
import json, sys, time
import jax, flax.linen, flax.nnx
begin = time.process_time()
import jaxlin
seconds = time.process_time() - begin
print(json.dumps([seconds, [name for name in {HEAVY} if name in sys.modules]]))
"""


def test_import():
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    seconds, loaded = json.loads(out)
    assert loaded == []
    assert seconds < 1.5, f"import jaxlin took {seconds:.2f} s of processor time beyond jax and flax"
