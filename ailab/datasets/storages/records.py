"""Readers of annotation files (txt, JSON, JSONL, CSV, Excel). Each record keeps its line number for messages."""

from __future__ import annotations

import csv
import io
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ailab.errors import DataError, nearest
from ailab.signature import name_list

MAX_BYTES = 1 << 31  # size of an annotation file
_CELL = 1 << 24  # characters of a CSV cell, at most


@dataclass(frozen=True)
class Records:
    """The records of one annotation file."""

    path: Path
    rows: list[Any]
    places: Sequence[int]  # line number of each row; the record number if the format has no lines
    unit: str = "line"  # what `places` counts: "line" or "record"

    def where(self, index: int) -> str:
        """The file and the line of a record, for messages."""
        return f"{self.path}, {self.unit} {self.places[index]}"


def read_records(path: str | Path) -> Records:
    """Read the records of an annotation file. The file extension decides the format.

    A .txt file gives lines of text. A .jsonl or .ndjson file gives one value per line. A .json file gives the items of its list.
    A .csv or .tsv file gives one dict of texts per row, with the header as keys. An .xlsx or .xls file gives one dict per row.

    Raises:
        DataError: The file is missing, too large or damaged, or its extension is unknown. The message has the line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown extension of an annotation file. Expected {name_list(_READERS)}, or set load_fun=...")
    return reader(path)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: The file cannot be read, is larger than 2 GiB, or is not UTF-8.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path}: the file has {size} bytes, and {MAX_BYTES} are allowed. Split it into several files.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte {content[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: no UTF-8 text ({byte}). Save the file as UTF-8.") from error


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON value.

    Args:
        text: The JSON text.
        where: The file, or the file and the line, for messages.

    Raises:
        DataError: The text is no JSON, is nested too deeply, or has NaN or Infinity, which are not part of JSON.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise DataError(f"{where}: the JSON is nested too deeply.") from error
    except json.JSONDecodeError as error:
        at = f"{where}, line {error.lineno}" if ", line " not in where else where
        raise DataError(f"{at}: no JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}.") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"it has {name}")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # one for all calls: json.loads makes one per call


def _lines(path: Path) -> Records:
    kept = [(i, line.strip()) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    return Records(path, [line for _, line in kept], array("q", [i for i, _ in kept]))


def _jsonl(path: Path) -> Records:
    # Split at newlines only: splitlines() also splits at U+2028, which JSON allows inside a text.
    kept = [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    return Records(path, [parse_json(line, f"{path}, line {i}") for i, line in kept], array("q", [i for i, _ in kept]))


def _json(path: Path) -> Records:
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of records, got {type(value).__name__}.")
    rows = cast("list[Any]", value)
    return Records(path, rows, range(len(rows)), "record")


def _csv(path: Path, delimiter: str = ",") -> Records:
    if csv.field_size_limit() < _CELL:
        csv.field_size_limit(_CELL)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Any] = []
    places = array("q")
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            if header is None:
                header = _header(cells, path, reader.line_num)
            elif len(cells) != len(header):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} columns."
                )
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                places.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no CSV: {error}.") from error
    return Records(path, rows, places)


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    names = [c.strip() for c in cells]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"{path}, line {line}: the column {twice[0]!r} occurs twice.")
    return names


def _excel(path: Path) -> Records:
    from ailab.datasets.storages.table import TableAnnotationDataset

    table = TableAnnotationDataset(path).table
    return Records(path, table.to_dict("records"), range(len(table)), "record")


def _tsv(path: Path) -> Records:
    return _csv(path, "\t")


_READERS: dict[str, Callable[[Path], Records]] = {
    ".txt": _lines,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".xlsx": _excel,
    ".xls": _excel,
}


def check_columns(records: Records, columns: Iterable[str], unique: str | None = None) -> None:
    """Check that every record has the columns, and that the values of `unique` are unique.

    Raises:
        DataError: A record lacks a column, or two records have the same value of `unique`. The message has the file and lines.
    """
    wanted = [*columns, *([unique] if unique else [])]
    seen: dict[Any, int] = {}
    for i, row in enumerate(records.rows if wanted else ()):
        for name in wanted:
            lookup(row, name, lambda i=i: records.where(i))
        if unique:
            key = str(row[unique])
            if key in seen:
                first = records.places[seen[key]]
                raise DataError(f"{records.where(i)}: {unique} {key!r} is also in {records.unit} {first}. It must be unique.")
            seen[key] = i


def lookup(row: Any, name: str, where: Callable[[], str]) -> Any:
    """The value of a field of a record.

    Args:
        row: The record.
        name: Name of the field.
        where: Gives the file and the line of the record, for messages.

    Raises:
        DataError: The record is not a dict, or has no such field.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where()}: expected a record with {name!r}, got {type(row).__name__} {row!r:.60}.")
    known = cast("dict[str, Any]", row)
    if name not in known:
        raise DataError(f"{where()}: there is no {name!r}.{nearest(name, known)} It has: {name_list(known)}.")
    return known[name]
