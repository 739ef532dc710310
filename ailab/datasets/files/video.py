"""The frames of a video that is stored as pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image import read_image
from ailab.datasets.files.paths import PICTURES


def read_frames(source: str | Path | Sequence[str | Path], count: int, *, size_hint: tuple[int, int] | None = None) -> Tensor:
    """`count` frames spread evenly over a video: (count, 3, H, W) uint8. A shorter one repeats frames.

    Args:
        source: a folder of pictures, in the order of their names; or their paths.
        count: number of frames.
        size_hint: as `read_image`.

    Raises:
        BadFile: the folder has no picture, or one cannot be read.
        ValueError: the frames differ in size.
    """
    if isinstance(source, (str, Path)):
        try:
            names = sorted(n for n in os.listdir(source) if n.lower().endswith(PICTURES) and not n.startswith("."))
        except OSError as error:
            raise BadFile("missing", str(error.strerror or error), str(source)) from error
        paths: Sequence[str | Path] = [os.path.join(source, n) for n in names]
    else:
        paths = source
    if not paths:
        raise BadFile("missing", "there is no frame", str(source))
    chosen = [paths[min(int((i + 0.5) * len(paths) / count), len(paths) - 1)] for i in range(count)]
    read = {p: read_image(p, size_hint=size_hint) for p in dict.fromkeys(chosen)}
    if len(shapes := {tuple(f.shape) for f in read.values()}) > 1:
        raise ValueError(f"{source!s:.200}: the frames differ in size: {sorted(shapes)}")
    return torch.stack([read[p] for p in chosen])
