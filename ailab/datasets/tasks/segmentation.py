"""Semantic and panoptic segmentation: a class, or a class and an instance, for every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image_header import PNG, check_png
from ailab.datasets.tasks.task import Task, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class SegmentationTask(Task):
    """Semantic segmentation: `{"image": (C, H, W) uint8, "mask": (H, W) int64}`.

    "mask" is the class of each pixel, or `ignore_index` for pixels without a class. Define `load_image` and `load_mask`.
    """

    input_field: str | None = "image"
    kinds: Mapping[str, str] = {"image": "image", "mask": "mask"}
    ignore_index: int = 255

    def load_image(self, raw: Any) -> Any:
        """The image: (C, H, W) uint8, or a PIL image."""
        raise NotImplementedError(f"{type(self).__name__}: define load_image.")

    def load_mask(self, raw: Any) -> Any:
        """The class map: (H, W) integers, as `read_label_map` gives."""
        raise NotImplementedError(f"{type(self).__name__}: define load_mask.")

    def load(self, raw: Any) -> Sample:
        """The fields "image" and "mask"."""
        image = tensor_of(self.load_image(raw), "load_image")
        mask = _map(self.load_mask(raw), image, "load_mask")
        if self.classes is not None:
            _check_classes(mask, len(self.classes), self.ignore_index)
        return {"image": image, "mask": mask}


class PanopticTask(Task):
    """Panoptic segmentation: `{"image": (C, H, W) uint8, "semantic": (H, W) int64, "instance": (H, W) int64}`.

    "semantic" is the class of each pixel, or `ignore_index`. "instance" is the number of its object, or 0 for no object. Define
    `load_image`, `load_semantic` and `load_instance`.
    """

    kinds: Mapping[str, str] = {"image": "image", "semantic": "mask", "instance": "mask"}
    ignore_index: int = 255

    def load_image(self, raw: Any) -> Any:
        """The image: (C, H, W) uint8, or a PIL image."""
        raise NotImplementedError(f"{type(self).__name__}: define load_image.")

    def load_semantic(self, raw: Any) -> Any:
        """The class of each pixel: (H, W) integers."""
        raise NotImplementedError(f"{type(self).__name__}: define load_semantic.")

    def load_instance(self, raw: Any) -> Any:
        """The number of the object of each pixel: (H, W) integers, 0 for no object."""
        raise NotImplementedError(f"{type(self).__name__}: define load_instance.")

    def load(self, raw: Any) -> Sample:
        """The image and both maps."""
        image = tensor_of(self.load_image(raw), "load_image")
        semantic = _map(self.load_semantic(raw), image, "load_semantic")
        if self.classes is not None:
            _check_classes(semantic, len(self.classes), self.ignore_index)
        return {"image": image, "semantic": semantic, "instance": _map(self.load_instance(raw), image, "load_instance")}


def _map(value: Any, image: Tensor, what: str) -> Tensor:
    found = tensor_of(value, what).long()
    if found.shape != image.shape[-2:]:
        raise ValueError(f"{what}: expected a map of the image's {tuple(image.shape[-2:])} pixels, got {tuple(found.shape)}")
    return found


def _check_classes(mask: Tensor, classes: int, ignore: int) -> None:
    wrong = (mask != ignore) & ((mask < 0) | (mask >= classes))
    if wrong.any():
        value = int(mask[wrong][0])
        raise ValueError(f"the mask has the class {value}; expected 0 to {classes - 1}, or {ignore} for pixels without a class")


def read_label_map(path: str | Path, *, max_pixels: float = 64e6) -> Tensor:
    """Read a class map from an image file: (H, W) int64.

    The value of a pixel is the palette index of a palette image, the grey value of an 8 or 16-bit grey image, and
    `r + 256 * g + 65536 * b` of a colour image, as in COCO's panoptic images.

    Args:
        path: Path of the file.
        max_pixels: The largest number of pixels. A larger image is refused.

    Raises:
        BadFile: The file is missing, is no such image, is damaged, or is too large.
    """
    import numpy as np
    from PIL import Image

    try:
        if Path(path).exists() and not Path(path).is_file():
            raise BadFile("unreadable", "it is no regular file")
        data = Path(path).read_bytes()
        if data.startswith(PNG):
            check_png(data, int(max_pixels))  # Pillow gives 0 for missing rows
        with Image.open(BytesIO(data)) as image:
            if image.width * image.height > max_pixels:
                raise BadFile("bomb", f"{image.width}x{image.height} pixels, more than {max_pixels:.0f}", str(path))
            if image.mode in ("RGB", "RGBA"):
                r, g, b = torch.from_numpy(np.array(image.convert("RGB"))).long().unbind(-1)
                return r + 256 * g + 65536 * b
            if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                text = f"mode {image.mode} is no class map. Save it with a palette or as grey"
                raise BadFile("unsupported_mode", text, str(path))
            return torch.from_numpy(np.array(image).astype("int64"))
    except BadFile as error:
        raise BadFile(error.kind, error.message, str(path)) from error
    except FileNotFoundError as error:
        raise BadFile("missing", "there is no such file", str(path)) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile("corrupt", f"no class map: {error}", str(path)) from error
