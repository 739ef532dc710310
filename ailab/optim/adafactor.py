"""Adafactor without device reads, so that it can be traced.

torch's functional form calls `.item()` twice per parameter, which breaks the graph and stalls a GPU. This is the same update
(Shazeer and Stern 2018, as in `torch.optim._adafactor`) with 0-d tensors. A test compares it with torch's.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    """`(grad * grad).mean(dim)` without the intermediate tensor."""
    norm = cast("Tensor", torch.linalg.vector_norm(grad, dim=dim, keepdim=True))  # pyright: ignore[reportUnknownMemberType]
    return norm.square() / grad.size(dim)


def _estimate(grad: Tensor, row: Tensor | None, col: Tensor | None, variance: Tensor | None, weight: Tensor, eps1: float):
    """The estimate of the second moment of `grad`, factored for matrices. Updates the moving averages in place."""
    if variance is not None:
        return variance.lerp_(grad * grad, weight)
    assert row is not None and col is not None
    row.lerp_(_mean_square(grad, -1), weight)
    col.lerp_(_mean_square(grad, -2), weight)
    return (row @ col) / row.mean(dim=-2, keepdim=True).clamp(min=eps1)


def adafactor(
    params: list[Tensor],
    grads: list[Tensor],
    row_vars: list[Tensor | None],
    col_vars: list[Tensor | None],
    variances: list[Tensor | None],
    state_steps: list[Tensor],
    *,
    lr: Tensor,
    d: float,
    beta2_decay: float,
    weight_decay: float,
    eps1: float | None,
    eps2: float,
    maximize: bool,
    **_: Any,
) -> None:
    """Update `params` and the variances in place; the arguments of `torch.optim._adafactor.adafactor`."""
    for param, grad, row, col, variance, step in zip(params, grads, row_vars, col_vars, variances, state_steps, strict=True):
        grad = -grad if maximize else grad
        tiny = torch.finfo(param.dtype).eps if eps1 is None else eps1
        now = step + 1
        rate = torch.minimum(lr, now.to(lr.dtype).rsqrt())
        rms = param.norm(2) / param.numel() ** 0.5
        if weight_decay != 0:
            param.mul_(1 - lr * weight_decay)
        square = _estimate(grad, row, col, variance, (now**beta2_decay).to(param.dtype), tiny)
        change = square.clamp(min=tiny * tiny).rsqrt() * grad
        excess = (change.norm(2) / (change.numel() ** 0.5 * d)).clamp(min=1.0)
        param.sub_(change * (rms.clamp(min=eps2) * rate / excess))
