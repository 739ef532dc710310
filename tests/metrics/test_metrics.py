"""Accuracies against torchmetrics, over shapes, weights and partitions of the data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ailab.metrics import Accuracy, LabBaseMetric, Top1Accuracy
from ailab.types import Mean


def drawn(seed: int, samples: int, classes: int, pixels: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(samples, classes, *pixels), torch.randint(0, classes, (samples, *pixels))


def metric(topk: int) -> Top1Accuracy | Accuracy:
    return Top1Accuracy() if topk == 1 else Accuracy(topk)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(2, 8), st.integers(1, 8), st.booleans())
def test_accuracy_equals_torchmetrics(seed: int, samples: int, classes: int, topk: int, dense: bool) -> None:
    """Over any sizes, top-k accuracy is torchmetrics' micro accuracy; so is its mean over pixels."""
    functional = pytest.importorskip("torchmetrics.functional.classification")
    topk = min(topk, classes)
    pred, label = drawn(seed, samples, classes, (3, 2) if dense and topk == 1 else ())
    oracle = functional.multiclass_accuracy(pred, label, num_classes=classes, average="micro", top_k=topk)
    torch.testing.assert_close(metric(topk)(pred, label).value, oracle)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(1, 3), st.data())
def test_weights_select_samples_and_parts_add_up(seed: int, samples: int, topk: int, data: st.DataObject) -> None:
    """Weight 0 removes a sample, and the sum of the parts of a data set is the whole."""
    pred, label = drawn(seed, samples, 5)
    weight = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=samples, max_size=samples)))
    cut = data.draw(st.integers(0, samples))
    accuracy = metric(topk)
    parts = accuracy(pred[:cut], label[:cut], weight[:cut]) + accuracy(pred[cut:], label[cut:], weight[cut:])
    chosen = weight.bool()
    torch.testing.assert_close(parts.value, accuracy(pred[chosen], label[chosen]).value)
    assert parts.weight == weight.sum()


@pytest.mark.parametrize("topk", [1, 2])
def test_one_score_per_class_is_a_label_too(topk: int) -> None:
    """A float label of the shape of the scores means the class with the highest value."""
    pred, label = drawn(0, 50, 7)
    scores = torch.nn.functional.one_hot(label, 7).float()
    assert metric(topk)(pred, scores).value == metric(topk)(pred, label).value


def test_a_constant_or_nan_prediction_is_not_right() -> None:
    """Ties and NaN pick k classes and no more, so that a collapsed model does not look perfect."""
    label = torch.arange(10)
    for pred in (torch.zeros(10, 10), torch.full((10, 10), math.nan)):
        assert Top1Accuracy()(pred, label).value == pytest.approx(0.1)
        assert Accuracy(2)(pred, label).value == pytest.approx(0.2)


def test_top_5_of_three_classes_is_always_right() -> None:
    """With fewer classes than k the class is always among the k."""
    assert Accuracy()(*drawn(0, 8, 3)).value == 1


@pytest.mark.parametrize(("pred", "label"), [((4,), (4,)), ((4, 5), (4, 1)), ((4, 5), (3,)), ((4, 5, 2), (4,))])
def test_shapes_that_do_not_belong_together_are_refused(pred: tuple[int, ...], label: tuple[int, ...]) -> None:
    """No silent broadcast: the error names both shapes."""
    with pytest.raises(ValueError, match="accuracy of pred"):
        Top1Accuracy()(torch.zeros(pred), torch.zeros(label, dtype=torch.long))


@pytest.mark.parametrize("topk", [1, 3])
def test_a_metric_traces_into_one_graph(topk: int) -> None:
    """Pure metrics run below the compile line with no graph break."""
    accuracy = metric(topk)

    def traced(pred: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        mean: Mean = accuracy(pred, label, weight)
        return torch.stack([mean.total, mean.weight])

    inputs = (*drawn(0, 8, 5), torch.ones(8))
    torch.testing.assert_close(torch.compile(traced, fullgraph=True, backend="aot_eager")(*inputs), traced(*inputs))


def test_avg_of_a_class_style_metric_is_its_value() -> None:
    """`meters['x'].avg` of the seed's log_items reads compute()."""

    class Count(LabBaseMetric):
        def reset(self) -> None:
            self.n = 0

        def update(self, pred: Tensor) -> None:
            self.n += len(pred)

        def compute(self) -> int:
            return self.n

    count = Count()
    count.reset()
    count.update(torch.zeros(3))
    assert count.avg == 3
