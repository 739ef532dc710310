"""Transforms of torchvision done to a picture alone, without what they do around each call: the same draws, the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.image import pixels_resized

Step = Callable[[Tensor], Tensor]


def lone_steps(steps: Sequence[Any]) -> tuple[Step, ...] | None:
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
    return partial(_mirrored, step.p) if type(step) is v2.RandomHorizontalFlip else step


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
        self.step = step
        self.size: tuple[int, int] = (step.size[0], step.size[1])
        self.scale, self.ratio = step.scale, step.ratio
        low, high = torch.log(torch.tensor(step.ratio)).tolist()  # in float32, as torchvision does
        self.logs: tuple[float, float] = (low, high)

    def __call__(self, picture: Tensor) -> Tensor:
        if picture.dtype != torch.uint8 or picture.shape[0] != 3:
            return self.step(picture)
        top, left, h, w = self.drawn(picture.shape[-2], picture.shape[-1])
        return pixels_resized(picture[:, top : top + h, left : left + w], self.size)

    def drawn(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a crop."""
        one = torch.empty(1)
        for _ in range(10):
            area = height * width * one.uniform_(*self.scale).item()
            ratio = one.uniform_(*self.logs).exp_().item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = (int(torch.randint(most + 1, (1,)).item()) for most in (height - h, width - w))
                return top, left, h, w
        w, h = width, height
        if width / height < min(self.ratio):
            h = round(w / min(self.ratio))
        elif width / height > max(self.ratio):
            w = round(h * max(self.ratio))
        return (height - h) // 2, (width - w) // 2, h, w


def _mirrored(p: float, picture: Tensor) -> Tensor:
    return picture.flip(-1) if torch.rand(1).item() < p else picture
