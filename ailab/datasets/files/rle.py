"""Masks of COCO annotations: run lengths, plain or compressed, and polygons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.files.boxes import are_numbers
from ailab.errors import DataError

_NEEDED = "masks of polygons need the package pycocotools: pip install 'ailab[coco]'."


def check_segmentation(value: Any, size: tuple[int, int], where: str) -> None:
    """Check the form of a segmentation, without making the mask.

    Raises:
        DataError: it is neither a list of polygons (each at least three points) nor run lengths of the image's size; or it needs
            pycocotools, which is missing.
    """
    if isinstance(value, dict):
        _run_lengths(cast("dict[str, Any]", value), size, where)
        return
    polygons = cast("list[Any]", value) if isinstance(value, list) else []
    if not polygons or not all(_is_polygon(p) for p in polygons):
        raise DataError(
            f"{where}: expected a segmentation of polygons [[x0, y0, x1, y1, x2, y2, ...], ...] or "
            f"{{'size': [H, W], 'counts': ...}}, got {value!r:.80}."
        )
    _coco_masks(where)


def decoded(value: Any, size: tuple[int, int], where: str) -> Tensor:
    """The mask of a segmentation: (H, W) bool, as pycocotools' `annToMask` gives.

    Raises:
        DataError: as `check_segmentation`.
    """
    if isinstance(value, dict):
        return run_mask(_run_lengths(cast("dict[str, Any]", value), size, where), size)
    masks = _coco_masks(where)
    runs = masks.merge(masks.frPyObjects([[float(x) for x in p] for p in value], *size))
    return run_mask(uncompressed(runs["counts"]), size)


def run_mask(counts: Sequence[int], size: tuple[int, int]) -> Tensor:
    """(H, W) bool out of the lengths of runs of 0 and 1 in turn, down the columns."""
    lengths = torch.tensor(counts, dtype=torch.int64)
    values = torch.arange(len(counts)) % 2 == 1
    return values.repeat_interleave(lengths).view(size[1], size[0]).T.contiguous()


def uncompressed(text: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed text: base 32 with a sign, each beyond the third the difference to the one two before.

    Raises:
        ValueError: a character is not of the format, or the text ends within a number.
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
        raise ValueError("it ends within a number")
    return counts


def _run_lengths(value: dict[str, Any], size: tuple[int, int], where: str) -> list[int]:
    counts, said = value.get("counts"), value.get("size")
    try:
        runs: list[int] = uncompressed(counts) if isinstance(counts, (str, bytes)) else list(counts or ())
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: these are no run lengths: {error}.") from error
    if not {*map(type, runs)} <= {int}:
        raise DataError(f"{where}: these are no run lengths: {counts!r:.80}.")
    same = isinstance(said, (list, tuple)) and list(cast("Sequence[Any]", said)) == list(size)
    if not same or min(runs, default=-1) < 0 or sum(runs) != size[0] * size[1]:
        came = f"size {said!r:.40} and {sum(runs)} pixels"[:99]
        wanted = f"size {list(size)} and {size[0] * size[1]} pixels"
        raise DataError(f"{where}: expected run lengths of the image, {wanted}, got {came}.")
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
