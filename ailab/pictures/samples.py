"""Images of the samples of a batch, with target and prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SIDE = 96  # pixels; a smaller image is enlarged
_PALETTE = torch.tensor(
    [[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240]]
    + [[240, 50, 230], [210, 245, 60], [250, 190, 212], [0, 128, 128], [220, 190, 255], [170, 110, 40], [128, 0, 0]],
    dtype=torch.uint8,
)  # one colour per class, repeated for further classes


@dataclass(frozen=True)
class Picture:
    """The image of a sample, with a caption."""

    image: Tensor  # (3, H, W) uint8; a target or a prediction that is an image or a class map is beside the input
    caption: str  # e.g. "target 3, predicted 5"


def pictures_of(fields: Mapping[str, Tensor]) -> list[Picture]:
    """Images of the samples of a batch, with one copy from the device.

    Args:
        fields: "input" (B, C, H, W), and optionally "target" and "output" (B, ...).
    """
    host = {n: v.detach().float().cpu() if v.is_floating_point() else v.detach().cpu() for n, v in fields.items()}
    return [_picture({n: v[i] for n, v in host.items()}) for i in range(len(host["input"]))]


def _picture(sample: Mapping[str, Tensor]) -> Picture:
    size, words = sample["input"].shape[-2:], list[str]()
    panels = [_grey_to_colour(_stretched(sample["input"]))]
    target = sample.get("target")
    classes = target is not None and not target.is_floating_point()
    for name, word in (("target", "target"), ("output", "predicted")):
        value = sample.get(name)
        if value is None:
            continue
        if value.shape[-2:] != size or value.dim() < 2:
            words.append(f"{word} {_in_words(value)}")
        elif value.dim() == 3 and value.shape[0] in (1, 3) and not classes:
            panels.append(_grey_to_colour(_stretched(value)))
        else:
            panels.append(_coloured(value.argmax(0) if value.dim() == 3 else value))
    times = max(1, -(-_SIDE // min(size)))
    wide = torch.cat(panels, 2).repeat_interleave(times, 1).repeat_interleave(times, 2)
    return Picture(wide, ", ".join(words))


def _stretched(image: Tensor) -> Tensor:
    """Scale (C, H, W) of any range to uint8. The smallest value becomes 0, the largest 255."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)


def _grey_to_colour(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)


def _coloured(labels: Tensor) -> Tensor:
    """Colour a class map: (H, W) class indices to (3, H, W) uint8."""
    return _PALETTE[labels.long() % len(_PALETTE)].permute(2, 0, 1)


def _in_words(value: Tensor) -> str:
    """A text for a value: the class with the highest score, a number, or the shape."""
    if value.dim() == 1 and len(value) > 1:
        return str(int(value.argmax()))
    if value.numel() == 1:
        return f"{float(value):.3g}" if value.is_floating_point() else str(int(value))
    return f"of shape {tuple(value.shape)}"
