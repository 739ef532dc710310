"""The inputs that a command line names, one after the other: files, folders, patterns, lists, arrays. Nothing is held."""

from __future__ import annotations

import csv
import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.inputs import ARRAYS, read_array
from ailab.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2", ".ico", ".tga")
LISTS = (".csv", ".tsv", ".jsonl", ".json", ".txt")
_COLUMNS = ("path", "image", "file", "file_name", "filename")  # of a list, the first that it has; else its first column


@dataclass(frozen=True)
class Item:
    """One input."""

    path: str  # as it was given; "" for an array in memory
    index: int | None  # of a sample in a file or an array of several
    raw: Any  # what `InputDataset` reads: a path that can be opened, or an array; a `BadFile` for a file that cannot be read


def inputs_of(sources: Iterable[Any], sample_dims: int | None = None) -> Iterator[Item]:
    """The inputs of some sources, in order.

    Args:
        sources: Each a path of an image or an array; a folder, which is searched in the order of the names, with its sub-folders; a
            pattern such as "photos/*.jpg"; a list (.csv, .tsv, .jsonl, .json or .txt) of paths, which start from its folder; "-",
            paths on standard input, one a line; or a tensor or an array.
        sample_dims: Dimensions of one sample. An array with one more is several samples. None: an array is one sample.

    Raises:
        DataError: A list cannot be read, or a folder or a pattern has no inputs.
    """
    for source in sources:
        if not isinstance(source, (str, Path)):
            yield from _of_array("", source, sample_dims)
            continue
        for path, place in _paths(str(source)):
            if path.lower().endswith(ARRAYS):
                yield from _of_file(path, place, sample_dims)
            else:
                yield Item(path, None, place)


def _of_file(path: str, place: str, sample_dims: int | None) -> Iterator[Item]:
    try:
        array = read_array(place)
    except BadFile as error:
        yield Item(path, None, error)
        return
    yield from _of_array(path, array, sample_dims)


def _of_array(path: str, array: Any, sample_dims: int | None) -> Iterator[Item]:
    shape = getattr(array, "shape", None)
    if shape is None:
        raise DataError(f"an input is a path, a tensor or an array, got {type(array).__name__}.")
    if sample_dims is not None and len(shape) == sample_dims + 1:
        for i in range(shape[0]):
            yield Item(path, i, array[i])
    else:
        yield Item(path, None, array)


def _paths(source: str) -> Iterator[tuple[str, str]]:
    """(path as given, path to open) of a source that is a string."""
    if source == "-":
        yield from ((line, line) for line in map(str.strip, sys.stdin) if line)
    elif os.path.isdir(source):
        yield from _some(_below(source), f"{source}: the folder has no image and no array.")
    elif source.lower().endswith(LISTS):
        yield from _some(_listed(source), f"{source}: the list has no path.")
    elif not os.path.exists(source) and glob.has_magic(source):
        found = sorted(glob.glob(source, recursive=True))
        yield from _some(((p, p) for p in found if not os.path.isdir(p)), f"{source}: no file matches.")
    else:
        yield source, source  # a file that is not there is a bad input, as one that is damaged


def _some(paths: Iterable[tuple[str, str]], none: str) -> Iterator[tuple[str, str]]:
    found = False
    for pair in paths:
        found = True
        yield pair
    if not found:
        raise DataError(none)


def _below(folder: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.is_dir():
            yield from _below(entry.path)
        elif entry.name.lower().endswith(IMAGES + ARRAYS) and not entry.name.startswith("."):
            yield entry.path, entry.path


def _listed(source: str) -> Iterator[tuple[str, str]]:
    root = os.path.dirname(source)
    try:
        with open(source, encoding="utf-8", newline="") as file:
            for number, row in enumerate(_rows(source, file), 1):
                if not isinstance(row, str) or not row:
                    raise DataError(f"{source}, record {number}: there is no path.")
                yield row, os.path.join(root, row)
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, RecursionError) as error:
        raise DataError(f"{source}: the list cannot be read: {error}.") from error


def _rows(source: str, file: Any) -> Iterator[Any]:
    """The path of each record of an open list."""
    kind = Path(source).suffix.lower()
    if kind in (".csv", ".tsv"):
        rows = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",")
        head = next(rows, [])
        column = next((head.index(name) for name in _COLUMNS if name in head), None)
        if column is None and head:  # no header: the first line is a record
            yield head[0]
        yield from (row[column or 0] for row in rows if row)
    elif kind == ".json":
        yield from (_path_of(record) for record in cast("list[Any]", json.load(file)))
    elif kind == ".jsonl":
        yield from (_path_of(json.loads(line)) for line in file if line.strip())
    else:
        yield from (line.strip() for line in file if line.strip())


def _path_of(record: Any) -> Any:
    if not isinstance(record, dict):
        return record
    named = cast("dict[str, Any]", record)
    return next((named[n] for n in _COLUMNS if n in named), None)
