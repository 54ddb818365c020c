"""Readers of local tables: TSV, CSV, JSON, JSON lines, Parquet; each gives the same `Table`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlin.errors import InputError

MAX_CHARACTERS = 1_000_000
"""Longest line of TSV and JSON lines, longest field of the others: beyond it a file is not what its name says."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Columns of text or numbers.

    Attributes:
        source: What messages call it: a file, or a split of a hub data set.
        columns: Values by column name, all of one length; `None` where a value is missing.
        rows: What messages call each row: line numbers of a text file, else 1, 2, ….
        unit: `"line"` or `"row"`: what `rows` counts.
        class_names: Of columns whose integers are declared to be class ids.
    """

    source: str
    columns: Mapping[str, list[Any]]
    rows: Sequence[int]
    unit: str
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def where(self, index: int) -> str:
        """Names a row in a message."""
        return f"{self.source}, {self.unit} {self.rows[index]}"


def _bytes(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    if not content:
        raise InputError(f"{file} is empty (0 bytes); expected rows of data")
    return content


def _text(file: Path) -> str:
    content = _bytes(file)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{file} is UTF-16, not UTF-8 text; convert it first")
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise InputError(f"{file} holds a NUL byte in line {line}: it is binary or damaged; expected UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file} is not UTF-8 text in line {line} (byte {error.start}); convert it first, or it is damaged there"
        ) from error


def _lines(file: Path) -> list[str]:
    """Lines without their ends; empty ones at the end of the file left out."""
    lines = [line.removesuffix("\r") for line in _text(file).split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_CHARACTERS:
            raise InputError(_too_long(f"{file}, line {number}", len(line)))
    return lines


def _too_long(where: str, length: int) -> str:
    return f"{where} has {length:,} characters, more than {MAX_CHARACTERS:,}; is it one row a line, and text?"


_NAMES = {"\t": "tabs (named .tsv)", ",": "commas (named .csv)", ";": "semicolons"}


def _from_rows(file: Path, separator: str, rows: list[tuple[int, list[str]]], rule: str) -> Table:
    """Builds a table of delimited text from `(line, fields)`, the header first and every row checked against it."""
    if not rows:
        raise InputError(f"{file} holds no line of text; expected a header line and rows of data")
    header = [name.strip() for name in rows.pop(0)[1]]
    other = [mark for mark in _NAMES if mark != separator and len(header) == 1 and mark in header[0]]
    if other:
        raise InputError(f"{file} has the one column {header[0]!r}; is it separated by {_NAMES[other[0]]}? Here {rule}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InputError(f"{file} has a column name twice, {repeated[0]!r}; its columns: {', '.join(header)}")
    if not rows:
        raise InputError(f"{file} holds a header line ({', '.join(header)}) and no row of data")
    for number, row in rows:
        if len(row) != len(header):
            raise InputError(
                f"{file}, line {number}: {len(row)} field(s), but the header has {len(header)} ({', '.join(header)}); "
                f"{rule}"
            )
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    return Table(str(file), columns, [number for number, _ in rows], "line")


def read_tsv(file: Path) -> Table:
    """Reads tab-separated text with a header line and no quoting (a `"` is a character like any other).

    Returns:
        The table, its fields stripped.

    Raises:
        InputError: If the file cannot be read, is not UTF-8 text, has no row, a column twice, or a line with another
            number of fields than the header; says which.
    """
    lines = enumerate(_lines(file), start=1)
    rows = [(number, [field.strip() for field in line.split("\t")]) for number, line in lines]
    return _from_rows(file, "\t", rows, "fields are separated by tabs and not quoted")


def read_csv(file: Path) -> Table:
    """Reads comma-separated text with a header line, quoted as in RFC 4180, strictly.

    Returns:
        The table, its fields as they are.

    Raises:
        InputError: As for `read_tsv`, or if the quoting is broken.
    """
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    limit = csv.field_size_limit(MAX_CHARACTERS)
    rows, begin = [], 1
    try:
        for row in reader:
            rows.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{file}, line {begin}: {error}; expected fields separated by commas, and a field that holds a comma, "
            'a quote or a line break in double quotes (a quote inside doubled: "")'
        ) from error
    finally:
        csv.field_size_limit(limit)
    while rows and not any(field.strip() for field in rows[-1][1]):
        rows.pop()
    return _from_rows(file, ",", rows, "fields are separated by commas, and quoted where they hold one")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice among {', '.join(key for key, _ in pairs)}")
    return found


def _from_objects(file: Path, objects: Iterable[tuple[int, Any]], unit: str) -> Table:
    """Builds a table of JSON objects of equal keys."""
    columns: dict[str, list[Any]] = {}
    numbers: list[int] = []
    for number, item in objects:
        where = f"{file}, {unit} {number}"
        if not isinstance(item, dict):
            raise InputError(f"{where} is {json.dumps(item)[:40]}; expected an object of column names and values")
        if not numbers:
            columns = {key: [] for key in item}
        if item.keys() != columns.keys():
            raise InputError(f"{where} has the keys {', '.join(item)}; the first row has {', '.join(columns)}")
        for key, value in item.items():
            columns[key].append(value)
        numbers.append(number)
    if not numbers:
        raise InputError(f"{file} holds no object; expected rows of data")
    return _short(Table(str(file), columns, numbers, unit))


def _short(table: Table) -> Table:
    """Returns the table after a look at the length of every text."""
    for name, values in table.columns.items():
        for i, value in enumerate(values):
            if isinstance(value, str) and len(value) > MAX_CHARACTERS:
                raise InputError(_too_long(f"{table.where(i)}: column {name!r}", len(value)))
    return table


def read_json(file: Path) -> Table:
    """Reads a JSON list of objects, or an object whose `data` is that list.

    Returns:
        The table.

    Raises:
        InputError: If the file cannot be read, is not such JSON, or its objects differ in their keys.
    """
    text = _text(file)
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}; one object a line is named .jsonl") from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(
            f'{file} holds a JSON {type(content).__name__}; expected a list of objects, or {{"data": [...]}}'
        )
    return _from_objects(file, enumerate(rows, start=1), "row")


def read_jsonl(file: Path) -> Table:
    """Reads one JSON object a line.

    Returns:
        The table.

    Raises:
        InputError: As for `read_json`; says the line.
    """

    def objects() -> Iterable[tuple[int, Any]]:
        for number, line in enumerate(_lines(file), start=1):
            try:
                yield number, json.loads(line, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}, line {number} is not a JSON object: {error}") from error

    return _from_objects(file, objects(), "line")


def read_parquet(file: Path) -> Table:
    """Reads Parquet; class names that `datasets` wrote beside the columns are kept.

    Returns:
        The table.

    Raises:
        InputError: If the file cannot be read, is not whole Parquet, or holds no row.
    """
    import pyarrow
    import pyarrow.parquet

    content = _bytes(file)
    try:
        found = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} is not whole Parquet: {str(error).splitlines()[0]}") from error
    names = found.column_names
    if len(set(names)) < len(names):
        raise InputError(f"{file} has a column name twice; its columns: {', '.join(names)}")
    if not found.num_rows:
        raise InputError(f"{file} holds columns ({', '.join(names)}) and no row of data")
    columns = {name: found[name].to_pylist() for name in names}
    rows = range(1, found.num_rows + 1)
    return _short(Table(str(file), columns, rows, "row", _declared_names(found.schema.metadata)))


def _declared_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Class names in the metadata that `datasets` writes into Parquet."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: tuple(value["names"]) for name, value in features.items() if value.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):  # none, or another program's
        return {}


READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
"""Reader by suffix of the file's name."""


def read_table(file: Path) -> Table:
    """Reads a table by the suffix of its name.

    Returns:
        The table, at least one row.

    Raises:
        InputError: If the suffix is none of `READERS`, or the file cannot be used.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a file")
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"{file} has the suffix {file.suffix!r}; expected one of {', '.join(READERS)}")
    return reader(file)
