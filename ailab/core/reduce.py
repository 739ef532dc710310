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
    names, dtype = list(aux.logs), aux.weight.dtype
    values = [aux.weight] + [t for n in names for t in (aux.logs[n].total, aux.logs[n].weight)]
    if STOP in batch:
        values.append(batch[STOP])
    with torch.no_grad():
        if any(v.dtype != dtype for v in values):
            values = [v.to(torch.float64) for v in values]
        sums = dist.begin_sum(torch.stack(values).to(torch.float64), fresh=True)
    buffers = dist.begin_from_first(aux.buffers)

    def reduced() -> Aux:
        weight, *summed = sums().to(dtype).unbind()
        logs = {n: Mean(summed[2 * i], summed[2 * i + 1]) for i, n in enumerate(names)}
        control = {STOP: summed[-1]} if STOP in batch else {}
        return replace(aux, weight=weight, logs=logs, buffers=buffers(), control=control)

    return reduced
