"""The storage of Pascal VOC annotations: one image and one XML file per sample."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.boxes import BoxError, BoxErrors, BoxPolicy, checked_box
from ailab.datasets.files.paths import IMAGE_EXTENSIONS, path_inside, sorted_entries
from ailab.datasets.storages.records import read_records
from ailab.datasets.storages.safe_xml import read_xml
from ailab.datasets.storages.shared_list import SharedList
from ailab.errors import DataError, nearest
from ailab.signature import check_choice, name_list


class VocAnnotationDataset(LabBaseDataset):
    """Storage of Pascal VOC annotations. A raw record is `(image path, annotation)`.

    The annotation is the content of `<annotation>` as a dict. Its "object" is a list of dicts, each with a "box" [x0, y0, x1,
    y1] in pixels that starts at 0. (VOC files count pixels from 1 and include the last pixel.) All files are read and checked
    at build time. Source of the format: Everingham et al., the VOC2012 development kit.

    Args:
        images_dir: Folder of the images.
        annotations_dir: Folder of the XML files.
        parser_fun: A function path -> annotation. It replaces this parser and its checks.
        names: Names of the samples, without extension. Or a text file such as "ImageSets/Main/train.txt", with a name as the
            first word of each line. Default: all XML files, sorted.
        classes: Class names that an object may have. Default: any name.
        box_policy: For a box without area, or more than one pixel outside its image: "error" raises, "clip" clips it at the
            image border, "drop" leaves the object out.

    Raises:
        DataError: A folder or a file is missing, the split is empty, a name occurs twice or leads out of its folder. Or an XML
            file is invalid, declares entities, lacks a field, or has an invalid box or an unknown class.
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
        images = {e.name for e in sorted_entries(self.img_dir, "a folder of images")}
        records: list[tuple[str, Any]] = []
        box_errors = BoxErrors()
        for name in self.names:
            file = path_inside(self.ann_dir, f"{name}.xml", f"{names or self.ann_dir}")
            try:
                parsed = parser_fun(file) if parser_fun else parse_voc(file, classes, box_policy)
            except BoxError as error:
                box_errors.add(error)
                continue
            records.append((self._image(name, parsed, images, file), parsed))
        box_errors.raise_if_any()
        self._records: Sequence[Any] = records if parser_fun else SharedList(records)

    def _len(self) -> int:
        return len(self._records)

    def _get_raw(self, index: int) -> Any:
        path, annotation = self._records[index]
        return Path(path), annotation

    def _image(self, name: str, parsed: Any, images: set[str], file: str) -> str:
        """The image file of a name. The extension in the annotation is tried first, then all others."""
        filename = cast("dict[str, Any]", parsed).get("filename") if isinstance(parsed, dict) else None
        first = [os.path.splitext(str(filename))[1]] if filename else []
        for extension in dict.fromkeys([*first, *IMAGE_EXTENSIONS]):
            if name + extension in images or (os.sep in name and (self.img_dir / (name + extension)).is_file()):
                return path_inside(self.img_dir, name + extension, file)
        raise DataError(f"{file}: there is no image {name}.jpg (nor .png, ...) in {self.img_dir}.")


def parse_voc(path: str | Path, classes: Sequence[str] | None = None, box_policy: BoxPolicy = "error") -> dict[str, Any]:
    """Read and check the annotation of one XML file. The result and the arguments are those of `VocAnnotationDataset`.

    Raises:
        DataError: The annotation is invalid. The message has the file and the object.
        BoxError: A box is invalid and the policy is "error".
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
        found = [e.name[:-4] for e in sorted_entries(folder, "a folder of XML files") if e.name.lower().endswith(".xml")]
    elif isinstance(names, (str, Path)):
        found = [str(row).split()[0] for row in read_records(names).rows]
    else:
        found = list(names)
    if not found:
        raise DataError(f"{folder if names is None else names}: the split is empty: there is no name.")
    if len(set(found)) < len(found):
        twice = next(n for n in found if found.count(n) > 1)
        raise DataError(f"{names}: the name {twice!r} occurs twice.")
    return found
