"""Metrics of pictures and of maps: peak signal-to-noise ratio, pure; mean intersection over union, of a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ailab.metrics.accuracy import class_indices
from ailab.metrics.lab import LabBaseMetric
from ailab.registry import METRICS
from ailab.types import Mean, widened


@METRICS.register_module()
@dataclass(frozen=True)
class PSNR:
    """The mean over the pictures of 10 log10(data_range² / mean squared error), in decibels; infinite where two are equal.

    Called with pred and target (B, ...) of one shape, in the units of `data_range`; weight (B,), 0 for a picture that does not
    count. The ratio is of each picture, as papers report it, and not of all pixels of a data set together.

    Raises:
        ValueError: `data_range` is not positive, or the shapes differ.
    """

    data_range: float = 1.0  # largest minus smallest value that a pixel can have

    def __post_init__(self) -> None:
        if not self.data_range > 0:
            raise ValueError(f"data_range is {self.data_range}; it is the largest minus the smallest value of a pixel.")

    def __call__(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Mean:
        """The sum of the ratios and how many pictures count, as a `Mean`."""
        if pred.shape != target.shape:
            raise ValueError(f"PSNR of pred {tuple(pred.shape)} and target {tuple(target.shape)}: the shapes must be the same.")
        error = (widened(pred) - widened(target)).flatten(1).square().mean(1)
        ratio = 10 * torch.log10(self.data_range**2 / error)
        # Padding repeats a sample, so its ratio may be infinite too, and 0 * inf is no number.
        return Mean.of(ratio if weight is None else torch.where(weight > 0, ratio, 0.0), weight)


@METRICS.register_module()
class MeanIoU(LabBaseMetric):
    """The mean over the classes of intersection / union of predicted and true pixels, of all samples of the phase together.

    `update` takes pred (B, C, ...) scores or (B, ...) class indices, and label (B, ...) class indices or one score per class.
    Pixels whose label is `ignore_index` do not count; a class that is neither predicted nor true has no part in the mean.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None):
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; it is at least 2.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def reset(self) -> None:
        """Forget every sample."""
        self.matrix = torch.zeros_like(self.matrix)

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count the pixels of a batch by (true, predicted) class; on their device, nothing is read back."""
        if pred.is_floating_point():
            label, pred = class_indices(pred, label), pred.argmax(1)
        n, pred, label = self.num_classes, pred.flatten(), label.flatten().long()
        counts = torch.ones_like(label) if self.ignore_index is None else (label != self.ignore_index).long()
        cell = torch.where(counts > 0, label, 0) * n + pred
        found = torch.zeros(n * n, dtype=torch.int64, device=label.device).index_add_(0, cell, counts)
        self.matrix = self.matrix.to(label.device) + found.view(n, n)

    def compute(self) -> dict[str, Tensor]:
        """The mean, and the share of pixels that are right, of all samples since `reset`."""
        matrix = self.matrix.double()
        hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        there = union > 0
        iou = torch.where(there, hit / union.clamp(min=1), 0.0).sum() / there.sum().clamp(min=1)
        return {"miou": iou, "accuracy": hit.sum() / matrix.sum().clamp(min=1)}
