"""Prefetch: copy the next batch to the device while it works on the one before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ailab import tree
from ailab.types import Batch

_STEPS_AHEAD = 2  # batches on a CUDA device whose steps have not been done: what bounds how far the host runs ahead


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to `device`; to a CUDA device on a stream of its own, under the steps that were launched before.

    A batch is asked for when the step before it has been launched, so a late batch delays no step but its own. The copy is
    asynchronous if the batches are in pinned memory. Before a third batch is copied the host waits for the first one's step:
    it runs two steps ahead, and so much memory is held. Order and values are those of `batches`.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tree.to(batch, device)
        return
    side: Any = torch.cuda.Stream(device)
    in_use: deque[Any] = deque()
    for batch in batches:
        if len(in_use) == _STEPS_AHEAD:
            in_use.popleft().synchronize()
        with torch.cuda.stream(side):
            copied = tree.to(batch, device)
        current: Any = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in tree.leaves(copied):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(current)  # its memory is used again only after the work queued on it here is done
        yield copied
        used: Any = torch.cuda.Event()
        used.record(current)
        in_use.append(used)
