"""Boxes: checked against their image when they are read, and converted to the format that is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ailab.errors import DataError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
BoxPolicy = Literal["error", "clip", "drop"]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, from the upper left corner of the first pixel

_SHOWN = 5  # of the boxes that do not fit
_ROUNDING = 1.0  # pixels that a box may reach outside, and is cut: annotation tools round


class BoxError(DataError):
    """A box that does not fit into its image.

    Args:
        message: the box and what would do.
        where: the file and row.
    """

    def __init__(self, message: str, where: str):
        super().__init__(message)
        self.where = where


class Misfits:
    """The boxes of a data set that do not fit, to be told together: one by one they would take a run each."""

    def __init__(self) -> None:
        self.errors: list[BoxError] = []

    def add(self, error: BoxError) -> None:
        """Take note of one."""
        self.errors.append(error)

    def tell(self) -> None:
        """Nothing, if all boxes fit.

        Raises:
            DataError: the first one, and where the next ones are.
        """
        if not self.errors:
            return
        places = [e.where.rpartition("/")[2] for e in self.errors[1:]]
        shown = "; ".join(places[:_SHOWN]) + ("; ..." if len(places) > _SHOWN else ".")
        more = f"\n  {len(places)} more do not fit: {shown}" if places else ""
        raise DataError(f"{self.errors[0]}{more}")


def checked_box(numbers: Any, size: tuple[int, int], policy: BoxPolicy, where: str, *, form: BoxFormat = "xyxy") -> Box | None:
    """A box of an annotation, inside its image.

    Args:
        numbers: four of them, in the format `form`, in pixels.
        size: (H, W) of the image.
        policy: what happens to one that has no area or reaches outside by more than a pixel. "clip" cuts it at the border.
        where: the file and row, for messages.
        form: what the four numbers are.

    Returns:
        The box as xyxy, or None for one to leave out: by "drop", or by "clip" where nothing of it is inside.

    Raises:
        DataError: these are not four finite numbers.
        BoxError: under "error", the box does not fit.
    """
    box = _corners(numbers, where, form)
    (h, w), (x0, y0, x1, y1) = size, box
    cut: Box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(w)), min(y1, float(h)))
    empty = cut[2] <= cut[0] or cut[3] <= cut[1]
    outside = max(abs(a - b) for a, b in zip(box, cut, strict=True)) > _ROUNDING
    if not empty and (not outside or policy == "clip"):
        return cut
    if policy != "error":
        return None
    flat = x1 <= x0 or y1 <= y0
    what = "has no area" if flat else f"reaches outside the image of {w}x{h} pixels"
    fix = "Correct it, or box_policy='clip' (cut) or 'drop' (leave out)."
    raise BoxError(f"{where}: the box {list(numbers)} ({form}) {what}.\n  {fix}", where)


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite ints or floats, and no bools."""
    try:
        return {*map(type, values)} <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:  # an int that no float holds
        return False


def _corners(numbers: Any, where: str, form: BoxFormat) -> Box:
    values = cast("Sequence[Any]", numbers) if isinstance(numbers, (list, tuple)) else ()
    if len(values) != 4 or not are_numbers(values):
        raise DataError(f"{where}: expected a box of four finite numbers ({form}), got {numbers!r:.80}.")
    a, b, c, d = (float(v) for v in values)
    if form == "xywh":
        return a, b, a + c, b + d
    return (a - c / 2, b - d / 2, a + c / 2, b + d / 2) if form == "cxcywh" else (a, b, c, d)


def converted(boxes: Tensor, to: BoxFormat, size: tuple[int, int] | None = None) -> Tensor:
    """Boxes in another format, and as fractions of the image's sides where its size is given.

    Args:
        boxes: (N, 4) xyxy in pixels.
        to: the format.
        size: (H, W) to divide by.

    Returns:
        (N, 4) of the same dtype.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    if to == "xywh":
        boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], -1)
    elif to == "cxcywh":
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
    if size is None:
        return boxes
    h, w = size
    return boxes / torch.tensor([w, h, w, h], dtype=boxes.dtype)


def box_tensor(boxes: Sequence[Box]) -> Tensor:
    """(N, 4) float32, for no box too."""
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
