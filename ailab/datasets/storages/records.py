"""The records of annotation files (txt, JSON, JSONL, CSV, tables), each with the place where it stands."""

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

MAX_BYTES = 1 << 31  # of an annotation file that is read into memory
_CELL = 1 << 24  # characters of a CSV cell


@dataclass(frozen=True)
class Records:
    """What one annotation file holds."""

    path: Path
    rows: list[Any]
    places: Sequence[int]  # of each row: its line, or its number where the format has no lines
    unit: str = "line"

    def where(self, index: int) -> str:
        """The file and the line of one record, for messages."""
        return f"{self.path}, {self.unit} {self.places[index]}"


def read_records(path: str | Path) -> Records:
    """The records of a file by its ending.

    .txt gives lines of text, .jsonl (or .ndjson) a value per line, .json the values of one list, .csv and .tsv a dict of text
    per row by the names in the header, .xlsx and .xls a dict per row.

    Raises:
        DataError: the file is missing, too large, damaged, or of no known ending; with the line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: annotations of this ending are not known; expected {name_list(_READERS)}, or load_fun=...")
    return reader(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        DataError: the file cannot be read, is larger than 2 GiB, or is no UTF-8.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes are too many for one annotation file; split it, at most {MAX_BYTES}.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte {content[error.start]:#04x}"
        raise DataError(f"{path}, line {line}: no UTF-8 text ({byte}); save the file as UTF-8.") from error


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: it is no JSON, is nested too deeply, or holds NaN or Infinity, which JSON has not.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply for an annotation.") from error
    except json.JSONDecodeError as error:
        at = f"{where}, line {error.lineno}" if ", line " not in where else where
        raise DataError(f"{at}: no JSON: {error.msg} (column {error.colno}).") from error
    except ValueError as error:
        raise DataError(f"{where}: no JSON: {error}.") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # once: json.loads would make one for every line


def _lines(path: Path) -> Records:
    kept = [(i, line.strip()) for i, line in enumerate(read_text(path).splitlines(), 1) if line.strip()]
    return Records(path, [line for _, line in kept], array("q", [i for i, _ in kept]))


def _jsonl(path: Path) -> Records:
    # Split at newlines alone: splitlines() also breaks at U+2028, which JSON allows inside a text.
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
                raise DataError(f"{path}, line {reader.line_num}: {len(cells)} cells; the header has {len(header)} columns.")
            else:
                rows.append(dict(zip(header, cells, strict=True)))
                places.append(reader.line_num)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: no CSV: {error}.") from error
    return Records(path, rows, places)


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    names = [c.strip() for c in cells]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise DataError(f"{path}, line {line}: the column {twice[0]!r} is there twice.")
    return names


def _sheet(path: Path) -> Records:
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
    ".xlsx": _sheet,
    ".xls": _sheet,
}


def require(records: Records, columns: Iterable[str], unique: str | None = None) -> None:
    """Check that every record has the columns, and that no two have the same value of `unique`.

    Raises:
        DataError: with the file and the line of the first that has not, or of both that agree.
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
                raise DataError(f"{records.where(i)}: {unique} {key!r} is there already, at {records.unit} {first}.")
            seen[key] = i


def lookup(row: Any, name: str, where: Callable[[], str]) -> Any:
    """The value of a column of a record.

    Raises:
        DataError: the record is no dict, or has no such column.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where()}: expected a record with {name!r}, got {type(row).__name__} {row!r:.60}.")
    known = cast("dict[str, Any]", row)
    if name not in known:
        raise DataError(f"{where()}: there is no {name!r}.{nearest(name, known)} It has: {name_list(known)}.")
    return known[name]
