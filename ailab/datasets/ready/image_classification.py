"""Image classification from one folder per class, or from an annotation file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.files.image import read_image
from ailab.datasets.files.paths import path_inside
from ailab.datasets.storages.folder import FolderPerClassDataset
from ailab.datasets.storages.records import Records, lookup, read_records
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.storages.shared_list import SharedList
from ailab.datasets.tasks import ClassificationTask
from ailab.datasets.tasks.task import class_index
from ailab.datasets.transforms.pipeline import TransformSpec, build_transform
from ailab.errors import DataError
from ailab.registry import DATASETS

_MAX_CLASSES = 1 << 20  # of a file whose labels are class indices


@DATASETS.register_module()
class ClassificationImageDataset(ListDataset, ClassificationTask):
    """Images with a class label: `{"input": (3, H, W) uint8, "target": () int64}`.

        ClassificationImageDataset("photos/")  # photos/cat/1.jpg, photos/dog/2.jpg, ...
        ClassificationImageDataset("train.csv")  # a CSV file with the columns image and label

    All labels are checked when the dataset is built.

    Args:
        source: A folder with one folder of images per class, or an annotation file. The annotation file is a .jsonl, .json,
            .csv, .tsv or .xlsx file of records, or a .txt file of lines `path label`.
        x_key: Name of the image path in a record.
        y_key: Name of the label in a record. A label is a class index or a class name.
        classes: Class names in the order of their indices. Default: the distinct names of the data, sorted. Give the val split
            the classes of the train split.
        root: Folder that relative paths start from. Default: the folder of the annotation file.
        transform: Transforms of a sample, see `build_transform`. All samples must come out with the same size.
        multi_label: Whether a record has a list of labels. The target is then (classes,) float32 of 0 and 1.
        separator: Text between the labels in one cell of a table, for `multi_label`.
        size_hint: (H, W) in pixels that the transform needs. Much larger JPEGs are decoded at a fraction of their size.
        resize: (H, W) in pixels, or the length of the shorter side. Images are resized when they are read, so the cache holds
            the resized image.
        allow_outside_root: Whether to accept images outside `root`.

    Raises:
        DataError: At build time: `source` does not exist, the split is empty, a record lacks a field, a class is unknown, or a
            path leads out of `root`. The message has the file and the line.
    """

    def __init__(
        self,
        source: str | Path,
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
        if os.path.isdir(source):
            folders = FolderPerClassDataset(source, classes)
            self.classes = folders.classes
            items: list[Any] = [[p, [c] if multi_label else c] for p, c in folders.samples]
        else:
            self.classes, items = read_labels(
                source,
                x_key,
                y_key,
                classes=classes,
                root=root,
                separator=separator if multi_label else None,
                allow_outside_root=allow_outside_root,
            )
        # A subclass may write to the image, so only this class borrows the memory of the cache.
        self._borrow = type(self) is ClassificationImageDataset and self.transform is not None and self.transform.copies_image
        super().__init__(SharedList(items))
        self.targets = None if multi_label else torch.tensor([label for _, label in items])  # of all samples: (N,) int64

    def load_input(self, raw: Any) -> Tensor:
        """The image: (3, H, W) uint8."""
        return read_image(raw[0], size_hint=self.size_hint, resize=self.resize, borrow=self._borrow)

    def load_label(self, raw: Any) -> Any:
        """The class index; a list of them with `multi_label`."""
        return raw[1]


def read_labels(
    file: str | Path,
    x_key: str,
    y_key: str,
    *,
    classes: Sequence[str] | None,
    root: str | Path | None,
    separator: str | None = None,
    allow_outside_root: bool = False,
) -> tuple[list[str] | None, list[tuple[str, Any]]]:
    """The class names of an annotation file, and `(path, class index)` of every record. With `separator`: lists of indices.

    Raises:
        DataError: There is no record, a record lacks a field, a class is unknown, or a path leads out of the root.
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
        path = path_inside(place, lookup(row, x_key, lambda w=where: w), where, allow_outside_root=allow_outside_root)
        try:
            found = [
                i if (i := _index_of(v, index)) is not None else class_index(v, names) for v in (value if many else [value])
            ]
        except ValueError as error:
            raise DataError(f"{where}, {y_key!r}: {error}.") from error
        items.append((path, found if many else found[0]))
    return names, items


def _as_dicts(records: Records, x_key: str, y_key: str) -> Records:
    """The records. Text lines `path label` become dicts."""
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
    """The label of a record. Digits become a number. With `separator`: a list of labels."""
    if separator is not None:
        parts: Any = [p for p in value.split(separator) if p.strip()] if isinstance(value, str) else value
        return [_label(v, None) for v in cast("Sequence[Any]", parts if isinstance(parts, (list, tuple)) else [parts])]
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdecimal() and text.isascii() and len(text) < 10 else text
    return value


def _index_of(value: Any, index: dict[str, int]) -> int | None:
    return index.get(value) if isinstance(value, str) else None


def _classes(values: Sequence[Any], file: str | Path) -> list[str] | None:
    """The distinct class names of a file, sorted. For class indices: "0" to the highest index."""
    flat = [one for v in values for one in (cast("list[Any]", v) if isinstance(v, list) else [v])]
    names = {one for one in flat if isinstance(one, str)}
    if names:
        return sorted(names | {str(one) for one in flat if not isinstance(one, str)})
    whole = [one for one in flat if isinstance(one, int)]
    if max(whole, default=0) >= _MAX_CLASSES:
        raise DataError(f"{file}: a label is {max(whole)}. Expected class indices from 0 to at most {_MAX_CLASSES - 1}.")
    return [str(i) for i in range(max(whole) + 1)] if whole else None
