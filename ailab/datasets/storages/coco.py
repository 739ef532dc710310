"""A storage of the images of a COCO JSON file with their annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.boxes import BoxError, BoxPolicy, Misfits, checked_box
from ailab.datasets.files.paths import inside
from ailab.datasets.storages.records import lookup, parse_json, read_text
from ailab.datasets.storages.shared_list import SharedList
from ailab.errors import DataError
from ailab.signature import check_choice, name_list

_MOST = 1 << 24  # pixels of a side
_PARTS = ("images", "annotations", "categories")


class CocoAnnotationDataset(LabBaseDataset):
    """The storage: its raw record is `(image id, image, annotations)`, the last two as in the file. The order is the file's.

    Categories, whose ids may have gaps, become the classes 0, 1, ... in the order of their ids.
    Source of the format: cocodataset.org/#format-data.

    Args:
        coco_json: the annotation file.
        images_dir: the folder that file names are relative to.
        box_policy: what happens to a box that has no area or reaches outside its image by more than a pixel: "error", "clip"
            (cut at the border) or "drop".
        allow_outside_root: accept images outside `images_dir`.

    Raises:
        DataError: the file is no COCO file or has no image; an id is there twice; an annotation names an image or a category that
            is not there, or has a bad box; an image has no size or is outside `images_dir`.
    """

    keep_empty: bool = True  # pictures without an annotation

    def __init__(
        self,
        coco_json: str | Path,
        images_dir: str | Path,
        *,
        box_policy: BoxPolicy = "error",
        allow_outside_root: bool = False,
    ):
        check_choice(box_policy, BoxPolicy, f"{type(self).__name__}: box_policy")
        self.coco_json, self.img_dir = Path(coco_json), Path(images_dir)
        self.allow_outside_root = allow_outside_root
        content = parse_json(read_text(self.coco_json), str(self.coco_json))
        parts = {name: _part(content, name, self.coco_json) for name in _PARTS}
        categories = self._by_id(parts["categories"], "category", lambda *_: None)
        images = self._by_id(parts["images"], "image", self._check_image)
        self.categories = [categories[i] for i in sorted(categories)]
        self.classes = [str(lookup(c, "name", lambda: f"{self.coco_json}, category")) for c in self.categories]
        self.class_index = {c["id"]: i for i, c in enumerate(self.categories)}
        found: dict[int, list[dict[str, Any]]] = {i: [] for i in images}

        misfits = Misfits()

        def sort(annotation: dict[str, Any], where: str) -> None:
            image = self._image_of(annotation, images, where)
            if self._fitted(annotation, image, where, box_policy, misfits) and self.kept(annotation, image, where):
                found[image["id"]].append(annotation)

        self._by_id(parts["annotations"], "annotation", sort)
        misfits.tell()
        self.ids = [i for i in images if self.keep_empty or found[i]]
        if not self.ids:
            raise DataError(f"{self.coco_json}: the split is empty: no picture {'has an object' if images else 'is listed'}.")
        self._records = SharedList([images[i], found[i]] for i in self.ids)

    def _len(self) -> int:
        return len(self.ids)

    def _get_raw(self, index: int) -> Any:
        image, annotations = self._records[index]
        return image["id"], image, annotations

    def kept(self, annotation: dict[str, Any], image: dict[str, Any], where: str) -> bool:
        """Whether an annotation belongs to the data set; what a subclass needs of it is checked here.

        Raises:
            DataError: it lacks something; `where` says which it is.
        """
        return True

    def image_file(self, image: Mapping[str, Any]) -> str:
        """The path of an image of the file."""
        where = f"{self.coco_json}, image id {image['id']}"
        return inside(self.img_dir, image["file_name"], where, allow_outside_root=self.allow_outside_root)

    def _by_id(self, entries: list[Any], what: str, check: Callable[[dict[str, Any], str], None]) -> dict[int, dict[str, Any]]:
        """The entries of one part by their ids, in their order, each checked."""
        found: dict[int, dict[str, Any]] = {}
        for i, entry in enumerate(entries):
            key = lookup(entry, "id", lambda i=i: f"{self.coco_json}, {what} number {i}")
            if type(key) is not int:
                raise DataError(f"{self.coco_json}, {what} number {i}: expected a whole number as id, got {key!r:.60}.")
            if key in found:
                raise DataError(f"{self.coco_json}: the {what} id {key} is there twice; ids have to differ.")
            check(entry, f"{self.coco_json}, {what} id {key}")
            found[key] = entry
        return found

    def _check_image(self, image: dict[str, Any], where: str) -> None:
        for side in ("width", "height"):
            value = lookup(image, side, lambda: where)
            if type(value) is not int or not 0 < value < _MOST:
                raise DataError(f"{where}: expected a whole number of pixels as {side!r}, got {value!r:.60}.")
        lookup(image, "file_name", lambda: where)
        self.image_file(image)

    def _image_of(self, annotation: dict[str, Any], images: dict[int, dict[str, Any]], where: str) -> dict[str, Any]:
        image_id = lookup(annotation, "image_id", lambda: where)
        image = images.get(image_id) if isinstance(image_id, int) else None
        if image is None:
            raise DataError(f"{where}: there is no image with the id {image_id!r:.60}.")
        return image

    def _fitted(
        self, annotation: dict[str, Any], image: dict[str, Any], where: str, policy: BoxPolicy, misfits: Misfits
    ) -> bool:
        """Whether the annotation stays, its box cut to its picture."""
        category = lookup(annotation, "category_id", lambda: where)
        if type(category) is not int or category not in self.class_index:
            known = name_list(f"{c['id']} {c['name']}" for c in self.categories)
            raise DataError(f"{where}: unknown category id {category!r:.60}. Categories: {known}.")
        if "bbox" in annotation:
            try:
                box = checked_box(annotation["bbox"], (image["height"], image["width"]), policy, where, form="xywh")
            except BoxError as error:
                misfits.add(error)
                return False
            if box is None:
                return False
            annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        return True


def _part(content: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(cast("dict[str, Any]", content).get(name), list):
        came = name_list(cast("dict[str, Any]", content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: no COCO file: expected {name!r} with a list, among {name_list(_PARTS)}. It has: {came}.")
    return cast("list[Any]", content[name])
