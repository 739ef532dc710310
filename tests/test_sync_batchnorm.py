"""SyncBatchNormHook over gloo ranks: the joint batch, bit by bit of the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_parallel import CORES, WORLDS, ScalarLoss, compared, config, distance, traced, trained
from test_parallel import ranks as ranks  # a fixture
from torch import nn

from ailab.build import loss_of
from ailab.core.loss import module_state
from ailab.hooks import SyncBatchNormHook
from ailab.hooks.sync_batchnorm import moments_of_all
from ailab.stack import stack

SYNCED = dict(sync_bn=dict(type="SyncBatchNormHook"))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sync", CORES)
def test_ranks_normalise_as_the_joint_batch(ranks: Any, sync: str, world: int) -> None:
    """Parameters, running statistics and logs of 12 steps are those of one process with the whole batch (1e-9)."""
    cfg = config(12 * world, 4 * world, model=dict(norm=True), sync=sync, hooks=SYNCED)
    assert max(compared(ranks, world, cfg)) < 1e-9
    plain = {**cfg, "hooks": {n: h for n, h in cfg["hooks"].items() if n != "sync_bn"}}
    assert compared(ranks, world, plain, cfg)[0] > 1e-3  # without the hook it is another run


@pytest.mark.parametrize("sync", CORES)
def test_ranks_of_unequal_size_normalise_as_the_joint_batch(ranks: Any, sync: str) -> None:
    """With 3 samples on one rank and 2 on the other each sample counts once, in the statistics and in their gradients."""
    cfg = config(10, 5, model=dict(norm=True), loss=dict(type=ScalarLoss), sync=sync, hooks=SYNCED)
    assert max(compared(ranks, 2, cfg)) < 1e-9


@pytest.mark.parametrize("sync", CORES)
def test_compiled_equals_eager(ranks: Any, sync: str) -> None:
    """Traced, the reductions of the forward and of the backward are in the graph, and the numbers are eager's (1e-5)."""
    cfg = config(16, model=dict(double=False, norm=True), sync=sync, workflow=[{"phase": "train"}], hooks=SYNCED)
    eager, compiled = ranks(2)(trained, cfg), ranks(2)(traced, {**cfg, "compile": True})
    for name in ("params", "buffers"):
        assert distance(getattr(compiled[0]["state"], name), getattr(eager[0]["state"], name)) < 1e-5
    assert compiled[0]["graphs"] == (2 if sync == "ddp" else 1)


def test_one_process_is_left_alone() -> None:
    """In one process the loss is the bare one, and the moments are those of torch."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    bare = loss_of(model, nn.MSELoss())
    assert stack(bare, [SyncBatchNormHook()]) is bare
    assert module_state(model).buffers
    x = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    mean, variance, count = moments_of_all(x)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(variance, x.var((0, 2), correction=0))
    assert float(count) == 35
