"""A storage of Pascal VOC annotations: an image and an XML file for each name."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.boxes import BoxError, BoxPolicy, Misfits, checked_box
from ailab.datasets.files.paths import PICTURES, inside, listing
from ailab.datasets.storages.records import read_records
from ailab.datasets.storages.safe_xml import read_xml
from ailab.datasets.storages.shared_list import SharedList
from ailab.errors import DataError, nearest
from ailab.signature import check_choice, name_list


class VocAnnotationDataset(LabBaseDataset):
    """The storage: its raw record is `(image path, annotation)`, the content of `<annotation>` as a dict.

    Its "object" is a list, each entry with a "box" [x0, y0, x1, y1]: the file counts pixels from 1 and includes the last one,
    and boxes of ailab start at 0. All files are read and checked at once.
    Source of the format: Everingham et al., the VOC2012 development kit.

    Args:
        images_dir: the folder of the pictures.
        annotations_dir: the folder of the XML files.
        parser_fun: path -> record, instead of this parser and its checks.
        names: the names of the split, without endings; or a text file of them ("ImageSets/Main/train.txt", of whose lines the
            first word counts); all XML files, sorted, when left out.
        classes: the classes that an object may have; any when left out.
        box_policy: what happens to a box that has no area or reaches outside its image: "error", "clip" or "drop".

    Raises:
        DataError: a folder or file is missing, the split is empty, a name is there twice or leads out of its folder; a file is no
            XML, declares entities, or its annotation lacks a part, has a bad box or an unknown class.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotations_dir: str | Path,
        parser_fun: Callable[[str], Any] | None = None,
        *,
        names: Sequence[str] | str | Path | None = None,
        classes: Sequence[str] | None = None,
        box_policy: BoxPolicy = "error",
    ):
        check_choice(box_policy, BoxPolicy, f"{type(self).__name__}: box_policy")
        self.img_dir, self.ann_dir = Path(images_dir), Path(annotations_dir)
        self.names = _split(self.ann_dir, names)
        pictures = {e.name for e in listing(self.img_dir, "a folder of pictures")}
        records: list[tuple[str, Any]] = []
        misfits = Misfits()
        for name in self.names:
            file = inside(self.ann_dir, f"{name}.xml", f"{names or self.ann_dir}")
            try:
                parsed = parser_fun(file) if parser_fun else parse_voc(file, classes, box_policy)
            except BoxError as error:
                misfits.add(error)
                continue
            records.append((self._picture(name, parsed, pictures, file), parsed))
        misfits.tell()
        self._records: Sequence[Any] = records if parser_fun else SharedList(records)

    def _len(self) -> int:
        return len(self._records)

    def _get_raw(self, index: int) -> Any:
        path, annotation = self._records[index]
        return Path(path), annotation

    def _picture(self, name: str, parsed: Any, pictures: set[str], file: str) -> str:
        """The picture of a name, by the ending that the annotation says or any that there is."""
        said = cast("dict[str, Any]", parsed).get("filename") if isinstance(parsed, dict) else None
        endings = dict.fromkeys([os.path.splitext(str(said))[1], *PICTURES] if said else PICTURES)
        for ending in endings:
            if name + ending in pictures or (os.sep in name and (self.img_dir / (name + ending)).is_file()):
                return inside(self.img_dir, name + ending, file)
        raise DataError(f"{file}: there is no picture {name}.jpg (nor .png, ...) in {self.img_dir}.")


def parse_voc(path: str | Path, classes: Sequence[str] | None = None, box_policy: BoxPolicy = "error") -> dict[str, Any]:
    """The annotation in one file, checked; see `VocAnnotationDataset`.

    Raises:
        DataError: with the file and the object.
    """
    root = read_xml(path).get("annotation")
    if not isinstance(root, dict):
        raise DataError(f"{path}: no VOC file: expected an <annotation> with <size> and <object>s.")
    annotation = cast("dict[str, Any]", root)
    size = (_number(annotation, "size", "height", path), _number(annotation, "size", "width", path))
    found = annotation.get("object", [])
    objects = cast("list[Any]", found) if isinstance(found, list) else [found]
    kept: list[dict[str, Any]] = []
    for i, entry in enumerate(objects):
        where = f"{path}, object {i}"
        name = cast("dict[str, Any]", entry).get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name:
            raise DataError(f"{where}: expected an <object> with a <name> and a <bndbox>, got {entry!r:.80}.")
        if classes is not None and name not in classes:
            raise DataError(f"{where}: unknown class {name!r:.60}.{nearest(name, classes)} Classes: {name_list(classes)}.")
        x0, y0, x1, y1 = (_number(entry, "bndbox", side, where) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = checked_box([x0 - 1, y0 - 1, x1, y1], (int(size[0]), int(size[1])), box_policy, where)
        if box is not None:
            kept.append({**entry, "box": list(box)})
    return {**annotation, "object": kept}


def _number(record: dict[str, Any], part: str, name: str, where: str | Path) -> float:
    inner = record.get(part)
    text = cast("dict[str, Any]", inner).get(name) if isinstance(inner, dict) else None
    try:
        value = float(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: expected a number in <{part}><{name}>, got {text!r:.60}.")
    return value


def _split(folder: Path, names: Sequence[str] | str | Path | None) -> list[str]:
    if names is None:
        found = [e.name[:-4] for e in listing(folder, "a folder of XML files") if e.name.lower().endswith(".xml")]
    elif isinstance(names, (str, Path)):
        found = [str(row).split()[0] for row in read_records(names).rows]
    else:
        found = list(names)
    if not found:
        raise DataError(f"{folder if names is None else names}: the split is empty: there is no name.")
    if len(set(found)) < len(found):
        twice = next(n for n in found if found.count(n) > 1)
        raise DataError(f"{names}: the name {twice!r} is there twice.")
    return found
