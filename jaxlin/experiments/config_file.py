"""Options in a YAML file: what a run writes, and what `--config` reads."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxlin.errors import InputError

NAME = "config.yaml"


def flat_options(config: Any) -> dict[str, Any]:
    """Returns the options of a dataclass of option groups, by name, in order."""
    return {name: value for group in vars(config).values() for name, value in dataclasses.asdict(group).items()}


def to_yaml(config: Any, without: Collection[str]) -> str:
    """Returns a configuration file that gives the same options again.

    Args:
        config: Dataclass of option groups.
        without: Names that are left out; so are options that are not set.
    """
    options = {
        name: str(value.expanduser().absolute())
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, tuple)
        else value
        for name, value in flat_options(config).items()
        if value is not None and name not in without
    }
    return yaml.safe_dump(options, sort_keys=False, allow_unicode=True, default_flow_style=None)


def read(file: Path, known: Collection[str]) -> list[str]:
    """Returns the options of a file as words of a command line.

    Args:
        file: YAML (or JSON): option name to value, a list for several; `_` and `-` are the same.
        known: Names of options.

    Raises:
        InputError: If it cannot be read, is no mapping of names to plain values, or names an unknown option.
    """
    if file.is_dir():
        raise InputError(f"--config {file} is a folder; expected a YAML file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise InputError(f"--config {file}{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {file} holds {type(content).__name__}; expected lines `option: value`")
    words: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"--config {file}: {key!r} is no option{hint}")
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in values):
            raise InputError(f"--config {file}: {key} is nested; expected a value or a list of values")
        if isinstance(value, list) and any(isinstance(item, bool) for item in value):
            raise InputError(f"--config {file}: {key} lists true or false (YAML so reads yes, no); put words in quotes")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", *map(str, values)]
    return words


def find(words: Sequence[str], option: str = "config") -> Path | None:
    """Returns the path that an option names on a command line, in either spelling.

    Raises:
        InputError: If there are several.
    """
    flags = {f"--{option}", f"--{option.replace('_', '-')}"}
    found = [value for flag, equals, value in (word.partition("=") for word in words) if equals and flag in flags]
    found += [value for word, value in itertools.pairwise(words) if word in flags]
    if len(found) > 1:
        raise InputError(f"--{option} is given {len(found)} times ({', '.join(found)}); expected one")
    return Path(found[0]) if found else None
