"""Class reports and intervals: the values of torchmetrics and of formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import classification as oracle

from ailab.metrics.class_report import (
    are_class_scores,
    average_precision,
    class_rows,
    confusion_matrix,
    precision_recall,
    probabilities,
    reliability,
)
from ailab.metrics.interval import bootstrap_intervals


def classified(n: int = 400, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n + classes)
    label = torch.randint(classes, (n,), generator=g)
    scores = torch.randn(n, classes, generator=g) + 2 * torch.nn.functional.one_hot(label, classes)
    return scores.mul(4).round().div(4), label  # with equal scores


def test_rows_of_classes_are_those_of_torchmetrics() -> None:
    """Confusion matrix, precision, recall, F1 and IoU of each class equal torchmetrics'."""
    scores, label = classified()
    matrix = confusion_matrix(scores.argmax(1), label, 5)
    assert torch.equal(matrix, oracle.multiclass_confusion_matrix(scores, label, 5))
    rows = class_rows(matrix)
    for name, fn in (("precision", "precision"), ("recall", "recall"), ("f1", "f1_score"), ("iou", "jaccard_index")):
        wanted = getattr(oracle, f"multiclass_{fn}")(scores, label, 5, average="none")
        assert [getattr(r, name) for r in rows] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert sum(r.support for r in rows) == 400


def test_labels_that_are_no_class_do_not_count() -> None:
    """An ignored label is in no row of the matrix."""
    label = torch.tensor([0, 255, 1, -100])
    assert confusion_matrix(torch.tensor([0, 1, 0, 1]), label, 2).tolist() == [[1, 0], [1, 0]]


def test_average_precision_is_that_of_torchmetrics() -> None:
    """The area of the curve of each class equals torchmetrics', with equal scores too."""
    scores, label = classified()
    likely = probabilities(scores)
    wanted = oracle.multiclass_average_precision(likely, label, 5, average="none")
    found = [average_precision(*precision_recall(likely[:, i], label == i)) for i in range(5)]
    assert found == pytest.approx(wanted.tolist(), abs=1e-6)


def test_calibration_error_is_that_of_torchmetrics() -> None:
    """The expected calibration error equals torchmetrics' of norm l1."""
    scores, label = classified()
    sure, pred = probabilities(scores).max(1)
    wanted = oracle.multiclass_calibration_error(probabilities(scores), label, 5, n_bins=15, norm="l1")
    assert reliability(sure, pred == label).error == pytest.approx(float(wanted), abs=1e-6)


def test_probabilities_stay_and_logits_do_not() -> None:
    """Scores that are probabilities come back as they are; logits get a softmax."""
    scores, _ = classified()
    likely = scores.softmax(1)
    assert torch.equal(probabilities(likely), likely)
    assert torch.equal(probabilities(scores), likely)


@pytest.mark.parametrize(
    ("pred", "label", "wanted"),
    [
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), True),
        (torch.zeros(3, 4, 5, 6), torch.zeros(3, 5, 6, dtype=torch.uint8), True),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), False),
        (torch.zeros(3, 4), torch.zeros(3, 4), False),
        (torch.zeros(3, 4), torch.zeros(3), False),
        (None, torch.zeros(3), False),
    ],
)
def test_what_class_scores_are(pred: object, label: object, wanted: bool) -> None:
    """Scores (B, C, ...) with whole labels (B, ...) are class scores; a regression is not."""
    assert are_class_scores(pred, label) is wanted


def test_the_interval_is_the_percentile_bootstrap() -> None:
    """For a mean it is about 1.96 standard errors wide on each side; for a weighted mean it equals a bootstrap by numpy."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=g, dtype=torch.float64)
    rows = torch.stack([values, torch.ones_like(values)], 1)[:, None]
    [(low, high)] = bootstrap_intervals(rows, 1)
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=half * 0.12)
    weights = torch.rand(2000, generator=g, dtype=torch.float64)
    [found] = bootstrap_intervals(torch.stack([values * weights, weights], 1)[:, None], 1, resamples=2000)
    rng, v, w = np.random.default_rng(0), values.numpy(), weights.numpy()
    means = [np.dot(v[i], w[i]) / w[i].sum() for i in (rng.integers(2000, size=2000) for _ in range(2000))]
    assert found == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=half * 0.2)


def test_the_interval_is_a_function_of_rows_and_seed() -> None:
    """The same rows and seed give the same interval; samples that are all alike give one of no width."""
    rows = torch.rand(50, 3, 2, generator=torch.Generator().manual_seed(2)).double()
    assert bootstrap_intervals(rows, 4) == bootstrap_intervals(rows, 4) != bootstrap_intervals(rows, 5)
    same = torch.tensor([[[0.25, 1.0]]], dtype=torch.float64).expand(9, 1, 2)
    assert bootstrap_intervals(same, 0) == [(0.25, 0.25)]
