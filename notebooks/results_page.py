"""Writes what the README shows of all kept results: the figure, and between two markers its caption and the table."""

from __future__ import annotations

from pathlib import Path

from jaxlin import plots
from jaxlin.experiments.figures import overview
from jaxlin.experiments.figures.run import STUDIES, open_study

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- claims: written by notebooks/results_page.py -->\n", "\n<!-- end of claims -->"


def kept_studies():
    """Returns every study whose results are kept, opened, by name."""
    names = [study.name for study in STUDIES if (HERE / "results" / study.name / "record.json").is_file()]
    return {name: open_study(name, HERE / "results") for name in names}


def tables_of(opened):
    """Returns the tables of studies by name."""
    return {name: study.tables for name, study in opened.items()}


def claims(opened) -> str:
    """Returns caption and table."""
    setting = opened["02_regularization_and_linearity"].record["setting"]
    return f"{overview.caption(setting)}\n\n{overview.claims_table(tables_of(opened))}"


def main() -> None:
    """Writes figures and table."""
    opened = kept_studies()
    plots.save(overview.draw(tables_of(opened)), HERE / "results" / "overview")
    for name, study in opened.items():
        for figure, drawn in study.figures.items():
            plots.save(drawn, HERE / "results" / name / figure, (".svg",))
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + claims(opened) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
