"""Batch augmentations that change the size or the colours: exact against slices and torchvision, one draw an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from ailab.datasets import BatchCrop, BatchJitter, BatchResizedCrop

OPS = [
    (BatchCrop((6, 5), pad=1), (6, 5)),
    (BatchResizedCrop((7, 11)), (7, 11)),
    (BatchJitter(0.5, 0.5, 0.5), (8, 10)),
]


def pictures(dtype: torch.dtype = torch.float32, channels: int = 3) -> Tensor:
    whole = torch.randint(1, 256, (6, channels, 8, 10), generator=torch.Generator().manual_seed(0))
    return whole.to(torch.uint8) if dtype == torch.uint8 else whole.to(dtype) / 255


@pytest.mark.parametrize(("op", "size"), OPS, ids=lambda op: type(op).__name__)
def test_they_are_pure_seeded_and_trace(op: Any, size: tuple[int, int]) -> None:
    """The input is untouched, the same seed gives the same images, bytes and floats agree, and there is one graph."""
    for dtype in (torch.float32, torch.uint8):
        x = pictures(dtype)
        kept = x.clone()
        torch.manual_seed(3)
        out = op(x)
        assert out.shape == (6, 3, *size)
        assert torch.equal(x, kept)
        torch.manual_seed(3)
        torch.compiler.reset()
        assert torch.equal(torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(x), out)
        torch.manual_seed(3)
        floats = op(pictures())
        torch.testing.assert_close(out.float() / (255 if dtype == torch.uint8 else 1), floats, atol=1e-5, rtol=1e-5)


def test_each_crop_is_a_window_of_its_image() -> None:
    """Every image gets one of the possible windows, exactly; all of them come; a window of full size is the image."""
    x = pictures()
    padded = functional.pad(x, [1] * 4, value=0.5)
    possible = [padded[:, :, i : i + 9, j : j + 10] for i in range(2) for j in range(3)]
    seen: set[int] = set()
    for _ in range(30):
        out = BatchCrop((9, 10), pad=1, fill=0.5)(x)
        found = [[k for k, p in enumerate(possible) if torch.equal(p[i], out[i])] for i in range(6)]
        assert all(found)
        seen |= {k for ks in found for k in ks}
    assert seen == set(range(6))
    assert torch.equal(BatchCrop((8, 10))(x), x)


def test_a_resized_crop_is_a_resized_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window on whole pixels, enlarged, is what interpolate makes of that slice; the whole image at its size is itself."""
    x = pictures()
    torch.testing.assert_close(BatchResizedCrop((8, 10), area=(1, 1), ratio=(1.25, 1.25))(x), x)
    # the left upper quarter: share 1/4, aspect of the image, centre at (-1/2, -1/2)
    drawn = iter([0.25, 0.2231435513142097, -1.0, -1.0])
    monkeypatch.setattr("ailab.datasets.transforms.augment._uniform", lambda x, low, high: torch.full((len(x),), next(drawn)))
    window = BatchResizedCrop((8, 10))(x)
    wanted = functional.interpolate(x[:, :, :5, :6], (10, 12), mode="bilinear")[:, :, :8, :10]
    torch.testing.assert_close(window[:, :, :7, :9], wanted[:, :, :7, :9], atol=1e-5, rtol=0)


def test_windows_have_the_asked_area_and_aspect() -> None:
    """On an image of its own coordinates each window lies inside, and has an area and an aspect of the asked ranges."""
    h, w = 40, 60
    rows, cols = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    x = torch.stack([rows, cols])[None].expand(500, -1, -1, -1).contiguous()
    out = BatchResizedCrop((20, 20), area=(0.1, 0.3))(x)
    high = (out[:, 0, 18, 0] - out[:, 0, 1, 0]) * 20 / 17
    wide = (out[:, 1, 0, 18] - out[:, 1, 0, 1]) * 20 / 17
    share, aspect = high * wide / (h * w), wide / high
    assert 0.099 <= share.min() < 0.12 < 0.28 < share.max() <= 0.301
    assert 0.749 <= aspect.min() < 0.8 < 1.25 < aspect.max() <= 1.334
    assert out.min() >= 0.5 and out[:, 0].max() <= 39.5 and out[:, 1].max() <= 59.5


def test_jitter_is_that_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """With given factors: brightness, contrast and saturation of torchvision on floats, one factor for each image."""
    x = pictures()
    factors = torch.linspace(0.4, 1.6, 6)
    monkeypatch.setattr("ailab.datasets.transforms.augment._uniform", lambda x, *_: factors[:, None, None, None])
    out = BatchJitter(0.6, 0.6, 0.6)(x)
    for i, factor in enumerate(factors.tolist()):
        wanted = vision.adjust_contrast(vision.adjust_brightness(x[i], factor), factor)
        torch.testing.assert_close(out[i], vision.adjust_saturation(wanted, factor), atol=2e-6, rtol=0)


def test_no_jitter_is_the_identity() -> None:
    """With all changes 0, images of any number of channels are as they were, up to rounding."""
    for channels in (1, 2, 3):
        x = pictures(channels=channels)
        torch.testing.assert_close(BatchJitter()(x), x, atol=1e-6, rtol=0)
