"""The internal state of a class-style metric as a tree of tensors and plain values for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ailab import tree

_PLAIN = (bool, int, float, str, type(None))  # by exact type
_SETTINGS = (torch.dtype, torch.device)  # cannot change in place, and an update does not replace them
Memory = dict[str, Any]


def memory_of(metric: Any) -> Memory | None:
    """A copy of the internal state of `metric`. None if it has anything but tensors, plain values, lists, tuples and dicts.

    For torchmetrics objects and collections it is the states that they declare, lists of samples too. For any other object it is
    all of its attributes.
    """
    found: Memory = {}
    for prefix, part in _parts(metric):
        for name in _names(part):
            value = getattr(part, name)
            if type(value) in _SETTINGS:
                continue
            if not _plain(value):
                return None
            found[prefix + name] = tree.clone(value)
    return found


def restore(metric: Any, memory: Mapping[str, Any], device: torch.device) -> None:
    """Put a memory back into a metric that has been reset; a tensor where the one was that it replaces, else on `device`."""
    for prefix, part in _parts(metric):
        for name in _names(part):
            if prefix + name in memory:
                old = getattr(part, name)
                home = old.device if isinstance(old, Tensor) else "cpu" if getattr(part, "compute_on_cpu", False) else device
                setattr(part, name, tree.map(lambda t, home=home: t.detach().to(home, copy=True), memory[prefix + name]))


def _plain(value: Any) -> bool:
    """Whether a checkpoint gives a value back as it was."""
    if isinstance(value, Tensor):
        return type(value) is Tensor
    if type(value) is dict:
        return all(_plain(v) for pair in cast("dict[Any, Any]", value).items() for v in pair)
    if type(value) in (list, tuple):
        return all(map(_plain, cast("list[Any]", value)))
    return type(value) in _PLAIN


def _parts(metric: Any) -> list[tuple[str, Any]]:
    """The metric, or the members of a collection, each with a prefix for its names."""
    if not hasattr(metric, "_defaults") and isinstance(metric, torch.nn.ModuleDict):
        return [(f"{n}.", m) for n, m in cast("Mapping[str, Any]", metric).items()]
    return [("", metric)]


def _names(part: Any) -> list[str]:
    declared = getattr(part, "_defaults", None)
    return [*declared, "_update_count"] if declared is not None else list(vars(part))
