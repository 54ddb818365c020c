"""The kernel engine on a GPU: time and error by precision, against the limit of its matrix products.

    uv run python benchmarks/gpu.py [--examples 256 1024] [--lengths 128 512] [--cases "LoRA q, v"] [--json FILE]

RoBERTa-base's shape with random weights and tokens, C = 2. `float32` is `precision="highest"`, `tf32` the device's
default for float32, `bfloat16` a model of bfloat16 weights. A limit is that of the matrix products at the best rate
measured in the same run, of one large product in that precision: N·F forward and N·C·F back (as much again for weight
gradients, in proportion to the weights tuned, in float32), and (NC)²·P of the Gram matrix in float64. `forwards` is the
time in units of N forward passes of the same batch; its own limit is 1 + C. `error` is ‖K − K₆₄‖/‖K₆₄‖ of a few
examples, K₆₄ of the float32 model computed in float64. Passes and products are told apart by the progress reported.
The first line printed is the time of 13 blocks of 34 MB on their way to the host, into memory that is new and into
memory that the device writes itself (`pinned`), the first time and later.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ntk import CASES, CONFIG, median

import jaxlin as jl
from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.models.encoder import SequenceClassifier
from jaxlin.ntk.on_device import on_its_way
from jaxlin.tunable import leaf_paths

WAYS = {"float32": ("float32", "highest"), "tf32": ("float32", "default"), "bfloat16": ("bfloat16", "default")}
C = 2


@functools.partial(jax.jit, static_argnames=("precision", "many"))
def products(a: jax.Array, b: jax.Array, precision: str, many: int) -> jax.Array:
    """Products one after the other, so that starting them does not count."""
    return jax.lax.fori_loop(0, many, lambda _, x: jnp.matmul(x, b, precision=precision), a)


def rate(dtype: str, precision: str, size: int = 8192, many: int = 10) -> float:
    """FLOP a second of large square products."""
    with jax.enable_x64(dtype == "float64"):
        a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) / size**0.5 for i in range(2))
        return many * 2 * size**3 / median(lambda: products(a, b, precision, many).block_until_ready(), 3)


def fetch_seconds(pinned: bool, blocks: int = 13, size: int = 2048) -> dict[str, float]:
    """Of as many blocks as the kernel of 1,024 examples has by layer, the first time and later."""
    times = []
    with jax.enable_x64(True):
        make = jax.jit(lambda i: jnp.full((size, size), i, jnp.float64))
        for _ in range(4):
            tiles = jax.block_until_ready([make(i) for i in range(blocks)])
            begin = time.perf_counter()
            found = [np.asarray(tile) for tile in [on_its_way(tile, pinned) for tile in tiles]]
            times.append(time.perf_counter() - begin)
            assert [tile[0, 0] for tile in found] == list(range(blocks))
            del tiles, found  # gives the memory back
    return {"first": times[0], "later": statistics.median(times[1:])}


def random_model(dtype: str) -> jl.Model:
    """RoBERTa-base's shape, the same random weights in any dtype."""
    module = SequenceClassifier(CONFIG, C, "mean")
    example = {"input_ids": np.full((1, 8), 5), "attention_mask": np.ones((1, 8), int)}
    params = jax.jit(module.init)(jax.random.key(0), example)["params"]
    return jl.from_linen(module, jax.tree.map(lambda leaf: leaf.astype(dtype), params))


def tokens(n: int, length: int) -> Dataset:
    """Random tokens of one length."""
    ids = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (n, length))
    return as_dataset({"input_ids": ids, "attention_mask": np.ones_like(ids)})


def forward_flops(length: int) -> float:
    """Of one example."""
    d, ff = CONFIG.hidden_size, CONFIG.intermediate_size
    return CONFIG.num_layers * length * (2 * (4 * d * d + 2 * d * ff) + 4 * length * d)


def forward_seconds(model: jl.Model, length: int, precision: str, repeats: int) -> float:
    """Of one example, in a batch as large as the engine's."""
    size = 8192 // length
    batch = jax.device_put(tokens(size, length).batch(np.arange(size)))
    apply = jax.jit(model.module.apply)
    with jax.default_matmul_precision(precision):
        return median(lambda: apply({"params": model.params}, batch).block_until_ready(), 5 * repeats) / size


def phases(tun: jl.Tunable, data: Dataset, **options: Any) -> dict[str, float]:
    """Time of the passes and of all, in one call."""
    marks: dict[str, float] = {}
    begin = time.perf_counter()
    jl.ntk(tun, data, progress=lambda phase, *_: marks.update({phase: time.perf_counter() - begin}), **options)
    return {"passes": marks["Jacobians"], "all": time.perf_counter() - begin}


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[1024])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["LoRA q, v"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_budget", type=float, default=16.0, help="GiB")
    parser.add_argument("--check_examples", type=int, default=64, help="for the error; 0: none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    device = jax.devices()[0]
    rates = {way: rate(*WAYS[way]) for way in {*args.ways, "float32"}} | {"float64": rate("float64", "highest", 4096)}
    print(device.device_kind, {way: f"{value / 1e12:.0f} TFLOP/s" for way, value in rates.items()}, flush=True)
    fetch = {name: fetch_seconds(pinned) for name, pinned in {"new": False, "pinned": True}.items()}
    print(
        "13 blocks to the host, ms:", {way: {k: round(1e3 * v) for k, v in each.items()} for way, each in fetch.items()}
    )
    about = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "rates": rates,
        "fetch_seconds": fetch,
        "check_examples": args.check_examples,
    }
    options: dict[str, Any] = {"blocks": "layer", "memory_budget": int(args.memory_budget * 2**30), "check_examples": 0}
    weights = CONFIG.num_layers * (4 * CONFIG.hidden_size**2 + 2 * CONFIG.hidden_size * CONFIG.intermediate_size)
    exact, rows = {}, []

    def save() -> None:
        if args.json:  # after each, so that none is lost
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))

    heads = "s", "passes", "limit", "of it", "forwards"
    print(f"{'tuned':18} {'in':10} {'T':>4} {'N':>5} " + " ".join(f"{head:>8}" for head in heads))
    for way in args.ways:
        dtype, precision = WAYS[way]
        model = random_model(dtype)
        for length in args.lengths:
            forward, flops = forward_seconds(model, length, precision, args.repeats), forward_flops(length)
            for case in args.cases:
                make, share = CASES[case]
                tun, depth = make(model, CONFIG.num_layers - 1), 1.0
                if case == "full, last layer":
                    share = depth = 1 / CONFIG.num_layers
                sizes = zip(leaf_paths(tun.theta0), map(np.size, jax.tree.leaves(tun.theta0)), strict=True)
                live = [size for path, size in sizes if not path.endswith("lora_A")]  # whose derivative is zero
                for n in args.examples:
                    data = tokens(n, length)
                    begin = time.perf_counter()
                    phases(tun, data, precision=precision, **options)
                    first = time.perf_counter() - begin
                    found = [phases(tun, data, precision=precision, **options) for _ in range(args.repeats)]
                    seconds, passes = (statistics.median(one[what] for one in found) for what in ("all", "passes"))
                    limit = n * flops * (1 + C * depth) / rates[way] + 2 * (n * C) ** 2 * sum(live) / rates["float64"]
                    limit += n * C * 2 * length * weights * share / rates["float32"]
                    row = {"tuned": case, "computed_in": way, "T": length, "N": n, "C": C, "seconds": seconds}
                    row |= {"pass_seconds": passes, "limit_seconds": limit, "forward_seconds": forward, "error": None}
                    row["first_call_seconds"] = first  # compiles, unless JAX's cache of compilations has it
                    rows.append(row)
                    numbers = (seconds, passes, limit, limit / seconds, seconds / n / forward)
                    print(
                        f"{case:18} {way:10} {length:4} {n:5} "
                        + " ".join(f"{number:8.3f}" for number in numbers)
                        + f"  forward at {flops / forward / rates[way]:.2f} of the rate, first call {first:.0f} s",
                        flush=True,
                    )
                    save()
                if args.check_examples:  # last: float64 takes long to compile
                    few = tokens(args.check_examples, length)
                    if (case, length) not in exact:
                        reference = make(random_model("float32"), CONFIG.num_layers - 1)
                        exact[case, length] = jl.ntk(reference, few, dtype="float64", **options).array
                    with_error = jl.ntk(tun, few, precision=precision, **options).array - exact[case, length]
                    error = float(np.linalg.norm(with_error) / np.linalg.norm(exact[case, length]))
                    for row in rows[-len(args.examples) :]:
                        row["error"] = error
                    print(f"{case:18} {way:10} {length:4} error {error:.1e}", flush=True)
                    save()


if __name__ == "__main__":
    main()
