"""Where a token stands: fixed sine-cosine tables, and rotary embeddings, of a grid of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid_sincos(height: int, width: int, features: int) -> Tensor:
    """(height * width, features) float32: sines and cosines of the column, then of the row, of each patch, row by row.

    Source: He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, and Chen et al. 2021 (MoCo v3).
    """
    rates = 1e4 ** -(torch.arange(features // 4, dtype=torch.float64) / (features // 4))
    rows, columns = _grid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64))
    parts = [f(place[:, None] * rates) for place in (columns, rows) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, 1).float()


def grid_angles(height: int, width: int, features: int, base: float = 100.0) -> Tensor:
    """(height * width, features / 2) float32: angles of the row, then of the column, of each patch, row by row.

    The middle of a patch is a number in (-1, 1) of the picture's height and width, so a larger picture has the same range.
    Source: Siméoni et al., "DINOv3", 2025; rotary embeddings: Su et al., "RoFormer", 2021.
    """
    rates = 2 * math.pi * base ** -(torch.arange(features // 4, dtype=torch.float64) / (features // 4))
    centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in (height, width)]
    return torch.cat([place[:, None] * rates for place in _grid(*centres)], 1).float()


def _grid(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the column of each patch, row by row."""
    return rows.repeat_interleave(len(columns)), columns.repeat(len(rows))


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """(..., T, D) queries or keys, whose features i and i + D / 2 are turned by `angles` (..., T, D / 2). Float32 inside."""
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(torch.promote_types(x.dtype, angles.dtype)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
