"""What ranks sum in each step beside the gradients: one reduction for the weight, the logs and the wish to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ailab import dist
from ailab.types import STOP, Aux, Batch, Mean


def begin_reduction(aux: Aux, batch: Batch) -> Callable[[], Aux]:
    """Begin the one small reduction of a step; call what comes back for the `Aux` of the global batch.

    It carries the weight, the logs, and, where the batch has the field `_stop`, how many ranks ask to end the run; so no
    decision needs a reduction of its own. Whether the step was finite is seen in the reduced gradients: a NaN or an infinity
    of any rank is in those of all. Between the call and its result the backward can run.

    Buffers (BatchNorm's running statistics) are rank 0's on every rank, as under DDP's `broadcast_buffers`.
    """
    if dist.world_size() == 1:
        return lambda: aux
    names = list(aux.logs)
    values = [aux.weight] + [t for n in names for t in (aux.logs[n].total, aux.logs[n].weight)]
    if STOP in batch:
        values.append(batch[STOP])
    sums = dist.begin_sum(torch.stack([v.detach().to(torch.float64) for v in values]))
    buffers = dist.begin_from_first(aux.buffers)

    def reduced() -> Aux:
        summed = sums().unbind()
        dtype = aux.weight.dtype
        logs = {n: Mean(summed[1 + 2 * i].to(dtype), summed[2 + 2 * i].to(dtype)) for i, n in enumerate(names)}
        control = {STOP: summed[-1]} if STOP in batch else {}
        return replace(aux, weight=summed[0].to(dtype), logs=logs, buffers=buffers(), control=control)

    return reduced
