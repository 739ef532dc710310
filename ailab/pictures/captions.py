"""A grid of images with captions, as one image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ailab.pictures.samples import Picture

_LINE, _GAP = 14, 4  # pixels


def captioned(pictures: Sequence[Picture]) -> Tensor:
    """Arrange pictures in a grid, each with its caption below it: (3, H, W) uint8.

    The caption is red if it has a target and a prediction and they differ.
    """
    from PIL import Image, ImageDraw

    columns = math.ceil(math.sqrt(len(pictures)))
    words = [p.caption.split(", ") if p.caption else [] for p in pictures]
    wide = max([p.image.shape[2] for p in pictures] + [7 * len(line) for lines in words for line in lines]) + _GAP
    high = max(p.image.shape[1] for p in pictures) + max(len(lines) for lines in words) * _LINE + _GAP
    sheet = Image.new("RGB", (wide * columns, high * math.ceil(len(pictures) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, lines) in enumerate(zip(pictures, words, strict=True)):
        left, top = i % columns * wide, i // columns * high
        sheet.paste(Image.fromarray(picture.image.permute(1, 2, 0).contiguous().numpy()), (left, top))
        wrong = len(lines) == 2 and lines[0].split(" ", 1)[1] != lines[1].split(" ", 1)[1]
        for k, line in enumerate(lines):
            below = top + picture.image.shape[1] + k * _LINE
            draw.text((left + 2, below), line, fill="red" if wrong and k else "black")
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1)
