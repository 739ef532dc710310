"""Each model of ailab, small, with a batch that it can learn by heart: the table of the laws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ailab.models import MLP, ConvNet, ResNet, ViT

CrossEntropy = dict(type="CrossEntropyLoss")


@dataclass(frozen=True)
class Case:
    cfg: dict[str, Any]  # of the model: type and arguments
    fields: Callable[[], dict[str, Tensor]]  # a batch
    wrong: tuple[tuple[dict[str, Tensor], str], ...]  # fields that do not fit, and the sentence that is told
    loss: dict[str, Any] | None = field(default_factory=lambda: CrossEntropy)  # None: the model gives its own
    lr: float = 1e-2
    below: float = 0.05  # the mean loss of the second half of the steps
    steps: int = 40
    nightly: bool = False  # too slow for each run of the tests

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.cfg["type"](**{k: v for k, v in self.cfg.items() if k not in ("type", "mapping", "output_keys")})


def pictures(size: int = 32, channels: int = 3, classes: int = 4, count: int = 8) -> Callable[[], dict[str, Tensor]]:
    def made() -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        return {
            "input": torch.randn(count, channels, size, size, generator=g),
            "target": torch.arange(count) % classes,
        }

    return made


def picture(*shape: int) -> dict[str, Tensor]:
    return {"input": torch.zeros(shape)}


TINY = dict(num_classes=4, width=8)
VIT = dict(image_size=16, patch=4, width=32, depth=2, heads=2, num_classes=4)
CASES = {
    "MLP": Case(
        dict(type=MLP, sizes=(12, 32, 4)),
        lambda: {k: v[:, :, :2, :2].contiguous() if k == "input" else v for k, v in pictures()().items()},
        (),
    ),
    "ConvNet": Case(dict(type=ConvNet, in_channels=3, num_classes=4, widths=(8, 16), depth=1), pictures(8), ()),
    "ResNet": Case(
        dict(type=ResNet, depth=18, **TINY),
        pictures(),
        (
            (picture(2, 3, 28, 28), "ResNet: the input is (2, 3, 28, 28): 28x28 is smaller than 32x32. Resize the images, or"),
            (picture(2, 1, 32, 32), "1 channels for 3. Set in_channels, or convert the images."),
            (picture(2, 32, 32, 3), "The channels seem to be last: move them to dimension 1."),
            (picture(3, 32, 32), "images are (batch, 3, height, width)."),
        ),
        steps=24,
        below=0.2,
    ),
    "ResNet-D": Case(
        dict(type=ResNet, depth=50, stem="deep", shortcut="avg", zero_init_residual=True, mean=0.1, std=(1, 2, 1), **TINY),
        pictures(),
        ((picture(2, 3, 64, 31), "64x31 is smaller than 32x32"),),
        nightly=True,
    ),
    "ResNet 3x3": Case(
        dict(type=ResNet, depth=18, stem="3x3", dropout=0.1, channels_last=True, **TINY),
        pictures(16),
        ((picture(2, 3, 7, 7), "7x7 is smaller than 8x8. Resize the images."),),
        nightly=True,
    ),
    "ViT": Case(
        dict(type=ViT, **VIT, drop_path=0.1, layer_scale=0.5, dropout=0.05),
        pictures(16),
        (
            (picture(2, 3, 28, 28), "ViT: the input is (2, 3, 28, 28): 28x28 is not 16x16. Set image_size, or resize"),
            (picture(2, 4, 16, 16), "4 channels for 3."),
        ),
        lr=3e-3,
        below=0.5,
    ),
    "ViT RoPE": Case(
        dict(type=ViT, **VIT, pos="rope", registers=2, qk_norm=True, patch_dropout=0.25), pictures(16), (), lr=3e-3, below=0.5
    ),
    "ViT mean": Case(dict(type=ViT, **VIT, pos="sincos", pool="mean"), pictures(16), (), lr=3e-3, below=0.5),
    "ViT attention pooling": Case(dict(type=ViT, **VIT, pool="map"), pictures(16), (), lr=3e-3, below=0.5),
}
