"""The state is one value on all ranks: how ranks find out that it is not, and what they then do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import CORES, config, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ailab import dist
from ailab.dist.checksum import checksum
from ailab.errors import PeerError
from ailab.stack import Middleware
from ailab.types import TrainState

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=g) * 50).to(dtype)


@given(dtype=st.sampled_from(DTYPES), size=st.integers(1, 300_000), at=st.integers(0, 299_999), bit=st.integers(0, 7))
def test_a_checksum_sees_every_bit(dtype: torch.dtype, size: int, at: int, bit: int) -> None:
    """A tensor with one bit of one element turned has another checksum."""
    x = values(torch.uint8, size * torch.empty((), dtype=dtype).element_size())
    y = x.clone()
    y[at % len(x)] ^= 1 << bit
    if dtype is torch.bool:
        x, y = x % 2, y % 2
        assert (checksum(x.bool()) == checksum(y.bool())) == torch.equal(x, y)
        return
    assert checksum(x.view(dtype)) != checksum(y.view(dtype))


@pytest.mark.parametrize("dtype", DTYPES[:-2], ids=str)
def test_a_checksum_sees_the_order_and_not_the_layout(dtype: torch.dtype) -> None:
    """Another order of the same elements has another checksum; the same values in another layout have the same."""
    x = values(dtype, 2, 3, 4, 5)
    assert checksum(x.flip(0)) != checksum(x)
    assert checksum(x.contiguous(memory_format=torch.channels_last)) == checksum(x)
    assert checksum(torch.stack([x, x], 4)[..., 0]) == checksum(x)
    assert checksum(torch.empty(0)) == 0


# A run in which one rank goes another way.


def Drift(where: str, at: int = 2, name: str = "drift") -> Middleware[Any]:
    """A hook that changes one value of the state by one bit on rank 1, after step `at`."""

    def changed(state: TrainState) -> TrainState:
        if where == "slot":
            return state.with_slot(name, torch.full((), float(dist.rank())))
        if where == "params":
            weight = state.params["body.4.weight"].detach().clone()
            weight[1, 1] = torch.nextafter(weight[1, 1], weight.new_tensor(9.0))
            return state.replace(params={**state.params, "body.4.weight": weight})
        if where == "optimizer":
            memory = {n: v + 1e-12 if n == "body.0.bias" else v for n, v in state.opt_state["momentum_buffer"].items()}
            return state.replace(opt_state={**state.opt_state, "momentum_buffer": memory})
        return state.replace(buffers={n: b + 1 if n.endswith("tracked") else b for n, b in state.buffers.items()})

    def wrap(step: Any) -> Any:
        def drifting(state: TrainState, batch: Any) -> Any:
            state, logs = step(state, batch)
            return changed(state) if state.at == at and dist.rank() == 1 else state, logs

        return drifting

    return Middleware(name, wrap, "host", (lambda state: torch.zeros(())) if where == "slot" else None)


NAMES = {
    "params": "state.params.body.4.weight",
    "optimizer": "state.opt_state.momentum_buffer.body.0.bias",
    "buffers": "state.buffers.body.1.num_batches_tracked",
    "slot": "state.slots.drift",
}


@pytest.mark.parametrize("saved", [False, True], ids=["at the end of the epoch", "before a checkpoint"])
@pytest.mark.parametrize("where", NAMES)
def test_the_value_that_differs_is_named_on_every_rank(ranks: Any, where: str, saved: bool, tmp_path: Path) -> None:
    """One bit of one rank's state ends all ranks with the same PeerError, which names the value; nothing of it is saved."""
    hooks = dict(drift=dict(type=Drift, where=where))
    if saved:
        hooks |= dict(checkpoint=dict(type="CheckpointHook", every_steps=3))
    # In the last step of the run, so that nothing spreads: other values would come to differ too.
    cfg = config(24, 6, model=dict(norm=True, still=where != "buffers"), hooks=hooks, workflow=[{"phase": "train"}])
    cfg["hooks"]["drift"]["at"] = 3 if saved else 4
    three = ranks(3)
    three.send(trained, {**cfg, "work_dir": str(tmp_path)})
    answers = [three.answer(rank) for rank in range(3)]
    assert [type(a) for a in answers] == [PeerError] * 3, answers
    assert {str(a) for a in answers} == {str(answers[0])}
    assert f"{NAMES[where]} is not the same on all ranks: rank 1 is not as rank 0. 1 of" in str(answers[0])
    assert answers[0].exit_code == 7
    assert not list(tmp_path.glob("checkpoints/step_*"))


class Ragged(nn.Module):
    """A loss whose own memory is per rank, as a user may write it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.ids = target.sum().float()
        return cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("sync", CORES)
def test_a_sound_run_is_never_refused(ranks: Any, sync: str, tmp_path: Path) -> None:
    """Buffers that each rank computes from its own samples, averages, skipped steps and metrics are one value at each check."""
    hooks = dict(
        skip=dict(type="SkipNonFiniteHook", policy="skip"),
        ema=dict(type="EMAHook", decay=0.9, use_buffers=True),
        checkpoint=dict(type="CheckpointHook", every_steps=1),
    )
    cfg = config(24, 6, model=dict(norm=True), dataset=dict(bad=5), loss=dict(type=Ragged), sync=sync, hooks=hooks)
    one, two = ranks(2)(trained, {**cfg, "work_dir": str(tmp_path)})
    assert one["bytes"] == two["bytes"]
