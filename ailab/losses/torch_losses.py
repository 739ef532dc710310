"""torch's own losses, asked for their per-sample values where that is the same mathematics."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ailab.types import Mean

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

PerSample = Callable[..., Tensor | Mean]


def maskable(criterion: nn.Module) -> PerSample | None:
    """A function with the parameters of `criterion.forward` that returns what the criterion takes the mean of.

    It returns (B,) per-sample values, whose plain mean is the criterion's. For a loss over class indices, where targets count
    by their class weight and not at all at `ignore_index`, it returns the `Mean`; its further keyword `weight`, (B,), says how
    often each sample counts. Values of shape (B,) are for the caller to weigh.

    From then on the criterion has `reduction="none"`; so call this once. Its buffers and parameters are read at each call.

    Args:
        criterion: an instance of a torch.nn loss, on batched input.

    Returns:
        None where the mathematics is another: `reduction` is "sum" or "none", `CTCLoss`, or a class that torch does not have.
    """
    forward, reduction = type(criterion).forward, getattr(criterion, "reduction", None)
    if any(forward is cls.forward for cls in _CLASSES) and reduction == "mean":
        call = _of_classes
    elif any(forward is cls.forward for cls in _PLAIN) and reduction == "mean":
        call = _mean_of_each
    elif forward is nn.KLDivLoss.forward and reduction == "batchmean":
        call = _sum_of_each
    else:
        return None
    if call is _of_classes:
        summed = copy.copy(criterion)  # shares the dict of buffers, so it sees the class weights that are swapped in
        summed.reduction = "sum"  # type: ignore[assignment]
        criterion.__dict__["summed"] = summed  # not a sub-module: it has no tensors of its own
    criterion.reduction = "none"  # type: ignore[assignment]
    return _signed(call, criterion)


def _signed(call: PerSample, criterion: nn.Module) -> PerSample:
    """`call` of this criterion, with the name of its class and the signature of its forward, and `weight`."""

    def per_sample(*args: Any, **kwargs: Any) -> Tensor | Mean:
        return call(criterion, *args, **kwargs)

    parameters = inspect.signature(criterion.forward).parameters.values()
    weight = inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    per_sample.__signature__ = inspect.Signature([*parameters, weight])  # type: ignore[attr-defined]
    per_sample.__name__ = per_sample.__qualname__ = type(criterion).__name__
    return per_sample


def _mean_of_each(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _sum_of_each(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else values.flatten(1).sum(1)


def _of_classes(criterion: Any, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor | Mean:
    """Cross-entropy and NLL. With probabilities for a target torch divides by the samples, whatever the class weights."""
    if target.is_floating_point():
        values = criterion.forward(input, target)
        return values if values.dim() == 1 else values.flatten(1).mean(1)
    counted = target != criterion.ignore_index  # an ignored target has the value 0
    if weight is None:
        total = criterion.summed.forward(input, target)
        shares = counted if criterion.weight is None else criterion.weight[target[counted]]
        return Mean(total, shares.sum().to(total.dtype))
    values = criterion.forward(input, target)
    shares = counted.to(values.dtype)
    if criterion.weight is not None:
        shares = shares * criterion.weight[torch.where(counted, target, 0)]
    weight = weight.to(values.dtype)
    if values.dim() > 1:
        weight = weight.view(-1, *[1] * (values.dim() - 1)).expand_as(values).reshape(-1)
        values, shares = values.reshape(-1), shares.reshape(-1)
    return Mean(torch.dot(values, weight), torch.dot(shares, weight))
