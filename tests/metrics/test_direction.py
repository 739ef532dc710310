"""Which is better: losses go down, metrics say it themselves, and nobody guesses."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest

from ailab.errors import ConfigError
from ailab.metrics import PSNR, Accuracy, LabBaseMetric, MeanIoU, Top1Accuracy
from ailab.metrics.direction import direction_of, is_better, known


def error_rate(pred: Any, label: Any) -> Any: ...


error_rate.higher_is_better = False  # type: ignore[attr-defined]


class Both(LabBaseMetric):
    higher_is_better = {"share": True, "error": False}  # noqa: RUF012


METRICS: dict[str, Any] = {
    "top1": Top1Accuracy(),
    "top": Accuracy((1, 5)),
    "psnr": PSNR(),
    "iou": MeanIoU(2),
    "err": error_rate,
    "half": partial(error_rate, label=0),
    "both": Both(),
    "mae": LabBaseMetric(),
    "ppl": lambda pred: pred,
}


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *(("loss", "min"), ("l1", "min"), ("top1", "max"), ("top_top5", "max"), ("psnr", "max"), ("iou_miou", "max")),
        *(("err", "min"), ("half", "min"), ("both_share", "max"), ("both_error", "min"), ("both_samples", None)),
        *(("mae", None), ("ppl", None), ("grad_norm", None), ("skipped", None), ("my_loss", None)),
    ],
)
def test_who_says_which_is_better(name: str, direction: str | None) -> None:
    """The loss and its parts, then the metric by its attribute, of a dict each entry; nothing follows from a name."""
    assert direction_of(name, ("loss", "l1"), METRICS) == direction


def test_torchmetrics_say_it() -> None:
    """By their own attribute, members of a collection too."""
    torchmetrics = pytest.importorskip("torchmetrics")
    c = torchmetrics.classification
    found = {
        "acc": c.MulticlassAccuracy(3),
        "mse": torchmetrics.MeanSquaredError(),
        "matrix": c.MulticlassConfusionMatrix(3),
        "all": torchmetrics.MetricCollection({"f1": c.MulticlassF1Score(3), "hinge": c.MulticlassHingeLoss(3)}),
    }
    names = ("acc", "mse", "matrix", "all_f1", "all_hinge")
    assert [direction_of(n, (), found) for n in names] == ["max", "min", None, "max", "min"]


def test_the_cfg_has_the_last_word_and_is_asked_where_nobody_knows() -> None:
    """A mode counts; else the result's own direction; else an error that asks for the mode."""
    directions: Any = {"val_top1": "max", "val_loss": "min"}
    assert [known(None, "val_top1", directions, "x"), known("min", "val_top1", directions, "x")] == ["max", "min"]
    assert known(None, "val_loss", {}, "x") == "min"  # in every run
    with pytest.raises(ConfigError, match=r"^cfg\.a\.mode: whether a lower or a higher 'val_mae' is better is not known: "):
        known(None, "val_mae", directions, "cfg.a.mode")


def test_better_is_strict_and_a_nan_never_is() -> None:
    """By more than the margin, in the direction; anything is better than nothing, which is a NaN."""
    nan = math.nan
    assert is_better(1.0, 2.0, "min") and not is_better(2.0, 2.0, "min") and not is_better(3.0, 2.0, "min")
    assert is_better(3.0, 2.0, "max") and not is_better(2.0, 2.0, "max") and not is_better(1.0, 2.0, "max")
    assert is_better(1.0, 2.0, "min", 0.9) and not is_better(1.0, 2.0, "min", 1.0)
    assert [is_better(nan, 1.0, "min"), is_better(1.0, nan, "max"), is_better(nan, nan, "max")] == [False, True, False]
