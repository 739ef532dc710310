"""Batches from worker processes through memory that stays: the worker writes it, the host copies it out, and it is used again.

torch's own way gives every tensor new shared memory, whose pages both sides fault in anew and whose descriptor travels through a
handshake: 0.2 ms of CPU for a picture of 224 pixels, half of what it takes to make one out of a cache.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ailab import tree
from ailab.types import Batch

_ALIGNED = 64  # bytes; the first 64 of a memory are its flags
_FULL, _KNOWN = 0, 1  # flags: written and not yet copied out; the host has it
_STEP = 1 << 16  # memories have a multiple of these bytes, and an eighth more than was needed, so that ragged batches fit


class Layout(NamedTuple):
    """Where a tensor lies in a memory."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor; it is a view."""
        flat = memory[self.start : self.start + self.nbytes].view(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True, eq=False)
class Parcel:
    """What goes through the queue for a batch."""

    process: int
    number: int  # of the memory, among those of the process; -1: it is not shared, and goes through the pipe itself
    memory: Any  # Tensor until the host has it, then None; an array where it is not shared
    batch: Batch  # None at the leaves that are in the memory
    layouts: dict[int, Layout]  # by number of the leaf


class Outbox:
    """The worker's end."""

    def __init__(self) -> None:
        self._memories: list[Tensor] = []
        self._lap = -1
        self._size = _ALIGNED  # bytes of the last batch
        self._end = _ALIGNED  # of what is lent of the memory at hand

    def begin(self, lap: int) -> None:
        """Make ready for a batch.

        Args:
            lap: of the host through its data. Another one than before means that the host gave up what is under way.
        """
        if lap != self._lap:
            self._lap = lap
            for memory in self._memories:
                memory[_FULL] = 0
        self._end = _ALIGNED
        self._number, self._memory = self._free(self._size)

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a tensor of the batch that was begun; it has not to be moved, if the batch is as large as the last one."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._end + nbytes > self._memory.numel():
            return torch.empty(shape, dtype=dtype)
        flat = self._memory[self._end : self._end + nbytes]
        self._end += _aligned(nbytes)
        return flat.view(dtype).view(shape)

    def pack(self, batch: Batch) -> Parcel:
        """The batch that was begun, its tensors moved into a memory that the host is done with; a new one where there is none.

        Args:
            batch: any nest. Tensors that are not dense, on a CPU and of plain type are sent in torch's way.
        """
        leaves, end, first = tree.leaves(batch), self._end, self._memory.data_ptr()
        layouts: dict[int, Layout] = {}
        for i, leaf in enumerate(leaves):
            if _is_plain(leaf):
                start = leaf.data_ptr() - first
                if not 0 <= start < self._end:  # it was not lent
                    start, end = end, end + _aligned(leaf.nbytes)
                layouts[i] = Layout(start, leaf.nbytes, leaf.dtype, tuple(leaf.shape), leaf.stride())
        self._size = end
        number, memory = (self._number, self._memory) if end <= self._memory.numel() else self._free(end)
        for i, layout in layouts.items():
            if (there := layout.of(memory)).data_ptr() != leaves[i].data_ptr():
                there.copy_(leaves[i].detach())
            leaves[i] = None
        memory[_FULL] = 1
        goes = memory.numpy() if number < 0 else None if memory[_KNOWN] else memory
        return Parcel(os.getpid(), number, goes, tree.unflatten(batch, leaves), layouts)

    def _free(self, nbytes: int) -> tuple[int, Tensor]:
        """A memory that is free and large enough, and its number; one of this process alone, -1, where none can be shared."""
        free = [i for i, memory in enumerate(self._memories) if not memory[_FULL]]
        for i in free:
            if self._memories[i].numel() >= nbytes:
                return i, self._memories[i]
        new = torch.zeros(-(-nbytes * 9 // (8 * _STEP)) * _STEP, dtype=torch.uint8)
        try:
            new.share_memory_()
        except RuntimeError:  # /dev/shm is full; a container may have as little as 64 MB of it
            return -1, new
        if free:
            self._memories[free[0]] = new  # in the place of a smaller one
            return free[0], new
        self._memories.append(new)
        return len(self._memories) - 1, new


class Inbox:
    """The host's end.

    Args:
        pin: whether batches come out in pinned memory.
    """

    def __init__(self, pin: bool):
        self.pin = pin
        self._memories: dict[tuple[int, int], Tensor] = {}

    def open(self, parcel: Parcel) -> Batch:
        """The batch in memory of its own."""
        key = (parcel.process, parcel.number)
        if parcel.number >= 0 and parcel.memory is not None:
            self._memories[key] = parcel.memory
        memory = self._memories[key] if parcel.number >= 0 else torch.from_numpy(parcel.memory)
        leaves = tree.leaves(parcel.batch)
        for i, leaf in enumerate(leaves):
            if i in parcel.layouts:
                leaf = parcel.layouts[i].of(memory)
                leaves[i] = leaf.pin_memory() if self.pin else leaf.clone()
            elif self.pin and isinstance(leaf, Tensor):
                leaves[i] = leaf.pin_memory()
        memory[_KNOWN] = 1
        memory[_FULL] = 0  # last: from here on the worker writes to it
        return tree.unflatten(parcel.batch, leaves)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _is_plain(leaf: object) -> bool:
    """Whether a leaf can be moved as bytes."""
    if type(leaf) is not Tensor or leaf.layout is not torch.strided or leaf.device.type != "cpu" or leaf.is_quantized:
        return False
    dense = leaf.is_contiguous() or (leaf.dim() == 4 and leaf.is_contiguous(memory_format=torch.channels_last))
    return dense and leaf.numel() > 0 and not leaf.is_conj() and not leaf.is_neg()
