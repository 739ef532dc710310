"""PSNR and mean IoU against torchmetrics, over shapes, weights and partitions of the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import rows_of, tiny_cfg
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ailab.fit import fit
from ailab.metrics import PSNR, MeanIoU


def pictures(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(samples, 3, 5, 4, generator=g), torch.rand(samples, 3, 5, 4, generator=g)


@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([1.0, 2.0, 255.0]))
def test_psnr_equals_torchmetrics(seed: int, samples: int, data_range: float) -> None:
    """The mean of the ratio of each picture."""
    image = pytest.importorskip("torchmetrics.functional.image", reason="the oracle")
    pred, target = (x * data_range for x in pictures(seed, samples))
    oracle = image.peak_signal_noise_ratio(pred, target, data_range=data_range, dim=(1, 2, 3), reduction="elementwise_mean")
    torch.testing.assert_close(PSNR(data_range)(pred, target).value, oracle)


@given(st.integers(0, 10**6), st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4))
def test_psnr_counts_the_pictures_with_a_weight(seed: int, weights: list[float]) -> None:
    """Weight 0 removes a picture, also one with an infinite ratio, and parts add up to the whole."""
    pred, target = pictures(seed, 4)
    weight = torch.tensor(weights)
    pred[weight == 0] = target[weight == 0]
    whole = PSNR()(pred, target, weight)
    parts = PSNR()(pred[:1], target[:1], weight[:1]) + PSNR()(pred[1:], target[1:], weight[1:])
    torch.testing.assert_close(parts.value, whole.value)
    if weight.any():
        torch.testing.assert_close(whole.value, PSNR()(pred[weight > 0], target[weight > 0]).value)


def test_equal_pictures_have_an_infinite_ratio_and_other_shapes_none() -> None:
    """There is no epsilon for equal images, no broadcasting, and half precision is summed in float32."""
    same, _ = pictures(0, 2)
    assert math.isinf(float(PSNR()(same, same).value))
    with pytest.raises(ValueError, match="shapes must be the same"):
        PSNR()(same, same[:, :1])
    with pytest.raises(ValueError, match="data_range is 0"):
        PSNR(0.0)
    assert PSNR()(same.half(), same.half() * 0.5).total.dtype == torch.float32


def test_psnr_traces_into_one_graph() -> None:
    """It runs below the compile line with no graph break."""

    def traced(pred: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return PSNR()(pred, target, weight).value

    inputs = (*pictures(0, 3), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(torch.compile(traced, fullgraph=True, backend="aot_eager")(*inputs), traced(*inputs))


@given(st.integers(0, 10**6), st.integers(2, 5), st.booleans(), st.booleans())
def test_mean_iou_equals_torchmetrics(seed: int, classes: int, scores: bool, ignore: bool) -> None:
    """Over batches, with scores or indices, ignored pixels and classes that are not there."""
    jaccard = pytest.importorskip("torchmetrics.classification", reason="the oracle")
    g = torch.Generator().manual_seed(seed)
    ignored = 255 if ignore else None
    mine = MeanIoU(classes + 1, ignore_index=ignored)  # the last class is never seen
    oracle = jaccard.MulticlassJaccardIndex(classes + 1, average="macro", ignore_index=ignored)
    mine.reset()
    for _ in range(3):
        pred = torch.randn(2, classes + 1, 3, 4, generator=g)
        pred[:, -1] = -100.0
        label = torch.randint(0, classes, (2, 3, 4), generator=g)
        if ignore:
            label[torch.rand(label.shape, generator=g) < 0.2] = 255
        mine.update(pred if scores else pred.argmax(1), label)
        oracle.update(pred, label)
    torch.testing.assert_close(mine.compute()["miou"], oracle.compute().double(), rtol=1e-6, atol=1e-6)


def Paint(n: int) -> TensorDataset:
    g = torch.Generator().manual_seed(n)
    return TensorDataset(torch.rand(n, 3, 4, 4, generator=g), torch.randint(0, 3, (n, 4, 4), generator=g))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def test_both_work_in_a_run(tmp_path: Path) -> None:
    """By name in a cfg: PSNR in the step, mean IoU on the host with its results by name."""
    mapping: dict[str, Any] = {"pred": "output", "label": "target"}
    cfg = tiny_cfg(tmp_path)
    cfg["model"] = dict(type=Pixels)
    cfg["data"] |= dict(train=dict(type=Paint, n=22), val=dict(type=Paint, n=9))
    cfg["hooks"] = dict(
        metrics=dict(
            type="MetricHook",
            seg=dict(type="MeanIoU", num_classes=3, mapping=mapping),
            top1=dict(type="Top1Accuracy", mapping=mapping),
            psnr=dict(type="PSNR", mapping={"pred": "output", "target": "input"}, phases=["val"]),
        )
    )
    fit(cfg)
    rows = [r for r in rows_of(tmp_path) if r["final"]]
    assert [r["seg_accuracy"] for r in rows] == pytest.approx([r["top1"] for r in rows])
    assert all(0 < r["seg_miou"] < 1 for r in rows)
    assert ["psnr" in r for r in rows] == [r["phase"] == "val" for r in rows]
