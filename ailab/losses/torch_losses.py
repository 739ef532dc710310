"""Per-sample values of torch's own losses, where their mean is the same as the loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ailab.types import Mean

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

PerSample = Callable[..., Tensor | Mean]


def maskable(criterion: nn.Module) -> PerSample | None:
    """A function with the parameters of `criterion.forward` that returns the loss before the mean over samples.

    It returns per-sample values, (B,), whose plain mean is the loss. The caller applies sample weights to them. For a loss over
    class indices, where a target counts by its class weight, and not at all for `ignore_index`, it returns a `Mean`. Then sample
    weights are its extra keyword `weight`, (B,).

    The criterion itself is changed to `reduction="none"`, so call this once. Its buffers and parameters are read at each call.

    Args:
        criterion: an instance of a torch.nn loss, for batched input.

    Returns:
        The function. None where the loss is not such a mean: `reduction` is "sum" or "none", the loss is `CTCLoss`, or its class
        is not one of torch.
    """
    forward, reduction = type(criterion).forward, getattr(criterion, "reduction", None)
    if any(forward is cls.forward for cls in _CLASSES) and reduction == "mean":
        call = _classification
    elif any(forward is cls.forward for cls in _PLAIN) and reduction == "mean":
        call = _mean_per_sample
    elif forward is nn.KLDivLoss.forward and reduction == "batchmean":
        call = _sum_per_sample
    else:
        return None
    if call is _classification:
        summed = copy.copy(criterion)  # shares the dict of buffers, so it uses the class weights of functional_call
        summed.reduction = "sum"  # type: ignore[assignment]
        criterion.__dict__["summed"] = summed  # not a sub-module: it has no tensors of its own
    criterion.reduction = "none"  # type: ignore[assignment]
    return _with_signature(call, criterion)


def _with_signature(call: PerSample, criterion: nn.Module) -> PerSample:
    """`call` for this criterion, with the name of its class and the signature of its forward plus `weight`."""

    def per_sample(*args: Any, **kwargs: Any) -> Tensor | Mean:
        return call(criterion, *args, **kwargs)

    parameters = inspect.signature(criterion.forward).parameters.values()
    weight = inspect.Parameter("weight", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Tensor | None")
    per_sample.__signature__ = inspect.Signature([*parameters, weight])  # type: ignore[attr-defined]
    per_sample.__name__ = per_sample.__qualname__ = type(criterion).__name__
    return per_sample


def _mean_per_sample(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def _sum_per_sample(criterion: nn.Module, *args: Any, weight: Tensor | None = None, **kwargs: Any) -> Tensor:
    values = criterion.forward(*args, **kwargs)
    return values if values.dim() == 1 else values.flatten(1).sum(1)


def _classification(criterion: Any, input: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor | Mean:
    """Cross-entropy and NLL. For a target of probabilities torch divides by the number of samples, even with class weights."""
    if target.is_floating_point():
        values = criterion.forward(input, target)
        return values if values.dim() == 1 else values.flatten(1).mean(1)
    counted = target != criterion.ignore_index  # an ignored target has the value 0
    if weight is None:
        total = criterion.summed.forward(input, target)
        weights = counted if criterion.weight is None else criterion.weight[target[counted]]
        return Mean(total, weights.sum().to(total.dtype))
    values = criterion.forward(input, target)
    weights = counted.to(values.dtype)
    if criterion.weight is not None:
        weights = weights * criterion.weight[torch.where(counted, target, 0)]
    weight = weight.to(values.dtype)
    if values.dim() > 1:
        weight = weight.view(-1, *[1] * (values.dim() - 1)).expand_as(values).reshape(-1)
        values, weights = values.reshape(-1), weights.reshape(-1)
    return Mean(torch.dot(values, weight), torch.dot(weights, weight))
