"""Pure accuracies: traced with the step, weighted by sample, added up as `Mean`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ailab.registry import METRICS
from ailab.types import Mean


def per_sample(values: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean over all dimensions but the first."""
    return values if values.dim() == 1 else values.flatten(1).mean(1)


def class_indices(pred: Tensor, label: Tensor) -> Tensor:
    """The label as (B, ...) class indices; one score per class, of the shape of `pred`, becomes the highest one's index.

    Raises:
        ValueError: the shapes do not belong together.
    """
    if pred.dim() > 1 and label.shape == pred.shape:
        return label.argmax(1)
    if pred.dim() < 2 or label.shape != pred.shape[:1] + pred.shape[2:]:
        raise ValueError(
            f"accuracy of pred {tuple(pred.shape)} and label {tuple(label.shape)}: pred has one score per class, (B, C, ...), "
            "and label is (B, ...) class indices or one score per class, (B, C, ...)."
        )
    return label


@METRICS.register_module()
@dataclass(frozen=True)
class Accuracy:
    """The share of samples whose class is among the `topk` highest scores; of fewer than `topk` classes every one is.

    Called with pred (B, C, ...) scores or logits; label (B, ...) int64 class indices, or (B, C, ...) one score per class;
    weight (B,), 0 for a sample that does not count. A sample with more dimensions (pixels) counts by its share that is right.
    With several numbers, `topk=(1, 5)`, there are several results, "top1" and "top5", of one sorting.

    Raises:
        ValueError: a `topk` below 1, or none.
    """

    topk: int | Sequence[int] = 5

    def __post_init__(self) -> None:
        if not self._ks or min(self._ks) < 1:
            raise ValueError(f"topk is {self.topk!r}; it is a number of classes, at least 1, or several of them.")

    @property
    def _ks(self) -> tuple[int, ...]:
        return (self.topk,) if isinstance(self.topk, int) else tuple(self.topk)

    def __call__(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Mean | dict[str, Mean]:
        """The hits and how many samples count, as a `Mean`; for several `topk` as one each."""
        label = class_indices(pred, label)
        top = pred.topk(min(max(self._ks), pred.shape[1]), dim=1).indices
        hits = top == label.unsqueeze(1)
        means = {f"top{k}": Mean.of(per_sample(hits[:, :k].any(1).float()), weight) for k in self._ks}
        return next(iter(means.values())) if isinstance(self.topk, int) else means


@METRICS.register_module()
@dataclass(frozen=True)
class Top1Accuracy:
    """The share of samples whose class has the highest score; called as `Accuracy` is."""

    def __call__(self, pred: Tensor, label: Tensor, weight: Tensor | None = None) -> Mean:
        """The hits and how many samples count, as a `Mean`."""
        label = class_indices(pred, label)
        return Mean.of(per_sample((pred.argmax(1) == label).float()), weight)
