"""A contact sheet: a grid of samples, with their labels, boxes, masks and keypoints drawn on the images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CELL, _LINE, _GAP = 192, 14, 6  # pixels: longer side of a cell, height of a text line, gap between cells
_COLUMNS = 6
_TEXT = 30  # characters of a caption line
_OPACITY = 0.45  # of masks


@dataclass(frozen=True)
class FieldInfo:
    """What the fields of a sample are, from the attributes of the dataset."""

    kinds: Mapping[str, str]  # field -> "image", "mask", "boxes" or "keypoints"
    classes: Sequence[str] | None = None
    box_format: str = "xyxy"  # or "xywh", "cxcywh"
    normalize: bool = False  # boxes are fractions of the image size

    @staticmethod
    def of(dataset: Any) -> FieldInfo:
        """From the attributes `kinds`, `renamed`, `classes`, `box_format` and `normalize` of a dataset, if it has them."""
        renamed = getattr(dataset, "renamed", {})
        kinds = {renamed.get(name, name): kind for name, kind in getattr(dataset, "kinds", {}).items()}
        classes = getattr(dataset, "classes", None)
        box_format, normalize = getattr(dataset, "box_format", "xyxy"), bool(getattr(dataset, "normalize", False))
        return FieldInfo(kinds, classes or None, box_format, normalize)

    def kind(self, name: str, value: Any, size: Sequence[int] | None = None) -> str:
        """The kind of a field: "image", "mask", "boxes", "keypoints", "label", "values" or "text".

        The kind in `kinds` counts. Otherwise it is guessed from the name and the shape.

        Args:
            name: Name of the field.
            value: Its value.
            size: (H, W) of the image of the sample; None if there is no image.
        """
        if not isinstance(value, Tensor):
            return "text"
        if name in self.kinds:
            return self.kinds[name]
        if value.dim() == 3 and value.shape[0] in (1, 3, 4) and min(value.shape[1:]) > 4:
            whole = not value.is_floating_point() and value.dtype != torch.uint8
            return "mask" if whole and size is not None else "image"
        if value.dim() == 2 and value.shape[1] == 4 and "box" in name:
            return "boxes"
        if size is not None and value.dim() in (2, 3) and tuple(value.shape[-2:]) == tuple(size):
            return "mask"
        return "label" if value.dim() == 0 else "values"


def contact_sheet(samples: Sequence[Mapping[str, Any]], names: Sequence[str], info: FieldInfo) -> Any:
    """Draw samples in a grid. The result is a PIL image.

    Args:
        samples: The samples, dicts of fields. The first image of each is drawn; the other fields are captions.
        names: Names of the samples, above the captions.
        info: What the fields are.
    """
    from PIL import Image

    scale = _scale([_picture(s, info) for s in samples])
    cells = [_cell(sample, name, info, scale) for sample, name in zip(samples, names, strict=True)]
    columns = min(_COLUMNS, len(cells))
    width, height = max(c.width for c in cells) + _GAP, max(c.height for c in cells) + _GAP
    whole = Image.new("RGB", (columns * width + _GAP, math.ceil(len(cells) / columns) * height + _GAP), (32, 32, 36))
    for i, cell in enumerate(cells):
        whole.paste(cell, (_GAP + i % columns * width, _GAP + i // columns * height))
    return whole


def _picture(sample: Mapping[str, Any], info: FieldInfo) -> tuple[str, Tensor] | None:
    found = ((n, v) for n, v in sample.items() if info.kind(n, v) == "image" and v.dim() == 3)
    return next(found, None)


def _scale(found: Sequence[tuple[str, Tensor] | None]) -> tuple[float, float]:
    """The values of black and white: 0 and 255 for uint8, 0 and 1 for floats in that range, otherwise minimum and maximum."""
    pictures = [p[1] for p in found if p is not None and p[1].numel()]
    if not pictures:
        return 0.0, 1.0
    low, high = min(float(p.min()) for p in pictures), max(float(p.max()) for p in pictures)
    if pictures[0].dtype == torch.uint8 and high > 63:
        return 0.0, 255.0
    if pictures[0].is_floating_point() and low >= 0 and 0.2 < high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _cell(sample: Mapping[str, Any], name: str, info: FieldInfo, scale: tuple[float, float]) -> Any:
    from PIL import Image, ImageDraw

    found = _picture(sample, info)
    lines = [name]
    if found is None:
        shown, size, zoom = Image.new("RGB", (_CELL, 0)), None, 1.0
    else:
        size = tuple(found[1].shape[-2:])
        zoom = _CELL / max(size)
        shown = _drawn(found[1], sample, info, scale, zoom)
    for field, value in sample.items():
        kind = info.kind(field, value, size)
        if kind in ("label", "values", "text"):
            lines.append(_caption(field, value, info))
        elif kind == "boxes" and found is not None:
            lines.append(f"{field}: {len(value)}")
    cell = Image.new("RGB", (_CELL, shown.height + _LINE * len(lines)), (32, 32, 36))
    cell.paste(shown, ((_CELL - shown.width) // 2, 0))
    pen = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        pen.text((2, shown.height + _LINE * i), line[:_TEXT], fill=(235, 235, 235) if i else (150, 170, 200))
    return cell


def _caption(field: str, value: Any, info: FieldInfo) -> str:
    if isinstance(value, Tensor):
        value = value.item() if value.dim() == 0 else value
    if isinstance(value, Tensor):
        head = ", ".join(f"{v:g}" for v in value.flatten()[:4].tolist())
        return f"{field}: [{head}{', ...' if value.numel() > 4 else ''}]"
    if isinstance(value, int) and not isinstance(value, bool) and _is_class(field, info):
        return f"{field}: {class_name(value, info.classes)}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{field}: {''.join(c if c.isprintable() else '?' for c in text)}"


def _is_class(field: str, info: FieldInfo) -> bool:
    return info.classes is not None and field in ("target", "label", "labels", "class", "y")


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """The name of a class; its index if the names are unknown."""
    return str(classes[index]) if classes and 0 <= index < len(classes) else str(index)


def _drawn(picture: Tensor, sample: Mapping[str, Any], info: FieldInfo, scale: tuple[float, float], zoom: float) -> Any:
    """An image resized to its cell, with masks, boxes and keypoints drawn on it."""
    from PIL import Image, ImageDraw

    low, high = scale
    pixels = ((picture.detach().float().cpu() - low) / (high - low) * 255).clamp(0, 255)
    pixels = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
    size = tuple(picture.shape[-2:])
    for field, value in sample.items():
        if info.kind(field, value, size) == "mask" and tuple(value.shape[-2:]) == size and value is not picture:
            pixels = _masked(pixels, value)
    shown = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    sides = (max(1, round(size[1] * zoom)), max(1, round(size[0] * zoom)))
    shown = shown.resize(sides, Image.Resampling.NEAREST if zoom >= 2 else Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(shown)
    labels = next((sample[n] for n in ("labels", "target", "label") if isinstance(sample.get(n), Tensor)), None)
    for field, value in sample.items():
        kind = info.kind(field, value, size)
        if kind == "boxes":
            _draw_boxes(pen, corners(value, info, size) * zoom, labels, info)
        elif kind == "keypoints":
            _draw_points(pen, value, sample.get("visible"), zoom)
    return shown


def _masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Draw a class map (H, W), or masks (N, H, W) of objects, over an image. The classes 0 and 255 are not drawn."""
    planes = mask.detach().cpu()
    if planes.dim() == 3:
        order = torch.arange(1, len(planes) + 1)[:, None, None]
        planes = (planes.bool() * order).amax(0) if len(planes) else torch.zeros(pixels.shape[-2:], dtype=torch.int64)
    for index in planes.unique().tolist():
        if index not in (0, 255) and index >= 0:
            here = planes == index
            tint = torch.tensor(colour(int(index)), dtype=torch.float32)[:, None]
            pixels = pixels.clone()
            pixels[:, here] = (1 - _OPACITY) * pixels[:, here] + _OPACITY * tint
    return pixels


def corners(boxes: Tensor, info: FieldInfo, size: Sequence[int]) -> Tensor:
    """Convert boxes from the format of `info` to xyxy in pixels: (N, 4) float32.

    Args:
        boxes: (N, 4) in the format of `info`.
        info: What the fields are.
        size: (H, W) of the image in pixels.
    """
    values = boxes.detach().float().cpu().view(-1, 4)
    if info.normalize:
        values = values * torch.tensor([size[1], size[0], size[1], size[0]])
    first, last = values[:, :2], values[:, 2:]
    if info.box_format == "xywh":
        return torch.cat([first, first + last], 1)
    return torch.cat([first - last / 2, first + last / 2], 1) if info.box_format == "cxcywh" else values


def _draw_boxes(pen: Any, boxes: Tensor, labels: Tensor | None, info: FieldInfo) -> None:
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not (x1 > x0 and y1 > y0):  # padding
            continue
        index = int(labels[i]) if labels is not None and labels.dim() == 1 and i < len(labels) else None
        tint = colour(i if index is None else index + 1)
        pen.rectangle((x0, y0, x1, y1), outline=tint, width=2)
        if index is not None:
            text = class_name(index, info.classes)
            pen.rectangle((x0, y0, x0 + 2 + pen.textlength(text), y0 + 11), fill=tint)
            pen.text((x0 + 2, y0), text, fill=(0, 0, 0))


def _draw_points(pen: Any, points: Tensor, visible: Any, zoom: float) -> None:
    """Draw keypoints (N, K, 2) or (N, K, 3), in pixels. Keypoints of visibility 0 are not drawn."""
    for i, keypoints in enumerate(points.detach().float().cpu().reshape(-1, *points.shape[-2:])):
        for k, point in enumerate(keypoints.tolist()):
            shown = visible[i, k] if isinstance(visible, Tensor) and visible.dim() == 2 else point[2] if len(point) > 2 else 1
            if shown > 0:
                x, y = point[0] * zoom, point[1] * zoom
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour(i + 1), outline=(0, 0, 0))


def colour(index: int) -> tuple[int, int, int]:
    """A bright RGB colour for an index. Neighbouring indices have very different colours."""
    r, g, b = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1.0)
    return round(r * 255), round(g * 255), round(b * 255)
