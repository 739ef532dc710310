"""A small convolutional network for images: blocks of convolution, batch norm and ReLU, halved in size between widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ailab.registry import MODELS


def block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU; keeps the size of the picture."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


@MODELS.register_module()
class ConvNet(nn.Module):
    """`depth` blocks of each width with a 2x2 max pooling between widths, then a global average and a linear layer.

    Pictures come as they are stored; the model subtracts `mean` and divides by `std` itself, so an exported model does too.

    Args:
        in_channels: channels of a picture, C.
        num_classes: logits per picture.
        widths: channels of each stage; the picture is halved before every stage but the first.
        depth: blocks per stage; one number for all stages or one for each.
        mean: per channel, or one for all; in the units of the input (0..255 for uint8 pictures).
        std: as `mean`.
        dropout: probability of dropping a feature before the linear layer.
        channels_last: keep the convolutions' weights, and with them what they compute, in that memory format; often faster.
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
