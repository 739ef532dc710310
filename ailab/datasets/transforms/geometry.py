"""Transforms of images with boxes and masks that torchvision does not have: letterbox, mosaic, keypoint flip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ailab.datasets.transforms.pipeline import Sample
from ailab.registry import TRANSFORMS


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) from `size`, which may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _moved(sample: Sample, move: Callable[[Any], Any]) -> Sample:
    """The sample with `move` applied to its images, masks, boxes and keypoints."""
    from torchvision import tv_tensors

    return {n: move(v) if isinstance(v, tv_tensors.TVTensor) else v for n, v in sample.items()}


def _canvas(sample: Sample) -> tuple[int, int]:
    """(H, W) of the image of a sample.

    Raises:
        TypeError: The sample has no image.
    """
    from torchvision import tv_tensors

    for value in sample.values():
        if isinstance(value, (tv_tensors.Image, tv_tensors.Video)):
            return value.shape[-2], value.shape[-1]
    raise TypeError(f"there is no image among the fields {', '.join(sample)}")


def _like(value: Tensor, other: Any) -> Any:
    """Wrap a plain tensor as the same class of tv_tensor as `other`, if `other` is a tv_tensor."""
    from torchvision import tv_tensors

    wrap: Any = tv_tensors.wrap
    return wrap(value, like=other) if isinstance(other, tv_tensors.TVTensor) else value


def _padded(value: Any, padding: list[int], fill: float, ignore: int) -> Any:
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    is_map = isinstance(value, tv_tensors.Mask) and value.dim() == 2  # a class map; (N, H, W) are masks of objects
    return functional.pad(value, padding, fill=ignore if is_map else 0 if isinstance(value, tv_tensors.Mask) else fill)  # type: ignore[arg-type]


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class LetterBox:
    """Resize an image to fit into `size` with its aspect ratio, and pad it evenly. Boxes, masks and keypoints are changed too.

    Args:
        size: (H, W) of the result in pixels, or one number for both.
        fill: Value of the padding, in the units of the image.
        scale_up: Whether to enlarge an image that is smaller than `size`.
        ignore: Class of the padding in a class map (H, W).
    """

    size: int | Sequence[int]
    fill: float = 114
    scale_up: bool = True
    ignore: int = 255

    def __call__(self, sample: Sample) -> Sample:
        """The sample, resized and padded to `size`."""
        from torchvision.transforms.v2 import functional

        (h, w), (to_h, to_w) = _canvas(sample), _sides(self.size)
        scale = min(to_h / h, to_w / w) if self.scale_up else min(to_h / h, to_w / w, 1.0)
        new_h, new_w = max(round(h * scale), 1), max(round(w * scale), 1)
        top, left = (to_h - new_h) // 2, (to_w - new_w) // 2
        padding = [left, top, to_w - new_w - left, to_h - new_h - top]

        def fitted(value: Any) -> Any:
            return _padded(functional.resize(value, [new_h, new_w], antialias=True), padding, self.fill, self.ignore)

        return _moved(sample, fitted)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class Mosaic:
    """Mosaic: combine four samples to one image, in four quarters around a random centre, with the objects of all four.

    Boxes are clipped at the quarters. The three other samples are drawn from the dataset with the seed of the sample, so an
    epoch is the same for any number of workers. Source: Bochkovskiy et al., arXiv:2004.10934.

    Args:
        size: (H, W) of the result in pixels, or one number for both.
        p: Probability for each sample. Otherwise the sample gets `LetterBox(size)`.
        fill: Value of pixels that no image covers, in the units of the image.
        per_object: Fields with one row per object. Their rows are concatenated.
        ignore: Class of pixels that no class map (H, W) covers.
    """

    size: int | Sequence[int]
    p: float = 1.0
    fill: float = 114
    per_object: Sequence[str] = ("boxes", "labels", "masks", "keypoints", "visible")
    ignore: int = 255
    others: ClassVar[int] = 3

    def __call__(self, sample: Sample, others: Sequence[Sample]) -> Sample:
        """One sample of four. Fields that are neither images nor objects come from the first sample."""
        if float(torch.rand(())) >= self.p:
            return LetterBox(self.size, self.fill, ignore=self.ignore)(sample)
        h, w = _sides(self.size)
        y, x = (int(torch.randint(side // 4, side - side // 4, ())) for side in (h, w))
        areas = [(0, 0, y, x), (0, x, y, w - x), (y, 0, h - y, x), (y, x, h - y, w - x)]  # top, left, height, width
        placed = [self._placed(s, area, (h, w)) for s, area in zip([sample, *others], areas, strict=True)]
        return {n: self._joined(n, [p[n] for p in placed], areas) for n in sample}

    def _placed(self, sample: Sample, area: tuple[int, int, int, int], canvas: tuple[int, int]) -> Sample:
        """One sample, resized to cover its quarter, cropped to it, and padded to the whole canvas."""
        from torchvision.transforms.v2 import functional

        (h, w), (top, left, height, width) = _canvas(sample), area
        scale = max(height / h, width / w)
        new = [max(round(h * scale), height), max(round(w * scale), width)]
        padding = [left, top, canvas[1] - left - width, canvas[0] - top - height]

        def fitted(value: Any) -> Any:
            cut = functional.crop(functional.resize(value, new, antialias=True), 0, 0, height, width)
            return _padded(cut, padding, self.fill, self.ignore)

        placed = _moved(sample, fitted)
        if "keypoints" in placed and "visible" in placed:  # keypoints outside the crop are in another quarter now
            x, y = placed["keypoints"].as_subclass(torch.Tensor).unbind(-1)
            inside = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
            placed["visible"] = placed["visible"] * inside
        return placed

    def _joined(self, name: str, parts: list[Any], areas: list[tuple[int, int, int, int]]) -> Any:
        from torchvision import tv_tensors

        first = parts[0]
        if name in self.per_object:
            joined = torch.cat([p.as_subclass(torch.Tensor) for p in parts])
            return _like(joined, first)
        if not isinstance(first, (tv_tensors.Image, tv_tensors.Mask)):
            return first
        whole = first.as_subclass(torch.Tensor).clone()
        for part, (top, left, height, width) in zip(parts[1:], areas[1:], strict=True):
            quarter = (..., slice(top, top + height), slice(left, left + width))
            whole[quarter] = part.as_subclass(torch.Tensor)[quarter]
        return _like(whole, first)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class KeypointFlip:
    """Flip a sample horizontally with probability `p`, and swap its left and right keypoints.

    RandomHorizontalFlip does not swap them: in the flipped image the right eye would have the index of the left eye.

    Args:
        pairs: Pairs of keypoint indices to swap, e.g. ((1, 2), (3, 4)).
        p: Probability for each sample.
        fields: Fields with the keypoints in dimension 1, such as coordinates (N, K, 2) and visibility (N, K).
    """

    pairs: Sequence[Sequence[int]]
    p: float = 0.5
    fields: Sequence[str] = ("keypoints", "visible")

    def __call__(self, sample: Sample) -> Sample:
        """The sample, or the flipped sample."""
        from torchvision.transforms.v2 import functional

        if float(torch.rand(())) >= self.p:
            return sample
        sample = _moved(sample, functional.horizontal_flip)
        for name in self.fields:
            value: Tensor | None = sample.get(name)
            if value is None:
                continue
            order = list(range(value.shape[1]))
            for a, b in self.pairs:
                order[a], order[b] = b, a
            swapped = value.as_subclass(torch.Tensor)[:, order]
            sample[name] = _like(swapped, value)
        return sample
