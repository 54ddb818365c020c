"""Writes what the README shows of all kept results: the figure, and the table between its two markers."""

from __future__ import annotations

from pathlib import Path

from jaxlin import plots
from jaxlin.experiments.figures import overview
from jaxlin.experiments.figures.run import STUDIES, open_study

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- claims: written by notebooks/results_page.py -->\n", "\n<!-- end of claims -->"


def kept_studies():
    """Returns the tables of every study whose results are kept, by name."""
    names = [study.name for study in STUDIES if (HERE / "results" / study.name / "record.json").is_file()]
    return {name: open_study(name, HERE / "results").tables for name in names}


def main() -> None:
    """Writes figure and table."""
    studies = kept_studies()
    plots.save(overview.draw(studies), HERE / "results" / "overview")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(before + BEGIN + overview.claims_table(studies) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
