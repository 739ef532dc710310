"""Bounding boxes: check a box against its image, and convert between formats."""

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

_SHOWN = 5  # further boxes that a message lists
_TOLERANCE = 1.0  # pixels that a box may reach outside its image, since annotation tools round; it is clipped


class BoxError(DataError):
    """A bounding box that does not fit into its image.

    Args:
        message: The box, the problem and the fix.
        where: The file and the record, for the list of further boxes.
    """

    def __init__(self, message: str, where: str):
        super().__init__(message)
        self.where = where


class BoxErrors:
    """Collects the invalid boxes of a dataset, so that one error reports them all."""

    def __init__(self) -> None:
        self.errors: list[BoxError] = []

    def add(self, error: BoxError) -> None:
        """Collect one error."""
        self.errors.append(error)

    def raise_if_any(self) -> None:
        """Raise one error for all collected ones.

        Raises:
            DataError: At least one error was collected. The message is that of the first, and the places of the others.
        """
        if not self.errors:
            return
        places = [e.where.rpartition("/")[2] for e in self.errors[1:]]
        shown = "; ".join(places[:_SHOWN]) + ("; ..." if len(places) > _SHOWN else ".")
        more = f"\n  {len(places)} more do not fit: {shown}" if places else ""
        raise DataError(f"{self.errors[0]}{more}")


def checked_box(numbers: Any, size: tuple[int, int], policy: BoxPolicy, where: str, *, form: BoxFormat = "xyxy") -> Box | None:
    """Check the bounding box of an annotation against its image.

    A box is invalid if it has no area or reaches outside the image by more than one pixel.

    Args:
        numbers: The four numbers of the box, in pixels.
        size: (H, W) of the image in pixels.
        policy: For an invalid box: "error" raises, "clip" clips it at the image border, "drop" leaves it out.
        where: The file and the record, for messages.
        form: The format of `numbers`.

    Returns:
        The box as xyxy, clipped to the image. None if it is left out: an invalid box with "drop", or with "clip" a box without
        area inside the image.

    Raises:
        DataError: `numbers` are not four finite numbers.
        BoxError: The box is invalid and the policy is "error".
    """
    box = _to_xyxy(numbers, where, form)
    (h, w), (x0, y0, x1, y1) = size, box
    cut: Box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(w)), min(y1, float(h)))
    empty = cut[2] <= cut[0] or cut[3] <= cut[1]
    outside = max(abs(a - b) for a, b in zip(box, cut, strict=True)) > _TOLERANCE
    if not empty and (not outside or policy == "clip"):
        return cut
    if policy != "error":
        return None
    flat = x1 <= x0 or y1 <= y0
    what = "has no area" if flat else f"reaches outside the image of {w}x{h} pixels"
    fix = "Correct it, or set box_policy='clip' (clip at the border) or 'drop' (leave out)."
    raise BoxError(f"{where}: the box {list(numbers)} ({form}) {what}.\n  {fix}", where)


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all values are finite ints or floats. A bool is not a number here."""
    try:
        return {*map(type, values)} <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:  # an int too large for a float
        return False


def _to_xyxy(numbers: Any, where: str, form: BoxFormat) -> Box:
    values = cast("Sequence[Any]", numbers) if isinstance(numbers, (list, tuple)) else ()
    if len(values) != 4 or not are_numbers(values):
        raise DataError(f"{where}: expected a box of four finite numbers ({form}), got {numbers!r:.80}.")
    a, b, c, d = (float(v) for v in values)
    if form == "xywh":
        return a, b, a + c, b + d
    return (a - c / 2, b - d / 2, a + c / 2, b + d / 2) if form == "cxcywh" else (a, b, c, d)


def convert_boxes(boxes: Tensor, to: BoxFormat, size: tuple[int, int] | None = None) -> Tensor:
    """Convert boxes from xyxy to another format, and to fractions of the image size if `size` is given.

    Args:
        boxes: (N, 4) xyxy in pixels.
        to: The format of the result.
        size: (H, W) of the image. With it x and w are divided by W, and y and h by H.

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
    """Boxes as (N, 4) float32; (0, 4) for an empty list."""
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
