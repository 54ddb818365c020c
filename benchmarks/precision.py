"""How far bfloat16, and the device's default matrix products, take outputs, gradients and a whole run from float32.

    uv run python benchmarks/precision.py FOLDER/sst2/train.tsv [--examples 32] [--steps 20] [--json FILE]

MiniLM (the embedded model) with real text, LoRA rank 8 on queries and values and the head, squared loss. Everything is
told against the same in float64: the error of outputs and gradient at a point away from θ₀ (B ≠ 0), relative to the
largest output (their Frobenius norm for the gradient), and, of a run of Adam, the largest error of the loss relative
to its start and that of where it ends, ‖θ − θ₆₄‖/‖θ₆₄ − θ₀‖. Full and linearized; at `precision="highest"` and
`"default"`, which is TF32 or bfloat16 on accelerators (on a CPU it is the same and left out).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlin as jl
from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.ntk.jacobian import to_float64
from jaxlin.training.precision import in_dtype
from jaxlin.training.step import loss_and_gradient

WAYS = {
    "float64": ("float32", "highest"),  # of the parameters, which are float64 there
    "float32, highest": ("float32", "highest"),
    "float32, default": ("float32", "default"),
    "bfloat16, highest": ("bfloat16", "highest"),
    "bfloat16, default": ("bfloat16", "default"),
}


def load(args: argparse.Namespace) -> tuple[jl.Tunable, Dataset]:
    """The embedded model with LoRA, and the first texts of a file."""
    with args.text.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[: args.examples]
    model = jl.load_model(num_labels=2)
    tokens = model.tokenizer(
        [row["sentence"] for row in rows], padding="longest", truncation=True, max_length=128, return_tensors="np"
    )
    labels = np.array([int(row["label"]) for row in rows])
    return jl.lora(model, rank=8), as_dataset({**dict(tokens), "labels": labels})


def flat(tree: Any) -> np.ndarray:
    """All leaves as one float64 vector."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def measure(way: str, linear: bool, tun: jl.Tunable, theta: Any, data: Dataset, steps: int) -> dict[str, np.ndarray]:
    """Outputs and gradient at `theta`, and the losses and the end of a run."""
    dtype, precision = WAYS[way]
    if way == "float64":
        apply, theta0 = to_float64((tun.apply, tun.theta0))
        tun, theta = dataclasses.replace(tun, apply=apply, theta0=theta0), to_float64(theta)
    tun = jl.linearize(tun) if linear else tun
    computed = tun if dtype == "float32" else in_dtype(tun, dtype)
    batch = data.batch(np.arange(len(data)))
    with jax.default_matmul_precision(precision):
        outputs = jax.jit(lambda apply, p: apply(p, batch))(computed.apply, theta)
        _, gradient = jax.jit(lambda apply, p: loss_and_gradient("squared", apply, p, batch))(computed.apply, theta)
    config = jl.TrainConfig(batch_size=len(data) // 2, max_steps=steps, learning_rate=2e-3, precision=precision)
    run = jl.train(tun, data, config=dataclasses.replace(config, compute_dtype=dtype))
    found = {"outputs": np.asarray(outputs, np.float64), "gradient": flat(gradient), "theta": flat(run.theta)}
    return found | {"loss": np.array([row["loss"] for row in run.history])}


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="TSV with columns `sentence` and `label`")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    tun, data = load(args)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(tun.theta0)))
    moved = [
        leaf + 0.02 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, jax.tree.leaves(tun.theta0), strict=True)
    ]
    theta, start = jax.tree.unflatten(jax.tree.structure(tun.theta0), moved), flat(tun.theta0)
    ways = [way for way in WAYS if "default" not in way or jax.default_backend() != "cpu"]  # no difference there
    print(f"{len(data)} texts, {args.steps} steps of Adam; errors are relative to float64")
    print(f"{'model':11} {'computed in':18} {'outputs':>9} {'gradient':>9} {'loss':>9} {'end':>9}")
    rows = []
    for model in ("full", "linearized"):
        for way in ways:
            with jax.enable_x64(way == "float64"):
                found = measure(way, model == "linearized", tun, theta, data, args.steps)
            if way == "float64":
                exact = found
                continue
            row = {
                "model": model,
                "computed_in": way,
                "outputs": np.abs(found["outputs"] - exact["outputs"]).max() / np.abs(exact["outputs"]).max(),
                "gradient": np.linalg.norm(found["gradient"] - exact["gradient"]) / np.linalg.norm(exact["gradient"]),
                "loss": np.abs(found["loss"] - exact["loss"]).max() / exact["loss"][0],
                "end": np.linalg.norm(found["theta"] - exact["theta"]) / np.linalg.norm(exact["theta"] - start),
            }
            rows.append({name: value if isinstance(value, str) else float(value) for name, value in row.items()})
            numbers = " ".join(f"{row[name]:9.1e}" for name in ("outputs", "gradient", "loss", "end"))
            print(f"{model:11} {way:18} {numbers}", flush=True)
    if args.json:
        about = {"examples": len(data), "steps": args.steps, "tokens": int(data["input_ids"].shape[1])}
        about |= {"jax": jax.__version__, "device": str(jax.devices()[0]), "machine": platform.machine()}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
