"""The internal state of a class-style metric as a flat dict of tensors, for a slot of the state, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

_NUMBERS = (bool, int, float)  # by exact type
_SETTINGS = (str, type(None), torch.dtype, torch.device)  # cannot change in place, and an update does not replace them
Memory = dict[str, Tensor]


def memory_of(metric: Any, device: torch.device) -> Memory | None:
    """A copy of the internal state of `metric`, on `device`. None if it has anything but tensors, numbers and settings.

    For torchmetrics objects and collections it is the states that they declare. A metric that keeps every sample has a list there.
    For any other object it is all of its attributes.
    """
    found: Memory = {}
    for prefix, part in _parts(metric):
        for name in _names(part):
            value = getattr(part, name)
            if type(value) in _SETTINGS:
                continue
            if not (isinstance(value, Tensor) or type(value) in _NUMBERS):
                return None
            found[prefix + name] = torch.as_tensor(value, dtype=_wide(value), device=device).detach().clone()
    return found


def restore(metric: Any, memory: Mapping[str, Tensor]) -> None:
    """Put a memory back into a metric that has been reset."""
    for prefix, part in _parts(metric):
        for name in _names(part):
            if prefix + name in memory:
                old, saved = getattr(part, name), memory[prefix + name]
                new = saved.clone().to(old.device, old.dtype) if isinstance(old, Tensor) else type(old)(saved.item())
                setattr(part, name, new)


def same_shape(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether one memory can take the place of the other in the state."""
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and a[n].dtype == b[n].dtype for n in a)


def _wide(value: Any) -> torch.dtype | None:
    return torch.float64 if type(value) is float else None


def _parts(metric: Any) -> list[tuple[str, Any]]:
    """The metric, or the members of a collection, each with a prefix for its names."""
    if not hasattr(metric, "_defaults") and isinstance(metric, torch.nn.ModuleDict):
        return [(f"{n}.", m) for n, m in cast("Mapping[str, Any]", metric).items()]
    return [("", metric)]


def _names(part: Any) -> list[str]:
    declared = getattr(part, "_defaults", None)
    return [*declared, "_update_count"] if declared is not None else list(vars(part))
