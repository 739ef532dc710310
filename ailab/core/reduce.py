"""The control message of a step: weight, logs and stop flag, summed over ranks in a bucket of gradients."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ailab.types import STOP, Aux, Batch, Buffers, Mean


def control_message(aux: Aux, batch: Batch, dtype: torch.dtype) -> Tensor:
    """This rank's control message, (numbers,): the weight, the logs, and the stop flag where the batch has the field `_stop`.

    Whether the step was finite is seen in the reduced gradients: a NaN or an infinity of any rank is in those of all. So no
    decision needs a reduction of its own.
    """
    values = [aux.weight] + [t for mean in aux.logs.values() for t in (mean.total, mean.weight)]
    if STOP in batch:
        values.append(batch[STOP])
    with torch.no_grad():
        return torch.stack([v if v.dtype == dtype else v.to(dtype) for v in values])


def reduced(aux: Aux, batch: Batch, sums: Tensor, buffers: Buffers) -> Aux:
    """The `Aux` of the global batch, from the sum of the control messages of all ranks; the buffers are rank 0's."""
    dtype = torch.promote_types(aux.weight.dtype, torch.float32)  # a count may be an integer, and a total is none
    weight, *summed = sums.to(dtype, copy=True).unbind()  # a copy: the next backward writes into its bucket
    logs = {n: Mean(summed[2 * i], summed[2 * i + 1]) for i, n in enumerate(aux.logs)}
    control = {STOP: summed[2 * len(logs)]} if STOP in batch else {}
    return replace(aux, weight=weight, logs=logs, buffers=buffers, control=control)
