"""`jaxlin select`: which layers and modules to adapt, from kernels at θ₀, before anything is trained."""

from __future__ import annotations

import dataclasses
import functools
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxlin import plots
from jaxlin.data.dataset import Dataset
from jaxlin.errors import InputError
from jaxlin.experiments.data_arguments import DataArguments, check_numbers
from jaxlin.experiments.model_arguments import ModelArguments, pretrained, starts_as_probe
from jaxlin.experiments.progress import ProgressReporter
from jaxlin.experiments.record import options_file, resolved
from jaxlin.experiments.run_arguments import OutputArguments
from jaxlin.experiments.run_folder import RunFolder, write_csv, write_json
from jaxlin.experiments.select_page import LAM_BY, caveats, doubts, interval, named_criterion, page, rate_line
from jaxlin.experiments.setting import Loaded, load
from jaxlin.experiments.tables import make_console
from jaxlin.experiments.tuned_arguments import TunedArguments, tune
from jaxlin.models.model import Model
from jaxlin.models.probe import probe_head
from jaxlin.selection import LayerSelection, layer_grid, select_layers
from jaxlin.theory.selection import check_search
from jaxlin.training.losses import targets
from jaxlin.tunable import Tunable
from jaxlin.versions import versions

ALL_MODULES = ("query", "key", "value", "attention/output", "mlp/up", "mlp/down")


@dataclasses.dataclass(frozen=True)
class SelectArguments:
    """The choice.

    Attributes:
        criterion: What candidates are ranked by.
        budget: Most parameters that may be tuned, the head among them.
        num_samples: Labelled training examples that the kernels are of, stratified.
        probe_samples: Other training examples that a probe head is fitted on.
        num_eval_samples: Validation examples, for validation_error and for a prediction on them.
        draws: Of LoRA's A, and of a random head.
        lam_rel: Pull λ that criteria are at, in units of each candidate's μ₁; what is suggested for everything, if not
            given.
        lam_by: What the pull is suggested by.
        contrasts: Take contrasts of the outputs, as softmax sees them; for a frozen head whose columns sum to 0.
        lipschitz_directions: Random directions in which H is sampled for the bound of the linearization's gap, beside
            the ridge solution; 0: no bound.
        exhaustive_limit: Up to so many candidates are all computed; more are searched.
        memory_budget: GiB held at a time, beside the model.
        seed: Of head, A, subsets and bootstrap.
    """

    criterion: Literal[
        "condition_number",
        "regularized_condition_number",
        "mu_max",
        "mu_min",
        "trace",
        "effective_dimension",
        "alignment",
        "residual_share",
        "leave_one_out_error",
        "log_marginal_likelihood",
        "validation_error",
    ] = "condition_number"
    budget: int | None = None
    num_samples: int = 256
    probe_samples: int = 256
    num_eval_samples: int = 0
    draws: int = 3
    lam_rel: float | None = None
    lam_by: Literal["leave_one_out", "marginal_likelihood"] = "leave_one_out"
    contrasts: bool = False
    lipschitz_directions: int = 1
    exhaustive_limit: int = 512
    memory_budget: float = 4.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Choose layers and modules to adapt by their tangent kernels, before anything is trained.

    Attributes:
        choice: The choice.
        model: The model.
        data: The data.
        tuned: What may be tuned at most.
        output: Where results go.
    """

    choice: SelectArguments = dataclasses.field(default_factory=SelectArguments)
    model: ModelArguments = dataclasses.field(default_factory=ModelArguments)
    data: DataArguments = dataclasses.field(default_factory=DataArguments)
    tuned: TunedArguments = dataclasses.field(default_factory=lambda: TunedArguments(lora_targets=ALL_MODULES))
    output: OutputArguments = dataclasses.field(default_factory=OutputArguments)


def _settled(config: SelectConfig) -> SelectConfig:
    """Lets the default targets, which are all modules here, stand for LoRA only."""
    tuned = config.tuned
    if tuned.peft == "lora" or tuned.lora_targets != ALL_MODULES:
        return config
    return dataclasses.replace(config, tuned=dataclasses.replace(tuned, lora_targets=TunedArguments().lora_targets))


def _check(config: SelectConfig) -> None:
    """Refuses what cannot be meant.

    Raises:
        InputError: If something is.
    """
    arguments = config.choice
    least = {"num_samples": 2, "probe_samples": 2, "num_eval_samples": 0, "draws": 1, "seed": 0}
    check_numbers(arguments, config.data, **least, lipschitz_directions=0)
    if config.model.adapter_name_or_path is not None:
        raise InputError(
            "--adapter_name_or_path is of compare, ntk and bounds; select chooses before anything is adapted"
        )
    if arguments.criterion == "validation_error" and not arguments.num_eval_samples:
        raise InputError("--criterion validation_error needs --num_eval_samples")


def _parts(data: Dataset, arguments: SelectArguments, probed: bool) -> tuple[Dataset, Dataset | None]:
    """Examples of the kernels, and the others that the probe is fitted on; in proportion where there are too few."""
    n, wanted = len(data), arguments.num_samples + arguments.probe_samples
    size = min(n, arguments.num_samples)
    if probed and n < wanted:
        size = max(2, n * arguments.num_samples // wanted)
    order = _stratified_order(data["labels"], arguments.seed)
    train, others = data.take(np.sort(order[:size])), np.sort(order[size:])
    if not probed:
        return train, None
    if len(others) < 2:
        raise InputError(f"{n} training examples are too few for kernels and a probe head; expected at least 4")
    return train, data.take(others)


def _stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A permutation that begins with an example of each class, and any beginning of which has the shares of all."""
    order = np.random.default_rng(seed).permutation(len(labels))
    if labels.dtype.kind == "f":  # scores
        return order
    quantile = np.zeros(len(labels))
    for value in np.unique(labels):
        members = order[labels[order] == value]
        quantile[members] = np.arange(len(members)) / len(members)
    return order[np.argsort(quantile[order], kind="stable")]


@dataclasses.dataclass(frozen=True, eq=False)
class _Draws:
    """From a number to what is tuned: A drawn anew, and a random head."""

    model: Model
    config: SelectConfig
    num_labels: int
    new_head: bool

    def __call__(self, number: int) -> Tunable:
        seed = self.config.choice.seed + number
        model = pretrained(self.config.model, self.num_labels, seed) if self.new_head and number else self.model
        return tune(model, self.config.tuned, seed, False)[0]


def _outputs_wanted(data: Dataset, outputs: int) -> np.ndarray:
    return np.asarray(targets(data["labels"], outputs), np.float64)


def run(config: SelectConfig) -> LayerSelection:
    """Chooses, and writes the folder.

    Args:
        config: What to run.

    Returns:
        What was found.

    Raises:
        InputError: If anything given cannot be used; nothing has been written then.
        KeyboardInterrupt: If interrupted.
    """
    begin, arguments, config = time.monotonic(), config.choice, _settled(config)
    _check(config)
    default = Path("runs") / time.strftime("select-%Y%m%d-%H%M%S")
    folder = RunFolder(config.output.output_dir or default, config.output.overwrite_output_dir)
    # Whether a new head is fitted is known only with the model; what is not needed then is left.
    probes = config.model.head_init == "probe"
    whole = arguments.num_samples + (arguments.probe_samples if probes else 0)
    loaded = load(
        config.model, config.data, {"train": whole, "eval": arguments.num_eval_samples}, arguments.seed, "squared"
    )
    probed = starts_as_probe(loaded.model, config.model)
    train, others = _parts(loaded.data["train"], arguments, probed)
    if arguments.contrasts and loaded.task.num_labels < 2:
        raise InputError(f"--contrasts needs two outputs or more; task {loaded.task.name} has one")
    grid = layer_grid(tune(loaded.model, config.tuned, arguments.seed, False)[0])
    held_out = arguments.num_eval_samples > 0
    lam_rel = 1.0 if arguments.lam_rel is None else arguments.lam_rel
    limits = (arguments.budget, None, lam_rel, arguments.exhaustive_limit, held_out)
    check_search(grid, arguments.criterion, *limits)  # for its errors, before anything is written
    folder.open(resolved("select", config, loaded), options_file(config, loaded))
    try:
        with ProgressReporter(folder.line, config.output.quiet) as progress:
            for line in loaded.lines(config.tuned.peft, sum(grid.sizes.values()), config.model.head_init):
                progress.say(line)
            report = _select(config, loaded, train, others, progress)
        warnings = caveats(report, 0 if others is None else len(others))
        _write(report, config, loaded, folder.path, warnings, time.monotonic() - begin)
    except KeyboardInterrupt:
        folder.line("stopped: interrupted")
        raise
    finally:
        folder.close()
    _print(report, doubts(report), folder.path, time.monotonic() - begin)
    return report


def _select(
    config: SelectConfig, loaded: Loaded, train: Dataset, others: Dataset | None, progress: ProgressReporter
) -> LayerSelection:
    arguments, outputs, model = config.choice, loaded.task.num_labels, loaded.model
    if others is not None:
        progress.say(f"{len(train)} of the training examples make the kernels, the other {len(others)} the probe head")
        model = probe_head(model, others, _outputs_wanted(others, outputs))
    new_head = model.source is not None and model.source.head_is_new and config.model.head_init == "random"
    data_eval = loaded.data.get("eval")
    return select_layers(
        _Draws(model, config, outputs, new_head),
        train,
        _outputs_wanted(train, outputs),
        budget=arguments.budget,
        criterion=arguments.criterion,
        draws=arguments.draws,
        x_eval=data_eval,
        y_eval=None if data_eval is None else _outputs_wanted(data_eval, outputs),
        lam_rel=arguments.lam_rel,
        lam_by=arguments.lam_by,
        contrasts=arguments.contrasts,
        lipschitz_directions=arguments.lipschitz_directions,
        exhaustive_limit=arguments.exhaustive_limit,
        memory_budget=int(arguments.memory_budget * 2**30),
        seed=arguments.seed,
        progress=progress.update,
    )


def _compare_command(report: LayerSelection, config: SelectConfig) -> str | None:
    """A command line that fine-tunes the choice; `None` where it is no LoRA of one rank."""
    if config.tuned.peft != "lora" or report.rank is None:
        return None
    chosen = {"lora_layers": report.choice.layers, "lora_targets": report.choice.modules}
    groups = (config.model, config.data, dataclasses.replace(config.tuned, **chosen))  # type: ignore[arg-type]
    words = ["jaxlin", "compare"]
    for group in groups:
        default = type(group)()
        for name, value in vars(group).items():
            if value == getattr(default, name):
                continue
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join([*words, "--lam_rel", "0", f"{report.lam_rel:.3g}"])


def _of(report: LayerSelection, loaded: Loaded) -> str:
    return f"{loaded.task.name}, {report.examples} training examples × {loaded.task.num_labels} output(s)"


def _write(
    report: LayerSelection, config: SelectConfig, loaded: Loaded, path: Path, warnings: list[str], seconds: float
) -> None:
    model_type, source = loaded.model.config.get("model_type"), loaded.model.source
    peft = report.peft_config(model_type)
    if peft is not None and source is not None:
        peft["base_model_name_or_path"] = source.name
        if not config.model.has_head:  # an adapter of the language model; the library has no masked kind
            masked = getattr(loaded.model.module, "mask_id", None) is not None
            peft["task_type"] = None if masked else "CAUSAL_LM"
        write_json(path / "adapter_config.json", peft)
    command, of = _compare_command(report, config), _of(report, loaded)
    write_csv(path / "table.csv", report.table)
    write_csv(path / "by_criterion.csv", report.by_criterion)
    content = report.to_dict()
    summary = {**content["summary"], "peft_config": peft, "caveats": warnings, "seconds": seconds}
    write_json(path / "all_results.json", {**content, "summary": summary})
    about = [*loaded.lines(config.tuned.peft, report.num_params, config.model.head_init)]
    about.append(f"data sha256 {loaded.task.sha256()}")
    about.append(", ".join(f"{name} {version}" for name, version in versions().items()))
    about.append("λ, μ and kernels are for the summed loss ½‖f − y‖² + (λ/2)‖θ − θ₀‖².")
    title = f"Which layers to adapt: {loaded.task.name}, {source.name if source else 'model'}"
    figures = {
        "candidates": plots.candidates(report.table, report.search.criterion, of),
        "cells": plots.cells(report.table, "Where the best candidates lie"),
        "spectra": plots.spectra(report.spectra, of),
        "lam": plots.lam_curve(report.lam_curve, report.lam_rel, of),
    }
    drawn = {}
    for name, figure in figures.items():
        plots.save(figure, path / "figures" / name)
        drawn[name] = plots.element(path / "figures" / f"{name}.svg")
    (path / "report.html").write_text(page(report, title, drawn, peft, command, warnings, about), encoding="utf-8")


def _print(report: LayerSelection, warnings: list[str], path: Path, seconds: float) -> None:
    console = make_console()
    plain = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    criterion = report.search.criterion
    head = " and the head" if report.head else ""
    plain(f"tune {report.choice.label}{head}: {report.num_params:,} parameters")
    plain(f"by {plots.CRITERIA[criterion]}: {report.search.optimality}")
    if report.accuracy is not None:
        plain(f"predicted accuracy  {interval(report.accuracy)}")
    plain(f"predicted loss      {interval(report.loss)}")
    if report.eval_loss is not None:
        plain(f"held out            loss {interval(report.eval_loss)}")
    if report.eval_accuracy is not None:
        plain(f"held out            accuracy {interval(report.eval_accuracy)}")
    plain(f"pull λ              {report.lam_rel:.3g} μ₁ = {report.lam:.3g}, by {LAM_BY[report.lam_by]}")
    plain(f"learning rate       at most {rate_line(report)}")
    plain(f"linear there?       {report.trust.verdict}")
    columns = {"rank": "", "layers": "layers", "modules": "modules", "num_params": "parameters"}
    _show(console, "Candidates", report.table[:6], columns | {criterion: plots.CRITERIA[criterion]})
    columns = {"criterion": "criterion", "layers": "layers", "modules": "modules", "num_params": "parameters"}
    _show(console, "What each criterion would choose", list(map(named_criterion, report.by_criterion)), columns)
    for line in warnings:
        plain(f"note: {line}")
    plain(f"written to {path} in {seconds:.0f} s; read {path / 'report.html'}")


def _show(console: Console, title: str, rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for key, heading in columns.items():
        words = key in ("criterion", "layers", "modules")
        out.add_column(heading, justify="left" if words else "right", overflow="fold")
    for row in rows:
        out.add_row(*(_text(key, row[key]) for key in columns))
    console.print(out)


def _text(key: str, value: Any) -> str:
    if key == "modules":
        return value.replace("attention/", "").replace("mlp/", "")
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
