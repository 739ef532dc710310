"""LabelSmoothingHook: label smoothing for criteria that take class probabilities."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from ailab.errors import ConfigError, nearest
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import VIEWS, Aux, Batch, Buffers, Loss, Params


@HOOKS.register_module()
def LabelSmoothingHook(
    classes: int, smoothing: float = 0.1, target: str = "target", name: str = "label_smoothing"
) -> Middleware[Loss]:
    """Replace class indices by the probabilities `(1 - smoothing) * one_hot(target) + smoothing / classes`.

    In training only, and for criteria that take probabilities: cross-entropy, KL divergence, binary cross-entropy of one-hot
    targets. Only the criterion gets the probabilities. Metrics get the indices, wherever they are listed. A target outside
    0 .. classes - 1 (an `ignore_index`) gets probabilities of 0: its loss is 0, and its sample still counts in the mean. With
    CrossEntropyLoss over indices you can use its own `label_smoothing` instead. It gives the same loss, and also supports class
    weights.

    Args:
        classes: number of classes, at least 2.
        smoothing: probability that is spread over all classes, in [0, 1]. 0 leaves the indices as they are.
        target: the batch field, (B, ...) int64 class indices. The criterion gets (B, classes, ...) float32.

    Raises:
        ConfigError: for `smoothing` outside [0, 1], fewer than 2 classes, or a field that the batch does not have or that is
            floating point.

    Source: Szegedy et al. 2016, arXiv:1512.00567.
    """
    path = f"cfg.hooks.{name}"
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"{path}.smoothing is {smoothing}; it must be in [0, 1].")
    if classes < 2:
        raise ConfigError(f"{path}.classes is {classes}; it must be at least 2.")

    def smooth(index: Tensor) -> Tensor:
        if index.is_floating_point():
            raise ConfigError(f"{path}.target: '{target}' is {index.dtype}; label smoothing takes class indices.")
        hit = (index.unsqueeze(1) == torch.arange(classes, device=index.device).view(-1, *[1] * (index.dim() - 1))).float()
        return hit * (1 - smoothing) + hit.amax(1, keepdim=True) * (smoothing / classes)

    def wrap(loss: Loss) -> Loss:
        if smoothing == 0:
            return loss

        def smoothed(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            views = batch.get(VIEWS) or [(None, {})]
            views = [(share, {**fields, target: smooth(fields.get(target, batch[target]))}) for share, fields in views]
            return loss(params, buffers, {**batch, VIEWS: views})

        return smoothed

    def check(fields: Collection[str], phase: str) -> list[str]:
        if target in fields:
            return []
        return [f"{path}.target: there is no field '{target}'.{nearest(target, fields)} Fields: {', '.join(fields)}."]

    return Middleware(name, wrap, "loss", check=check)
