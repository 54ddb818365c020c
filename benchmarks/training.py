"""Time of training steps as ratios that arithmetic bounds: linearized to full, with trunk or Jacobians cached.

    uv run python benchmarks/training.py [--batch 8] [--length 128] [--repeats 5] [--json FILE]   # RoBERTa-base's shape
    uv run python benchmarks/training.py --text FOLDER/sst2/train.tsv [--examples 1000]             # MiniLM, real text

With F a forward pass, a LoRA step costs 2F and its linearized step 3F (primal, tangent, transpose); of all weights 3F
and 5F. With a share d of the layers tuned (the top 2 of 12; the top 1 of 6) these are 1 + d, 1 + 2d, 1 + 2d and 1 + 4d,
and where what lies below is computed once 2d, 3d, 3d and 5d; a kernel of C outputs takes 1 + Cd and (1 + C)d.
Embeddings, norms and the softmax are not counted. `reached` is limit over ratio where a ratio is to be small, ratio
over limit where it is a speed-up.

Steps of all variants are interleaved, and ratios are of the medians of one run: what else the machine does meets all of
them. On a machine that others use too, `of CPU` is the ratio of the processor time that the process took for the same
steps, which their work disturbs less than the clock. The first call's excess over the median is told apart, as
compilation. Peak memory is of the process (Linux), with everything that is compared. The cached mode is compared by
whole epochs: a streaming one once, in steps of its buckets.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ntk import CONFIG, peak_memory  # benchmarks/ntk.py, beside this file

import jaxlin as jl
from jaxlin.data.dataset import Dataset, as_dataset
from jaxlin.models.encoder import SequenceClassifier
from jaxlin.training.step import Schedule, compiled_step

PARTS = ("streaming", "trunk", "cached")
SCHEDULE = Schedule(1.0, "constant", 0, 1000)


def roberta_shape(args: argparse.Namespace) -> tuple[Any, Dataset]:
    """RoBERTa-base's shape with random weights, and random tokens of one length."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, CONFIG.vocab_size, (args.batch, args.length))
    columns = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": rng.integers(0, 2, args.batch)}
    module = SequenceClassifier(CONFIG, 2, "mean")
    return jl.from_linen(module, jax.jit(module.init)(jax.random.key(0), columns)["params"]), as_dataset(columns)


def minilm(args: argparse.Namespace) -> tuple[Any, Dataset]:
    """The embedded model, and the first texts of a file at their own lengths."""
    with args.text.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))[: args.examples]
    model = jl.load_model(num_labels=2, head="mean")
    tokens = model.tokenizer([row["sentence"] for row in rows], padding="longest", truncation=True, return_tensors="np")
    return model, as_dataset({**tokens, "labels": np.array([int(row["label"]) for row in rows])})


class Stepper:
    """Steps of one variant, with its own parameters and optimizer."""

    def __init__(self, tun: jl.Tunable, batch: dict[str, np.ndarray]) -> None:
        """Prepares; nothing is computed."""
        self.tx, self.step = compiled_step("squared", "adam", SCHEDULE, "coupled", (), (), 1)
        self.apply, self.batch = tun.apply, batch
        self.theta = jax.tree.map(jnp.array, tun.theta0)
        self.state = self.tx.init(self.theta)._replace(rate=jnp.asarray(1e-4))

    def __call__(self) -> None:
        """Takes a step, as the trainer does."""
        self.theta, self.state, metrics = self.step(self.apply, self.theta, self.state, self.batch)
        jax.block_until_ready((self.theta, metrics))


def interleaved(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of calls taken in turn, by the clock and of CPU; and by how much the first took longer."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            begin = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    found = {}
    for name, values in times.items():
        seconds, cpu = (statistics.median(column) for column in zip(*values[1:], strict=True))
        found[name] = {"seconds": seconds, "cpu_seconds": cpu, "compile_seconds": max(0.0, values[0][0] - seconds)}
    return found


def steps(model: Any, data: Dataset, layers: int, top: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ratios of steps and kernels on one batch."""
    last = list(range(layers - top, layers))
    pattern = rf"layer_({'|'.join(map(str, last))})/|^classifier"
    share, c = top / layers, 2
    longest = np.argsort(data.lengths)[-args.batch :] if data.lengths is not None else np.arange(args.batch)
    some = data.take(np.sort(longest))
    rows: list[dict[str, Any]] = []

    def ratio(what: str, found: dict[str, Any], over: str, under: str, limit: float, small: bool) -> None:
        value, of_cpu = (found[over][key] / found[under][key] for key in ("seconds", "cpu_seconds"))
        row = {"ratio": what, "value": value, "limit": limit, "reached": limit / value if small else value / limit}
        row["value_of_cpu"] = of_cpu
        rows.append({**row, over: found[over], under: found[under], "peak_rss_GiB": peak_memory()})
        say(rows[-1])

    def batch_of(part: Dataset) -> dict[str, np.ndarray]:
        return part.batch(np.arange(len(part)))

    whole = (("LoRA q, v", jl.lora(model, rank=8), 3 / 2), ("all weights", jl.full(model), 5 / 3))
    for name, tun, limit in whole if "streaming" in args.parts else ():
        peak_memory(reset=True)
        calls = {"full": Stepper(tun, batch_of(some)), "linearized": Stepper(jl.linearize(tun), batch_of(some))}
        found = interleaved(calls, args.repeats)
        ratio(f"{name}: linearized over full step", found, "linearized", "full", limit, True)
        del calls
    above = (
        ("LoRA q, v", jl.lora(model, rank=8, layers=last), ((1 + share, 2), (1 + 2 * share, 3))),
        ("all weights", jl.select(model, pattern), ((1 + 2 * share, 3), (1 + 4 * share, 5))),
    )
    for name, tun, costs in above if "trunk" in args.parts else ():
        peak_memory(reset=True)
        begin = time.perf_counter()
        fast, cached = jl.cache_trunk(tun, some)
        filling = time.perf_counter() - begin
        calls = {
            "full": Stepper(tun, batch_of(some)),
            "full, trunk cached": Stepper(fast, batch_of(cached)),
            "linearized": Stepper(jl.linearize(tun), batch_of(some)),
            "linearized, trunk cached": Stepper(jl.linearize(fast), batch_of(cached)),
        }
        if name.startswith("LoRA"):
            calls["kernel"] = lambda t=tun: jl.ntk(t, some, check_examples=0)
            calls["kernel, trunk cached"] = lambda t=fast, d=cached: jl.ntk(t, d, check_examples=0)
        found = interleaved(calls, args.repeats)
        limits = {"full": costs[0][0] / (costs[0][1] * share), "linearized": costs[1][0] / (costs[1][1] * share)}
        limits["kernel"] = (1 + c * share) / ((1 + c) * share)
        for kind in [kind for kind in limits if kind in found]:
            what = f"{name}, top {top} of {layers}: {kind}, speed-up by the cached trunk"
            ratio(what, found, kind, f"{kind}, trunk cached", limits[kind], False)
        rows[-1]["filling_seconds"] = filling
        del calls
    return rows


def cached(model: Any, data: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """An epoch on cached Jacobians against a streaming one, and a sweep at once against one run at a time."""
    rows: list[dict[str, Any]] = []
    tun = jl.lora(model, rank=8)
    lin = jl.linearize(tun)
    peak_memory(reset=True)
    begin = time.perf_counter()
    ready = jl.prepare(lin, data, mode="cached")
    filling = time.perf_counter() - begin
    config = jl.TrainConfig(learning_rate=1e-4, batch_size=32, num_train_epochs=1, group_by_length=True)
    lams = [0.0, 1e-1, 1.0, 10.0, 100.0]
    losses: dict[str, list[float]] = {}

    def run(name: str, result: Any) -> None:
        losses[name] = [row["loss"] for row in result.history]

    calls: dict[str, Callable[[], Any]] = {
        "train": lambda: run("train", jl.train(ready.tun, *ready.data, config=config)),
        "one": lambda: run("one", jl.train_sweep(ready.tun, *ready.data, config=config, lams=lams[:1]).results[0]),
        "sweep": lambda: jl.train_sweep(ready.tun, *ready.data, config=config, lams=lams),
    }
    found = interleaved(calls, args.repeats)
    jl.train(lin, data, config=config)  # compiles
    begin = time.perf_counter()
    run("streaming", jl.train(lin, data, config=config))
    streaming = time.perf_counter() - begin
    gap = max(abs(a - b) for a, b in zip(losses["streaming"], losses["one"], strict=True))
    about = {"streaming_seconds": streaming, "jacobian_seconds": filling, "largest_gap_of_losses": gap, **found}
    about["peak_rss_GiB"] = peak_memory()
    n = len(data)
    for name in ("train", "one"):
        value = streaming / found[name]["seconds"]
        by = "train" if name == "train" else "train_sweep"
        what = f"LoRA q, v, {n} examples: an epoch, speed-up by cached Jacobians ({by})"
        rows.append({"ratio": what, "value": value, "limit": 20.0, "reached": value / 20.0, **about})
        say(rows[-1])
    value = len(lams) * found["one"]["seconds"] / found["sweep"]["seconds"]
    what = f"sweep over {len(lams)} λ at once, speed-up over one at a time"
    rows.append({"ratio": what, "value": value, "limit": float(len(lams)), "reached": value / len(lams), **about})
    say(rows[-1])
    return rows


def say(row: dict[str, Any]) -> None:
    """Prints one ratio."""
    of_cpu = f"  of CPU {row['value_of_cpu']:5.2f}" if "value_of_cpu" in row else ""
    print(
        f"{row['ratio']:80} {row['value']:6.2f}  limit {row['limit']:5.2f}  reached {row['reached']:5.2f}{of_cpu}",
        flush=True,
    )


def main() -> None:
    """Prints a table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1000, help="of the text, for the cached mode")
    parser.add_argument(
        "--text", type=Path, help="TSV with columns `sentence`, `label`: MiniLM in place of RoBERTa-base"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="what is there already of the other model is kept")
    args = parser.parse_args()
    model, data = minilm(args) if args.text else roberta_shape(args)
    config = model.module.config if args.text else CONFIG
    rows = []
    with jax.default_matmul_precision("highest"):
        rows += steps(model, data, config.num_layers, config.num_layers // 6, args)
        if "cached" in args.parts and args.text:
            rows += cached(model, data, args)
    if args.json:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        about = {"jax": jax.__version__, "device": str(jax.devices()[0]), "machine": platform.machine()}
        about |= {
            "cores": os.cpu_count(),
            "load_average": load,
            "batch": args.batch,
            "length": int(data["input_ids"].shape[1]),
        }
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        known["MiniLM" if args.text else "RoBERTa-base shape"] = {"about": about, "rows": rows}
        args.json.write_text(json.dumps(known, indent=2))


if __name__ == "__main__":
    main()
