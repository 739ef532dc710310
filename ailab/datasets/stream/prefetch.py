"""Batches to the device while the one before is being worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ailab import tree
from ailab.types import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch on `device`, one ahead where that is a CUDA device: copied on a stream of its own, from pinned memory.

    The order and the values are those of `batches`. What it raises is raised when its turn comes, after the batch before it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield tree.to(batch, device)
        return
    side: Any = torch.cuda.Stream(device)
    source = iter(batches)
    ahead = _copied(next(source, None), device, side)
    while ahead is not None:
        failure: Exception | None = None
        current: Any = torch.cuda.current_stream(device)
        current.wait_stream(side)
        for tensor in tree.leaves(ahead):
            if isinstance(tensor, torch.Tensor):
                tensor.record_stream(current)  # its memory is not given away before what was queued on it here is done
        batch, ahead = ahead, None
        try:
            ahead = _copied(next(source, None), device, side)
        except Exception as error:  # the batch at hand is whole, and comes first
            failure = error
        yield batch
        if failure is not None:
            raise failure


def _copied(batch: Batch | None, device: torch.device, stream: Any) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(stream):
        return tree.to(batch, device)
