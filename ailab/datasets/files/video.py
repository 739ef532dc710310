"""Video clips that are stored as one image file per frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image import read_image
from ailab.datasets.files.paths import IMAGE_EXTENSIONS


def read_frames(source: str | Path | Sequence[str | Path], count: int, *, size_hint: tuple[int, int] | None = None) -> Tensor:
    """Read `count` frames at equal distances from a video: (count, 3, H, W) uint8. A shorter video repeats frames.

    Args:
        source: A folder of image files, read in the order of their names, or a list of image paths.
        count: Number of frames.
        size_hint: (H, W) in pixels that is enough, see `read_image`.

    Raises:
        BadFile: The folder has no image, or an image cannot be read.
        ValueError: The frames differ in size.
    """
    if isinstance(source, (str, Path)):
        try:
            names = sorted(n for n in os.listdir(source) if n.lower().endswith(IMAGE_EXTENSIONS) and not n.startswith("."))
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
