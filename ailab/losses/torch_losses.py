"""torch's own losses, asked for their per-sample values where that is the same mathematics."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ailab.types import Mean, Sum, widened

# Losses whose mean is the plain mean over all elements, and over samples of equal size. By `forward`, so that a subclass that
# overrides it is not taken for the original. Not here: CTCLoss (divides by target lengths), AdaptiveLogSoftmaxWithLoss.
_PLAIN = (
    nn.L1Loss,
    nn.MSELoss,
    nn.HuberLoss,
    nn.SmoothL1Loss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.GaussianNLLLoss,
    nn.KLDivLoss,
    nn.HingeEmbeddingLoss,
    nn.SoftMarginLoss,
    nn.MarginRankingLoss,
    nn.CosineEmbeddingLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
)
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)  # their mean is over the targets that count, by class weight

PerSample = Callable[..., Tensor | Mean | Sum]


def maskable(criterion: nn.Module) -> PerSample | None:
    """A function with the parameters of `criterion.forward` that returns what the criterion takes the mean or the sum of.

    It returns (B,) per-sample values, whose plain mean is the criterion's; a `Sum` of them where `reduction` is "sum". For a
    loss over class indices, where targets count by their class weight and not at all at `ignore_index`, the mean is a `Mean`;
    its further keyword `weight`, (B,), says how often each sample counts. Values of shape (B,) are for the caller to weigh.

    The criterion stays as it is; its buffers and parameters are read at each call.

    Args:
        criterion: an instance of a torch.nn loss, on batched input.

    Returns:
        None where the mathematics is another: `reduction` is "none", `CTCLoss`, or a class that torch does not have.
    """
    forward, reduction = type(criterion).forward, getattr(criterion, "reduction", None)
    plain = any(forward is cls.forward for cls in _PLAIN)
    classes = any(forward is cls.forward for cls in _CLASSES)
    if classes and reduction == "mean":
        call = _of_classes
    elif plain and reduction == "mean":
        call = _mean_of_each
    elif forward is nn.KLDivLoss.forward and reduction == "batchmean":
        call = _sum_of_each
    elif (classes or plain) and reduction == "sum":
        call = _sum_of_all
    else:
        return None
    each = copy.copy(criterion)  # shares the dicts of parameters and buffers, so it sees the tensors that are swapped in
    each.reduction = "none"  # type: ignore[assignment]
    if call is _of_classes:
        summed = copy.copy(criterion)
        summed.reduction = "sum"  # type: ignore[assignment]
        each.__dict__["summed"] = summed  # not a sub-module: it has no tensors of its own
    return _signed(call, each)


def _signed(call: PerSample, criterion: nn.Module) -> PerSample:
    """`call` of this criterion, with the name of its class and the signature of its forward, and `weight`."""

    def per_sample(*args: Any, **kwargs: Any) -> Tensor | Mean | Sum:
        return call(criterion, *args, **kwargs)

    parameters = inspect.signature(criterion.forward).parameters.values()
    weight = inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    per_sample.__signature__ = inspect.Signature([*parameters, weight])  # type: ignore[attr-defined]
    per_sample.__name__ = per_sample.__qualname__ = type(criterion).__name__
    return per_sample


def _mean_of_each(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else widened(values).flatten(1).mean(1)


def _sum_of_each(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else widened(values).flatten(1).sum(1)


def _sum_of_all(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Sum:
    return Sum(_sum_of_each(criterion, *args, **kwargs))


def _of_classes(criterion: Any, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor | Mean:
    """Cross-entropy and NLL. With probabilities for a target torch divides by the samples, whatever the class weights."""
    if target.is_floating_point():
        return _mean_of_each(criterion, input, target)
    counted = target != criterion.ignore_index  # an ignored target has the value 0
    if weight is None and input.dtype not in (torch.float16, torch.bfloat16):
        total = criterion.summed.forward(input, target)
        shares = counted if criterion.weight is None else criterion.weight[target[counted]]
        return Mean(total, shares.sum().to(total.dtype))
    values = widened(criterion.forward(input, target))  # a half cannot hold a sum over many targets, nor their number
    shares = counted.to(values.dtype)
    if criterion.weight is not None:
        shares = shares * criterion.weight[torch.where(counted, target, 0)].to(values.dtype)
    weight = torch.ones(len(target), dtype=values.dtype, device=values.device) if weight is None else weight.to(values.dtype)
    if values.dim() > 1:
        weight = weight.view(-1, *[1] * (values.dim() - 1)).expand_as(values).reshape(-1)
        values, shares = values.reshape(-1), shares.reshape(-1)
    return Mean(torch.dot(values, weight), torch.dot(shares, weight))
