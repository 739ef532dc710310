"""SyncBatchNormHook: BatchNorm with the statistics of all ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # base of BatchNorm1d, 2d and 3d, and of SyncBatchNorm

from ailab import dist
from ailab.core.loss import described_as, remodelled
from ailab.registry import HOOKS
from ailab.stack import Middleware, unchanged
from ailab.types import WEIGHT, Aux, Batch, Buffers, Loss, Params, widened


@HOOKS.register_module()
def SyncBatchNormHook(name: str = "sync_batchnorm") -> Middleware[Loss]:
    """In training, normalise by the mean and variance over the batches of all ranks, and update running statistics with them.

    Parameters and running statistics are then the same as in one process with the global batch. Each BatchNorm needs one small
    all-reduce in the forward and one in the backward pass. Evaluation does not change. With one process the hook does nothing.
    The model needs no conversion. `torch.nn.SyncBatchNorm` in a model works too, also on a CPU.
    """

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and not hasattr(type(module), "synchronised"):
                module.__class__ = _synchronised(type(module))  # pyright: ignore[reportAttributeAccessIssue]

    def bare(loss: Loss) -> Loss:
        return loss if dist.world_size() == 1 else _with_stand_ins(remodelled(loss, change))

    return Middleware(name, unchanged, "loss", bare=bare)


_counts: Tensor | None = None  # (), 0 where the batch at hand is a stand-in of a rank that has no sample; None: it counts


def _with_stand_ins(loss: Loss) -> Loss:
    """`loss`, whose BatchNorms leave out what stands in for the samples of a rank that has none: all its weights are 0."""

    def counted(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        global _counts
        _counts = (batch[WEIGHT] > 0).any() if WEIGHT in batch else None
        try:
            return loss(params, buffers, batch)
        finally:
            _counts = None

    return described_as(loss, counted)


@cache
def _synchronised(cls: type[_BatchNorm]) -> type[_BatchNorm]:
    """A subclass of a BatchNorm class with the mean and variance over all ranks."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if not self.training or dist.world_size() == 1:
            return cls.forward(self, input)
        self._check_input_dim(input)
        x = widened(input.flatten(2) if input.dim() > 2 else input.unsqueeze(2))  # (N, C, L)
        mean, variance, count = global_moments(x)
        if self.running_mean is not None:
            _update_running_stats(self, mean.detach(), variance.detach() * (count / (count - 1)))
        scale = torch.rsqrt(variance + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        out = (x - mean.view(1, -1, 1)) * scale.view(1, -1, 1)
        out = out if self.bias is None else out + self.bias.view(1, -1, 1)
        return out.view(input.shape).to(input.dtype)

    return type(f"Synchronised{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__, "synchronised": True})


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () of the values of each channel of `x`, (N, C, L), over all ranks.

    Each rank sends its own mean and variance. They are combined as in Chan et al. 1983: sums of squares would lose digits.
    """
    channels, mine = x.shape[1], torch.full((1,), float(x.shape[0] * x.shape[2]), dtype=x.dtype, device=x.device)
    mine = mine if _counts is None else mine * _counts
    variance, mean = torch.var_mean(x, (0, 2), correction=0)
    row = torch.cat([mean, variance, mine])
    before, after = dist.rank(), dist.world_size() - dist.rank() - 1
    rows = dist.all_reduce_differentiable(functional.pad(row.unsqueeze(0), (0, 0, before, after)))  # (world, 2 C + 1)
    means, variances, counts = rows[:, :channels], rows[:, channels : 2 * channels], rows[:, -1:]
    share = counts / counts.sum()
    whole = (share * means).sum(0)
    return whole, (share * (variances + (means - whole) ** 2)).sum(0), counts.sum()


def _update_running_stats(module: Any, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics: exponential moving average, or cumulative average where `momentum` is None."""
    count = module.num_batches_tracked + 1
    factor = count.to(mean.dtype).reciprocal() if module.momentum is None else module.momentum
    for key, value in (("running_mean", mean), ("running_var", variance)):
        old = getattr(module, key)
        setattr(
            module, key, torch.lerp(old, value.to(old.dtype), factor if isinstance(factor, float) else factor.to(old.dtype))
        )
    module.num_batches_tracked = count
