"""Accuracies as pure metrics: traced into the step, weighted by sample, summed as `Mean`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ailab.registry import METRICS
from ailab.types import Mean


def per_sample(values: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over all dimensions but the first."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def class_indices(pred: Tensor, label: Tensor) -> Tensor:
    """The label as (B, ...) class indices. A label with one score per class, of the shape of `pred`, becomes its argmax.

    Raises:
        ValueError: when the shapes do not fit together.
    """
    if pred.dim() > 1 and label.shape == pred.shape:
        return label.argmax(1)
    if pred.dim() < 2 or label.shape != pred.shape[:1] + pred.shape[2:]:
        raise ValueError(
            f"accuracy of pred {tuple(pred.shape)} and label {tuple(label.shape)}: pred must be scores (B, C, ...), "
            "and label must be class indices (B, ...) or one score per class (B, C, ...)."
        )
    return label


@METRICS.register_module()
@dataclass(frozen=True)
class Accuracy:
    """Top-k accuracy: the fraction of samples whose class is among the `topk` highest scores.

    Called with `pred`, (B, C, ...) scores or logits; `label`, (B, ...) int64 class indices or (B, C, ...) one score per class;
    and `weight`, (B,), 0 for a sample that does not count. For samples with more dimensions (pixels), the value of a sample is the
    fraction of its pixels that are correct. With fewer than `topk` classes every sample is correct.

    Args:
        topk: k, at least 1. Several numbers, such as `(1, 5)`, give several results, "top1" and "top5".

    Raises:
        ValueError: when `topk` is below 1 or empty.
    """

    higher_is_better: ClassVar[bool] = True
    topk: int | Sequence[int] = 5

    def __post_init__(self) -> None:
        if not self._ks or min(self._ks) < 1:
            raise ValueError(f"topk is {self.topk!r}; it must be a number of classes, at least 1, or several of them.")

    @property
    def _ks(self) -> tuple[int, ...]:
        return (self.topk,) if isinstance(self.topk, int) else tuple(self.topk)

    def __call__(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Mean | dict[str, Mean]:
        """Correct samples and counted samples as a `Mean`; for several `topk` one `Mean` each, by name."""
        label = class_indices(pred, label)
        top = pred.topk(min(max(self._ks), pred.shape[1]), dim=1).indices
        correct = top == label.unsqueeze(1)
        means = {f"top{k}": Mean.of(per_sample(correct[:, :k].any(1).float()), weight) for k in self._ks}
        return next(iter(means.values())) if isinstance(self.topk, int) else means


@METRICS.register_module()
@dataclass(frozen=True)
class Top1Accuracy:
    """Top-1 accuracy: the fraction of samples whose class has the highest score. Called as `Accuracy` is."""

    higher_is_better: ClassVar[bool] = True

    def __call__(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Mean:
        """Correct samples and counted samples, as a `Mean`."""
        label = class_indices(pred, label)
        return Mean.of(per_sample((pred.argmax(1) == label).float()), weight)
