"""Image classification from a folder per class, a table, or an annotation file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.files.image import read_image
from ailab.datasets.files.paths import inside
from ailab.datasets.storages.folder import FolderPerClassDataset
from ailab.datasets.storages.records import Records, lookup, read_records
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.storages.shared_list import SharedList
from ailab.datasets.tasks import ClassificationTask
from ailab.datasets.tasks.task import class_index
from ailab.datasets.transforms.pipeline import TransformSpec, build_transform
from ailab.errors import DataError
from ailab.registry import DATASETS

_MOST = 1 << 20  # classes that are counted by their highest index


@DATASETS.register_module()
class ClassificationImageDataset(ListDataset, ClassificationTask):
    """Pictures with a class: `{"input": (3, H, W) uint8, "target": () int64}`; every label is checked at once.

    Args:
        annotation_file: a folder with one folder per class; or a .jsonl, .json, .csv, .tsv or .xlsx file of records; or a .txt file
            of lines `path label`.
        x_key: the name of the picture's path in a record.
        y_key: the name of its label in a record: the index of a class, or its name.
        classes: the names of the classes in order; of names in the file the sorted distinct ones when left out. Give val those of
            train: `classes=[...]`.
        root: the folder that paths are relative to; that of the file when left out.
        transform: see `build_transform`; samples have to come out of one size.
        multi_label: a record has a list of labels (in a table, `separator` between them); the target is (classes,) float32.
        separator: of several labels in one cell.
        size_hint: (H, W) that the transform will ask for: much larger JPEGs are decoded at a fraction of their size.
        resize: (H, W), or the shorter side, that pictures are resized to as they are read, before a cache keeps them.
        allow_outside_root: accept pictures outside `root`.

    Raises:
        DataError: the file or a name in it is missing, the split is empty, a class is unknown, or a path leads out of `root`.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        x_key: str = "image",
        y_key: str = "label",
        *,
        classes: Sequence[str] | None = None,
        root: str | Path | None = None,
        transform: TransformSpec = None,
        multi_label: bool = False,
        separator: str = ";",
        size_hint: Sequence[int] | None = None,
        resize: int | Sequence[int] | None = None,
        allow_outside_root: bool = False,
    ):
        self.transform, self.multi_label = build_transform(transform), multi_label
        self.size_hint = (size_hint[0], size_hint[1]) if size_hint is not None else None
        self.resize = (resize[0], resize[1]) if isinstance(resize, Sequence) else resize
        if os.path.isdir(annotation_file):
            folders = FolderPerClassDataset(annotation_file, classes)
            self.classes = folders.classes
            items: list[Any] = [[p, [c] if multi_label else c] for p, c in folders.samples]
        else:
            self.classes, items = labelled(
                annotation_file,
                x_key,
                y_key,
                classes=classes,
                root=root,
                separator=separator if multi_label else None,
                allow_outside_root=allow_outside_root,
            )
        # A subclass may write to what it is given.
        self._borrow = type(self) is ClassificationImageDataset and self.transform is not None and self.transform.copies
        super().__init__(SharedList(items))
        self.targets = None if multi_label else torch.tensor([label for _, label in items])  # of all samples: (N,) int64

    def load_input(self, raw: Any) -> Tensor:
        """The picture."""
        return read_image(raw[0], size_hint=self.size_hint, resize=self.resize, borrow=self._borrow)

    def load_label(self, raw: Any) -> Any:
        """The index of the class, or several."""
        return raw[1]


def labelled(
    file: str | Path,
    x_key: str,
    y_key: str,
    *,
    classes: Sequence[str] | None,
    root: str | Path | None,
    separator: str | None = None,
    allow_outside_root: bool = False,
) -> tuple[list[str] | None, list[tuple[str, Any]]]:
    """The classes of an annotation file, and `(path, class index)` of every record; with `separator`, lists of indices.

    Raises:
        DataError: a record lacks a part, its class is unknown, or its path leads out of the root; or there is no record.
    """
    records = _as_dicts(read_records(file), x_key, y_key)
    if not records.rows:
        raise DataError(f"{file}: the split is empty: there is no record.")
    values = [_label(lookup(r, y_key, lambda i=i: records.where(i)), separator) for i, r in enumerate(records.rows)]
    names = list(classes) if classes is not None else _classes(values, file)
    index = {name: i for i, name in enumerate(names or ())}  # the first look-up, for many records of many classes
    many = separator is not None
    place = Path(root) if root is not None else Path(file).parent
    items: list[tuple[str, Any]] = []
    for i, (row, value) in enumerate(zip(records.rows, values, strict=True)):
        where = records.where(i)
        path = inside(place, lookup(row, x_key, lambda w=where: w), where, allow_outside_root=allow_outside_root)
        try:
            found = [i if (i := _known(v, index)) is not None else class_index(v, names) for v in (value if many else [value])]
        except ValueError as error:
            raise DataError(f"{where}, {y_key!r}: {error}.") from error
        items.append((path, found if many else found[0]))
    return names, items


def _as_dicts(records: Records, x_key: str, y_key: str) -> Records:
    """The records, lines `path label` as dicts."""
    if not records.rows or not all(isinstance(r, str) for r in records.rows):
        return records
    rows: list[Any] = []
    for i, row in enumerate(records.rows):
        parts = str(row).rsplit(None, 1)
        if len(parts) < 2:
            raise DataError(f"{records.where(i)}: expected a path and a label, got {row!r:.80}.")
        rows.append({x_key: parts[0], y_key: parts[1]})
    return Records(records.path, rows, records.places, records.unit)


def _label(value: Any, separator: str | None) -> Any:
    """The label of a record, digits as a number; with `separator`, a list of them."""
    if separator is not None:
        parts: Any = [p for p in value.split(separator) if p.strip()] if isinstance(value, str) else value
        return [_label(v, None) for v in cast("Sequence[Any]", parts if isinstance(parts, (list, tuple)) else [parts])]
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else text
    return value


def _known(value: Any, index: dict[str, int]) -> int | None:
    return index.get(value) if isinstance(value, str) else None


def _classes(values: Sequence[Any], file: str | Path) -> list[str] | None:
    """The distinct names of a file, sorted; of numbers, as many as the highest asks for."""
    flat = [one for v in values for one in (cast("list[Any]", v) if isinstance(v, list) else [v])]
    names = {one for one in flat if isinstance(one, str)}
    if names:
        return sorted(names | {str(one) for one in flat if not isinstance(one, str)})
    whole = [one for one in flat if isinstance(one, int)]
    if max(whole, default=0) >= _MOST:
        raise DataError(f"{file}: a label is {max(whole)}; expected the indices of at most {_MOST} classes, from 0.")
    return [str(i) for i in range(max(whole) + 1)] if whole else None
