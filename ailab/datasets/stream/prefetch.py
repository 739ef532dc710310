"""Prefetch: copy the next batch to the device while the current one is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ailab import tree
from ailab.types import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch to `device`. For a CUDA device, the next batch is copied ahead of time, on a stream of its own.

    The copy is asynchronous if the batches are in pinned memory. Order and values are those of `batches`. An exception of `batches`
    is raised after the batch before it was given.
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
                tensor.record_stream(current)  # its memory is reused only after the work queued on it here is done
        batch, ahead = ahead, None
        try:
            ahead = _copied(next(source, None), device, side)
        except Exception as error:  # the current batch is complete, and comes first
            failure = error
        yield batch
        if failure is not None:
            raise failure


def _copied(batch: Batch | None, device: torch.device, stream: Any) -> Batch | None:
    if batch is None:
        return None
    with torch.cuda.stream(stream):
        return tree.to(batch, device)
