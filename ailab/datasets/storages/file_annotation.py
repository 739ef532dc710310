"""The storage of one or several annotation files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.paths import path_inside
from ailab.datasets.storages.records import Records, check_columns, read_records
from ailab.datasets.storages.shared_list import shared_list
from ailab.errors import DataError


class FileAnnotationDataset(LabBaseDataset):
    """Storage of annotation files. A raw record is one line or one value of a file.

    A .txt file gives the lines as text. A .json file gives the items of its list. A .jsonl file gives one value per line. A .csv
    or .tsv file gives one dict of texts per row.

    Args:
        annotation_file: The file, or a list of files. Several files are read one after the other.
        load_fun: A function path -> records. It replaces the reader for the file extension.
        root: Folder that relative paths in the records start from. Default: the folder of the first file.
        columns: Field names that every record must have.
        unique: Field name whose values must be unique.
        allow_outside_root: Whether to accept paths outside `root`.

    Raises:
        DataError: A file cannot be read, there is no record, a record lacks a column, or two records have the same value of
            `unique`.
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
            raise DataError("annotation_file: expected a file or a list of files, got an empty list.")
        self.root = Path(root) if root is not None else files[0].parent
        self.allow_outside_root = allow_outside_root
        parts = [_loaded(load_fun, f) if load_fun else read_records(f) for f in files]
        rows: list[Any] = [row for part in parts for row in part.rows]
        if not rows:
            raise DataError(f"{', '.join(map(str, files))}: the split is empty: there is no record.")
        whole = Records(Path(f"{files[0]} and others"), rows, range(len(rows)), "record")  # finds an id that is in two files
        for part in parts if len(parts) == 1 else [*parts, whole]:
            check_columns(part, columns, unique)
        self.samples: Sequence[Any] = rows if load_fun else shared_list(rows)
        self._ends = list(accumulate(len(part.rows) for part in parts))
        self._parts = [replace(part, rows=[]) for part in parts]

    def _len(self) -> int:
        return len(self.samples)

    def _get_raw(self, index: int) -> Any:
        return self.samples[index]

    def where(self, index: int) -> str:
        """The file and the line of a record, for messages."""
        part = bisect_right(self._ends, index)
        return self._parts[part].where(index - (self._ends[part - 1] if part else 0))

    def file(self, name: Any, index: int | None = None) -> str:
        """The full path of a file name in a record, checked to be inside `root`.

        Args:
            name: The file name.
            index: Index of the record, for the message.

        Raises:
            DataError: `name` leads out of `root`, or is not a path.
        """
        where = self.where(index) if index is not None else str(self._parts[0].path)
        return path_inside(self.root, name, where, allow_outside_root=self.allow_outside_root)


def _loaded(load_fun: Callable[..., Iterable[Any]], file: Path) -> Records:
    try:
        rows = list(load_fun(file))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: load_fun failed: {type(error).__name__}: {error}") from error
    return Records(file, rows, range(len(rows)), "record")
