"""What the scores of a classifier say class by class: confusion matrix, precision and recall, their curve, calibration.

All functions are pure and take whole splits. Their values are those of scikit-learn and torchmetrics where these have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def confusion_matrix(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """How often each true class was predicted as each class: (C, C) int64, a row per true class.

    Args:
        pred: (N,) int64 predicted classes.
        label: (N,) int64 true classes. A label outside [0, num_classes) does not count.
        num_classes: C.
    """
    counts = (label >= 0) & (label < num_classes)
    cell = label[counts] * num_classes + pred[counts]
    return torch.bincount(cell, minlength=num_classes**2).view(num_classes, num_classes)


@dataclass(frozen=True)
class ClassRow:
    """The results of one class. A ratio whose denominator is 0 is 0."""

    support: int  # samples of this class
    predicted: int  # samples that were predicted as this class
    precision: float
    recall: float
    f1: float
    iou: float


def class_rows(matrix: Tensor) -> list[ClassRow]:
    """Precision, recall, F1 and intersection over union of each class of a confusion matrix (C, C)."""
    hit, support, predicted = (x.tolist() for x in (matrix.diagonal(), matrix.sum(1), matrix.sum(0)))
    return [
        ClassRow(s, p, _ratio(h, p), _ratio(h, s), _ratio(2 * h, s + p), _ratio(h, s + p - h))
        for h, s, p in zip(hit, support, predicted, strict=True)
    ]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def precision_recall(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The precision-recall curve of one class: precision and recall, (K,) float64 each, by falling threshold.

    There is a point for each distinct score. Without a positive sample recall is 0 throughout.

    Args:
        scores: (N,) the score of the class.
        positive: (N,) bool, whether the sample is of the class.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    ranked, hits = scores[order], positive[order].to(torch.float64).cumsum(0)
    last = torch.ones_like(ranked, dtype=torch.bool)  # of each run of equal scores
    last[:-1] = ranked[1:] != ranked[:-1]
    found = hits[last]
    taken = torch.arange(1, len(ranked) + 1, dtype=torch.float64)[last]
    return found / taken, found / hits[-1:].clamp(min=1)


def average_precision(precision: Tensor, recall: Tensor) -> float:
    """The area below a precision-recall curve as a step function: the sum of precision times the gain of recall."""
    gains = torch.diff(recall, prepend=torch.zeros(1, dtype=recall.dtype))
    return float((precision * gains).sum())


@dataclass(frozen=True)
class Reliability:
    """How often a classifier is right, by how sure it is. Bins are of equal width over [0, 1]."""

    count: Tensor  # (bins,) int64 samples
    confidence: Tensor  # (bins,) float64 mean of the highest probability; 0 in an empty bin
    accuracy: Tensor  # (bins,) float64 fraction of samples that are right; 0 in an empty bin

    @property
    def error(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence|, each bin weighted by its samples.

        Source: Guo et al. 2017, equation 3.
        """
        gaps = (self.accuracy - self.confidence).abs() * self.count
        return float(gaps.sum() / self.count.sum().clamp(min=1))


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> Reliability:
    """Confidence against accuracy.

    Args:
        confidence: (N,) the highest probability of each sample, in [0, 1].
        correct: (N,) bool, whether the class of that probability is right.
        bins: number of bins; each holds its upper bound.
    """
    place = (confidence.to(torch.float64) * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(place, minlength=bins)
    some = count.clamp(min=1)
    sure = torch.bincount(place, confidence.to(torch.float64), minlength=bins) / some
    right = torch.bincount(place, correct.to(torch.float64), minlength=bins) / some
    return Reliability(count, sure, right)


def probabilities(scores: Tensor) -> Tensor:
    """Class scores (N, C, ...) as probabilities along dimension 1, float32.

    Scores that already are probabilities stay: none is negative, and those of every sample add up to 1. Of others it is the
    softmax. Give it a whole split: the choice is made once.
    """
    wide = scores.float()
    if bool((wide >= 0).all()) and bool(((wide.sum(1) - 1).abs() < 1e-3).all()):
        return wide
    return wide.softmax(1)


def are_class_scores(pred: object, label: object) -> bool:
    """Whether a model output and a field of the batch are the scores of classes and the classes.

    That is: `pred` (B, C, ...) of a float dtype with C >= 2, and `label` (B, ...) of whole numbers.
    """
    if not isinstance(pred, Tensor) or not isinstance(label, Tensor):
        return False
    if not pred.is_floating_point() or pred.dim() < 2 or pred.shape[1] < 2:
        return False
    whole = not label.is_floating_point() and not label.is_complex() and label.dtype != torch.bool
    return whole and label.shape == pred.shape[:1] + pred.shape[2:]
