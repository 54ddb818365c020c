"""`jaxlin compare`: full against linearized fine-tuning of a pretrained transformer on real text."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from jaxlin import plots
from jaxlin.errors import TrainingDivergedError
from jaxlin.experiments.config_file import to_yaml
from jaxlin.experiments.data_arguments import DataArguments, with_folder
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.run_folder import RunFolder, write_csv, write_json
from jaxlin.experiments.setting import (
    ModelArguments,
    OutputArguments,
    Setting,
    SweepArguments,
    TrainingArguments,
    lam_grid,
    late_steps,
    prepare,
    train_config,
)
from jaxlin.experiments.tables import gap_tables, late_table, score_table, spectrum_line
from jaxlin.experiments.tuned_arguments import FROZEN_A, TunedArguments
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.training.compare import Comparison, check_comparison, compare
from jaxlin.versions import versions


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Fine-tune a model in full and linearized, over a sweep of pulls λ, and say how close the two are.

    Attributes:
        model: The model.
        data: The data.
        tuned: What is tuned.
        sweep: What is compared.
        training: How.
        output: Where results go.
    """

    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    tuned: TunedArguments = dataclasses.field(default_factory=TunedArguments)
    sweep: SweepArguments = dataclasses.field(default_factory=SweepArguments)
    training: TrainingArguments = dataclasses.field(default_factory=TrainingArguments)
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def _resolved(config: CompareConfig, setting: Setting) -> dict[str, Any]:
    """The configuration with all that is needed to repeat the run."""
    arguments = {group: dataclasses.asdict(value) for group, value in vars(config).items()}
    return {
        "command": "compare",
        "arguments": {
            group: {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
            for group, values in arguments.items()
        },
        "model": dataclasses.asdict(setting.model.source) if setting.model.source else None,
        "head": setting.model.module.head,
        "task": {
            "name": setting.task.name,
            "labels": setting.task.label_names,
            "metrics": setting.task.metrics,
            **setting.task.provenance,
        },
        "target_mean": setting.scale.mean if setting.scale else None,
        "target_std": setting.scale.std if setting.scale else None,
        "data_sha256": setting.task.sha256(),
        "tokenized_sha256": {name: part.sha256() for name, part in setting.data.items()},
        "truncated": setting.truncated,
        "versions": versions(),
        "device": str(jax.devices()[0]),
    }


def _options(config: CompareConfig, setting: Setting) -> str:
    """The options as a file that runs the same again: paths absolute, commits for what is from the hub, no output."""
    model, data, source = config.model, with_folder(config.data), setting.model.source
    if Path(model.model_name_or_path).expanduser().is_dir():
        folder = str(Path(model.model_name_or_path).expanduser().absolute())
        model = dataclasses.replace(model, model_name_or_path=folder)
    elif source is not None and source.name != EMBEDDED_MODEL:
        model = dataclasses.replace(model, model_revision=Path(source.folder).name)  # as the hub's cache has it
    if commit := setting.task.provenance.get("commit"):
        data = dataclasses.replace(data, dataset_revision=commit)
    config = dataclasses.replace(config, model=model, data=data)
    return to_yaml(config, without=("output_dir", "overwrite_output_dir", "config", "debug"))


def _write(folder: RunFolder, resolved: Mapping[str, Any], result: Comparison, title: str, seconds: float) -> None:
    write_csv(folder.path / "table.csv", result.table)
    results = {"summary": {**result.summary, "seconds": seconds}, "table": result.table, "config": resolved}
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
        KeyboardInterrupt: If interrupted; likewise.
    """
    begin = time.monotonic()
    default = Path("runs") / time.strftime("compare-%Y%m%d-%H%M%S")
    folder = RunFolder(config.output.output_dir or default, config.output.overwrite_output_dir)
    if config.output.quiet:  # read by the libraries when they are imported, which is when data or a model are loaded
        for library in ("HF_HUB", "HF_DATASETS"):
            os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    setting = prepare(config.model, config.data, config.tuned, config.sweep, config.training)
    options: dict[str, Any] = {
        "lams": lam_grid(config.sweep),
        "lam_rel": config.sweep.lam_rel or None,
        "linearize_at": late_steps(config.sweep),
        "linear_mode": config.sweep.linear_mode,
        "kernel_examples": config.sweep.kernel_examples,
    }
    training = train_config(config.training, config.sweep)
    check_comparison(setting.tun, setting.data, training, **options)
    resolved = _resolved(config, setting)
    folder.open(resolved, _options(config, setting))
    source = setting.model.source
    assert source is not None  # loaded by name
    sizes = {name: len(part) for name, part in setting.data.items()}
    try:
        with ProgressReporter(folder.line, config.output.quiet) as progress:
            progress.say(
                f"{source.name} with head {setting.model.module.head!r}, {config.tuned.peft} "
                f"({setting.tun.num_params:,} trainable parameters), task {setting.task.name}: "
                f"{sizes['train']} training, {sizes['eval']} evaluation examples, "
                f"{setting.task.num_labels} output(s)"
            )
            if source.head_is_new:
                progress.say(f"the checkpoint has no head of this kind: a new one starts as {config.model.head_init}")
            for note in setting.notes:
                progress.say(note)
            for name, count in setting.truncated.items():
                if count:
                    whole = f"{count} of {sizes[name]} {name} texts"
                    progress.say(f"{whole} are longer than {setting.max_length} tokens and were truncated")
            dropped = setting.task.provenance["train_rows_also_in_validation_dropped"]
            if dropped:
                progress.say(f"{dropped} training rows whose text is also in validation were dropped")
            result = compare(
                setting.tun,
                setting.data["train"],
                setting.data["eval"],
                training,
                extra_arms=setting.extra_arms,
                baselines=setting.baselines,
                log=folder.step,
                progress=progress.update,
                **options,
            )
        title = (
            f"{source.name}, {setting.task.name}: {sizes['train']} training and {sizes['eval']} evaluation examples, "
            f"{result.summary['steps']} steps, seed {config.training.seed}"
        )
        _write(folder, resolved, result, title, time.monotonic() - begin)
    except (TrainingDivergedError, KeyboardInterrupt) as error:
        folder.line(f"stopped: {str(error) or 'interrupted'}")
        if isinstance(error, TrainingDivergedError):
            raise TrainingDivergedError(f"{error}; the log is in {folder.path}") from error
        raise
    finally:
        folder.close()
    _print(result, setting.task.metrics, folder.path, time.monotonic() - begin)
    return result


def _print(result: Comparison, metrics: Sequence[str], path: Path, seconds: float) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(spectrum_line(result.summary), highlight=False, soft_wrap=True)
    for arm in ("full", FROZEN_A):
        if any(row["arm"] == arm for row in result.table):
            console.print(*gap_tables(result.table, arm))
    if any(row["linearize_at"] for row in result.table):
        console.print(late_table(result.table))
    console.print(score_table(result.table, metrics))
    console.print(f"written to {path} in {seconds:.0f} s", highlight=False)
