"""`jaxlin compare`: full against linearized fine-tuning of a pretrained transformer on real text."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlin import plots
from jaxlin.errors import RUN_ERRORS, Interrupted
from jaxlin.experiments.data_arguments import DataArguments
from jaxlin.experiments.device_arguments import DeviceArguments, mesh_and_rules
from jaxlin.experiments.model_arguments import ModelArguments
from jaxlin.experiments.observe import RunClock, StepProfiler
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.record import options_file, resolved
from jaxlin.experiments.resume import check_same, command, run_to_resume
from jaxlin.experiments.run_arguments import (
    STEP_OPTIONS,
    CheckpointArguments,
    OutputArguments,
    SweepArguments,
    TrainingArguments,
    checkpoints_in,
    lam_grid,
    steps_of,
    train_config,
)
from jaxlin.experiments.run_folder import RunFolder, SilentFolder, write_csv, write_json
from jaxlin.experiments.setting import prepare
from jaxlin.experiments.tables import (
    gap_tables,
    late_table,
    linearization_table,
    make_console,
    score_table,
    spectrum_line,
)
from jaxlin.experiments.tuned_arguments import FROZEN_A, TunedArguments
from jaxlin.sharding import DATA
from jaxlin.training.compare import Comparison, check_comparison, compare
from jaxlin.training.report import LinearizationReport
from jaxlin.training.trainer import Row


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Fine-tune a model in full and linearized, over a sweep of pulls λ, and say how close the two are.

    Attributes:
        model: The model.
        data: The data.
        tuned: What is tuned.
        sweep: What is compared.
        training: How.
        devices: On what.
        checkpoints: When it is saved, and whether it goes on.
        output: Where results go.
    """

    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    tuned: TunedArguments = dataclasses.field(default_factory=TunedArguments)
    sweep: SweepArguments = dataclasses.field(default_factory=SweepArguments)
    training: TrainingArguments = dataclasses.field(default_factory=TrainingArguments)
    devices: DeviceArguments = dataclasses.field(default_factory=DeviceArguments)
    checkpoints: CheckpointArguments = dataclasses.field(default_factory=CheckpointArguments)
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def _history(result: Comparison) -> list[Row]:
    """Every step of every arm at every λ, as `log.jsonl` has them, as one table."""
    shares = {row["lam"]: row["lam_over_mu1"] for row in result.table if row["lam"] is not None}
    rows = [
        {"arm": arm, "lam": lam, "lam_over_mu1": shares[lam], **row}
        for (arm, lam), trained in result.results.items()
        for row in trained.history
    ]
    columns = dict.fromkeys(key for row in sorted(rows, key=len, reverse=True) for key in row)
    return [{key: row.get(key) for key in columns} for row in rows]


def _write(
    folder: RunFolder, resolved: Mapping[str, Any], result: Comparison, title: str, taken: Mapping[str, Any]
) -> None:
    write_csv(folder.path / "table.csv", result.table)
    write_csv(folder.path / "history.csv", _history(result))
    results = {"summary": {**result.summary, **taken}, "table": result.table, "config": resolved}
    if result.linearization:
        along = [row for report in result.linearization.values() for row in report.table]
        write_csv(folder.path / "linearization.csv", along)
        reports = [{"lam": lam, **dataclasses.asdict(report)} for lam, report in result.linearization.items()]
        results["linearization"] = reports
        top = reports[0]["summary"]["top"]
        plots.save(plots.linearization(along, top, title), folder.path / "figures" / "linearization")
    write_json(folder.path / "all_results.json", results)
    history = {key: value.history for key, value in result.results.items()}
    figures = folder.path / "figures"
    plots.save(plots.comparison(result.table, history, title), figures / "compare")
    if any(row["linearize_at"] for row in result.table):
        plots.save(plots.late(result.table, title), figures / "linearize_at")
    examples = result.summary["kernel_examples"]
    plots.save(plots.spectrum(result.spectrum, f"Spectrum of K₀, {examples} examples"), figures / "spectrum")


def run(config: CompareConfig) -> Comparison:
    """Runs the comparison and writes its folder.

    Args:
        config: What to run.

    Returns:
        The comparison.

    Raises:
        InputError: If anything given cannot be used; nothing has been written then.
        TrainingDivergedError: If an arm diverges; the logs up to there are kept.
        DeviceMemoryError: If a device's memory is too small; likewise.
        ProcessLostError: If another process has ended; likewise.
        Interrupted: On Ctrl-C or SIGTERM, where there are checkpoints; says how to go on.
        KeyboardInterrupt: Likewise, where there are none.
    """
    begin = time.monotonic()
    default = Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    mesh, rules = mesh_and_rules(config.devices)
    first = jax.process_index() == 0  # the one that writes and shows
    resumed = run_to_resume(config.checkpoints, config.output)
    path = resumed or config.output.output_dir or default
    overwrite, going_on = config.output.overwrite_output_dir, resumed is not None
    folder = RunFolder(path, overwrite, going_on) if first else SilentFolder(path, overwrite, going_on)
    checkpoints = checkpoints_in(path, config.checkpoints)
    if jax.process_count() > 1 and resumed is None and config.output.output_dir is None:
        checkpoints = None  # the processes may have begun in different seconds: their default folders are not one
    if config.output.quiet:  # read by the libraries when they are imported, which is when data or a model are loaded
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    setting = prepare(config.model, config.data, config.tuned, config.sweep, config.training, config.devices)
    options: dict[str, Any] = {
        "lams": lam_grid(config.sweep),
        "lam_rel": config.sweep.lam_rel or None,
        **{option: steps_of(config.sweep, option) for option in STEP_OPTIONS},
        "linear_mode": config.sweep.linear_mode,
        "trunk_cache": config.sweep.trunk_cache,
        "kernel_examples": config.sweep.kernel_examples,
        "mesh": mesh,
        "rules": rules,
    }
    training = train_config(config.training, config.sweep, config.devices, 1 if mesh is None else mesh.shape[DATA])
    check_comparison(setting.tun, setting.data, training, **options)
    if checkpoints is not None:
        checkpoints.check(training, True)
    record, written = resolved("compare", config, setting), options_file(config, setting)
    note = None if resumed is None else check_same(resumed, record, written)
    folder.open(record, written)
    source = setting.model.source
    assert source is not None  # loaded by name
    sizes = {name: len(part) for name, part in setting.data.items()}
    clock = RunClock()
    profiler = StepProfiler(folder.path / "profile" if config.training.profile and first else None)
    try:
        with ProgressReporter(folder.line, config.output.quiet or not first) as progress, clock.running():

            def log(row: Row) -> None:
                clock.step(row["arm"])
                folder.step(row)
                progress.note(f"loss {row['loss']:.3g}")
                profiler.step(row["arm"], row["step"])

            for line in setting.lines(config.tuned.peft, setting.tun.num_params, config.model.head_init):
                progress.say(line)
            if note is not None:
                progress.say(f"begun elsewhere ({note}): the same to rounding only")
            result = compare(
                setting.tun,
                setting.data["train"],
                setting.data["eval"],
                training,
                extra_arms=setting.extra_arms,
                baselines=setting.baselines,
                checkpoints=checkpoints,
                resume=resumed is not None,
                log=log,
                replay=folder.step,
                progress=progress.update,
                **options,
            )
            for what in ("linear_mode", "trunk_cache"):
                progress.say(f"{what}: {result.summary[what]}")
        title = (
            f"{source.name}, {setting.task.name}: {sizes['train']} training and {sizes['eval']} evaluation examples, "
            f"{result.summary['steps']} steps, seed {config.training.seed}"
        )
        taken = {"seconds": time.monotonic() - begin, **clock.summary()}
        if first:
            _write(folder, record, result, title, taken)
    except (*RUN_ERRORS, KeyboardInterrupt) as error:
        folder.line(f"stopped: {str(error) or 'interrupted'}")
        if isinstance(error, RUN_ERRORS):
            raise type(error)(f"{error}; the log is in {folder.path}") from error
        if checkpoints is None:
            raise
        signum = error.signal if isinstance(error, Interrupted) else signal.SIGINT
        go_on = f"{str(error) or 'interrupted'}; go on with: {command('compare', folder.path)}"
        raise Interrupted(go_on, signum) from error
    finally:
        profiler.stop()
        folder.close()
    if first:
        _print(result, setting.task.metrics, folder.path, taken)
    return result


def _print(result: Comparison, metrics: Sequence[str], path: Path, taken: Mapping[str, Any]) -> None:
    console = make_console()
    examples, of = result.summary["kernel_examples"], result.summary["train_examples"]
    subset = "" if examples == of else f" of {of}"
    what = f"NTK at θ₀ ({examples}{subset} training examples × {result.summary['outputs']} outputs)"
    console.print(f"{what}: {spectrum_line(result.summary)}", highlight=False, soft_wrap=True)
    for arm in ("full", FROZEN_A):
        if any(row["arm"] == arm for row in result.table):
            console.print(*gap_tables(result.table, arm))
    if any(row["linearize_at"] for row in result.table):
        console.print(late_table(result.table))
    if result.linearization:
        _print_reports(console, list(result.linearization.values()))
    console.print(score_table(result.table, metrics))
    means = ", ".join(f"{arm} {1e3 * seconds:.3g} ms" for arm, seconds in taken["step_seconds"].items())
    memory = f"peak memory of the {taken['peak_memory_of']} {taken['peak_memory_bytes'] / 2**30:.1f} GiB"
    steps = f"a step took {means}; " if means else ""  # none, where a finished run is gone on with
    costs = f"{steps}compiling {taken['compile_seconds']:.0f} s; {memory}"
    console.print(costs, highlight=False, soft_wrap=True)
    console.print(f"written to {path} in {taken['seconds']:.0f} s", highlight=False)


def _print_reports(console: Console, reports: Sequence[LinearizationReport]) -> None:
    rows = [row for report in reports for row in report.table]
    console.print(linearization_table(rows, reports[0].summary))
    strength, label = plots.strength(rows)
    for report in reports:
        text = f"{label} = {report.table[0][strength]:.3g}: {report.verdict}"
        console.print(text, highlight=False, soft_wrap=True)
