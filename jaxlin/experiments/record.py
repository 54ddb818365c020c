"""What a run was: everything needed to repeat it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxlin.experiments.config_file import to_yaml
from jaxlin.experiments.data_arguments import with_folder
from jaxlin.experiments.setting import Loaded
from jaxlin.models.resolve import EMBEDDED_MODEL
from jaxlin.versions import versions


def resolved(command: str, config: Any, setting: Loaded) -> dict[str, Any]:
    """Returns the configuration with all that is needed to repeat the run.

    Args:
        command: Of the program.
        config: Dataclass of option groups.
        setting: What was loaded.
    """
    arguments = {group: dataclasses.asdict(value) for group, value in vars(config).items()}
    return {
        "command": command,
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


_NOT_OF_A_RUN = (
    "output_dir",
    "overwrite_output_dir",
    "config",
    "debug",
    "resume",
    "resume_from_checkpoint",
    "estimate",
    "process_id",
)


def options_file(config: Any, setting: Loaded) -> str:
    """Returns the options as a file that runs the same again: paths absolute, commits for the hub, no output."""
    model, data, source = config.model, with_folder(config.data), setting.model.source
    if Path(model.model_name_or_path).expanduser().is_dir():
        folder = str(Path(model.model_name_or_path).expanduser().absolute())
        model = dataclasses.replace(model, model_name_or_path=folder)
    elif source is not None and source.name != EMBEDDED_MODEL:
        model = dataclasses.replace(model, model_revision=Path(source.folder).name)  # as the hub's cache has it
    if model.adapter_name_or_path is not None:
        adapter = str(Path(model.adapter_name_or_path).expanduser().absolute())
        model = dataclasses.replace(model, adapter_name_or_path=adapter)
    if commit := setting.task.provenance.get("commit"):
        data = dataclasses.replace(data, dataset_revision=commit)
    config = dataclasses.replace(config, model=model, data=data)
    return to_yaml(config, without=_NOT_OF_A_RUN)
