"""Memory layouts on several ranks: a tensor that is rebuilt after a collective lies in memory as it did before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import CORES, alone, compared, config, distance, together, traced, trained
from test_ranks_restart import until
from torch import Tensor, nn

from ailab import dist, tree


class LastNet(nn.Module):
    """A convolution in channels_last, a transposed weight and a running mean in an odd layout."""

    def __init__(self, double: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, (2, 1)).to(memory_format=torch.channels_last)
        self.head = nn.Parameter(torch.randn(4, 8).t())
        self.register_buffer("seen", torch.zeros(2, 3).t())
        self.double() if double else self.float()

    def forward(self, input: Tensor) -> Tensor:
        x = input.to(self.head.dtype).view(-1, 3, 2, 1).contiguous(memory_format=torch.channels_last)
        if self.training:
            self.seen = torch.lerp(self.seen, x.detach().mean(0).squeeze(2), 0.1)
        return self.conv(x).tanh().flatten(1) @ self.head


OPTIMIZERS = {
    "momentum": dict(type="SGD", lr=0.1, momentum=0.9),
    "adamw": dict(type="AdamW", lr=0.01, momentum=None),
    "rmsprop": dict(type="RMSprop", lr=0.01, momentum=0.9),
}


def last_cfg(optimizer: str, sync: str, double: bool = True, **more: Any) -> dict[str, Any]:
    cfg = config(24, 12, sync=sync, optimizer=OPTIMIZERS[optimizer], workflow=[{"phase": "train"}], **more)
    return cfg | {"model": dict(type=LastNet, double=double)}


def strides(state: Any) -> dict[str, Any]:
    return {path: leaf.stride() for path, leaf in tree.items(state) if isinstance(leaf, Tensor)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("sync", CORES)
def test_ranks_equal_one_process_in_any_layout(ranks: Any, sync: str, optimizer: str) -> None:
    """Parameters and optimizer state of 8 steps are those of one process (1e-9), and so are the strides of the whole state."""
    cfg = last_cfg(optimizer, sync)
    assert compared(ranks, 2, cfg)[0] < 1e-9
    one, two = alone(ranks, cfg)["state"], ranks(2)(trained, cfg)[0]["state"]
    assert strides(two) == strides(one)
    assert two.params["conv.weight"].stride() != two.params["conv.weight"].contiguous().stride()
    for key, memory in one.opt_state.items():
        if isinstance(memory, dict):
            assert distance(two.opt_state[key], memory) < 1e-9


@pytest.mark.parametrize("sync", CORES)
def test_compiled_ranks_equal_one_process_in_any_layout(ranks: Any, sync: str) -> None:
    """The same compiled, in float32 (1e-5)."""
    cfg = last_cfg("momentum", sync, double=False)
    one, two = alone(ranks, cfg)["state"], ranks(2)(traced, {**cfg, "compile": True})[0]["state"]
    assert distance(two.params, one.params) < 1e-5
    assert distance(two.opt_state["momentum_buffer"], one.opt_state["momentum_buffer"]) < 1e-5
    assert strides(two) == strides(one)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_a_resume_at_another_world_size_in_any_layout(
    ranks: Any, optimizer: str, first: int, second: int, tmp_path: Any
) -> None:
    """3 steps on some ranks and the rest on others are the run of one process (1e-9), optimizer state included."""
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
    plain = last_cfg(optimizer, "ddp", hooks=saves)
    whole = alone(ranks, {**plain, "work_dir": str(tmp_path / "whole")})
    cfg = {**plain, "work_dir": str(tmp_path / "changed")}
    begun = ranks(first)(until, cfg, 3)
    ended = ranks(second)(trained, cfg)
    assert together(begun) + together(ended) == whole["ids"]
    assert distance(ended[0]["state"].params, whole["state"].params) < 1e-9
    for key, memory in whole["state"].opt_state.items():
        if isinstance(memory, dict):
            assert distance(ended[0]["state"].opt_state[key], memory) < 1e-9


def exchanged() -> list[Tensor]:
    """Collectives of a tensor whose layout is another one on each rank."""
    x = torch.arange(24.0).view(2, 3, 4) + 100 * dist.rank()
    x = x.transpose(0, 2).contiguous().transpose(0, 2) if dist.rank() else x
    leaf = x.clone().requires_grad_()
    (torch.arange(24.0).view(2, 3, 4) * dist.all_reduce_differentiable(leaf)).sum().backward()
    assert leaf.grad is not None
    return [dist.all_reduce(x), dist.broadcast_tensors({"x": x})["x"], dist.all_gather(x), leaf.grad]


def test_collectives_pair_elements_by_their_index(ranks: Any) -> None:
    """Where ranks hold a tensor in different layouts, sums, broadcasts and gradients are those of the values."""
    x = torch.arange(24.0).view(2, 3, 4)
    for found in ranks(2)(exchanged):
        for value, right in zip(found, [2 * x + 100, x, torch.cat([x, x + 100]), 2 * x], strict=True):
            assert torch.equal(value, right)
