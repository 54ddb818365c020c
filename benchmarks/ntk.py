"""Time and memory of the kernel engines as ratios to one forward pass, and against other ways to the same kernel.

    uv run python benchmarks/ntk.py [--examples 16 32] [--length 128] [--outputs 2 3] [--repeats 3] [--json FILE]
    uv run python benchmarks/ntk.py --examples 32 64 128 256 --cases "LoRA q, v"    # growth: time, memory, compilation
    uv run python benchmarks/ntk.py --text FOLDER/sst2/train.tsv --examples 32      # MiniLM, real text

The shape is RoBERTa-base with random weights and tokens, or MiniLM with real text. The limit of a kernel is that of its
matrix products: N·F forward, N·C·F back through activations (and as much again for weight gradients, in proportion to
the weights tuned), at the best rate of products of these shapes, forward or transposed, measured in the same run; and
(NC)²·P for the Gram matrices in float64 of the P weights whose derivatives are not all zero, at the rate of a float64
product of a matrix with itself, measured likewise. The first call's excess over the median is told apart, as
compilation; ε_J is not measured. Of --engines all but the first are timed for the first of --examples only. The peak is
of the process during the calls (Linux), with the model.
`--head cls` reads one position, for which the last layer then works alone; `--head mean` reads all; `--head both` times
the factored engine with the two in turn, and says what one position gains.

Beside jaxlin's engines: `one block`, the same engine for the summed kernel alone; `neural_tangents`, the fastest of
its implementations for LoRA (JACOBIAN_CONTRACTION), in tiles, and checked; `neural_tangents alone`, the library itself
with all examples at once, whose program says what memory it needs before it runs, and `neural_tangents structured` by
STRUCTURED_DERIVATIVES, which is its faster one where all weights are tuned and texts are short; `paper's script`, the
Jacobian of all parameters, one example at a time, twice, of texts padded to 512 tokens as that script pads them
(`--length` where tokens are random).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxlin as jl
from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.errors import InputError
from jaxlin.models.encoder import EncoderConfig, SequenceClassifier
from jaxlin.tunable import layer_index, leaf_paths

CONFIG = EncoderConfig(50265, 768, 12, 12, 3072, 512, 2)
CASES: dict[str, tuple[Callable[[Any, int], jl.Tunable], float]] = {
    # what is tuned (given the number of the last layer), and the share of layers whose weights' gradients are formed
    "LoRA q, v": (lambda model, last: jl.lora(model, rank=8), 0.0),
    "LoRA all modules": (lambda model, last: jl.lora(model, rank=8, targets=r".*(attention|mlp)/\w+"), 0.0),
    "full, last layer": (lambda model, last: jl.select(model, f"layer_{last}/"), 0.0),
    "full, encoder": (lambda model, last: jl.select(model, "^encoder/"), 1.0),
}


class Timed(NamedTuple):
    """Median seconds of a call after one that compiles, by how much that one took longer, and the last result."""

    seconds: float
    compile_seconds: float
    result: Any


def timed(function: Callable[[], Any], repeats: int) -> Timed:
    """Calls a function once to compile it, and then so often; not again if that is 0 times."""
    times = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - begin)
    middle = statistics.median(times[1:] or times)
    return Timed(middle, max(0.0, times[0] - middle), result)


def median(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call in seconds, after one that compiles."""
    return timed(function, repeats).seconds


def peak_memory(reset: bool = False) -> float:
    """Largest resident size of this process in GiB, since the last reset where the system has one."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def free_memory() -> float:
    """Memory in GiB that programs may still take (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


def product_rate(config: EncoderConfig, repeats: int) -> float:
    """Multiply-adds a second of the products of a layer's MLP, of 512 tokens: the better of forward and transposed."""
    times, (width, wide) = 16, (config.hidden_size, config.intermediate_size)
    x, up, down = (np.ones(shape, np.float32) for shape in ((512, width), (width, wide), (wide, width)))

    @jax.jit
    def forward(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ up) @ down * 1e-9, x)

    @jax.jit
    def transposed(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, times, lambda _, x: (x @ down.T) @ up.T * 1e-9, x)

    with jax.default_matmul_precision("highest"):
        best = min(median(lambda f=f: f(x, up, down).block_until_ready(), repeats) for f in (forward, transposed))
    return 2 * times * x.size * wide / best


def multiply_adds(config: EncoderConfig, data: Dataset) -> float:
    """Of a forward pass of all examples, each at the length that it is computed at."""
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    lengths = data.buckets or (data["input_ids"].shape[1],)
    tokens = zip(lengths, map(len, data.groups()), strict=True)
    return config.num_layers * sum(n * (t * layer + 2 * t**2 * config.hidden_size) for t, n in tokens)


def roberta_shape(args: argparse.Namespace, outputs: int) -> tuple[Any, Dataset]:
    """RoBERTa-base's shape with random weights, and random tokens of one length."""
    ids = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (max(args.examples), args.length))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    module = SequenceClassifier(CONFIG, outputs, args.head)
    return jl.from_linen(module, jax.jit(module.init)(jax.random.key(0), batch)["params"]), as_dataset(batch)


def minilm(args: argparse.Namespace, outputs: int) -> tuple[Any, Dataset]:
    """The embedded model, and the first texts of a file at their own lengths."""
    with args.text.open(encoding="utf-8") as stream:
        texts = [row["sentence"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]
    model = jl.load_model(num_labels=outputs, head=args.head)
    tokens = model.tokenizer(texts[: max(args.examples)], padding="longest", truncation=True, return_tensors="np")
    return model, as_dataset(dict(tokens))


ALONE = {
    "neural_tangents alone": "JACOBIAN_CONTRACTION",
    "neural_tangents structured": "STRUCTURED_DERIVATIVES",
}


def neural_tangents_alone(implementation: str, tun: jl.Tunable, data: Dataset, repeats: int) -> Timed:
    """Times a kernel of all examples by the library itself, without tiles and check."""
    nt, batch = jl.load_neural_tangents(), dict(data.columns)
    kernel = nt.empirical_ntk_fn(
        tun.apply,
        trace_axes=(),
        vmap_axes=(dict.fromkeys(batch, 0), 0, {}),
        implementation=nt.NtkImplementation[implementation],
    )
    with jax.default_matmul_precision("highest"):
        begin = time.perf_counter()
        program = jax.jit(kernel).lower(batch, None, tun.theta0).compile()
        compiling = time.perf_counter() - begin
        needed, free = program.memory_analysis().temp_size_in_bytes / 2**30, free_memory()
        if needed > free:
            raise InputError(f"the program needs {needed:.0f} GiB, of {free:.0f} that are free")
        found = timed(lambda: np.asarray(program(batch, None, tun.theta0)), repeats)
    return found._replace(compile_seconds=compiling)


def call(engine: str, model: Any, tun: jl.Tunable, data: Dataset, args: argparse.Namespace) -> Timed:
    """Times a kernel of all examples by one of the ways."""
    if engine in ALONE:
        return neural_tangents_alone(ALONE[engine], tun, data, args.repeats)
    if engine == "paper's script":
        everything = jl.full(model)
        length = 512 if args.text else data["input_ids"].shape[1]
        ids = np.zeros((1, length), np.int64)
        ids[0, : data["input_ids"].shape[1]] = data["input_ids"][0]
        one = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64), "weight": np.ones(1, np.float32)}
        rows = jax.jit(lambda apply, theta, batch: jax.jacrev(apply)(theta, batch))
        with jax.default_matmul_precision("highest"):
            each = timed(lambda: jax.block_until_ready(rows(everything.apply, everything.theta0, one)), args.repeats)
        return each._replace(seconds=2 * len(data) * each.seconds)
    options: dict[str, Any] = {"engine": engine, "memory_budget": int(args.memory_budget * 2**30)}
    if engine != "neural_tangents":
        options["check_examples"] = 0
    if engine == "one block":
        options |= {"engine": "auto", "blocks": {"all": tuple(p for paths in tun.blocks.values() for p in paths)}}
    elif engine == "neural_tangents":
        options["blocks"] = {"all": tuple(p for paths in tun.blocks.values() for p in paths)}
    return timed(lambda: jl.ntk(tun, data, **options), args.repeats)


def gain_of_one_position(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times kernels of models whose head reads all positions, and one, in turn."""
    setups = []
    for head in ("mean", "cls"):
        own = argparse.Namespace(**{**vars(args), "head": head})
        setups.append((minilm if args.text else roberta_shape)(own, args.outputs[0]))
    rows = []
    for name in args.cases:
        last = (setups[0][0].module.config if args.text else CONFIG).num_layers - 1
        tuns = [CASES[name][0](model, last) for model, _ in setups]
        for n in args.examples:
            times: list[list[float]] = [[], []]
            for _ in range(1 + args.repeats):
                for each, tun, (_, data) in zip(times, tuns, setups, strict=True):
                    some, begin = data.take(np.arange(n)), time.perf_counter()
                    jl.ntk(tun, some, engine="factored", check_examples=0)
                    each.append(time.perf_counter() - begin)
            all_of_them, one = (statistics.median(each[1:]) for each in times)
            rows.append(
                {"tuned": name, "N": n, "C": args.outputs[0], "seconds": one, "seconds_all_positions": all_of_them}
            )
            print(f"{name:18} N={n:<4} one position {one / n:.3f} s/example, all {all_of_them / n:.3f}", flush=True)
    return rows


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--outputs", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=3, help="0: the call that compiles is timed, for long ones")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    engines = ("factored", "one block", "jacobian", "neural_tangents", *ALONE, "paper's script")
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines[:3])
    parser.add_argument("--few", nargs="+", choices=CASES, default=[], help="cases of the first of --examples only")
    parser.add_argument("--head", choices=("mean", "cls", "both"), default="mean")
    parser.add_argument("--subsets", type=int, default=0, help="time the spectra of so many subsets of layers")
    parser.add_argument("--text", type=Path, help="TSV with a column `sentence`: MiniLM in place of RoBERTa-base")
    parser.add_argument("--memory_budget", type=float, default=4.0, help="GiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    if args.head == "both":
        rows = gain_of_one_position(args)
        if args.json:
            about = {"repeats": args.repeats, "jax": jax.__version__, "length": None if args.text else args.length}
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))
        return
    rng, load = np.random.default_rng(0), minilm if args.text else roberta_shape
    model, data_all = load(args, args.outputs[0])
    config = model.module.config if args.text else CONFIG
    apply, times = jax.jit(model.module.apply), max(1, args.repeats)
    with jax.default_matmul_precision("highest"):
        # Of texts of several lengths: the time of all of them, shared out.
        chunks = [batch for _, batch in data_all.chunks(8)]
        forward = sum(
            median(lambda b=batch: apply({"params": model.params}, b).block_until_ready(), times) for batch in chunks
        ) / (8 * len(chunks))
    square = rng.normal(size=(512, 1 << 14))
    gram_rate = 512 * 512 * (1 << 14) / median(lambda: square @ square.T, times)  # multiply-adds a second
    rate = product_rate(config, 4 * times)
    share_of_rate = multiply_adds(config, data_all) / len(data_all) / forward / rate
    print(f"forward {forward:.4f} s an example, {share_of_rate:.2f} of the rate of its products", end="; ")
    print(f"products {rate / 1e9:.0f} G multiply-adds/s; Gram {gram_rate / 1e9:.0f} in float64")

    rows = []
    for name, c in itertools.product(args.cases, args.outputs):
        model, (make, share) = load(args, c)[0], CASES[name]
        tun, depth = make(model, config.num_layers - 1), 1.0
        if name == "full, last layer":
            share = depth = 1 / config.num_layers
        sizes = zip(leaf_paths(tun.theta0), jax.tree.leaves(tun.theta0), strict=True)
        weights = sum(leaf.size for path, leaf in sizes if "lora_A" not in path)  # A's derivatives are zero at θ₀
        for n in args.examples[:1] if name in args.few else args.examples:
            data = data_all.take(np.arange(n))
            passes = multiply_adds(config, data) * (1 + c * (depth + share)) / rate
            limit = passes + (n * c) ** 2 * weights / gram_rate
            for engine in args.engines if n == args.examples[0] else args.engines[:1]:
                row = {"tuned": name, "N": n, "C": c, "engine": engine, "limit_seconds": limit}
                peak_memory(reset=True)
                try:
                    row["seconds"], row["compile_seconds"], found = call(engine, model, tun, data, args)
                except InputError as error:
                    row["refused"] = str(error)
                row["peak_rss_GiB"] = peak_memory()
                rows.append(row)
                taken = (
                    f"{row['seconds'] / n:8.3f} s/example {row['seconds'] / n / forward:6.2f} forwards "
                    f"{limit / row['seconds']:5.2f} of the limit  compiled in {row['compile_seconds']:5.1f} s"
                    if "seconds" in row
                    else f"   {row['refused']}"
                )
                print(f"{name:18} N={n:<4} {engine:21} {taken}  peak {row['peak_rss_GiB']:.1f} GiB", flush=True)
                if args.subsets and engine == "factored" and "seconds" in row:
                    layers = sorted({layer_index(block) for block in found.parts} - {None})
                    row = {"tuned": name, "N": n, "C": c, "engine": f"spectra of {args.subsets} subsets of layers"}
                    begin = time.perf_counter()
                    for _ in range(args.subsets):
                        some = [i for i in layers if rng.random() < 0.5] or layers[:1]
                        jl.spectrum(found.subset([b for b in found.parts if layer_index(b) in some]))
                    row["seconds"], row["pass_seconds"] = time.perf_counter() - begin, n * forward * (1 + c)
                    rows.append(row)
                    print(f"{'':25} {row['engine']}: {row['seconds']:.1f} s; a pass is {row['pass_seconds']:.1f} s")
    if args.json:
        about = {"forward_seconds": forward, "product_rate": rate, "gram_rate": gram_rate, "repeats": args.repeats}
        about |= {"jax": jax.__version__, "length": None if args.text else args.length}
        about |= {"device": str(jax.devices()[0]), "machine": platform.machine()}
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
