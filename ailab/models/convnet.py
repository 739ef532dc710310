"""A small convolutional network for images: stages of convolution, batch norm and ReLU, with max pooling between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ailab.registry import MODELS


def block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU; the image size does not change."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@MODELS.register_module()
class ConvNet(nn.Module):
    """A stage of `depth` blocks for each width, 2x2 max pooling between stages, global average pooling and a linear layer.

    The model normalises its input itself, so it takes images as they are stored. An exported model does the same.

    Args:
        in_channels: channels of an image, C.
        num_classes: number of classes: logits per image.
        widths: channels of each stage. Height and width are halved before every stage but the first.
        depth: blocks per stage. One number for all stages, or one for each.
        mean: subtracted from the input. One value per channel or one for all, in the units of the input (0..255 for uint8).
        std: divides the input after `mean` is subtracted. One value per channel or one for all, in the same units.
        dropout: probability of dropping a feature before the linear layer.
        channels_last: keep weights and activations of the convolutions in the channels_last memory format. Often faster.
    """

    mean: Tensor  # (C or 1, 1, 1)
    std: Tensor

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (32, 64, 128),
        depth: int | Sequence[int] = 2,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        dropout: float = 0.0,
        channels_last: bool = False,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1))
        layers: list[nn.Module] = []
        channels = in_channels
        depths = [depth] * len(widths) if isinstance(depth, int) else depth
        for i, (width, blocks) in enumerate(zip(widths, depths, strict=True)):
            if i:
                layers.append(nn.MaxPool2d(2))
            for _ in range(blocks):
                layers.append(block(channels, width))
                channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> (B, num_classes) logits."""
        x = (input.to(self.mean.dtype) - self.mean) / self.std
        return self.head(self.dropout(self.features(x).mean((2, 3))))
