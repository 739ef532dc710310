"""A storage of records in one or several annotation files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.paths import inside
from ailab.datasets.storages.records import Records, read_records, require
from ailab.datasets.storages.shared_list import shared_list
from ailab.errors import DataError


class FileAnnotationDataset(LabBaseDataset):
    """The storage: its raw record is a line of a .txt, a value of a .json list or .jsonl, a dict of text of a .csv or .tsv row.

    Args:
        annotation_file: one file, or several that are read as one in the order given.
        load_fun: path -> records, instead of what the ending says.
        root: the folder that file names in the records are relative to; that of the first file when left out.
        columns: the names that every record has to have.
        unique: the name whose values have to differ.
        allow_outside_root: accept records that name files outside `root`.

    Raises:
        DataError: a file cannot be read, holds no record, a record has no such column, or two have the same `unique`.
    """

    def __init__(
        self,
        annotation_file: str | Path | Sequence[str | Path],
        load_fun: Callable[..., Iterable[Any]] | None = None,
        *,
        root: str | Path | None = None,
        columns: Sequence[str] = (),
        unique: str | None = None,
        allow_outside_root: bool = False,
    ):
        several = isinstance(annotation_file, Sequence) and not isinstance(annotation_file, str)
        files = [Path(f) for f in (cast("Sequence[str | Path]", annotation_file) if several else [annotation_file])]  # type: ignore[list-item]
        if not files:
            raise DataError("annotation_file: expected at least one file, got an empty list.")
        self.root = Path(root) if root is not None else files[0].parent
        self.allow_outside_root = allow_outside_root
        parts = [_loaded(load_fun, f) if load_fun else read_records(f) for f in files]
        rows: list[Any] = [row for part in parts for row in part.rows]
        if not rows:
            raise DataError(f"{', '.join(map(str, files))}: the split is empty: there is no record.")
        whole = Records(Path(f"{files[0]} and others"), rows, range(len(rows)), "record")  # an id may be in two files
        for part in parts if len(parts) == 1 else [*parts, whole]:
            require(part, columns, unique)
        self.samples: Sequence[Any] = rows if load_fun else shared_list(rows)
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self._parts = [replace(part, rows=[]) for part in parts]

    def _len(self) -> int:
        return len(self.samples)

    def _get_raw(self, index: int) -> Any:
        return self.samples[index]

    def where(self, index: int) -> str:
        """The file and the line of one record, for messages."""
        part = bisect_right(self._ends, index)
        return self._parts[part].where(index - (self._ends[part - 1] if part else 0))

    def file(self, name: Any, index: int | None = None) -> str:
        """The path of a file that a record names, inside `root`.

        Raises:
            DataError: it leads out of the root, or is no path.
        """
        where = self.where(index) if index is not None else str(self._parts[0].path)
        return inside(self.root, name, where, allow_outside_root=self.allow_outside_root)


def _loaded(load_fun: Callable[..., Iterable[Any]], file: Path) -> Records:
    try:
        rows = list(load_fun(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: load_fun failed: {type(error).__name__}: {error}") from error
    return Records(file, rows, range(len(rows)), "record")
