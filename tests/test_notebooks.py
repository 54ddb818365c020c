"""The notebooks: committed as they run, and every number in their text is the kept table's."""

import ast
import importlib.util
import json
import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from jaxlin.errors import InputError
from jaxlin.experiments.figures.run import FAST_SWITCH, STUDIES, chosen, open_study

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
LIVE = ("01_quickstart",)
"""Notebooks that compute all that they show, and keep no tables."""
OF_STUDIES = [source for source in SOURCES if source.stem not in LIVE]
HOW = "; render it: cd notebooks && python render.py {}"
MOST_BYTES = 10_000_000


def by_name(sources):
    return pytest.mark.parametrize("source", sources, ids=[source.stem for source in sources])


def committed(source):
    """The notebook with its outputs."""
    path = source.with_suffix(".ipynb")
    assert path.is_file(), f"{path.name} is not there{HOW.format(source.name)}"
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def last_expression(cell):
    """The expression whose value a cell shows, or `None`."""
    last = ast.parse(cell.source).body[-1]
    return last.value if isinstance(last, ast.Expr) else None


def asked_of_study(cell):
    """Name and arguments of what a cell asks its study for: `("found", ["gap"])`; `None`: nothing."""
    value = last_expression(cell)
    if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("study."):
        return value.func.attr, [ast.literal_eval(argument) for argument in value.args]
    return None


def opened(source, monkeypatch):
    monkeypatch.delenv(FAST_SWITCH, raising=False)
    return open_study(source.stem, FOLDER / "results")


def test_there_is_a_notebook_of_every_study():
    assert [source.stem for source in OF_STUDIES] == [study.name for study in STUDIES]


@by_name(SOURCES)
def test_it_is_committed_as_it_runs(source):
    text, kept = jupytext.read(source), committed(source)
    said = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (kept, text)]
    assert said[0] == said[1], f"{source.stem}: its text form has changed{HOW.format(source.name)}"
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [output.output_type for output in cell.outputs]
        assert "error" not in kinds
        assert kinds or last_expression(cell) is None, f"{cell.source!r} shows nothing{HOW.format(source.name)}"


@by_name(OF_STUDIES)
def test_what_it_says_is_of_the_kept_tables(source, monkeypatch):
    study = opened(source, monkeypatch)
    said, expected = [], []
    for cell in code_cells(committed(source)):
        shown = [output.data for output in cell.outputs if "data" in output]
        said += [data["text/markdown"] for data in shown if "text/markdown" in data]
        name, arguments = asked_of_study(cell) or (None, [])
        if name == "show":
            assert all("image/png" in data for data in shown)
            assert arguments[0] in study.figures
        elif name is not None:
            expected.append(str(getattr(study, name)(*arguments)))
    assert expected
    assert said == expected, f"{source.stem} says what the tables do not{HOW.format(source.name)}"


@by_name(OF_STUDIES)
def test_kept_results_are_of_a_full_run(source, monkeypatch):
    study = opened(source, monkeypatch)
    record = study.record
    assert record["study"] == source.stem
    assert record["command"].startswith(f"jaxlin figures {source.stem} --full")
    assert record["seconds"] > 0
    assert set(record["data_sha256"]) == set(record["cut"]) == set(record["setting"]["tasks"])
    assert study.tables
    for name, rows in study.tables.items():
        assert rows, f"table {name} of {source.stem} is empty"
    # What is committed names no folder of the machine that it was made on.
    assert record["setting"]["data_dir"] is None
    assert not Path(record["setting"]["model_name_or_path"]).is_absolute()


def prose(source):
    """The text of a notebook without formulas and commands in code spans, and without links' targets."""
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "markdown"]
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", "\n\n".join(cells), flags=re.DOTALL)


@by_name(SOURCES)
def test_its_prose_holds_no_measured_number(source):
    """What is measured has decimals, a percent sign or a unit of time, and is said by a cell that computes it."""
    found = re.findall(r"[^\n]*(?:\d[.,]\d|\d\s?%|\d+ (?:s|seconds?|minutes?|hours?)\b)[^\n]*", prose(source))
    assert not found, "say it by study.found, from the tables"


@by_name(OF_STUDIES)
def test_it_begins_with_what_was_run_and_found(source):
    asked = [asked_of_study(cell) for cell in code_cells(jupytext.read(source))]
    assert [name for name, _ in asked[:2]] == ["about", "found"]


def test_the_quickstart_is_a_dozen_lines():
    _, first, *_ = code_cells(jupytext.read(FOLDER / "01_quickstart.py"))
    assert "jl.compare(" in first.source
    assert len(first.source.splitlines()) == 12


@by_name(SOURCES)
def test_its_links_lead_somewhere(source):
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", source.read_text()):
        page = FOLDER / target
        assert page.is_file(), target
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        assert not heading or heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


@by_name(SOURCES)
def test_it_names_no_folder_of_the_machine(source):
    text = json.dumps(committed(source), ensure_ascii=False)
    assert str(FOLDER.parent) not in text
    assert str(Path.home() / ".") not in text or str(Path.home()) == "/"


def test_all_of_it_is_small():
    files = [*FOLDER.glob("*.ipynb"), *(file for file in (FOLDER / "results").rglob("*") if file.is_file())]
    sizes = {str(file.relative_to(FOLDER)): file.stat().st_size for file in files}
    assert sum(sizes.values()) < MOST_BYTES, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def _render():
    spec = importlib.util.spec_from_file_location("render", FOLDER / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@by_name(SOURCES)
def test_it_runs_in_fast_mode_in_a_fresh_kernel(source, monkeypatch):
    if source in OF_STUDIES:
        try:
            (study,) = chosen([source.stem])
            study.fast.model_arguments()
        except InputError as error:
            pytest.skip(str(error))
    monkeypatch.setenv(FAST_SWITCH, "fast")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]))
    notebook = _render().executed(source)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert cell.outputs or last_expression(cell) is None
        name, _ = asked_of_study(cell) or (None, [])
        if name is not None:
            kind = "image/png" if name == "show" else "text/markdown"
            assert any(kind in output.get("data", {}) for output in cell.outputs)
