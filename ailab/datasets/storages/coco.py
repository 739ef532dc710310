"""The storage of a COCO JSON file: its images with their annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.boxes import BoxError, BoxErrors, BoxPolicy, checked_box
from ailab.datasets.files.paths import path_inside
from ailab.datasets.storages.records import lookup, parse_json, read_text
from ailab.datasets.storages.shared_list import SharedList
from ailab.errors import DataError
from ailab.signature import check_choice, name_list

_MAX_SIDE = 1 << 24  # pixels
_PARTS = ("images", "annotations", "categories")


class CocoAnnotationDataset(LabBaseDataset):
    """Storage of a COCO JSON file. A raw record is `(image id, image entry, list of annotations)`.

    The image entry and the annotations are dicts as in the file, in the order of the file. Categories become the classes 0, 1, ...
    in the order of their ids; the ids may have gaps. Source of the format: cocodataset.org/#format-data.

    Args:
        coco_json: The annotation file.
        images_dir: Folder that the file names start from.
        box_policy: For a box without area, or more than one pixel outside its image: "error" raises, "clip" clips it at the
            image border, "drop" leaves the annotation out.
        allow_outside_root: Whether to accept images outside `images_dir`.

    Raises:
        DataError: The file is no COCO file or has no image, an id occurs twice, an annotation has an unknown image, an unknown
            category or an invalid box, or an image has no size or is outside `images_dir`.
    """

    keep_empty: bool = True  # whether to keep images without annotations

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

        box_errors = BoxErrors()

        def sort(annotation: dict[str, Any], where: str) -> None:
            image = self._image_of(annotation, images, where)
            if self._check_annotation(annotation, image, where, box_policy, box_errors) and self.keep_annotation(
                annotation, image, where
            ):
                found[image["id"]].append(annotation)

        self._by_id(parts["annotations"], "annotation", sort)
        box_errors.raise_if_any()
        self.ids = [i for i in images if self.keep_empty or found[i]]
        if not self.ids:
            raise DataError(f"{self.coco_json}: the split is empty: no image {'has an object' if images else 'is listed'}.")
        self._records = SharedList([images[i], found[i]] for i in self.ids)

    def _len(self) -> int:
        return len(self.ids)

    def _get_raw(self, index: int) -> Any:
        image, annotations = self._records[index]
        return image["id"], image, annotations

    def keep_annotation(self, annotation: dict[str, Any], image: dict[str, Any], where: str) -> bool:
        """Whether to keep an annotation. A subclass overrides this to select and to check annotations.

        Args:
            annotation: The annotation, as in the file.
            image: The entry of its image.
            where: The file and the annotation, for messages.

        Raises:
            DataError: The annotation lacks a field that the subclass needs.
        """
        return True

    def image_file(self, image: Mapping[str, Any]) -> str:
        """The path of an image, from its entry in the file."""
        where = f"{self.coco_json}, image id {image['id']}"
        return path_inside(self.img_dir, image["file_name"], where, allow_outside_root=self.allow_outside_root)

    def _by_id(self, entries: list[Any], what: str, check: Callable[[dict[str, Any], str], None]) -> dict[int, dict[str, Any]]:
        """The entries of one part as {id: entry}, in the order of the file. `check` is called for each."""
        found: dict[int, dict[str, Any]] = {}
        for i, entry in enumerate(entries):
            key = lookup(entry, "id", lambda i=i: f"{self.coco_json}, {what} number {i}")
            if type(key) is not int:
                raise DataError(f"{self.coco_json}, {what} number {i}: expected an integer as id, got {key!r:.60}.")
            if key in found:
                raise DataError(f"{self.coco_json}: the {what} id {key} occurs twice. Ids must be unique.")
            check(entry, f"{self.coco_json}, {what} id {key}")
            found[key] = entry
        return found

    def _check_image(self, image: dict[str, Any], where: str) -> None:
        for side in ("width", "height"):
            value = lookup(image, side, lambda: where)
            if type(value) is not int or not 0 < value < _MAX_SIDE:
                raise DataError(f"{where}: expected a positive integer as {side!r}, in pixels, got {value!r:.60}.")
        lookup(image, "file_name", lambda: where)
        self.image_file(image)

    def _image_of(self, annotation: dict[str, Any], images: dict[int, dict[str, Any]], where: str) -> dict[str, Any]:
        image_id = lookup(annotation, "image_id", lambda: where)
        image = images.get(image_id) if isinstance(image_id, int) else None
        if image is None:
            raise DataError(f"{where}: there is no image with the id {image_id!r:.60}.")
        return image

    def _check_annotation(
        self, annotation: dict[str, Any], image: dict[str, Any], where: str, policy: BoxPolicy, box_errors: BoxErrors
    ) -> bool:
        """Check the category and the box of an annotation, and clip the box. False if the annotation is left out."""
        category = lookup(annotation, "category_id", lambda: where)
        if type(category) is not int or category not in self.class_index:
            known = name_list(f"{c['id']} {c['name']}" for c in self.categories)
            raise DataError(f"{where}: unknown category id {category!r:.60}. Categories: {known}.")
        if "bbox" in annotation:
            try:
                box = checked_box(annotation["bbox"], (image["height"], image["width"]), policy, where, form="xywh")
            except BoxError as error:
                box_errors.add(error)
                return False
            if box is None:
                return False
            annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        return True


def _part(content: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(content, dict) or not isinstance(cast("dict[str, Any]", content).get(name), list):
        came = name_list(cast("dict[str, Any]", content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: no COCO file: expected the lists {name_list(_PARTS)}. There is no list {name!r}. It has: {came}."
        )
    return cast("list[Any]", content[name])
