"""Image metrics: PSNR (a pure metric), and mean IoU (a class-style metric with a confusion matrix)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ailab.metrics.accuracy import class_indices
from ailab.metrics.lab import LabBaseMetric
from ailab.registry import METRICS
from ailab.types import Mean, widened


@METRICS.register_module()
@dataclass(frozen=True)
class PSNR:
    """Peak signal-to-noise ratio: the mean over the images of 10 log10(data_range² / mean squared error), in decibels.

    Called with `pred` and `target`, (B, ...) of the same shape, and `weight`, (B,), 0 for an image that does not count. The ratio
    is computed for each image, as papers report it, not over all pixels of the data set. It is infinite where both are equal.

    Args:
        data_range: largest minus smallest value that a pixel can have, positive.

    Raises:
        ValueError: when `data_range` is not positive, or the shapes differ.
    """

    higher_is_better: ClassVar[bool] = True
    data_range: float = 1.0

    def __post_init__(self) -> None:
        if not self.data_range > 0:
            raise ValueError(
                f"data_range is {self.data_range}; it must be positive: the largest minus the smallest value of a pixel."
            )

    def __call__(self, pred: Tensor, target: Tensor, weight: Tensor | None = None) -> Mean:
        """The sum of the ratios and the number of counted images, as a `Mean`."""
        if pred.shape != target.shape:
            raise ValueError(f"PSNR of pred {tuple(pred.shape)} and target {tuple(target.shape)}: the shapes must be the same.")
        pred, target = (widened(x) if x.is_floating_point() else x.float() for x in (pred, target))  # uint8 wraps around
        error = (pred - target).flatten(1).square().mean(1)
        ratio = 10 * torch.log10(self.data_range**2 / error)
        # Padding repeats a sample, so its ratio may be infinite too, and 0 * inf is NaN.
        return Mean.of(ratio if weight is None else torch.where(weight > 0, ratio, 0.0), weight)


@METRICS.register_module()
class MeanIoU(LabBaseMetric):
    """Mean IoU: the mean over the classes of intersection / union of predicted and true pixels, over all samples of the phase.

    `update` takes `pred`, (B, C, ...) scores or (B, ...) class indices, and `label`, (B, ...) class indices or one score per
    class. A class that is neither predicted nor true is not in the mean. The results are "miou" and the pixel "accuracy".

    Args:
        num_classes: number of classes, at least 2.
        ignore_index: pixels with this label do not count. None: all pixels count.

    Raises:
        ValueError: for fewer than two classes.
    """

    higher_is_better = True

    def __init__(self, num_classes: int, ignore_index: int | None = None):
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 2.")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def reset(self) -> None:
        """Clear the confusion matrix."""
        self.matrix = torch.zeros_like(self.matrix)

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Add the pixels of a batch to the confusion matrix, on their device, without a device read."""
        if pred.is_floating_point():
            label, pred = class_indices(pred, label), pred.argmax(1)
        n, pred, label = self.num_classes, pred.flatten(), label.flatten().long()
        counts = torch.ones_like(label) if self.ignore_index is None else (label != self.ignore_index).long()
        cell = torch.where(counts > 0, label, 0) * n + pred
        found = torch.zeros(n * n, dtype=torch.int64, device=label.device).index_add_(0, cell, counts)
        self.matrix = self.matrix.to(label.device) + found.view(n, n)

    def compute(self) -> dict[str, Tensor]:
        """Mean IoU and pixel accuracy over all samples since `reset`."""
        matrix = self.matrix.double()
        intersection, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        present = union > 0
        iou = torch.where(present, intersection / union.clamp(min=1), 0.0).sum() / present.sum().clamp(min=1)
        return {"miou": iou, "accuracy": intersection.sum() / matrix.sum().clamp(min=1)}
