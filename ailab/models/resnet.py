"""Residual networks for images: ResNet-18 to 152, with the stems and the shortcut of the later papers."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from ailab.errors import ConfigError
from ailab.models.images import Images, Pixels
from ailab.registry import MODELS

Stem = Literal["7x7", "3x3", "deep"]
Shortcut = Literal["conv", "avg"]

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut: (B, inputs, H, W) -> (B, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride=stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = shortcut_of(inputs, width, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut: (B, inputs, H, W) -> (B, 4 width, H / stride, W / stride).

    The stride is that of the 3x3 convolution ("v1.5"); the paper has it at the first one.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut):
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = conv1x1(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride=stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, outputs), nn.BatchNorm2d(outputs)
        self.downsample = shortcut_of(inputs, outputs, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = relu(self.bn1(self.conv1(x)))
        y = relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return relu(y + (x if self.downsample is None else self.downsample(x)))


def shortcut_of(inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> nn.Sequential | None:
    """What the input passes on its way around a block; None for the identity, where the shape stays.

    "conv" takes every second pixel by the stride of a 1x1 convolution; "avg" averages 2x2 pixels before it (ResNet-D).
    """
    if stride == 1 and inputs == outputs:
        return None
    norm = nn.BatchNorm2d(outputs)
    if shortcut == "conv":
        return nn.Sequential(conv1x1(inputs, outputs, stride=stride), norm)
    # Of an odd size the last row stands alone, as in a convolution of stride 2.
    pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, conv1x1(inputs, outputs), norm)


STAGES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {  # table 1 of the paper
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


@MODELS.register_module()
class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and a linear layer.

    The names of the tensors are those of torchvision, so `cfg.model.init` takes its files. Source: He et al., "Deep residual
    learning for image recognition", CVPR 2016. Deep stem and average-pool shortcut: He et al., "Bag of tricks for image
    classification with convolutional neural networks", CVPR 2019 (ResNet-C and ResNet-D).

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of classes: logits per image.
        in_channels: channels of an image, C.
        stem: "7x7", of stride 2 and with 3x3 max pooling after it: stride 32 in all. "deep": three 3x3 convolutions in the place
            of the 7x7 one. "3x3": one such of stride 1 and no pooling, for images of 8 to 64 pixels: stride 8 in all.
        shortcut: how a block's shortcut halves the image: "conv" or "avg". ResNet-50-D is `stem="deep", shortcut="avg"`.
        width: channels of the first stage; 64 in the paper. The others have 2, 4 and 8 times as many.
        dropout: probability of dropping a feature before the linear layer.
        zero_init_residual: begin with blocks that are the identity: the last norm of each has weight 0 (Goyal et al. 2017).
        mean: subtracted from the input. One value per channel or one for all, in the units of the input (0..255 for uint8).
        std: divides the input after `mean` is subtracted. One value per channel or one for all, in the same units.
        channels_last: keep weights and activations of the convolutions in the channels_last memory format. Often faster.

    Raises:
        ConfigError: there is no such depth, stem or shortcut.
    """

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: Stem = "7x7",
        shortcut: Shortcut = "conv",
        width: int = 64,
        dropout: float = 0.0,
        zero_init_residual: bool = False,
        mean: Pixels = 0.0,
        std: Pixels = 1.0,
        channels_last: bool = False,
    ):
        super().__init__()
        _check_names(depth, stem, shortcut)
        block, blocks = STAGES[depth]
        small = stem == "3x3"
        hint = "Resize the images" + ("" if small else ", or take stem='3x3', which needs 8x8")
        self.images = Images("ResNet", in_channels, mean, std, least=8 if small else 32, hint=hint)
        self.conv1 = _stem(in_channels, width, stem)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        inputs = width
        for i, count in enumerate(blocks):
            stage: list[nn.Module] = []
            for j in range(count):
                stage.append(block(inputs, width << i, 2 if i and not j else 1, shortcut))
                inputs = (width << i) * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
        self.num_features = inputs
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, num_classes)
        self._init_weights(zero_init_residual)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def _init_weights(self, zero_init_residual: bool) -> None:
        """He et al. 2015, by the number of outputs; norms and the linear layer are as torch makes them."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def maps(self, input: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> the outputs of the four stages, at strides 4, 8, 16 and 32; 1, 2, 4 and 8 with `stem="3x3"`."""
        x = self.maxpool(relu(self.bn1(self.conv1(self.images(input)))))
        found: list[Tensor] = []
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
            found.append(x)
        return found

    def features(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_features): the mean of the last stage."""
        return self.maps(input)[-1].mean((2, 3))

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> (B, num_classes) logits."""
        return self.fc(self.dropout(self.features(input)))


def _stem(channels: int, width: int, stem: Stem) -> nn.Module:
    """The convolutions before the first norm: (B, channels, H, W) -> (B, width, H or H / 2, W or W / 2)."""
    if stem == "7x7":
        return nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    if stem == "3x3":
        return conv3x3(channels, width)
    half = width // 2
    first = [conv3x3(channels, half, stride=2), nn.BatchNorm2d(half), nn.ReLU()]
    return nn.Sequential(*first, conv3x3(half, half), nn.BatchNorm2d(half), nn.ReLU(), conv3x3(half, width))


def _check_names(depth: int, stem: str, shortcut: str) -> None:
    for name, given, offered in (
        ("depth", depth, STAGES),
        ("stem", stem, ("7x7", "3x3", "deep")),
        ("shortcut", shortcut, ("conv", "avg")),
    ):
        if given not in offered:
            raise ConfigError(f"ResNet.{name}: {given!r} is none of {', '.join(map(repr, offered))}.")
