"""Object detection, keypoints and instance segmentation: one image, and fields with one row per object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ailab.datasets.files.boxes import BoxFormat, convert_boxes
from ailab.datasets.tasks.task import Task, class_index, tensor_of
from ailab.datasets.transforms.pipeline import Sample

_MIN_SIDE = 1.0  # pixels; an object with a smaller box after the transform is dropped


class ObjectsTask(Task):
    """The base class of tasks with objects in images.

    Boxes are loaded as xyxy in pixels. The sample has them in the format `box_format`, as fractions of the image size with
    `normalize`. After the transform, boxes are clipped to the image. An object whose box is less than a pixel wide or high is
    dropped. A keypoint outside the image gets visibility 0.
    """

    input_field: str | None = "image"
    kinds: Mapping[str, str] = {"image": "image", "boxes": "boxes", "masks": "mask", "keypoints": "keypoints"}
    rows: ClassVar[tuple[str, ...]] = ("boxes", "labels", "masks", "keypoints", "visible")  # fields with one row per object
    box_format: BoxFormat = "xyxy"
    normalize: bool = False

    def load_image(self, raw: Any) -> Any:
        """The image: (C, H, W) uint8, or a PIL image."""
        raise NotImplementedError(f"{type(self).__name__}: define load_image.")

    def load_boxes(self, raw: Any) -> Any:
        """The boxes: (N, 4), xyxy in pixels."""
        raise NotImplementedError(f"{type(self).__name__}: define load_boxes.")

    def load_labels(self, raw: Any) -> Any:
        """The classes: (N,) class indices, or names if `classes` is set."""
        raise NotImplementedError(f"{type(self).__name__}: define load_labels.")

    def load_masks(self, raw: Any) -> Any:
        """The masks: (N, H, W) of 0 and 1."""
        raise NotImplementedError(f"{type(self).__name__}: define load_masks.")

    def load_keypoints(self, raw: Any) -> Any:
        """The keypoints: (N, K, 2) x and y in pixels, or (N, K, 3) with visibility: 0 not labelled, 1 hidden, 2 visible."""
        raise NotImplementedError(f"{type(self).__name__}: define load_keypoints.")

    def after_transform(self, sample: Sample) -> Sample:
        """The fields after the transform, without the objects that it has cut away."""
        h, w = sample["image"].shape[-2:]
        if "keypoints" in sample:
            x, y = sample["keypoints"].unbind(-1)
            sample["visible"] = sample["visible"] * ((x >= 0) & (x < w) & (y >= 0) & (y < h))
        if "boxes" in sample:
            x0, y0, x1, y1 = sample["boxes"].unbind(1)
            boxes = torch.stack([x0.clamp(0, w), y0.clamp(0, h), x1.clamp(0, w), y1.clamp(0, h)], 1)
            sample["boxes"] = boxes
            kept = ((boxes[:, 2:] - boxes[:, :2]) >= _MIN_SIDE).all(1)
            sample.update({n: sample[n][kept] for n in self.rows if n in sample and len(sample[n]) == len(kept)})
        _check_same_length(sample, self.rows)
        return sample

    def output(self, sample: Sample) -> Sample:
        """The fields with the boxes in the format `box_format`."""
        if "boxes" not in sample or (self.box_format == "xyxy" and not self.normalize):
            return sample
        size = tuple(sample["image"].shape[-2:]) if self.normalize else None
        return {**sample, "boxes": convert_boxes(sample["boxes"], self.box_format, size)}

    def _boxes(self, raw: Any) -> Sample:
        found = tensor_of(self.load_boxes(raw), "load_boxes").float()
        boxes = found.view(-1, 4) if found.numel() == 0 else found
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.isfinite().all():
            raise ValueError(f"load_boxes: expected (N, 4) finite numbers, got {tuple(boxes.shape)}")
        labels = [class_index(one, self.classes) for one in self.load_labels(raw)]
        return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64)}

    def _masks(self, raw: Any, image: Tensor) -> Sample:
        masks = tensor_of(self.load_masks(raw), "load_masks")
        if masks.numel() == 0:
            masks = masks.view(0, *image.shape[-2:])
        if masks.dim() != 3 or masks.shape[-2:] != image.shape[-2:]:
            raise ValueError(f"load_masks: expected (N, {image.shape[-2]}, {image.shape[-1]}), got {tuple(masks.shape)}")
        return {"masks": masks.bool()}

    def _keypoints(self, raw: Any) -> Sample:
        points = tensor_of(self.load_keypoints(raw), "load_keypoints").float()
        if points.dim() != 3 or points.shape[-1] not in (2, 3):
            raise ValueError(f"load_keypoints: expected (N, K, 2) or (N, K, 3), got {tuple(points.shape)}")
        visible = points[..., 2].long() if points.shape[-1] == 3 else torch.full(points.shape[:2], 2)
        return {"keypoints": points[..., :2].contiguous(), "visible": visible}


def _check_same_length(sample: Sample, rows: tuple[str, ...]) -> None:
    sizes = {n: len(sample[n]) for n in rows if n in sample}
    if len(set(sizes.values())) > 1:
        raise ValueError("the fields of the objects differ in length: " + ", ".join(f"{n} {k}" for n, k in sizes.items()))


class DetectionTask(ObjectsTask):
    """Object detection: `{"image": (C, H, W) uint8, "boxes": (N, 4) float32, "labels": (N,) int64}`.

    Define `load_image`, `load_boxes` and `load_labels`.
    """

    def load(self, raw: Any) -> Sample:
        """The image, its boxes and their classes."""
        sample = {"image": tensor_of(self.load_image(raw), "load_image"), **self._boxes(raw)}
        _check_same_length(sample, self.rows)
        return sample


class InstanceSegmentationTask(ObjectsTask):
    """Instance segmentation: the fields of `DetectionTask` and `"masks": (N, H, W) bool`.

    Define `load_image`, `load_boxes`, `load_labels` and `load_masks`.
    """

    def load(self, raw: Any) -> Sample:
        """The image, its boxes, their classes and masks."""
        image = tensor_of(self.load_image(raw), "load_image")
        sample = {"image": image, **self._boxes(raw), **self._masks(raw, image)}
        _check_same_length(sample, self.rows)
        return sample


class KeypointTask(ObjectsTask):
    """Keypoints: `{"image": (C, H, W) uint8, "keypoints": (N, K, 2) float32, "visible": (N, K) int64}`.

    Keypoints are x and y in pixels. Visibility is 0 (not labelled), 1 (hidden) or 2 (visible). Define `load_image` and
    `load_keypoints`.
    """

    def load(self, raw: Any) -> Sample:
        """The image and the keypoints of its objects."""
        return {"image": tensor_of(self.load_image(raw), "load_image"), **self._keypoints(raw)}
