"""A contact sheet: samples as pictures, with their labels, boxes, masks and keypoints drawn in."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CELL, _LINE, _GAP = 192, 14, 6  # pixels: of a cell's longer side, a line of text, between cells
_COLUMNS = 6
_TEXT = 30  # letters of a caption line
_OPACITY = 0.45  # of a mask


@dataclass(frozen=True)
class Look:
    """What a dataset says of its fields, where it does."""

    kinds: Mapping[str, str]  # field -> "image", "mask", "boxes" or "keypoints"
    classes: Sequence[str] | None = None
    box_format: str = "xyxy"  # or "xywh", "cxcywh"
    normalize: bool = False  # boxes are shares of the picture's sides

    @staticmethod
    def of(dataset: Any) -> Look:
        """From the attributes `kinds`, `renamed`, `classes`, `box_format` and `normalize`."""
        renamed = getattr(dataset, "renamed", {})
        kinds = {renamed.get(name, name): kind for name, kind in getattr(dataset, "kinds", {}).items()}
        classes = getattr(dataset, "classes", None)
        return Look(kinds, classes or None, getattr(dataset, "box_format", "xyxy"), bool(getattr(dataset, "normalize", False)))

    def kind(self, name: str, value: Any, size: Sequence[int] | None = None) -> str:
        """What a field is: as the dataset says, else by its shape, given the size of the picture."""
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


def contact_sheet(samples: Sequence[Mapping[str, Any]], names: Sequence[str], look: Look) -> Any:
    """Samples side by side, a PIL picture.

    Args:
        samples: fields by name; the first picture of each is shown, or a table of its numbers where it has none.
        names: of the samples, over the captions.
        look: what the fields are.
    """
    from PIL import Image

    scale = _scale([_picture(s, look) for s in samples])
    cells = [_cell(sample, name, look, scale) for sample, name in zip(samples, names, strict=True)]
    columns = min(_COLUMNS, len(cells))
    width, height = max(c.width for c in cells) + _GAP, max(c.height for c in cells) + _GAP
    whole = Image.new("RGB", (columns * width + _GAP, math.ceil(len(cells) / columns) * height + _GAP), (32, 32, 36))
    for i, cell in enumerate(cells):
        whole.paste(cell, (_GAP + i % columns * width, _GAP + i // columns * height))
    return whole


def _picture(sample: Mapping[str, Any], look: Look) -> tuple[str, Tensor] | None:
    found = ((n, v) for n, v in sample.items() if look.kind(n, v) == "image" and v.dim() == 3)
    return next(found, None)


def _scale(found: Sequence[tuple[str, Tensor] | None]) -> tuple[float, float]:
    """The values that become black and white: 0 and 255 of bytes, 0 and 1 of floats that lie between, else least and most."""
    pictures = [p[1] for p in found if p is not None and p[1].numel()]
    if not pictures:
        return 0.0, 1.0
    low, high = min(float(p.min()) for p in pictures), max(float(p.max()) for p in pictures)
    if pictures[0].dtype == torch.uint8 and high > 63:
        return 0.0, 255.0
    if pictures[0].is_floating_point() and low >= 0 and 0.2 < high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1


def _cell(sample: Mapping[str, Any], name: str, look: Look, scale: tuple[float, float]) -> Any:
    from PIL import Image, ImageDraw

    found = _picture(sample, look)
    lines = [name]
    if found is None:
        shown, size, zoom = Image.new("RGB", (_CELL, 0)), None, 1.0
    else:
        size = tuple(found[1].shape[-2:])
        zoom = _CELL / max(size)
        shown = _drawn(found[1], sample, look, scale, zoom)
    for field, value in sample.items():
        kind = look.kind(field, value, size)
        if kind in ("label", "values", "text"):
            lines.append(_caption(field, value, look))
        elif kind == "boxes" and found is not None:
            lines.append(f"{field}: {len(value)}")
    cell = Image.new("RGB", (_CELL, shown.height + _LINE * len(lines)), (32, 32, 36))
    cell.paste(shown, ((_CELL - shown.width) // 2, 0))
    pen = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        pen.text((2, shown.height + _LINE * i), line[:_TEXT], fill=(235, 235, 235) if i else (150, 170, 200))
    return cell


def _caption(field: str, value: Any, look: Look) -> str:
    if isinstance(value, Tensor):
        value = value.item() if value.dim() == 0 else value
    if isinstance(value, Tensor):
        head = ", ".join(f"{v:g}" for v in value.flatten()[:4].tolist())
        return f"{field}: [{head}{', ...' if value.numel() > 4 else ''}]"
    if isinstance(value, int) and not isinstance(value, bool) and _is_class(field, look):
        return f"{field}: {class_name(value, look.classes)}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{field}: {''.join(c if c.isprintable() else '?' for c in text)}"


def _is_class(field: str, look: Look) -> bool:
    return look.classes is not None and field in ("target", "label", "labels", "class", "y")


def class_name(index: int, classes: Sequence[str] | None) -> str:
    """The name of a class, or its number."""
    return str(classes[index]) if classes and 0 <= index < len(classes) else str(index)


def _drawn(picture: Tensor, sample: Mapping[str, Any], look: Look, scale: tuple[float, float], zoom: float) -> Any:
    """A picture at the size of a cell, with what is known of it on top."""
    from PIL import Image, ImageDraw

    low, high = scale
    pixels = ((picture.detach().float().cpu() - low) / (high - low) * 255).clamp(0, 255)
    pixels = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
    size = tuple(picture.shape[-2:])
    for field, value in sample.items():
        if look.kind(field, value, size) == "mask" and tuple(value.shape[-2:]) == size and value is not picture:
            pixels = _masked(pixels, value)
    shown = Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    sides = (max(1, round(size[1] * zoom)), max(1, round(size[0] * zoom)))
    shown = shown.resize(sides, Image.Resampling.NEAREST if zoom >= 2 else Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(shown)
    labels = next((sample[n] for n in ("labels", "target", "label") if isinstance(sample.get(n), Tensor)), None)
    for field, value in sample.items():
        kind = look.kind(field, value, size)
        if kind == "boxes":
            _draw_boxes(pen, corners(value, look, size) * zoom, labels, look)
        elif kind == "keypoints":
            _draw_points(pen, value, sample.get("visible"), zoom)
    return shown


def _masked(pixels: Tensor, mask: Tensor) -> Tensor:
    """Coloured over: a map of classes (H, W), or a mask (N, H, W) of 0 and 1 for each object; 0 and 255 stay clear."""
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


def corners(boxes: Tensor, look: Look, size: Sequence[int]) -> Tensor:
    """Boxes of any of the formats as x0, y0, x1, y1 in pixels of a picture of `size` (height, width): (N, 4) float32."""
    values = boxes.detach().float().cpu().view(-1, 4)
    if look.normalize:
        values = values * torch.tensor([size[1], size[0], size[1], size[0]])
    first, last = values[:, :2], values[:, 2:]
    if look.box_format == "xywh":
        return torch.cat([first, first + last], 1)
    return torch.cat([first - last / 2, first + last / 2], 1) if look.box_format == "cxcywh" else values


def _draw_boxes(pen: Any, boxes: Tensor, labels: Tensor | None, look: Look) -> None:
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not (x1 > x0 and y1 > y0):  # padding
            continue
        index = int(labels[i]) if labels is not None and labels.dim() == 1 and i < len(labels) else None
        tint = colour(i if index is None else index + 1)
        pen.rectangle((x0, y0, x1, y1), outline=tint, width=2)
        if index is not None:
            text = class_name(index, look.classes)
            pen.rectangle((x0, y0, x0 + 2 + pen.textlength(text), y0 + 11), fill=tint)
            pen.text((x0 + 2, y0), text, fill=(0, 0, 0))


def _draw_points(pen: Any, points: Tensor, visible: Any, zoom: float) -> None:
    """Keypoints (N, K, 2) or (N, K, 3), in pixels; those whose visibility is 0 are left out."""
    for i, person in enumerate(points.detach().float().cpu().reshape(-1, *points.shape[-2:])):
        for k, point in enumerate(person.tolist()):
            seen = visible[i, k] if isinstance(visible, Tensor) and visible.dim() == 2 else point[2] if len(point) > 2 else 1
            if seen > 0:
                x, y = point[0] * zoom, point[1] * zoom
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour(i + 1), outline=(0, 0, 0))


def colour(index: int) -> tuple[int, int, int]:
    """A bright colour; neighbours are far apart."""
    r, g, b = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 1.0)
    return round(r * 255), round(g * 255), round(b * 255)
