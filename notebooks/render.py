"""Runs notebooks from their text form and writes them with their outputs: python render.py [NAME.py …]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

HERE = Path(__file__).parent
QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}
"""Environment in which neither the absence of PyTorch, which is not used, nor that of widgets is remarked on."""


def executed(source: Path, timeout: int = 1800):
    """Returns the notebook of a text file, run from top to bottom in a fresh kernel, in the folder it lies in.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = jupytext.read(source)
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", coalesce_streams=True)
    client.execute(cwd=str(HERE), env={**QUIET, **os.environ})
    for number, cell in enumerate(notebook.cells):  # a run of the same is then the same file
        cell["id"] = f"cell-{number}"  # random otherwise
        cell.get("metadata", {}).pop("execution", None)  # times of day
    return notebook


def main() -> None:
    """Renders those given, or all."""
    for source in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted(HERE.glob("[0-9]*.py")):
        jupytext.write(executed(source), source.with_suffix(".ipynb"))
        print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main()
