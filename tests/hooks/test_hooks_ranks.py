"""Traced hooks over gloo ranks: what they do is what they do to the joint batch in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import CORES, WORLDS, ScalarLoss, compared, config, distance, traced, trained
from torch import nn

from ailab.build import loss_of
from ailab.core.loss import module_state
from ailab.errors import NonFiniteError
from ailab.hooks import SyncBatchNormHook
from ailab.hooks.loss.sync_batchnorm import global_moments
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
def test_recomputed_blocks_reduce_again(ranks: Any, sync: str) -> None:
    """Inside what RematHook computes twice, the reductions of the forward are made twice, in one order, to the same numbers."""
    remat = dict(remat=dict(type="RematHook", modules=["body"]))
    for hooks in ({**SYNCED, **remat}, {**remat, **SYNCED}):
        cfg = config(16, model=dict(norm=True), sync=sync, hooks=hooks)
        assert max(compared(ranks, 2, cfg)) < 1e-9


@pytest.mark.parametrize("sync", CORES)
def test_ranks_of_unequal_size_normalise_as_the_joint_batch(ranks: Any, sync: str) -> None:
    """With 3 samples on one rank and 2 on the other each sample counts once, in the statistics and in their gradients."""
    cfg = config(10, 5, model=dict(norm=True), loss=dict(type=ScalarLoss), sync=sync, hooks=SYNCED)
    assert max(compared(ranks, 2, cfg)) < 1e-9


@pytest.mark.parametrize("sync", CORES)
def test_a_rank_without_samples_is_not_in_the_statistics(ranks: Any, sync: str) -> None:
    """Of a last batch of 2 samples on 3 ranks the third has none: what stands in for them does not count (1e-9)."""
    cfg = config(14, 12, model=dict(norm=True), sync=sync, hooks=SYNCED)
    assert max(compared(ranks, 3, cfg)) < 1e-9
    assert distance(ranks(3)(trained, cfg)[0]["state"].buffers, ranks(1)(trained, cfg)[0]["state"].buffers) < 1e-9


@pytest.mark.parametrize("sync", CORES)
def test_synchronised_and_compiled_equals_eager(ranks: Any, sync: str) -> None:
    """Traced, the reductions of the forward and of the backward are in the graph, and the numbers are eager's (1e-5)."""
    cfg = config(16, model=dict(double=False, norm=True), sync=sync, workflow=[{"phase": "train"}], hooks=SYNCED)
    eager, compiled = ranks(2)(trained, cfg), ranks(2)(traced, {**cfg, "compile": True})
    for name in ("params", "buffers"):
        assert distance(getattr(compiled[0]["state"], name), getattr(eager[0]["state"], name)) < 1e-5
    assert compiled[0]["graphs"] == (2 if sync == "ddp" else 1)


def test_with_one_process_nothing_changes() -> None:
    """In one process the loss is not changed, and the moments are those of torch."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    bare = loss_of(model, nn.MSELoss())
    assert stack(bare, [SyncBatchNormHook()]) is bare
    assert module_state(model).buffers
    x = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0))
    mean, variance, count = global_moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2)))
    torch.testing.assert_close(variance, x.var((0, 2), correction=0))
    assert float(count) == 35


@pytest.mark.parametrize("sync", CORES)
@pytest.mark.parametrize("hook", ["sam", "asam", "lookahead", "swa", "freeze", "thaw", "stats", "spike", "accumulated"])
def test_ranks_equal_one_process(ranks: Any, hook: str, sync: str) -> None:
    """Two passes, averages, freezing, statistics and skipped spikes are those of the joint batch (1e-9): all see global values."""
    hooks = {
        "sam": dict(sam=dict(type="SAMHook", rho=0.5)),
        "asam": dict(sam=dict(type="SAMHook", rho=0.5, adaptive=True)),
        "lookahead": dict(slow=dict(type="LookaheadHook", k=3)),
        "swa": dict(swa=dict(type="SWAHook", start=2)),
        "freeze": dict(freeze=dict(type="FreezeHook", params=["body.0.*"])),
        "thaw": dict(thaw=dict(type="FreezeHook", params=["body.0.*"], until=2)),
        "stats": dict(stats=dict(type="GradStatsHook", patterns={"last": "body.3.*"})),
        "spike": dict(spike=dict(type="SpikeHook", policy="skip", threshold=0.5, window=3)),
        "accumulated": dict(accumulate=dict(type="GradAccumulateHook", n=2), sam=dict(type="SAMHook", rho=0.5)),
    }[hook]
    cfg = config(sync=sync, hooks=hooks)
    assert max(compared(ranks, 2, cfg)) < 1e-9
    if hook == "spike":
        assert any(logs["train_spike"][0] > 0 for logs in ranks(2)(trained, cfg)[0]["logs"])


@pytest.mark.parametrize("sync", CORES)
def test_a_nan_on_one_rank_ends_all_ranks(ranks: Any, sync: str) -> None:
    """A NaN in one rank's samples ends all ranks with the same message, at the same step."""
    cfg = config(sync=sync, dataset=dict(bad=5), hooks=dict(nonfinite=dict(type="SkipNonFiniteHook", every=4)))
    cfg["data"]["nan_is_bad"] = False  # let it through to the model
    two = ranks(2)
    two.send(trained, cfg)
    answers = [two.answer(rank) for rank in range(2)]
    assert [type(a) for a in answers] == [NonFiniteError, NonFiniteError]
    assert str(answers[0]) == str(answers[1])
    assert "is not finite, in its gradient" in str(answers[0])


@pytest.mark.parametrize("sync", CORES)
def test_mixtures_differ_between_ranks_and_count_every_sample(ranks: Any, sync: str) -> None:
    """Each rank mixes its own samples with its own shares; the weights of the global batch are those without mixing."""
    cfg = config(16, sync=sync, hooks=dict(mixup=dict(type="MixupHook", alpha=1.0)))
    answers = ranks(2)(trained, cfg)
    assert answers[0]["steps"] == answers[1]["steps"]
    for logs in answers[0]["logs"]:
        assert logs["train_loss"][1] == 16
        assert logs["train_top1"][1] == 16
