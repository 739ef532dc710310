"""Losses that are no mean over samples of their own, over several ranks: sums, and losses that need the batch of all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import CORES, compared, config, trained
from torch import Tensor
from torch.nn import functional

from ailab import Sum, dist
from ailab.errors import ConfigError


def info_nce(output: Tensor, target: Tensor) -> Tensor:
    """Each sample against the keys of the global batch, (B,)."""
    keys = dist.all_gather(output.square() + functional.one_hot(target, 4), differentiable=True)
    mine = dist.rank_offset(len(output)) + torch.arange(len(output))
    return functional.cross_entropy(output @ keys.T, mine, reduction="none")


def sum_of_all(output: Tensor, target: Tensor) -> Sum:
    """One number that padding cannot be masked in."""
    return Sum(functional.cross_entropy(output, target, reduction="sum"))


LOSSES: dict[str, Any] = {
    "contrastive": info_nce,
    "sum": dict(type="CrossEntropyLoss", reduction="sum"),
    "sum of classes": dict(type="CrossEntropyLoss", reduction="sum", weight=torch.tensor([1.0, 2.0, 0.5, 1.5]).double()),
    "own sum": sum_of_all,
}
ACCUMULATE = dict(accumulate=dict(type="GradAccumulateHook", n=3))


CASES = [(loss, hooks) for loss in LOSSES for hooks in ({}, ACCUMULATE)]
CASES.remove(("contrastive", ACCUMULATE))  # a micro-batch has other negatives than the batch


@pytest.mark.parametrize(("loss", "hooks"), CASES)
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("sync", CORES)
def test_ranks_equal_one_process(ranks: Any, loss: str, sync: str, world: int, hooks: dict[str, Any]) -> None:
    """With a ragged tail, in float64: the parameters and logs of one process, 1e-9."""
    cfg = config(29, 12, val=9, loss=LOSSES[loss], sync=sync, epochs=2, optimizer=dict(lr=0.01), hooks=hooks)
    assert max(compared(ranks, world, cfg)) < 1e-9


def test_a_rank_without_samples_has_none_to_gather(ranks: Any) -> None:
    """A last batch of one sample for two ranks is refused before the first step where the loss gathers, with the way out."""
    cfg = config(29, 12, val=7, loss=info_nce)
    with pytest.raises(ConfigError, match=r"cfg\.data\.val: the last batch has 1 samples for 2 ranks[\s\S]*drop_last=True"):
        ranks(2)(trained, cfg)
