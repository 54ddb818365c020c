"""Time and memory of the kernel engines at the shape of RoBERTa-base, as ratios to one forward pass.

    uv run python benchmarks/ntk.py [--examples 16 32] [--length 128] [--outputs 2] [--repeats 3] [--json FILE]

Weights and tokens are random. The limit of a kernel is that of its matrix products, at the rate of the forward pass
measured in the same run: N·F forward, N·C·F back through activations (and as much again for weight gradients, in
proportion to the weights tuned), and (NC)²·P for the Gram matrix of large weights in float64, at the rate of a float64
product measured likewise. Compilation is not counted, ε_J is not measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxlin as jl
from jaxlin.data.dataset import as_dataset
from jaxlin.errors import InputError
from jaxlin.models.encoder import EncoderConfig, SequenceClassifier

CONFIG = EncoderConfig(50265, 768, 12, 12, 3072, 512, 2)
CASES: dict[str, tuple[Callable[[Any], jl.Tunable], float]] = {
    # what is tuned, and the share of the encoder's weights whose gradients are formed
    "LoRA q, v": (lambda model: jl.lora(model, rank=8), 0.0),
    "LoRA all modules": (lambda model: jl.lora(model, rank=8, targets=r".*(attention|mlp)/\w+"), 0.0),
    "full, last layer": (lambda model: jl.select(model, "layer_11/"), 1 / 12),
    "full, encoder": (lambda model: jl.select(model, "^encoder/"), 1.0),
}
DEPTH = {"full, last layer": 1 / 12}
"""Share of the depth that is back-propagated, where it is not all."""


def median(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call in seconds, after one that compiles."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--outputs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--engines", nargs="+", default=["jacobian", "factored"])
    parser.add_argument("--memory_budget", type=float, default=4.0, help="GiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    rng, c = np.random.default_rng(0), args.outputs
    ids = rng.integers(5, CONFIG.vocab_size, (max(args.examples), args.length))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    module = SequenceClassifier(CONFIG, c, "mean")
    model = jl.from_linen(module, jax.jit(module.init)(jax.random.key(0), batch)["params"])
    apply = jax.jit(model.module.apply)
    eight = {name: value[:8] for name, value in batch.items()}
    with jax.default_matmul_precision("highest"):
        forward = median(lambda: apply({"params": model.params}, eight).block_until_ready(), args.repeats) / 8
    square = rng.normal(size=(512, 1 << 14))
    gram_rate = 512 * 512 * (1 << 14) / median(lambda: square @ square.T, args.repeats)  # multiply-adds a second
    print(f"forward {forward:.4f} s an example; Gram {gram_rate / 1e9:.0f} G multiply-adds/s in float64")

    rows = []
    for name in args.cases:
        make, share = CASES[name]
        tun = make(model)
        for n in args.examples:
            data = as_dataset({key: value[:n] for key, value in batch.items()})
            large = share * 12 * (4 * 768**2 + 2 * 768 * 3072)
            limit = n * forward * (1 + c * (DEPTH.get(name, 1.0) + share)) + (n * c) ** 2 * large / gram_rate
            for engine in args.engines:
                options = {"engine": engine, "check_examples": 0, "memory_budget": int(args.memory_budget * 2**30)}
                row = {"tuned": name, "N": n, "C": c, "engine": engine, "limit_seconds": limit}
                try:
                    row["seconds"] = median(lambda tun=tun, data=data, o=options: jl.ntk(tun, data, **o), args.repeats)
                except InputError as error:
                    row["refused"] = str(error)
                row["peak_rss_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                rows.append(row)
                taken = (
                    f"{row['seconds'] / n:8.3f} s/example  {limit / row['seconds']:6.2f} of the limit"
                    if "seconds" in row
                    else "   does not fit the budget"
                )
                print(f"{name:18} N={n:<4} {engine:16} {taken}  peak {row['peak_rss_GiB']:.1f} GiB", flush=True)
    if args.json:
        about = {"forward_seconds": forward, "gram_rate": gram_rate, "jax": jax.__version__, "length": args.length}
        about |= {"device": str(jax.devices()[0]), "machine": platform.machine()}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
