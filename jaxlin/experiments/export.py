"""`jaxlin export`: tuned weights out, as a checkpoint for transformers or an adapter for peft."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxlin.errors import InputError
from jaxlin.experiments.model_arguments import ModelArguments, pretrained, starts_as_probe
from jaxlin.experiments.tuned_arguments import FROZEN_A, TunedArguments, tune
from jaxlin.models.export import save_model
from jaxlin.models.load import load_language_model, load_model
from jaxlin.models.model import Model
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.peft.adapter import adapter_head, load_adapter, save_adapter
from jaxlin.peft.function import merge
from jaxlin.training.checkpoint import load_checkpoint
from jaxlin.training.sweep_record import NAME as SWEEP
from jaxlin.tunable import Tunable


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write tuned weights for other programs: of a compare run, or of an adapter.

    Attributes:
        output_dir: Folder that is made; it must not hold anything.
        run: Folder of a compare run, with its checkpoints.
        format: merged: a whole checkpoint, which transformers loads; peft: a LoRA adapter.
        arm: Of the run; a linearized arm is no network, so it cannot be one.
        lam: λ of the run for the summed loss; where it has several, this or lam_rel.
        lam_rel: λ in units of μ₁.
        step: Checkpoint; the last, if not given.
        adapter_name_or_path: In place of a run: folder of an adapter, to merge into the model.
        model_name_or_path: Model of that adapter: local folder, hub id, or the embedded default.
        model_revision: Branch, tag or commit of a hub model.
        debug: Show tracebacks.
    """

    output_dir: Path
    run: Path | None = None
    format: Literal["merged", "peft"] = "merged"
    arm: Literal["full", "full_A_frozen"] = "full"
    lam: float | None = None
    lam_rel: float | None = None
    step: int | None = None
    adapter_name_or_path: str | None = None
    model_name_or_path: str = EMBEDDED_MODEL
    model_revision: str | None = None
    debug: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class _Found:
    """What is to be written."""

    model: Model
    tun: Tunable
    theta: Any
    label_names: tuple[str, ...] | None
    facts: dict[str, str]


def run(config: ExportConfig) -> None:
    """Writes the folder.

    Args:
        config: What to write.

    Raises:
        InputError: If anything given cannot be used; nothing is left behind then.
    """
    if (config.run is None) == (config.adapter_name_or_path is None):
        raise InputError("give --run FOLDER or --adapter_name_or_path FOLDER, one of them")
    found = _of_adapter(config) if config.run is None else _of_run(config, config.run)
    if config.format == "peft":
        save_adapter(found.tun, found.theta, config.output_dir, found.model, card=found.facts)
    else:
        merged, names = merge(found.tun, found.theta), found.label_names
        save_model(found.model, config.output_dir, merged, label_names=names, card=found.facts)
    print(f"written to {config.output_dir}; how to load it is in its README.md")


def _of_adapter(config: ExportConfig) -> _Found:
    """An adapter and its model, which has the head that the adapter holds, or a language model's."""
    adapter, name, revision = config.adapter_name_or_path, config.model_name_or_path, config.model_revision
    assert adapter is not None
    head = adapter_head(adapter, name, revision)
    if head is not None:
        model = load_model(name, head[1], head=head[0], revision=revision)
    else:
        model = load_language_model(name, revision=revision)
    tun = load_adapter(model, adapter)
    return _Found(model, tun, tun.theta0, None, {"Adapter": f"`{adapter}`"})


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read; expected a run of jaxlin compare with checkpoints: {error}"
        ) from error


def _group(kind: Any, values: Mapping[str, Any]) -> Any:
    """A group of options as a run's `config.json` has it."""
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def _of_run(config: ExportConfig, folder: Path) -> _Found:
    """The parameters of one arm at one λ, and what its tables say of it."""
    record = _json(folder / "config.json")
    if record.get("command") != "compare":
        raise InputError(f"{folder} is of `jaxlin {record.get('command')}`; only a compare run has tuned weights")
    sweep = folder / "checkpoints"
    lams = _json(sweep / SWEEP)["lams"]
    results = _json(folder / "all_results.json") if (folder / "all_results.json").is_file() else {"table": []}
    index = _choice(config, lams, results["table"])
    arguments = record["arguments"]
    tuned = _group(TunedArguments, arguments["tuned"])
    if tuned.peft == "prompt":
        raise InputError(f"the run in {folder} tuned a soft prompt, which is no part of the weights: nothing to export")
    model_arguments = _group(ModelArguments, arguments["model"])
    labels, seed = record["task"]["labels"], arguments["training"]["seed"]
    model = pretrained(model_arguments, len(labels) or 1, seed)
    if starts_as_probe(model, model_arguments) and not tuned.train_head:
        raise InputError(f"the run in {folder} froze a probe head, which its checkpoints do not hold")
    tun, extra = tune(model, tuned, seed, config.arm == FROZEN_A)
    tun = extra.get(config.arm, tun)
    theta = load_checkpoint(sweep / f"lam_{index}" / config.arm, tun, config.step)
    row = next((row for row in results["table"] if (row["arm"], row["lam"]) == (config.arm, lams[index])), None)
    facts = _facts(record, lams[index], results.get("summary", {}), None if config.step is not None else row)
    return _Found(model, tun, theta, tuple(labels) or None, facts)


def _choice(config: ExportConfig, lams: Sequence[float], table: Sequence[Mapping[str, Any]]) -> int:
    """Index of the λ that is asked for."""
    if config.lam is not None and config.lam_rel is not None:
        raise InputError("--lam and --lam_rel are both given; give one of them")
    shares = {row["lam"]: row["lam_over_mu1"] for row in table if row["lam"] is not None}
    values = lams if config.lam_rel is None else [shares.get(lam) for lam in lams]
    wanted = config.lam if config.lam_rel is None else config.lam_rel
    hits = [
        i
        for i, value in enumerate(values)
        if wanted is None or (value is not None and abs(value - wanted) <= 1e-2 * abs(wanted))
    ]
    if len(hits) != 1:
        listed = ", ".join(
            f"{lam:.6g}" + (f" ({shares[lam]:.3g} μ₁)" if shares.get(lam) is not None else "") for lam in lams
        )
        raise InputError(f"the run has λ = {listed}; choose one by --lam or --lam_rel")
    return hits[0]


def _facts(
    record: Mapping[str, Any], lam: float, summary: Mapping[str, Any], row: Mapping[str, Any] | None
) -> dict[str, str]:
    """What a model card says, as far as it is known."""
    task, training = record["task"], record["arguments"]["training"]
    examples = f", {summary['train_examples']} training examples" if summary else ""
    facts = {"Data": f"{task['name']}{examples}; sha256 `{record['data_sha256'][:16]}`"}
    if task["labels"]:
        facts["Classes"] = ", ".join(task["labels"])
    if record.get("target_std") is not None:
        facts["Scores"] = f"(score − {record['target_mean']:.6g}) / {record['target_std']:.6g}"
    facts["Loss"] = f"{training['loss']}, {training['optimizer']}, seed {training['seed']}"
    share = f" = {row['lam_over_mu1']:.3g} μ₁" if row and row["lam_over_mu1"] is not None else ""
    facts["Pull λ towards θ₀"] = f"{lam:.3g}{share} (summed loss)"
    if summary.get("condition_number") is not None:
        of = f"{summary['kernel_examples']} training examples"
        sign = "at least " if summary["condition_number_is_lower_bound"] else ""
        facts["κ of the tangent kernel at θ₀"] = f"{sign}{float(summary['condition_number']):.4g} ({of})"
    if row:
        gap, distance = row["output_gap_relative_eval"], float(row["parameter_gap"])
        of_outputs = "" if gap is None else f"outputs {100 * float(gap):.3g} % (evaluation), "
        facts["Gap to the linearized model"] = f"{of_outputs}parameters {distance:.3g}"
        facts |= {
            f"Evaluation {name}": f"{float(row[f'{name}_eval']):.4g}"
            for name in ("loss", *task["metrics"])
            if row.get(f"{name}_eval") is not None
        }
    facts["Versions"] = ", ".join(f"{name} {record['versions'][name]}" for name in ("jaxlin", "jax"))
    return facts
