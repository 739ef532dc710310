"""Transforms of torchvision done to a picture alone, without what they do around each call: the same draws, the same bits."""

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
    """Steps that do to (C, H, W) what `steps` do to a sample that holds it; None where that is not sure.

    It is for torchvision's own, which take any form. Two of them, by which most are trained, go in half the time.
    """
    kinds = [type(step) for step in steps]
    if not all(k.__module__.startswith("torchvision.transforms.v2.") and k.__name__ != "Lambda" for k in kinds):
        return None
    return tuple(_lone(step) for step in steps)


def _lone(step: Any) -> Step:
    from torchvision.transforms import v2

    if crops_bytes(step):
        return _Crop(step)
    return partial(_mirrored, step) if type(step) is v2.RandomHorizontalFlip else step


def crops_bytes(step: Any) -> bool:
    """Whether it is a RandomResizedCrop that torchvision does on bytes: elsewhere it goes by floats, and rounds otherwise."""
    from torchvision.transforms import v2

    if type(step) is not v2.RandomResizedCrop:
        return False
    bilinear = step.interpolation in (v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BILINEAR.value)
    return bilinear and step.antialias is True and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class _Crop:
    """RandomResizedCrop: a share of the area and a ratio of the sides are drawn until they fit, ten times at most.

    Source: Szegedy et al., "Going deeper with convolutions", CVPR 2015, section 6.
    """

    def __init__(self, step: Any):
        self.step = step  # asked each time: a curriculum may change its scale
        low, high = torch.log(torch.tensor(step.ratio)).tolist()  # once and in float32, as torchvision does
        self.logs: tuple[float, float] = (low, high)

    def __call__(self, picture: Tensor) -> Tensor:
        if picture.dtype != torch.uint8 or picture.shape[0] != 3:
            return self.step(picture)
        top, left, h, w = self.drawn(picture.shape[-2], picture.shape[-1])
        return pixels_resized(picture[:, top : top + h, left : left + w], (self.step.size[0], self.step.size[1]))

    def drawn(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop."""
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


def _mirrored(step: Any, picture: Tensor) -> Tensor:
    return picture.flip(-1) if torch.rand(1).item() < step.p else picture
