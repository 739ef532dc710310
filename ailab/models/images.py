"""The way into an image model: pixels as they are stored become normalised numbers, and images that do not fit are refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ailab.errors import ConfigError

Pixels = float | Sequence[float]  # one value for all channels, or one for each, in the units of the input


class Images(nn.Module):
    """`(input - mean) / std`, in the dtype of `mean`. `mean` and `std` are no part of the state_dict: the cfg has them.

    Args:
        owner: name of the model, for messages.
        channels: of an image, C.
        mean: subtracted from the input. One value per channel or one for all, in the units of the input (0..255 for uint8).
        std: divides the input after `mean` is subtracted. One value per channel or one for all, in the same units.
        least: the smallest height and width that the model takes, in pixels.
        exact: the height and width that images must have, in pixels; None for any.
        hint: what would do, where an image is too small; the end of the message.

    Raises:
        ConfigError: `mean` or `std` has another number of values than 1 or `channels`, or a value of `std` is not above 0.
    """

    mean: Tensor  # (C or 1, 1, 1)
    std: Tensor

    def __init__(
        self,
        owner: str,
        channels: int,
        mean: Pixels = 0.0,
        std: Pixels = 1.0,
        *,
        least: int = 1,
        exact: tuple[int, int] | None = None,
        hint: str = "Resize the images",
    ):
        super().__init__()
        self.owner, self.channels, self.least, self.exact, self.hint = owner, channels, least, exact, hint
        for name, given in (("mean", mean), ("std", std)):
            values = [float(v) for v in ([given] if isinstance(given, (int, float)) else given)]
            if len(values) not in (1, channels):
                raise ConfigError(f"{owner}.{name}: {len(values)} values for {channels} channels. Give one, or one for each.")
            if name == "std" and min(values) <= 0:
                raise ConfigError(f"{owner}.std: {given} is not above 0.")
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)
        self.identity = (mean, std) == (0.0, 1.0)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) uint8 or float -> (B, C, H, W) float.

        Raises:
            ConfigError: the shape does not fit. Not asked while a graph is traced.
        """
        if not torch.compiler.is_compiling():
            self._check(tuple(input.shape))
        x = input if input.is_floating_point() else input.to(self.mean.dtype)
        return x if self.identity else (x.to(self.mean.dtype) - self.mean) / self.std

    def _check(self, shape: tuple[int, ...]) -> None:
        what = f"{self.owner}: the input is {shape}"
        if len(shape) != 4:
            raise ConfigError(f"{what}; images are (batch, {self.channels}, height, width).")
        if shape[1] != self.channels:
            last = " The channels seem to be last: move them to dimension 1." if shape[3] == self.channels else ""
            raise ConfigError(
                f"{what}, with {shape[1]} channels for {self.channels}.{last} Set in_channels, or convert the images."
            )
        height, width = shape[2:]
        if min(height, width) < self.least:
            raise ConfigError(f"{what}: {height}x{width} is smaller than {self.least}x{self.least}. {self.hint}.")
        if self.exact is not None and (height, width) != self.exact:
            wanted = "x".join(map(str, self.exact))
            raise ConfigError(f"{what}: {height}x{width} is not {wanted}. Set image_size, or resize the images.")
