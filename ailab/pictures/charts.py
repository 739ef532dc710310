"""Charts as PIL images: a confusion matrix, curves in a unit square, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ailab.pictures.contact_sheet import colour

_SIDE, _MARGIN, _KEY = 420, 52, 150  # pixels: plot area, room for labels, room for the names of curves
_INK, _GRID = (40, 40, 44), (222, 222, 226)
_CAPTION = 250  # pixels of the line below a matrix
_NAMED = 40  # classes of a matrix whose names are written
_NUMBERED = 16  # classes of a matrix whose counts are written


def confusion_image(matrix: Tensor, names: Sequence[str]) -> Any:
    """A confusion matrix as a PIL image: rows are true classes, columns predicted ones, the darker the more of its row.

    Args:
        matrix: (C, C) counts, a row per true class.
        names: of the C classes.
    """
    from PIL import Image, ImageDraw

    size = len(matrix)
    cell = max(2, min(48, 840 // size))
    wide = 12 + max([7 * len(n[:20]) for n in names] if size <= _NAMED else [40])
    side = cell * size
    image = Image.new("RGB", (wide + max(side, _CAPTION) + 20, wide + side + 30), "white")
    pen = ImageDraw.Draw(image)
    shares = (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).tolist()
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            x, y = wide + column * cell, wide + row * cell
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=_shade(share), outline=_GRID if cell > 6 else None)
            if size <= _NUMBERED and (count := int(matrix[row, column])):
                pen.text((x + cell // 2, y + cell // 2), str(count), fill="white" if share > 0.5 else _INK, anchor="mm")
    if size <= _NAMED:
        for i, name in enumerate(names):
            pen.text((wide - 6, wide + i * cell + cell // 2), _printable(name), fill=_INK, anchor="rm")
            _upright(image, _printable(name), (wide + i * cell + cell // 2, wide - 6))
    pen.text((wide, wide + side + 8), "rows: true class; columns: predicted class", fill=_INK)
    return image


def curves_image(curves: Sequence[tuple[str, Tensor, Tensor]], across: str, up: str) -> Any:
    """Curves in the unit square as a PIL image, with a key.

    Args:
        curves: (name, x, y) with x and y (K,) in [0, 1].
        across: what x is.
        up: what y is.
    """
    image, pen = _frame(across, up, _KEY)
    for i, (name, x, y) in enumerate(curves):
        points = [_place(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        if len(points) > 1:
            pen.line(points, fill=_dark(i), width=2)
        for a, b in points if len(points) == 1 else ():
            pen.ellipse((a - 3, b - 3, a + 3, b + 3), fill=_dark(i))
        top = 12 + 16 * i
        pen.rectangle((_MARGIN + _SIDE + 16, top + 2, _MARGIN + _SIDE + 26, top + 10), fill=_dark(i))
        pen.text((_MARGIN + _SIDE + 32, top), _printable(name), fill=_INK)
    return image


def reliability_image(count: Tensor, confidence: Tensor, accuracy: Tensor) -> Any:
    """A reliability diagram as a PIL image: a bar of the accuracy of each bin, a point at its mean confidence, and the diagonal.

    Args:
        count: (bins,) samples; an empty bin is not drawn.
        confidence: (bins,) in [0, 1].
        accuracy: (bins,) in [0, 1].
    """
    image, pen = _frame("confidence", "accuracy", 16)
    bins = len(count)
    for i, (n, sure, right) in enumerate(zip(count.tolist(), confidence.tolist(), accuracy.tolist(), strict=True)):
        if n:
            left, top = _place(i / bins, right)
            end, floor = _place((i + 1) / bins, 0.0)
            pen.rectangle((left + 1, top, end - 1, floor), fill=(120, 160, 220))
            x, y = _place(sure, right)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(200, 40, 40))
    pen.line([_place(0.0, 0.0), _place(1.0, 1.0)], fill=(120, 120, 124), width=1)
    return image


def _frame(across: str, up: str, right: int) -> tuple[Any, Any]:
    """An empty unit square with a grid and the names of its axes: an image, and what draws on it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_MARGIN + _SIDE + right, _SIDE + 2 * _MARGIN - 16), "white")
    pen = ImageDraw.Draw(image)
    for tick in range(0, 11, 2):
        (x, y), (left, top) = _place(tick / 10, tick / 10), _place(0.0, 1.0)
        pen.line([(x, top), (x, top + _SIDE)], fill=_GRID)
        pen.line([(left, y), (left + _SIDE, y)], fill=_GRID)
        pen.text((x, top + _SIDE + 4), f"{tick / 10:g}", fill=_INK, anchor="ma")
        pen.text((left - 6, y), f"{tick / 10:g}", fill=_INK, anchor="rm")
    pen.text((_MARGIN + _SIDE // 2, 12 + _SIDE + 22), across, fill=_INK, anchor="ma")
    _upright(image, up, (12, 12 + _SIDE // 2 + 30))
    return image, pen


def _place(x: float, y: float) -> tuple[float, float]:
    """The pixel of a point of the unit square."""
    return _MARGIN + x * _SIDE, 12 + (1 - y) * _SIDE


def _upright(image: Any, text: str, foot: tuple[int, int]) -> None:
    """Write a text from bottom to top. `foot` is the middle of its lower end."""
    from PIL import Image, ImageDraw

    wide = max(1, int(ImageDraw.Draw(image).textlength(text)) + 2)
    strip = Image.new("RGB", (wide, 14), "white")
    ImageDraw.Draw(strip).text((0, 0), text, fill=_INK)
    image.paste(strip.rotate(90, expand=True), (foot[0] - 7, max(0, foot[1] - wide)))


def _shade(share: float) -> tuple[int, int, int]:
    return round(255 - 225 * share), round(255 - 175 * share), round(255 - 90 * share)


def _dark(index: int) -> tuple[int, int, int]:
    r, g, b = colour(index)
    return round(r * 0.75), round(g * 0.75), round(b * 0.75)


def _printable(name: str) -> str:
    """At most 20 characters that the built-in font has."""
    return "".join(c if c.isprintable() and ord(c) < 256 else "?" for c in name[:20])
