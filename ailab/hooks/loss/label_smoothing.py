"""LabelSmoothingHook: class indices become probabilities that leave something for the other classes."""

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
    """Give the criterion `(1 - smoothing) * one_hot(target) + smoothing / classes` for a target of class indices.

    For criteria that take probabilities (cross-entropy, KL divergence, binary cross-entropy of one-hot targets) and in training
    only. Nobody but the criterion sees them: metrics keep the indices, wherever they are listed. A target outside
    0 .. classes - 1 (an `ignore_index`) has no probabilities: its loss is 0, and its sample counts. Where the criterion is
    CrossEntropyLoss over indices, its own `label_smoothing` is the same for one batch, and knows class weights as well.

    Args:
        classes: how many there are.
        smoothing: in [0, 1]; 0 leaves the indices as they are.
        target: the batch field, (B, ...) int64; becomes (B, classes, ...) float32.
        name: of this hook.

    Raises:
        ConfigError: for smoothing outside [0, 1], fewer than 2 classes, a field that the batch lacks or that holds no indices.

    Source: Szegedy et al. 2016, arXiv:1512.00567.
    """
    path = f"cfg.hooks.{name}"
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"{path}.smoothing is {smoothing}; it lies in [0, 1].")
    if classes < 2:
        raise ConfigError(f"{path}.classes is {classes}; there are at least 2.")

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
