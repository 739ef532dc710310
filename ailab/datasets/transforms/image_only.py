"""A fast path for torchvision's transforms of samples with only an image. It gives the same bits from the same random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.files.image import pixels_resized

Step = Callable[[Tensor], Tensor]


def image_only_steps(steps: Sequence[Any]) -> tuple[Step, ...] | None:
    """The transforms `steps` as functions of a plain image tensor (C, H, W); None if they may need the whole sample.

    Only torchvision's own transforms have a fast path. RandomResizedCrop and RandomHorizontalFlip then take half the time.
    """
    kinds = [type(step) for step in steps]
    if not all(k.__module__.startswith("torchvision.transforms.v2.") and k.__name__ != "Lambda" for k in kinds):
        return None
    return tuple(_image_step(step) for step in steps)


def _image_step(step: Any) -> Step:
    from torchvision.transforms import v2

    if is_uint8_crop(step):
        return _Crop(step)
    return partial(_mirrored, step) if type(step) is v2.RandomHorizontalFlip else step


def is_uint8_crop(step: Any) -> bool:
    """Whether a transform is a RandomResizedCrop that torchvision computes in uint8. In float32 it would round differently."""
    from torchvision.transforms import v2

    if type(step) is not v2.RandomResizedCrop:
        return False
    bilinear = step.interpolation in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BILINEAR.value)
    return bilinear and step.antialias is True and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class _Crop:
    """RandomResizedCrop: draw an area and an aspect ratio until the crop fits, at most ten times.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
    """

    def __init__(self, step: Any):
        self.step = step  # read at each call: a curriculum may change its scale
        low, high = torch.log(torch.tensor(step.ratio)).tolist()  # in float32, as torchvision does
        self.logs: tuple[float, float] = (low, high)

    def __call__(self, image: Tensor) -> Tensor:
        if image.dtype != torch.uint8 or image.shape[0] != 3:
            return self.step(image)
        top, left, h, w = self.drawn(image.shape[-2], image.shape[-1])
        return pixels_resized(image[:, top : top + h, left : left + w], (self.step.size[0], self.step.size[1]))

    def drawn(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a random crop, in pixels."""
        one = torch.empty(1)
        for _ in range(10):
            area = height * width * one.uniform_(*self.step.scale).item()
            ratio = one.uniform_(*self.logs).exp_().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = (int(torch.randint(most + 1, (1,)).item()) for most in (height - h, width - w))
                return top, left, h, w
        w, h, low, high = width, height, min(self.step.ratio), max(self.step.ratio)
        if width / height < low:
            h = round(w / low)
        elif width / height > high:
            w = round(h * high)
        return (height - h) // 2, (width - w) // 2, h, w


def _mirrored(step: Any, image: Tensor) -> Tensor:
    return image.flip(-1) if torch.rand(1).item() < step.p else image
