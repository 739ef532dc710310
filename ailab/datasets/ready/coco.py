"""COCO datasets: object detection, instance masks and keypoints, and semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ailab.datasets.files.boxes import BoxFormat, BoxPolicy, are_numbers, box_tensor
from ailab.datasets.files.image import read_image
from ailab.datasets.files.rle import check_segmentation, decode_mask
from ailab.datasets.storages.coco import CocoAnnotationDataset
from ailab.datasets.tasks.objects import ObjectsTask
from ailab.datasets.transforms.pipeline import Sample, TransformSpec, build_transform
from ailab.errors import DataError
from ailab.registry import DATASETS
from ailab.signature import check_choice, name_list

_FORMATS: dict[str, tuple[BoxFormat, bool]] = {  # name -> format, normalize
    "xyxy": ("xyxy", False),
    "xywh": ("xywh", False),
    "cxcywh": ("cxcywh", False),
    "pascal": ("xyxy", False),
    "coco": ("xywh", False),
    "yolo": ("cxcywh", True),
}
_Format = Literal["xyxy", "xywh", "cxcywh", "pascal", "coco", "yolo"]
_Mode = Literal["semantic", "instance"]
_TASKS = ("bbox", "mask", "keypoints")


@DATASETS.register_module()
class COCODataset(CocoAnnotationDataset, ObjectsTask):
    """COCO objects: `{"image": (3, H, W) uint8, "image_id": () int64, "size": (2,) int64, "labels": (N,) int64, ...}`.

    "size" is (H, W) of the image file in pixels. The other fields depend on `tasks`:

    - "bbox": "boxes" (N, 4) float32.
    - "mask": "masks" (N, H, W) bool.
    - "keypoints": "keypoints" (N, K, 2) float32, x and y in pixels, and "visible" (N, K) int64.

    With `ignore_crowd=False` there are also "iscrowd" (N,) int64 and "area" (N,) float32, in pixels of the image file.

    Args:
        annotation_file: The COCO JSON file.
        images_root: Folder of the images.
        tasks: Annotations to load: "bbox", "mask" (or "segmentation"), "keypoints".
        box_format: "xyxy", "xywh" or "cxcywh". "pascal" is "xyxy", "coco" is "xywh", "yolo" is "cxcywh" with `normalize`.
        normalize: Whether boxes are fractions of the width and height of the image after the transform.
        min_area: Smallest area of a box, in pixels of the image file. Smaller objects are left out.
        ignore_crowd: Whether to leave out crowd annotations (`iscrowd` 1).
        keep_empty: Whether to keep images without objects.
        transform: Transforms of a sample, see `build_transform`. They get all fields.
        box_policy: For a box without area or outside its image: "error" raises, "clip" clips it, "drop" leaves it out.
        allow_outside_root: Whether to accept images outside `images_root`.

    Raises:
        DataError: At build time, as `CocoAnnotationDataset`; also if an object lacks the annotation of a task, or no image is
            left. While reading, an image whose size is not the annotated one is a bad sample.
    """

    rows: ClassVar[tuple[str, ...]] = (*ObjectsTask.rows, "iscrowd", "area")

    def __init__(
        self,
        annotation_file: str | Path,
        images_root: str | Path,
        tasks: Sequence[str] = ("bbox",),
        *,
        box_format: _Format = "xyxy",
        normalize: bool = False,
        min_area: float = 0.0,
        ignore_crowd: bool = True,
        keep_empty: bool = True,
        transform: TransformSpec = None,
        box_policy: BoxPolicy = "error",
        allow_outside_root: bool = False,
    ):
        self.tasks = tuple("mask" if t == "segmentation" else t for t in tasks)
        if wrong := [t for t in self.tasks if t not in _TASKS]:
            raise DataError(f"COCODataset: tasks has {wrong[0]!r}; there are {name_list(_TASKS)}.")
        check_choice(box_format, _Format, "COCODataset: box_format")
        self.transform = build_transform(transform)
        self.box_format, fraction = _FORMATS[box_format]
        self.normalize, self.min_area = normalize or fraction, min_area
        self.ignore_crowd, self.keep_empty = ignore_crowd, keep_empty
        super().__init__(annotation_file, images_root, box_policy=box_policy, allow_outside_root=allow_outside_root)

    def keep_annotation(self, annotation: dict[str, Any], image: dict[str, Any], where: str) -> bool:
        """Whether the object is kept: not an ignored crowd and not too small. The annotations of the tasks are checked."""
        if not are_numbers([annotation.get("area", 0)]) or annotation.get("iscrowd", 0) not in (0, 1):
            came = f"{annotation.get('area', 0)!r:.40} and {annotation.get('iscrowd', 0)!r:.40}"
            raise DataError(f"{where}: expected a number as 'area', and 0 or 1 as 'iscrowd', got {came}.")
        if (self.ignore_crowd and annotation.get("iscrowd")) or _area(annotation) < self.min_area:
            return False
        for task, part in (("bbox", "bbox"), ("mask", "segmentation"), ("keypoints", "keypoints")):
            if task in self.tasks and part not in annotation:
                raise DataError(
                    f"{where}: there is no {part!r}, which the task {task!r} needs. It has: {name_list(annotation)}."
                )
        if "mask" in self.tasks:
            check_segmentation(annotation["segmentation"], (image["height"], image["width"]), where)
        if "keypoints" in self.tasks:
            points = annotation["keypoints"]
            if not isinstance(points, list) or len(points) != 3 * self.keypoint_count or not are_numbers(points):  # pyright: ignore[reportUnknownArgumentType]
                count = f"3 x {self.keypoint_count} numbers of keypoints, by the categories of the file"
                raise DataError(f"{where}: expected {count}, got {points!r:.80}.")
        return True

    def load(self, raw: Any) -> Sample:
        """The image and the fields of its objects."""
        image_id, info, objects = raw
        image = read_image(self.image_file(info))
        size = (info["height"], info["width"])
        if tuple(image.shape[-2:]) != size:
            raise ValueError(f"{self.image_file(info)}: {tuple(image.shape[-2:])} pixels; the annotation says {size}")
        sample: Sample = {"image": image, "image_id": torch.tensor(image_id), "size": torch.tensor(size)}
        sample["labels"] = torch.tensor([self.class_index[a["category_id"]] for a in objects], dtype=torch.int64)
        if "bbox" in self.tasks:
            boxes = box_tensor([a["bbox"] for a in objects])
            sample["boxes"] = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        if "mask" in self.tasks:
            sample["masks"] = self.masks(objects, size)
        if "keypoints" in self.tasks:
            points = [torch.tensor(a["keypoints"], dtype=torch.float32).view(-1, 3) for a in objects]
            joined = torch.stack(points) if points else torch.zeros(0, self.keypoint_count, 3)
            sample.update(keypoints=joined[..., :2].contiguous(), visible=joined[..., 2].long())
        if not self.ignore_crowd:
            sample["iscrowd"] = torch.tensor([int(a.get("iscrowd", 0)) for a in objects], dtype=torch.int64)
            sample["area"] = torch.tensor([float(a.get("area", _area(a))) for a in objects])
        return sample

    @cached_property
    def keypoint_count(self) -> int:
        """Number of keypoints of one object."""
        named = [c.get("keypoints", []) for c in self.categories]
        if any(not isinstance(names, list) for names in named):
            raise DataError(f"{self.coco_json}, categories: expected lists of names of keypoints.")
        return max(map(len, named), default=0)

    def masks(self, objects: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Tensor:
        """(N, H, W) bool."""
        found = [decode_mask(a["segmentation"], size, f"{self.coco_json}, annotation id {a['id']}") for a in objects]
        return torch.stack(found) if found else torch.zeros(0, *size, dtype=torch.bool)


@DATASETS.register_module()
class COCOSegmentationDataset(COCODataset):
    """COCO segmentation: `{"image": (3, H, W) uint8, "mask": (H, W) int64, "image_id": () int64, "size": (2,) int64}`.

    "mask" is the class of each pixel: 0 is the background, then the categories in the order of their ids. A smaller object covers
    a larger one. Pixels of crowds are `ignore_index`. With `mode="instance"` the sample has one mask per object instead, as
    `COCODataset(tasks=("bbox", "mask"))`.

    Args:
        annotation_file: The COCO JSON file.
        images_root: Folder of the images.
        mode: "semantic" for one class map per image, "instance" for one mask per object.
        ignore_index: Class of the pixels that the loss ignores.
        keep_empty: Whether to keep images without objects.
        transform: Transforms of a sample, see `build_transform`. They get all fields.
        box_policy: For a box without area or outside its image: "error" raises, "clip" clips it, "drop" leaves it out.
        allow_outside_root: Whether to accept images outside `images_root`.

    Raises:
        DataError: At build time, as `COCODataset`.
    """

    kinds: Mapping[str, str] = {**ObjectsTask.kinds, "mask": "mask"}

    def __init__(
        self,
        annotation_file: str | Path,
        images_root: str | Path,
        mode: _Mode = "semantic",
        *,
        ignore_index: int = 255,
        keep_empty: bool = True,
        transform: TransformSpec = None,
        box_policy: BoxPolicy = "error",
        allow_outside_root: bool = False,
    ):
        check_choice(mode, _Mode, "COCOSegmentationDataset: mode")
        self.mode, self.ignore_index = mode, ignore_index
        super().__init__(
            annotation_file,
            images_root,
            ("mask",) if mode == "semantic" else ("bbox", "mask"),
            ignore_crowd=mode == "instance",
            keep_empty=keep_empty,
            transform=transform,
            box_policy=box_policy,
            allow_outside_root=allow_outside_root,
        )
        if mode == "semantic":
            self.classes = ["background", *(self.classes or ())]

    def load(self, raw: Any) -> Sample:
        """The image and its class map; with the mode "instance" the image and its objects."""
        if self.mode == "instance":
            return super().load(raw)
        image_id, info, _ = raw
        image = read_image(self.image_file(info))
        mask = self.class_map(raw)
        if image.shape[-2:] != mask.shape:
            raise ValueError(f"{self.image_file(info)}: {tuple(image.shape[-2:])} pixels; annotated: {tuple(mask.shape)}")
        return {"image": image, "mask": mask, "image_id": torch.tensor(image_id), "size": torch.tensor(mask.shape)}

    def class_map(self, raw: Any) -> Tensor:
        """(H, W) int64, the class of each pixel of one raw record."""
        _, info, objects = raw
        size = (info["height"], info["width"])
        mask = torch.zeros(size, dtype=torch.int64)
        masks = self.masks(objects, size)
        areas = masks.flatten(1).sum(1)
        for i in areas.argsort(descending=True, stable=True).tolist():
            crowd = objects[i].get("iscrowd")
            mask[masks[i]] = self.ignore_index if crowd else self.class_index[objects[i]["category_id"]] + 1
        return mask

    def class_weights(self) -> Tensor:
        """Class weights against imbalance: (classes,) float32. A weight is 1 / (share of the pixels), scaled to a mean of 1.

        A class without pixels has the weight 0. All masks of the dataset are decoded once.
        """
        assert self.classes is not None
        counts = torch.zeros(256 if self.ignore_index < 256 else self.ignore_index + 1, dtype=torch.float64)
        for i in range(len(self)):
            counts += self.class_map(self._get_raw(i)).flatten().bincount(minlength=len(counts))[: len(counts)]
        pixels = counts[: len(self.classes)]
        weights = torch.where(pixels > 0, pixels.sum() / pixels.clamp_min(1), 0.0)
        return (weights / weights[pixels > 0].mean()).float()


def _area(annotation: Mapping[str, Any]) -> float:
    box = annotation.get("bbox")
    return float(box[2] * box[3]) if box else float(annotation.get("area", 0.0))
