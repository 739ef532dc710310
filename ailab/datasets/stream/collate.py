"""Collation of samples whose fields differ in length or size: padding to static sizes, and masks of what counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import default_collate  # pyright: ignore[reportUnknownVariableType]

from ailab.binding import wrap_sample
from ailab.errors import ConfigError, nearest
from ailab.registry import COLLATES
from ailab.signature import CheckedBy, check_choice

Size = int | Sequence[int]
Room = Callable[[tuple[int, ...], torch.dtype], Tensor]  # (shape, dtype) -> contiguous memory
_Overflow = Literal["error", "cut"]
MASK = "_mask"  # ending of the field that says what of another counts


@COLLATES.register_module()
@dataclass(frozen=True)
class PadCollate:
    """Stack samples; pad the fields that differ, and add `<field>_mask`, bool, True for what is real.

    A field with a `max_size` always comes out of that size, so one graph serves every batch. One that is `ragged` is padded to
    the longest of its batch, rounded up to `multiple_of`: less padding, and a graph for each size that comes. Fields in dicts go
    by their dotted names. Text stays a list.

    Args:
        max_size: {field: rows} pads dimension 0, of boxes (N, 4) or tokens (L,), say; {field: (h, w)} pads the last two dimensions,
            {field: (t,)} the last one. The mask has the shape (B, rows), (B, h, w) or (B, t).
        ragged: fields to pad to the longest; {field: number of last dimensions}, or names, which pads dimension 0.
        multiple_of: of ragged sizes.
        pad_value: {field: value} of the padding; 0 when left out.
        overflow: what happens to a field longer than its `max_size`: "error", or "cut".

    Raises:
        ConfigError: an argument names no size, or a size is below 1.
        ValueError: while collating: a field differs and is not named here, is missing, or is too long.
    """

    max_size: Mapping[str, Size] = field(default_factory=dict[str, Size])
    ragged: Mapping[str, int] | Sequence[str] = ()
    multiple_of: int = 1
    pad_value: Mapping[str, float] = field(default_factory=dict[str, float])
    overflow: _Overflow = "error"

    def __post_init__(self) -> None:
        check_choice(self.overflow, _Overflow, "PadCollate: overflow")
        for name, size in self.max_size.items():
            if min([size] if isinstance(size, int) else list(size), default=0) < 1:
                raise ConfigError(f"PadCollate: max_size.{name}: expected sizes of 1 at least, got {size!r}.")
        if self.multiple_of < 1:
            raise ConfigError(f"PadCollate: multiple_of: expected 1 at least, got {self.multiple_of}.")
        if unknown := [n for n in self.pad_value if n not in self.max_size and n not in self.ragged]:
            hint = nearest(unknown[0], [*self.max_size, *self.ragged])
            raise ConfigError(f"PadCollate: pad_value.{unknown[0]}: the field is in neither max_size nor ragged.{hint}")

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """A batch: tensors with the samples along dimension 0."""
        batch = self._joined([wrap_sample(s) for s in samples], "")
        if missing := [n for n in (*self.max_size, *self.ragged) if n + MASK not in _dotted(batch)]:
            raise ValueError(f"PadCollate: there is no field {missing[0]!r}.{nearest(missing[0], _dotted(batch))}")
        return batch

    def _joined(self, samples: list[dict[str, Any]], prefix: str) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name in samples[0]:
            path, values = prefix + name, [s[name] for s in samples]
            if isinstance(values[0], dict):
                batch[name] = self._joined(values, path + ".")
            elif path in self.max_size or path in self.ragged:
                batch[name], batch[name + MASK] = self._padded(path, [torch.as_tensor(v) for v in values])
            else:
                batch[name] = _stacked(path, values)
        return batch

    def _padded(self, path: str, values: list[Tensor]) -> tuple[Tensor, Tensor]:
        if path in self.max_size:
            size = self.max_size[path]
            first, wanted = (True, [size]) if isinstance(size, int) else (False, list(size))
        else:
            last = self.ragged[path] if isinstance(self.ragged, Mapping) else 0
            first, sides = last == 0, [v.shape[:1] if last == 0 else v.shape[-last:] for v in values]
            wanted = [max(-(-max(column) // self.multiple_of), 1) * self.multiple_of for column in zip(*sides, strict=True)]
        padded, masks = [], []
        for value in values:
            shape = list(value.shape[:1] if first else value.shape[-len(wanted) :])
            if any(have > most for have, most in zip(shape, wanted, strict=True)):
                if self.overflow == "error":
                    raise ValueError(f"{path!r} has {shape} and max_size is {wanted}: raise it, or overflow='cut'")
                value = value[(slice(wanted[0]),) if first else (..., *(slice(w) for w in wanted))]
                shape = [min(have, most) for have, most in zip(shape, wanted, strict=True)]
            spare = [most - have for have, most in zip(shape, wanted, strict=True)]
            after = [0, 0] * (value.dim() - 1) + [0, spare[0]] if first else [n for s in reversed(spare) for n in (0, s)]
            padded.append(functional.pad(value, after, value=_fill(value, self.pad_value.get(path, 0))))
            mask = torch.zeros(wanted, dtype=torch.bool)
            mask[tuple(slice(n) for n in shape)] = True
            masks.append(mask)
        return torch.stack(padded), torch.stack(masks)


def _fill(value: Tensor, fill: float) -> Any:
    return bool(fill) if value.dtype == torch.bool else fill


def _dotted(batch: Mapping[str, Any], prefix: str = "") -> list[str]:
    inner = [n for k, v in batch.items() if isinstance(v, dict) for n in _dotted(cast("dict[str, Any]", v), f"{prefix}{k}.")]
    return [prefix + k for k in batch] + inner


def _stacked(path: str, values: list[Any]) -> Any:
    shapes = {tuple(v.shape) for v in values if isinstance(v, Tensor)}
    if len(shapes) > 1:
        raise ValueError(f"{path!r} differs between samples, {sorted(shapes)[:2]}: name it in max_size or ragged, or resize it")
    return column(values)


def _joins(value: Tensor, first: Tensor) -> bool:
    """Whether a tensor can be written beside the first one."""
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.requires_grad
    return plain and value.shape == first.shape and value.dtype == first.dtype


def new_room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is not written to yet."""
    return torch.empty(shape, dtype=dtype)


def column(values: list[Any], room: Room = new_room) -> Any:
    """One field of all samples, as `default_collate` joins it, which in a worker would take new shared memory for tensors.

    Tensors are joined contiguous, whatever the order of the memory of each.
    """
    if not all(type(v) is Tensor for v in values):
        return default_collate(values)
    first = values[0]
    if first.is_quantized or not all(_joins(v, first) for v in values):
        return torch.stack(values)
    joined = room((len(values), *first.shape), first.dtype)
    if first.dim() != 3 or first.dtype != torch.uint8 or first.is_contiguous():
        return torch.stack(values, out=joined)
    for value, place in zip(values, joined.numpy(), strict=True):
        np.copyto(place, value.numpy())  # pixels to planes: half the time of torch's
    return joined


@COLLATES.register_module()
def SegmentationCollate(size: int | Sequence[int], ignore_index: int = 255) -> PadCollate:
    """Pictures and class maps padded to one size, right and below: `PadCollate` for the fields "image" and "mask".

    Args:
        size: (H, W) in pixels, or one number for both; larger pictures are an error.
        ignore_index: of the padding of the map, which no loss counts.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return PadCollate(max_size={"image": sides, "mask": sides}, pad_value={"mask": ignore_index})


def check_collate(spec: Any, path: str) -> list[str]:
    """The problems of `build_collate(spec, path)`, without building."""
    if isinstance(spec, str):
        spec = {"type": spec}
    if isinstance(spec, Mapping):
        return COLLATES.check(spec, path)
    return (
        [] if spec is None or callable(spec) else [f"{path}: expected a name, dict(type=...) or a callable, got {spec!r:.60}."]
    )


@COLLATES.register_module()
@dataclass(frozen=True)
class MultiScaleCollate:
    """Resize each batch to a size drawn for it: the same on every rank, and another graph for each size there is.

    Args:
        sizes: (H, W), or one number for both, of which one is drawn for each batch.
        collate: what makes the batch, a name or dict(type=...); the usual stacking when left out.
        images: fields (B, C, H, W), resized with bilinear interpolation.
        masks: fields (B, ..., H, W), resized to the nearest pixel.
        points: fields (B, ..., 2 or 4) of x and y in pixels; normalised ones need none of this.
    """

    sizes: Sequence[Size]
    collate: Annotated[Any, CheckedBy(check_collate)] = None
    images: Sequence[str] = ("image",)
    masks: Sequence[str] = ()
    points: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigError("MultiScaleCollate: sizes: expected at least one size.")
        object.__setattr__(self, "collate", build_collate(self.collate, "collate") or default_collate)

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """A batch of one of the sizes."""
        drawn = self.sizes[int(torch.randint(len(self.sizes), ()))]
        to = [drawn, drawn] if isinstance(drawn, int) else list(drawn)
        batch = wrap_sample(self.collate([wrap_sample(s) for s in samples]))
        h, w = batch[self.images[0]].shape[-2:]
        for name in self.images:
            image = batch[name]
            resized = functional.interpolate(image.float(), to, mode="bilinear", antialias=True)
            batch[name] = resized if image.is_floating_point() else resized.round().clamp(0, 255).to(image.dtype)
        for name in self.masks:
            mask = batch[name]
            flat = mask.reshape(-1, 1, h, w).double()  # exact for any class
            batch[name] = functional.interpolate(flat, to, mode="nearest-exact").to(mask.dtype).view(*mask.shape[:-2], *to)
        for name in self.points:
            values = batch[name]
            scale = torch.tensor([to[1] / w, to[0] / h], dtype=values.dtype)
            batch[name] = values * scale.repeat(values.shape[-1] // 2)
        return batch


def build_collate(spec: Any, path: str) -> Callable[[list[Any]], Any] | None:
    """A collate function out of a cfg: a name, `dict(type=..., **arguments)`, a callable, or None for the usual stacking.

    Raises:
        ConfigError: there is no such function, or it does not take the arguments.
    """
    if isinstance(spec, str):
        spec = {"type": spec}
    return COLLATES.build(cast("Mapping[str, Any]", spec), path) if isinstance(spec, Mapping) else spec
