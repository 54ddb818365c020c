"""`jaxlin bounds`: which bounds of the theory apply to a fine-tuning on real text, which hold, and how tightly."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jaxlin import plots
from jaxlin.errors import TrainingDivergedError
from jaxlin.experiments.cache import Cache
from jaxlin.experiments.data_arguments import DataArguments, check_numbers
from jaxlin.experiments.model_arguments import ModelArguments, starts_as_probe
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.record import options_file, resolved
from jaxlin.experiments.resume import check_resume, check_same, resume_command
from jaxlin.experiments.run_arguments import OutputArguments
from jaxlin.experiments.run_folder import RunFolder, write_csv, write_json
from jaxlin.experiments.setting import load
from jaxlin.experiments.tables import bound_lines, bound_table, constants_table, make_console
from jaxlin.experiments.tuned_arguments import TunedArguments, tune
from jaxlin.hashing import fingerprint
from jaxlin.training.bound_sweep import LAM_REL, BoundSweep, bound_sweep, check_sweep


@dataclasses.dataclass(frozen=True)
class BoundsArguments:
    """The bounds.

    Attributes:
        num_samples: Training examples, stratified.
        lam_rel: Pull strengths λ in units of μ₁.
        steps: Full-batch steps of descent at each λ; enough for the smallest.
        selective_steps: Steps with the selective pull.
        share: The step η as a share of the largest that the bounds allow at θ₀, 1/(max(β, σ²)+λ).
        directions: Random directions at the radius of each run, in which H is sampled beside the run's own points.
        gradient_accumulation_steps: About how many parts a step over all examples is computed in, each of like
            length, for less memory and padding; at most one an example.
        method: Hold Jacobians (dense), or use products with them only; auto: dense where they fit.
        memory_budget: GiB for Jacobians.
        seed: Of head, A, subset and directions.
        resume: Go on with the sweep in output_dir; start one if there is none.
    """

    num_samples: int = 32
    lam_rel: tuple[float, ...] = LAM_REL
    steps: int = 24
    selective_steps: int = 6
    share: float = 0.5
    directions: int = 2
    gradient_accumulation_steps: int = 1
    method: Literal["auto", "dense", "products"] = "auto"
    memory_budget: float = 4.0
    seed: int = 0
    resume: bool = False


_FREE = ("lam_rel", "memory_budget")
"""Options that a sweep may go on with others of: λ are kept one by one."""

PARTS = "parts"
"""Folder of what is done of a sweep: β at θ₀, and the runs at each λ."""


@dataclasses.dataclass(frozen=True)
class BoundsConfig:
    """Run descent, full and linearized, over a sweep of pulls λ, and hold every bound of the theory against it.

    Attributes:
        bounds: The bounds.
        model: The model.
        data: The data.
        tuned: What is tuned.
        output: Where results go.
    """

    bounds: BoundsArguments = dataclasses.field(default_factory=BoundsArguments)
    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=lambda: DataArguments(max_seq_length=32))
    tuned: TunedArguments = dataclasses.field(default_factory=TunedArguments)
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def run(config: BoundsConfig) -> BoundSweep:
    """Runs the sweep and writes its folder.

    Args:
        config: What to run.

    Returns:
        The sweep.

    Raises:
        InputError: If anything given cannot be used; nothing has been written then.
        TrainingDivergedError: If a run diverges.
        KeyboardInterrupt: If interrupted; the log is kept, and the λ that are done, for `--resume`.
    """
    begin, arguments = time.monotonic(), config.bounds
    check_numbers(config.bounds, config.data, num_samples=1)
    check_resume(arguments.resume, config.output, "bounds", "a sweep")
    default = Path("runs") / time.strftime("bounds-%Y%m%d-%H%M%S")
    folder = RunFolder(config.output.output_dir or default, config.output.overwrite_output_dir, arguments.resume)
    loaded = load(config.model, config.data, {"train": arguments.num_samples, "eval": 0}, arguments.seed, "squared")
    train = loaded.data["train"]
    options: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            "lam_rel",
            "steps",
            "selective_steps",
            "share",
            "directions",
            "method",
            "gradient_accumulation_steps",
        )
    }
    before, _ = tune(loaded.model, config.tuned, arguments.seed, False)
    check_sweep(before, train, **options)
    # The model as it is before its head is fitted: a probe is the same to rounding only.
    inputs = {**fingerprint(before, before.theta0), "data_sha256": train.sha256(), "head": config.model.head_init}
    if starts_as_probe(loaded.model, config.model):
        loaded = dataclasses.replace(loaded, model=loaded.probed())
    tun, _ = tune(loaded.model, config.tuned, arguments.seed, False)
    record, written = resolved("bounds", config, loaded), options_file(config, loaded)
    begun = arguments.resume and (folder.path / "config.json").exists()
    note = check_same(folder.path, record, written, _FREE) if begun else None
    folder.open(record, written)
    source = loaded.model.source
    assert source is not None  # loaded by name
    cache = Cache(folder.path / PARTS)
    try:
        with ProgressReporter(folder.line, config.output.quiet) as progress:
            if note:
                progress.say(f"what is taken from before agrees to rounding only: {note}")
            for line in loaded.lines(config.tuned.peft, tun.num_params, config.model.head_init):
                progress.say(line)
            result = bound_sweep(
                tun,
                train,
                **options,
                seed=arguments.seed,
                memory_budget=int(arguments.memory_budget * 2**30),
                progress=progress.update,
                cache=lambda part, compute: cache.get({**inputs, **part}, compute),
            )
        seconds = time.monotonic() - begin + cache.saved
        title = f"{source.name}, {loaded.task.name}: {len(train)} training examples, {arguments.steps} steps of descent"
        _write(folder.path, record, result, f"{title}, seed {arguments.seed}", seconds)
    except (TrainingDivergedError, KeyboardInterrupt) as error:
        folder.line(f"stopped: {str(error) or 'interrupted'}")
        if isinstance(error, KeyboardInterrupt):
            print(f"go on with: {resume_command('bounds', folder.path)}", flush=True)
        raise
    finally:
        folder.close()
    _print(result, folder.path, seconds)
    return result


def _write(path: Path, record: Mapping[str, Any], result: BoundSweep, title: str, seconds: float) -> None:
    write_csv(path / "table.csv", result.table)
    write_csv(path / "measurements.csv", result.measurements)
    summary = {**result.summary, "seconds": seconds}
    results = {"summary": summary, "table": result.table, "measurements": result.measurements, "config": record}
    write_json(path / "all_results.json", results)
    plots.save(plots.bounds(result.table, title), path / "figures" / "bounds")


def _print(result: BoundSweep, path: Path, seconds: float) -> None:
    console, summary = make_console(), result.summary
    console.print(
        f"at θ₀ ({summary['train_examples']} training examples × {summary['outputs']} outputs): σ = ‖J₀‖₂ = "
        f"{summary['sigma']:.4g}, μ₁ = σ² = {summary['mu_1']:.4g}, β = {summary['beta_start']:.4g}, "
        f"R = {summary['risk_start']:.3g}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(constants_table(summary["constants"]))
    console.print(bound_table(result.table))
    for line in bound_lines(result.table, summary["slopes"]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {path} in {seconds:.0f} s", highlight=False, markup=False, soft_wrap=True)
