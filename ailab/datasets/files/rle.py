"""Masks of COCO annotations: run-length encoding (RLE), plain or compressed, and polygons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.files.boxes import are_numbers
from ailab.errors import DataError

_NEEDED = "masks of polygons need the package pycocotools: pip install 'ailab[coco]'."


def check_segmentation(value: Any, size: tuple[int, int], where: str) -> None:
    """Check the segmentation of an annotation without decoding the mask.

    Args:
        value: A list of polygons of at least three points each, or RLE `{"size": [H, W], "counts": ...}`.
        size: (H, W) of the image in pixels.
        where: The file and the annotation, for messages.

    Raises:
        DataError: `value` is neither of the two, the RLE has another size, or polygons need pycocotools and it is not installed.
    """
    if isinstance(value, dict):
        _checked_counts(cast("dict[str, Any]", value), size, where)
        return
    polygons = cast("list[Any]", value) if isinstance(value, list) else []
    if not polygons or not all(_is_polygon(p) for p in polygons):
        raise DataError(
            f"{where}: expected a segmentation of polygons [[x0, y0, x1, y1, x2, y2, ...], ...] or "
            f"{{'size': [H, W], 'counts': ...}}, got {value!r:.80}."
        )
    _coco_masks(where)


def decode_mask(value: Any, size: tuple[int, int], where: str) -> Tensor:
    """Decode the segmentation of an annotation to a mask: (H, W) bool, the same as pycocotools' `annToMask`.

    Raises:
        DataError: As `check_segmentation`.
    """
    if isinstance(value, dict):
        return mask_from_counts(_checked_counts(cast("dict[str, Any]", value), size, where), size)
    masks = _coco_masks(where)
    runs = masks.merge(masks.frPyObjects([[float(x) for x in p] for p in value], *size))
    return mask_from_counts(decompress_counts(runs["counts"]), size)


def mask_from_counts(counts: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Decode uncompressed RLE counts to a mask: (H, W) bool. Runs of 0 and 1 alternate, in column-major order."""
    lengths = torch.tensor(counts, dtype=torch.int64)
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(lengths).view(size[1], size[0]).T.contiguous()


def decompress_counts(text: str | bytes) -> list[int]:
    """Decompress the counts of COCO's compressed RLE.

    The text holds signed numbers in base 32. From the fourth number on, it holds the difference to the count two before.
    Source: `rleFrString` in cocoapi, common/maskApi.c.

    Raises:
        ValueError: A character is not part of the format, or the text ends inside a number.
    """
    counts: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        digit = code - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"character {chr(code)!r}")
        value |= (digit & 0x1F) << shift
        shift += 5
        if digit & 0x20:
            continue
        if digit & 0x10:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError("the text ends inside a number")
    return counts


def _checked_counts(value: dict[str, Any], size: tuple[int, int], where: str) -> list[int]:
    counts, given = value.get("counts"), value.get("size")
    try:
        runs: list[int] = decompress_counts(counts) if isinstance(counts, (str, bytes)) else list(counts or ())
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: these are no RLE counts: {error}.") from error
    if not {*map(type, runs)} <= {int}:
        raise DataError(f"{where}: these are no RLE counts: {counts!r:.80}.")
    same = isinstance(given, (list, tuple)) and list(cast("Sequence[Any]", given)) == list(size)
    if not same or min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        came = f"size {given!r:.40} and {sum(runs)} pixels"[:99]
        wanted = f"size {list(size)} and {size[0] * size[1]} pixels"
        raise DataError(f"{where}: expected RLE counts of the image, {wanted}, got {came}.")
    return runs


def _is_polygon(value: Any) -> bool:
    numbers = cast("list[Any]", value) if isinstance(value, list) else []
    return len(numbers) >= 6 and len(numbers) % 2 == 0 and are_numbers(numbers)


def _coco_masks(where: str) -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError(f"{where}: {_NEEDED}") from error
    return mask
