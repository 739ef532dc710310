"""Pascal VOC datasets: detection and segmentation, in the folder layout of the development kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ailab.datasets.files.boxes import BoxFormat, BoxPolicy, box_tensor
from ailab.datasets.files.image import read_image
from ailab.datasets.storages.file_annotation import FileAnnotationDataset
from ailab.datasets.storages.voc import VocAnnotationDataset
from ailab.datasets.tasks import DetectionTask, SegmentationTask, read_label_map
from ailab.datasets.transforms.pipeline import TransformSpec, build_transform
from ailab.registry import DATASETS
from ailab.signature import check_choice

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow") + (
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)


@DATASETS.register_module()
class VOCDataset(VocAnnotationDataset, DetectionTask):
    """Pascal VOC detection: `{"image": (3, H, W) uint8, "boxes": (N, 4) float32, "labels": (N,) int64}`.

    Args:
        root: Folder with `Annotations`, `JPEGImages` and `ImageSets/Main`.
        split: Name of a file in `ImageSets/Main` without ".txt": "train", "val", "trainval", "test". None takes all XML files.
        classes: Class names in the order of their indices. Default: the 20 classes of VOC.
        difficult: Whether to keep objects that are marked as difficult.
        box_format: Format of the boxes: "xyxy", "xywh" or "cxcywh".
        normalize: Whether boxes are fractions of the width and height of the image after the transform.
        transform: Transforms of a sample, see `build_transform`. They get all fields.
        box_policy: For a box without area or outside its image: "error" raises, "clip" clips it, "drop" leaves it out.

    Raises:
        DataError: At build time, as `VocAnnotationDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        *,
        classes: Sequence[str] | None = None,
        difficult: bool = False,
        box_format: BoxFormat = "xyxy",
        normalize: bool = False,
        transform: TransformSpec = None,
        box_policy: BoxPolicy = "error",
    ):
        check_choice(box_format, BoxFormat, "VOCDataset: box_format")
        root, self.classes, self.difficult = Path(root), list(classes or VOC_CLASSES), difficult
        names = root / "ImageSets" / "Main" / f"{split}.txt" if split is not None else None
        super().__init__(root / "JPEGImages", root / "Annotations", names=names, classes=self.classes, box_policy=box_policy)
        self.transform = build_transform(transform)
        self.box_format, self.normalize = box_format, normalize

    def load_image(self, raw: Any) -> Tensor:
        """The image: (3, H, W) uint8."""
        return read_image(raw[0])

    def load_boxes(self, raw: Any) -> Tensor:
        """The boxes: (N, 4) float32, xyxy in pixels, from the corner of the first pixel."""
        return box_tensor([o["box"] for o in self._objects(raw[1])])

    def load_labels(self, raw: Any) -> list[str]:
        """The class names of the objects."""
        return [o["name"] for o in self._objects(raw[1])]

    def _objects(self, annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [o for o in annotation["object"] if self.difficult or o.get("difficult", "0") != "1"]


@DATASETS.register_module()
class VOCSegmentationDataset(FileAnnotationDataset, SegmentationTask):
    """Pascal VOC segmentation: `{"image": (3, H, W) uint8, "mask": (H, W) int64}`.

    "mask" is the class of each pixel: 0 is the background, 255 the borders between objects, which the loss ignores.

    Args:
        root: Folder with `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation`.
        split: Name of a file in `ImageSets/Segmentation` without ".txt": "train", "val", "trainval".
        classes: Class names without the background, in the order of their indices from 1. Default: the 20 classes of VOC.
        transform: Transforms of a sample, see `build_transform`. They get both fields.

    Raises:
        DataError: The file of the split is missing or empty, or a name leads out of `root`.
    """

    def __init__(
        self, root: str | Path, split: str = "train", *, classes: Sequence[str] | None = None, transform: TransformSpec = None
    ):
        super().__init__(Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt", root=root)
        self.classes = ["background", *(classes or VOC_CLASSES)]
        self.transform = build_transform(transform)
        for i, name in enumerate(self.samples):
            self.file(f"JPEGImages/{name}.jpg", i)

    def load_image(self, raw: Any) -> Tensor:
        """The image: (3, H, W) uint8."""
        return read_image(self.file(f"JPEGImages/{raw}.jpg"))

    def load_mask(self, raw: Any) -> Tensor:
        """The class map: (H, W) int64."""
        return read_label_map(self.file(f"SegmentationClass/{raw}.png"))
