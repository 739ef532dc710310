"""Collate functions: padding of fields that differ in length or size, and resizing of whole batches."""

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
Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]  # (shape, dtype) -> contiguous uninitialised tensor
_Overflow = Literal["error", "cut"]
MASK = "_mask"  # suffix of the mask field of a padded field


@COLLATES.register_module()
@dataclass(frozen=True)
class PadCollate:
    """Stack samples to a batch, and pad fields of different sizes. A padded field gets a mask.

    The mask is the field `<field>_mask`, bool, True for real values and False for padding. A field in `max_size` always gets the
    same size, so all batches run in one compiled graph. A field in `ragged` is padded to the longest sample of its batch, which
    needs less padding and one graph per size. A field inside a dict is named with dots, e.g. "meta.tokens". Text becomes a list.

    Args:
        max_size: {field: size}. The size `rows` pads dimension 0, e.g. of boxes (N, 4) or tokens (L,). The size `(h, w)` pads the
            last two dimensions, `(t,)` the last dimension. The mask is (B, rows), (B, h, w) or (B, t).
        ragged: Fields to pad to the longest sample of the batch. Names pad dimension 0. {field: n} pads the last n dimensions.
        multiple_of: Sizes of ragged fields are rounded up to a multiple of this number.
        pad_value: {field: value of its padding}. Default: 0.
        overflow: For a field larger than its `max_size`: "error" raises, "cut" crops it.

    Raises:
        ConfigError: A size is below 1, or `pad_value` has a field that is not padded.
        ValueError: While collating: a field differs in size and is not padded, a field is missing, or a field is too large.
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
                raise ConfigError(f"PadCollate: max_size.{name}: expected sizes of at least 1, got {size!r}.")
        if self.multiple_of < 1:
            raise ConfigError(f"PadCollate: multiple_of: expected at least 1, got {self.multiple_of}.")
        if unknown := [n for n in self.pad_value if n not in self.max_size and n not in self.ragged]:
            hint = nearest(unknown[0], [*self.max_size, *self.ragged])
            raise ConfigError(f"PadCollate: pad_value.{unknown[0]}: the field is not in max_size and not in ragged.{hint}")

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The batch of samples: tensors (B, ...)."""
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
                    raise ValueError(f"{path!r} has {shape} and max_size is {wanted}: raise it, or set overflow='cut'")
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
        raise ValueError(f"{path!r} differs between samples, {sorted(shapes)[:2]}: add it to max_size or ragged, or resize it")
    return stack_field(values)


def _can_copy(value: Tensor, first: Tensor) -> bool:
    """Whether a tensor can be copied into the same batch tensor as the first one."""
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.requires_grad
    return plain and value.shape == first.shape and value.dtype == first.dtype


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A new uninitialised tensor."""
    return torch.empty(shape, dtype=dtype)


def stack_field(values: list[Any], allocate: Allocate = new_tensor) -> Any:
    """Stack one field of all samples, with the values of torch's `default_collate`. The result is contiguous.

    In a worker `default_collate` allocates new shared memory for tensors; this function uses `allocate`.
    """
    if not all(type(v) is Tensor for v in values):
        return default_collate(values)
    first = values[0]
    if first.is_quantized or not all(_can_copy(v, first) for v in values):
        return torch.stack(values)
    joined = allocate((len(values), *first.shape), first.dtype)
    if first.dim() != 3 or first.dtype != torch.uint8 or first.is_contiguous():
        return torch.stack(values, out=joined)
    for value, place in zip(values, joined.numpy(), strict=True):
        np.copyto(place, value.numpy())  # HWC to CHW memory order, in half the time of torch
    return joined


@COLLATES.register_module()
def SegmentationCollate(size: int | Sequence[int], ignore_index: int = 255) -> PadCollate:
    """Pad images and class maps to one size, at the right and at the bottom: `PadCollate` for the fields "image" and "mask".

    Args:
        size: (H, W) in pixels, or one number for both. A larger image is an error.
        ignore_index: Class of the padding in "mask". The loss must ignore it.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return PadCollate(max_size={"image": sides, "mask": sides}, pad_value={"mask": ignore_index})


def check_collate(spec: Any, path: str) -> list[str]:
    """The problems that `build_collate(spec, path)` would raise. Nothing is built."""
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
    """Multi-scale training: resize each batch to a randomly drawn size.

    All ranks draw the same size. Each size needs its own compiled graph.

    Args:
        sizes: Sizes to draw from: (H, W) in pixels, or one number for both.
        collate: The collate function that makes the batch before resizing, a name or dict(type=...). Default: plain stacking.
        images: Image fields (B, C, H, W), resized with bilinear interpolation.
        masks: Mask fields (B, ..., H, W), resized with nearest-neighbour interpolation.
        points: Fields (B, ..., 2 or 4) of x and y in pixels, such as boxes and keypoints. Do not list normalised coordinates.
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
        """The batch of samples, resized."""
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
    """Build a collate function from a cfg.

    Args:
        spec: A registered name, `dict(type=..., **arguments)`, a callable, or None for plain stacking (the result is None).
        path: Path of `spec` in the cfg, for messages.

    Raises:
        ConfigError: The name is unknown, or the function does not accept the arguments.
    """
    if isinstance(spec, str):
        spec = {"type": spec}
    return COLLATES.build(cast("Mapping[str, Any]", spec), path) if isinstance(spec, Mapping) else spec
