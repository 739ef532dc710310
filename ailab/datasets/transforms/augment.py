"""Augmentations of a whole batch. They run on the device, inside the compiled step.

Each is a function x -> x on images (B, C, H, W) of any real dtype. Every sample draws its own parameters from torch's global
generator. A run seeds it before each step from (seed, step, rank).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ailab.registry import TRANSFORMS


def _uniform(x: Tensor, low: float, high: float, *shape: int) -> Tensor:
    """Uniform float32 in [low, high) on the device of `x`: (B, *shape)."""
    return low + (high - low) * torch.rand((x.shape[0], *shape), device=x.device)


def _real(x: Tensor) -> Tensor:
    """Convert integers to float32. A floating dtype is unchanged."""
    return x if x.is_floating_point() else x.float()


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchShift:
    """Shift each image by a random whole number of pixels, vertically and horizontally. The dtype is kept.

    Args:
        pixels: Largest shift in each direction, in pixels.
        fill: Value of the pixels that are shifted in, in the units of the image.
    """

    pixels: int
    fill: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), each shifted."""
        b, c, h, w = x.shape
        shift = torch.randint(0, 2 * self.pixels + 1, (2, b, 1), device=x.device)
        rows = (torch.arange(h, device=x.device) + shift[0])[:, None, :, None]  # (B, 1, H, 1)
        cols = (torch.arange(w, device=x.device) + shift[1])[:, None, None, :]
        sample = torch.arange(b, device=x.device)[:, None, None, None]
        channel = torch.arange(c, device=x.device)[None, :, None, None]
        return functional.pad(x, [self.pixels] * 4, value=self.fill)[sample, channel, rows, cols]


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchAffine:
    """Random affine transform: rotate, shear, scale and translate each image about its centre.

    Bilinear interpolation, zeros outside the image. Integers become float32.

    Args:
        degrees: Largest rotation in each direction, in degrees.
        translate: Largest translation in each direction, as a fraction of the height and the width.
        scale: (smallest, largest) scale factor.
        shear: Largest shear angle along x in each direction, in degrees.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: Sequence[float] = (1.0, 1.0)
    shear: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), each transformed."""
        x, (h, w) = _real(x), x.shape[-2:]
        turn, slant, low, high = math.radians(self.degrees), math.radians(self.shear), *self.scale
        angle, lean = _uniform(x, -turn, turn), torch.tan(_uniform(x, -slant, slant))
        size, move = 1 / _uniform(x, low, high), _uniform(x, -2 * self.translate, 2 * self.translate, 2)
        cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
        # The inverse map, output to input. An image spans [-1, 1] both ways, so what mixes x and y is scaled by the aspect.
        to_x = torch.stack([cos, (cos * lean - sin) * (h / w), move[:, 0]], 1)
        to_y = torch.stack([sin * (w / h), sin * lean + cos, move[:, 1]], 1)
        grid = functional.affine_grid(torch.stack([to_x, to_y], 1).to(x.dtype), list(x.shape), align_corners=False)
        return functional.grid_sample(x, grid, align_corners=False)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchFlip:
    """Flip each image horizontally with probability `p`. The dtype is kept.

    Args:
        p: Probability for each image.
    """

    p: float = 0.5

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), some of them flipped."""
        return torch.where(_uniform(x, 0, 1, 1, 1, 1) < self.p, x.flip(-1), x)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchErase:
    """Random erasing: fill one rectangle of each image with probability `p`. The dtype is kept.

    The aspect ratio is log-uniform in [1/3, 3]. The rectangle is clipped at the image border. Source: Zhong et al.,
    arXiv:1708.04896.

    Args:
        p: Probability for each image.
        area: (smallest, largest) area of the rectangle, as a fraction of the image area.
        fill: Value of the rectangle, in the units of the image.
    """

    p: float = 0.5
    area: Sequence[float] = (0.02, 0.2)
    fill: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), some of them with a filled rectangle."""
        (h, w), (low, high) = x.shape[-2:], self.area
        share, ratio = _uniform(x, low, high), torch.exp(_uniform(x, -math.log(3), math.log(3)))
        centre = _uniform(x, 0, 1, 2)
        half_h, half_w = h * torch.sqrt(share * ratio) / 2, w * torch.sqrt(share / ratio) / 2
        in_rows = (torch.arange(h, device=x.device) + 0.5 - h * centre[:, :1]).abs() <= half_h[:, None]  # (B, H)
        in_cols = (torch.arange(w, device=x.device) + 0.5 - w * centre[:, 1:]).abs() <= half_w[:, None]
        chosen = _uniform(x, 0, 1, 1, 1) < self.p
        hit = in_rows[:, :, None] & in_cols[:, None, :] & chosen  # (B, H, W)
        return x.masked_fill(hit[:, None], self.fill)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchCrop:
    """Random crop of each image, optionally after padding. The dtype is kept.

    Args:
        size: (H, W) of the crop in pixels.
        pad: Pixels of padding on each side, before the crop.
        fill: Value of the padding, in the units of the image.
    """

    size: Sequence[int]
    pad: int = 0
    fill: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width)."""
        x = functional.pad(x, [self.pad] * 4, value=self.fill) if self.pad else x
        (b, c, h, w), (height, width) = x.shape, self.size
        top = torch.randint(0, h - height + 1, (b, 1), device=x.device)
        left = torch.randint(0, w - width + 1, (b, 1), device=x.device)
        rows = (torch.arange(height, device=x.device) + top)[:, None, :, None]  # (B, 1, height, 1)
        cols = (torch.arange(width, device=x.device) + left)[:, None, None, :]
        sample = torch.arange(b, device=x.device)[:, None, None, None]
        channel = torch.arange(c, device=x.device)[None, :, None, None]
        return x[sample, channel, rows, cols]


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchResizedCrop:
    """Random resized crop: crop a random area and aspect ratio of each image, and resize it. Integers become float32.

    Bilinear interpolation without antialiasing, so resize images to at most twice `size` when they are read. Source: Szegedy et
    al., arXiv:1409.4842; the crop is always inside the image.

    Args:
        size: (H, W) of the result in pixels.
        area: (smallest, largest) area of the crop, as a fraction of the image area.
        ratio: (smallest, largest) aspect ratio of the crop, width / height, drawn log-uniformly.
    """

    size: Sequence[int]
    area: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width)."""
        x, (h, w) = _real(x), x.shape[-2:]
        share = _uniform(x, self.area[0], self.area[1])
        aspect = torch.exp(_uniform(x, math.log(self.ratio[0]), math.log(self.ratio[1]))) * h / w
        wide, high = (share * aspect).sqrt().clamp(max=1), (share / aspect).sqrt().clamp(max=1)  # fractions of the image
        zero = torch.zeros_like(wide)
        at_x, at_y = _uniform(x, -1, 1) * (1 - wide), _uniform(x, -1, 1) * (1 - high)  # centres; an image spans [-1, 1]
        maps = torch.stack([torch.stack([wide, zero, at_x], 1), torch.stack([zero, high, at_y], 1)], 1)
        grid = functional.affine_grid(maps.to(x.dtype), [*x.shape[:2], *self.size], align_corners=False)
        return functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchJitter:
    """Colour jitter: change brightness, contrast and saturation of each image, in this order. Integers become float32.

    Each factor is uniform in [max(0, 1 - value), 1 + value]. The result is clamped to [0, `limit`], as by torchvision's
    ColorJitter.

    Args:
        brightness: Largest change of the brightness factor, at least 0.
        contrast: Largest change of the contrast factor, at least 0. Contrast is the distance to the mean grey of the image.
        saturation: Largest change of the saturation factor, at least 0. Saturation is the distance of a pixel to its own grey.
            Only for images of three channels.
        limit: Value of white. Default: 255 for integers and 1 for floats.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    limit: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), each with its own factors."""
        white = self.limit if self.limit is not None else 1.0 if x.is_floating_point() else 255.0
        x = _real(x)
        x = (x * self._factor(x, self.brightness)).clamp(0, white)
        mean = _grey(x).mean((-2, -1), keepdim=True)
        x = (mean + (x - mean) * self._factor(x, self.contrast)).clamp(0, white)
        if x.shape[1] == 3:
            grey = _grey(x)
            x = (grey + (x - grey) * self._factor(x, self.saturation)).clamp(0, white)
        return x

    @staticmethod
    def _factor(x: Tensor, most: float) -> Tensor:
        return _uniform(x, max(0.0, 1 - most), 1 + most, 1, 1, 1).to(x.dtype)


def _grey(x: Tensor) -> Tensor:
    """The luma of RGB (ITU-R BT.601), or the only channel: (B, 1, H, W)."""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:] if x.shape[1] == 3 else x.mean(1, keepdim=True)


@TRANSFORMS.register_module()
@dataclass(frozen=True)
class BatchNormalize:
    """Normalise images: `(x - mean) / std`. Integers become float32.

    Args:
        mean: Mean, one number for all channels or one per channel, in the units of the image.
        std: Standard deviation, one number for all channels or one per channel, in the units of the image.
    """

    mean: float | Sequence[float]
    std: float | Sequence[float]

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised."""
        x = _real(x)
        if isinstance(self.mean, (int, float)) and isinstance(self.std, (int, float)):
            return (x - self.mean) / self.std
        mean, std = (self._plane(v, x) for v in (self.mean, self.std))
        return (x - mean) / std

    @staticmethod
    def _plane(values: float | Sequence[float], x: Tensor) -> Tensor:
        """(C, 1, 1). Filled on the device: a captured CUDA graph cannot copy a constant tensor from the host."""
        each = [values] * x.shape[1] if isinstance(values, (int, float)) else values
        return torch.stack([torch.full((), float(v), dtype=x.dtype, device=x.device) for v in each])[:, None, None]
