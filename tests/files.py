"""Small real files for the tests of data sets: pictures, sounds, COCO and VOC annotations."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels(seed: int = 0, h: int = 12, w: int = 16) -> Tensor:
    """(3, h, w) uint8."""
    return torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def picture(path: Path, image: Tensor | None = None, **save: Any) -> Tensor:
    """A lossless picture file (.png) of (3, H, W) uint8, or of a class map (H, W); returns what was written."""
    image = pixels() if image is None else image
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy() if image.dim() == 3 else image.numpy()
    Image.fromarray(np.ascontiguousarray(array)).save(path, **save)
    return image


def sound(path: Path, samples: Tensor, rate: int = 8000, width: int = 2) -> Path:
    """A WAV file of (C, T) whole numbers of `width` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {1: "<u1", 2: "<i2", 4: "<i4"}
    if width == 3:
        content = b"".join(int(v).to_bytes(3, "little", signed=True) for v in samples.T.reshape(-1))
    else:
        content = samples.T.contiguous().numpy().astype(kinds[width]).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path


def coco(folder: Path, annotations: Sequence[dict[str, Any]], *, images: int = 2, h: int = 12, w: int = 16) -> Path:
    """A COCO file with the categories 3 "cat" and 7 "dog", and its pictures in `folder`/images."""
    listed = [{"id": 10 + i, "file_name": f"{i}.png", "width": w, "height": h} for i in range(images)]
    for i, image in enumerate(listed):
        picture(folder / "images" / image["file_name"], pixels(i, h, w))
    names = ["nose", "left", "right"]
    categories = [{"id": 7, "name": "dog", "keypoints": names}, {"id": 3, "name": "cat", "keypoints": names}]
    path = folder / "coco.json"
    path.write_text(json.dumps({"images": listed, "annotations": list(annotations), "categories": categories}))
    return path


def thing(id: int, bbox: Sequence[float], *, image: int = 10, category: int = 3, **more: Any) -> dict[str, Any]:
    """A COCO annotation."""
    return {"id": id, "image_id": image, "category_id": category, "bbox": list(bbox), "area": bbox[2] * bbox[3], **more}


def voc(folder: Path, name: str, objects: Sequence[tuple[str, Sequence[float]]], *, more: str = "", size: str = "") -> Path:
    """A VOC file with its picture of 12x16 pixels, in the layout of the development kit."""
    picture(folder / "JPEGImages" / f"{name}.png")
    body = "".join(
        f"<object><name>{n}</name><difficult>{'1' if n == 'hidden' else '0'}</difficult><bndbox><xmin>{b[0]}</xmin>"
        f"<ymin>{b[1]}</ymin><xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for n, b in objects
    )
    size = size or "<size><width>16</width><height>12</height><depth>3</depth></size>"
    path = folder / "Annotations" / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{more}<annotation><filename>{name}.png</filename>{size}{body}</annotation>")
    return path
