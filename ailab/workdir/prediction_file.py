"""The files of a prediction: rows as JSONL or CSV, bad inputs, and how far it has come, so that a killed one can go on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ailab.errors import ConfigError
from ailab.workdir.durable import to_json

BAD = "bad.jsonl"


class PredictionFile:
    """Appends the rows of one batch after the other. After each batch a small file says how many inputs are done.

    A process that goes on cuts both files there and passes over these inputs, so the bytes are those of a run that was not
    killed.

    Args:
        folder: of the files; made if it is missing.
        part: (number of this process, number of processes). With several, each writes files of its own.
        columns: of a CSV file. None: JSON lines.
        made_of: what the rows depend on; another run does not go on with these files.
        resume: whether to go on with files that are there.

    Raises:
        ConfigError: there are files and `resume` is off, they were made of something else, or the folder cannot be used.
    """

    def __init__(
        self, folder: Path, part: tuple[int, int], columns: Sequence[str] | None, made_of: Mapping[str, Any], *, resume: bool
    ):
        suffix = f"-{part[0]}-of-{part[1]}" if part[1] > 1 else ""
        self.rows_path = folder / f"predictions{suffix}.{'jsonl' if columns is None else 'csv'}"
        self.bad_path = folder / f"{Path(BAD).stem}{suffix}.jsonl"
        self._mark_path = folder / f".progress{suffix}.json"
        self._columns, self._made_of = columns, json.loads(to_json(made_of))
        self.items = self.bad = 0  # inputs that are done; bad ones of them
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark = self._mark(resume)
            self._rows = _opened(self.rows_path, mark["rows"] if mark else 0)
            self._bad = _opened(self.bad_path, mark["bad"] if mark else 0)
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be written: {error.strerror or error}. Choose another folder: --out."
            ) from error
        if mark:
            self.items, self.bad = mark["items"], mark["bad_items"]
        elif columns is not None:
            self._rows.write(_csv_line(columns))

    def _mark(self, resume: bool) -> dict[str, Any] | None:
        """How far an earlier process came; None for a new start."""
        if self._mark_path.exists():
            mark = json.loads(self._mark_path.read_bytes())
            if resume and mark["made_of"] == self._made_of:
                return mark
            if resume:
                changed = [k for k in self._made_of if mark["made_of"].get(k) != self._made_of[k]]
                raise ConfigError(
                    f"{self.rows_path.parent}: these predictions differ in {', '.join(changed)}. Use another --out."
                )
        if self.rows_path.exists() and not resume:
            raise ConfigError(f"{self.rows_path} exists. To go on with it: --resume. To start again: another --out.")
        return None

    def append(self, rows: Iterable[Mapping[str, Any]], bad: Sequence[Mapping[str, Any]], items: int) -> None:
        """Write the rows and the bad inputs of one batch of `items` inputs, then the mark.

        Raises:
            ConfigError: the disk is full, or a file cannot be written.
        """
        try:
            text = b"".join(self._line(row) for row in rows)
            _write_all(self._rows, text)
            _write_all(self._bad, b"".join((to_json(line) + "\n").encode() for line in bad))
            self.items, self.bad = self.items + items, self.bad + len(bad)
            mark = {"items": self.items, "bad_items": self.bad, "rows": self._rows.tell(), "bad": self._bad.tell()}
            partial = self._mark_path.with_suffix(".tmp")
            partial.write_text(to_json({**mark, "made_of": self._made_of}))
            os.replace(partial, self._mark_path)
        except OSError as error:
            raise ConfigError(f"{self.rows_path} cannot be written: {error.strerror or error}.") from error

    def _line(self, row: Mapping[str, Any]) -> bytes:
        if self._columns is None:
            return (to_json(row) + "\n").encode()
        return _csv_line([row.get(c, "") for c in self._columns])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        self._bad.close()
        if not self.bad:
            self.bad_path.unlink(missing_ok=True)


def _opened(path: Path, size: int) -> io.FileIO:
    """A file that is cut to its first `size` bytes, to be written from there on."""
    file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
    file.truncate(size)
    file.seek(size)
    return file


def _csv_line(values: Sequence[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(["" if v is None else v for v in values])
    return text.getvalue().encode()


def _write_all(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]
