"""Per-sample values of torch's own losses, where their mean is the same as the loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ailab.types import Mean, Sum, widened

# Losses whose mean is the plain mean over all elements. They are compared by `forward`, so that a subclass that overrides it
# does not match. Not here: CTCLoss (divides by target lengths), AdaptiveLogSoftmaxWithLoss.
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
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)  # their mean is over the counted targets, by class weight

PerSample = Callable[..., Tensor | Mean | Sum]


def maskable(criterion: nn.Module) -> PerSample | None:
    """A function with the parameters of `criterion.forward` that returns what the criterion takes the mean or the sum of.

    It returns per-sample values, (B,), whose plain mean is the loss. The caller applies sample weights to them. With
    `reduction="sum"` it returns a `Sum` of such values. For a mean over class indices, where a target counts by its class weight,
    and not at all for `ignore_index`, it returns a `Mean`. Then sample weights are its extra keyword `weight`, (B,).

    The criterion does not change. Its buffers and parameters are read at each call.

    Args:
        criterion: an instance of a torch.nn loss, for batched input.

    Returns:
        The function. None where the loss is neither: `reduction` is "none", the loss is `CTCLoss`, or its class is not torch's.
    """
    forward, reduction = type(criterion).forward, getattr(criterion, "reduction", None)
    plain = any(forward is cls.forward for cls in _PLAIN)
    classes = any(forward is cls.forward for cls in _CLASSES)
    if classes and reduction == "mean":
        call = _classification
    elif plain and reduction == "mean":
        call = _mean_per_sample
    elif forward is nn.KLDivLoss.forward and reduction == "batchmean":
        call = _sum_per_sample
    elif (classes or plain) and reduction == "sum":
        call = _sum_over_samples
    else:
        return None
    each = copy.copy(criterion)  # shares the dicts of parameters and buffers, so it sees the tensors that are swapped in
    each.reduction = "none"  # type: ignore[assignment]
    if call is _classification:
        summed = copy.copy(criterion)
        summed.reduction = "sum"  # type: ignore[assignment]
        each.__dict__["summed"] = summed  # not a sub-module: it has no tensors of its own
    return _with_signature(call, each)


def _with_signature(call: PerSample, criterion: nn.Module) -> PerSample:
    """`call` for this criterion, with the name of its class and the signature of its forward plus `weight`."""

    def per_sample(*args: Any, **kwargs: Any) -> Tensor | Mean | Sum:
        return call(criterion, *args, **kwargs)

    parameters = inspect.signature(criterion.forward).parameters.values()
    weight = inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    per_sample.__signature__ = inspect.Signature([*parameters, weight])  # type: ignore[attr-defined]
    per_sample.__name__ = per_sample.__qualname__ = type(criterion).__name__
    return per_sample


def _mean_per_sample(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else widened(values).flatten(1).mean(1)


def _sum_per_sample(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else widened(values).flatten(1).sum(1)


def _sum_over_samples(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Sum:
    return Sum(_sum_per_sample(criterion, *args, **kwargs))


def _classification(criterion: Any, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor | Mean:
    """Cross-entropy and NLL. For a target of probabilities torch divides by the number of samples, even with class weights."""
    if target.is_floating_point():
        return _mean_per_sample(criterion, input, target)
    counted = target != criterion.ignore_index  # an ignored target has the value 0
    weights = counted
    if criterion.weight is not None:  # by `where`: how many are counted is not read from the device
        weights = counted * criterion.weight[torch.where(counted, target, 0)]
    if weight is None and input.dtype not in (torch.float16, torch.bfloat16):
        total = criterion.summed.forward(input, target)
        return Mean(total, weights.sum().to(total.dtype))
    values = widened(criterion.forward(input, target))  # a half cannot hold a sum over many targets, nor their number
    weights = weights.to(values.dtype)
    weight = torch.ones(len(target), dtype=values.dtype, device=values.device) if weight is None else weight.to(values.dtype)
    if values.dim() > 1:
        weight = weight.view(-1, *[1] * (values.dim() - 1)).expand_as(values).reshape(-1)
        values, weights = values.reshape(-1), weights.reshape(-1)
    return Mean(torch.dot(values, weight), torch.dot(weights, weight))
