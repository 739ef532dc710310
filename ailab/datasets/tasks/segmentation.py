"""Segmentation: a class, or a class and an object, for every pixel."""

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
    """Samples `{"image": (C, H, W) uint8, "mask": (H, W) int64}`, the class of each pixel; `ignore_index` for none."""

    kinds: Mapping[str, str] = {"image": "image", "mask": "mask"}
    ignore_index: int = 255

    def load_image(self, raw: Any) -> Any:
        """(C, H, W) uint8, or a PIL picture."""
        raise NotImplementedError(f"{type(self).__name__}: define load_image.")

    def load_mask(self, raw: Any) -> Any:
        """(H, W) whole numbers, as `read_label_map` gives."""
        raise NotImplementedError(f"{type(self).__name__}: define load_mask.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        image = tensor_of(self.load_image(raw), "load_image")
        mask = _map(self.load_mask(raw), image, "load_mask")
        if self.classes is not None:
            _check_classes(mask, len(self.classes), self.ignore_index)
        return {"image": image, "mask": mask}


class PanopticTask(Task):
    """Samples `{"image", "semantic": (H, W) int64 class, "instance": (H, W) int64 object of it}`; 0 is no object."""

    kinds: Mapping[str, str] = {"image": "image", "semantic": "mask", "instance": "mask"}
    ignore_index: int = 255

    def load_image(self, raw: Any) -> Any:
        """(C, H, W) uint8, or a PIL picture."""
        raise NotImplementedError(f"{type(self).__name__}: define load_image.")

    def load_semantic(self, raw: Any) -> Any:
        """(H, W) class of each pixel."""
        raise NotImplementedError(f"{type(self).__name__}: define load_semantic.")

    def load_instance(self, raw: Any) -> Any:
        """(H, W) number of the object of each pixel, 0 for none."""
        raise NotImplementedError(f"{type(self).__name__}: define load_instance.")

    def load(self, raw: Any) -> Sample:
        """The picture and both maps."""
        image = tensor_of(self.load_image(raw), "load_image")
        semantic = _map(self.load_semantic(raw), image, "load_semantic")
        if self.classes is not None:
            _check_classes(semantic, len(self.classes), self.ignore_index)
        return {"image": image, "semantic": semantic, "instance": _map(self.load_instance(raw), image, "load_instance")}


def _map(value: Any, image: Tensor, what: str) -> Tensor:
    found = tensor_of(value, what).long()
    if found.shape != image.shape[-2:]:
        raise ValueError(f"{what}: expected a map of the picture's {tuple(image.shape[-2:])} pixels, got {tuple(found.shape)}")
    return found


def _check_classes(mask: Tensor, classes: int, ignore: int) -> None:
    wrong = (mask != ignore) & ((mask < 0) | (mask >= classes))
    if wrong.any():
        value = int(mask[wrong][0])
        raise ValueError(f"the mask has the class {value}; there are {classes}, and {ignore} for pixels that do not count")


def read_label_map(path: str | Path, *, max_pixels: float = 64e6) -> Tensor:
    """The numbers in a picture of classes, (H, W) int64: the index of a palette picture, the value of an 8 or 16-bit gray one.

    A picture in colour is `r + 256 * g + 65536 * b`, as COCO's panoptic pictures are written.

    Raises:
        BadFile: the file is missing, is no such picture, is damaged or too large.
    """
    import numpy as np
    from PIL import Image

    try:
        if Path(path).exists() and not Path(path).is_file():
            raise BadFile("unreadable", "it is no regular file")
        data = Path(path).read_bytes()
        if data.startswith(PNG):
            check_png(data, int(max_pixels))  # Pillow gives 0 for rows that are not there
        with Image.open(BytesIO(data)) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadFile("bomb", f"{picture.width}x{picture.height} pixels, more than {max_pixels:.0f}", str(path))
            if picture.mode in ("RGB", "RGBA"):
                r, g, b = torch.from_numpy(np.array(picture.convert("RGB"))).long().unbind(-1)
                return r + 256 * g + 65536 * b
            if picture.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
                text = f"mode {picture.mode} holds no classes; save it with a palette or as gray"
                raise BadFile("unsupported_mode", text, str(path))
            return torch.from_numpy(np.array(picture).astype("int64"))
    except BadFile as error:
        raise BadFile(error.kind, error.message, str(path)) from error
    except FileNotFoundError as error:
        raise BadFile("missing", "there is no such file", str(path)) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadFile("corrupt", f"no map of classes: {error}", str(path)) from error
