"""The embedded task: which area of Python's standard library does a docstring come from?

Real text that every machine has: the first paragraph of each docstring, read with `ast` from source and
never imported. A top-level package stands in one class and one split only, so that the validation
packages are unseen; its own name is masked.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxlin.data.task import Task, TextSplit, make_task
from jaxlin.errors import InputError

# Modules that Python 3.11 to 3.14 share: class -> (training packages, validation packages).
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "internet": (
        ("email", "http", "xmlrpc", "imaplib", "ftplib", "socketserver", "ssl", "wsgiref", "mailbox"),
        ("urllib", "smtplib", "poplib", "ipaddress", "socket", "mimetypes", "netrc", "webbrowser"),
    ),
    "data formats": (
        (
            "xml",
            "json",
            "zipfile",
            "tarfile",
            "configparser",
            "pickle",
            "pickletools",
            "string",
            "re",
            "dbm",
            "sqlite3",
        ),
        (
            "csv",
            "plistlib",
            "gzip",
            "bz2",
            "lzma",
            "html",
            "difflib",
            "textwrap",
            "base64",
            "quopri",
            "shelve",
            "tomllib",
        ),
    ),
    "concurrency": (
        ("asyncio", "multiprocessing", "subprocess", "sched"),
        ("threading", "concurrent", "queue", "selectors", "signal"),
    ),
    "testing": (
        ("unittest", "pdb", "trace", "timeit", "pstats"),
        ("doctest", "bdb", "traceback", "cProfile", "profile", "tracemalloc"),
    ),
}
MAX_ROWS = {"train": 140, "validation": 60}
"""At most so many rows a class and split, drawn with a fixed seed."""

MASK = "this package"
_MIN_WORDS = 4


def _sources(stdlib: Path, package: str) -> list[Path]:
    """Source files of a top-level module or package, its own tests left out."""
    single, folder = stdlib / f"{package}.py", stdlib / package
    if single.is_file():
        return [single]
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    return [file for file in files if not {"test", "tests", "idle_test"} & set(file.relative_to(stdlib).parts)]


def _first_paragraphs(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())


def _texts(stdlib: Path, packages: tuple[str, ...]) -> list[str]:
    texts: list[str] = []
    for package in packages:
        name = re.compile(rf"\b{re.escape(package)}\b", re.IGNORECASE)
        for file in _sources(stdlib, package):
            texts += [name.sub(MASK, paragraph) for paragraph in _first_paragraphs(file)]
    return [text for text in texts if len(text.split()) >= _MIN_WORDS]


def load_stdlib_task(stdlib: Path | None = None) -> Task:
    """Builds the embedded task.

    Args:
        stdlib: Folder of the standard library's sources; default: the running Python's.

    Returns:
        A task of four classes, at most 200 rows each, no text twice. The text depends on the Python
        version, which the provenance records.

    Raises:
        InputError: If the library is zipped or its docstrings are stripped.
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    version = sys.version.split()[0]
    if not (folder / "json" / "__init__.py").is_file():
        raise InputError(
            f"Python {version} has no standard-library sources in {folder} (a zipped or frozen library?), which the "
            "embedded task is made of; use a Python with sources, or give --task_name or --train_file"
        )
    seen: set[str] = set()
    splits: dict[str, TextSplit] = {}
    for split in ("validation", "train"):  # a text in both splits stays in validation
        texts: list[tuple[str, ...]] = []
        labels: list[int] = []
        for label, (train, validation) in enumerate(AREAS.values()):
            rows = []
            for text in _texts(folder, train if split == "train" else validation):
                key = " ".join(re.findall(r"\w+", text.lower()))
                if key not in seen:
                    seen.add(key)
                    rows.append(text)
            if len(rows) < 20:
                raise InputError(
                    f"only {len(rows)} docstrings were found for the embedded task's class {list(AREAS)[label]!r} in "
                    f"{folder}; they seem to be stripped: use a Python with docstrings, or give --task_name or "
                    "--train_file"
                )
            order = np.random.default_rng(label).permutation(len(rows))[: MAX_ROWS[split]]
            texts += [(rows[i],) for i in np.sort(order)]
            labels += [label] * len(order)
        splits[split] = TextSplit(tuple(texts), np.array(labels))
    provenance = {"source": "docstrings of Python's standard library", "python": version}
    return make_task("stdlib", splits["train"], splits["validation"], tuple(AREAS), provenance)
