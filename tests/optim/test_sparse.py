"""Sparse gradients, as of `nn.Embedding(sparse=True)`: the classes that take them equal torch's, and the others refuse them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.step import train_step
from ailab.errors import ConfigError
from ailab.hooks import GradAccumulateHook, GradClipHook
from ailab.optim import build_optimizer
from ailab.optim.build import torch_classes
from ailab.stack import stack

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse invariant checks:UserWarning"
)  # torch's own Adagrad makes sparse tensors

IDS = torch.tensor([1, 3, 3, 0, 7, 1])
TARGET = torch.arange(12.0).view(6, 2)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.last = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.embedding(input))


def one() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(10, 2, sparse=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("make", [one, Mixed])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [("SGD", {}), ("SGD", {"momentum": 0.9}), ("SGD", {"foreach": False}), ("SGD", {"fused": True}), ("Adagrad", {})],
)
def test_equals_torch(name: str, hyper: dict[str, Any], make: Any, in_place: bool) -> None:
    """SGD and Adagrad of a model with a sparse embedding are torch's over 5 steps, whatever kernel was asked for."""
    model, plain = make(), make()
    state = module_state(model).clone()
    optimizer = build_optimizer(name, state.params, lr=0.1, **hyper)
    state = state.replace(opt_state=optimizer.init(state.params))
    step = train_step(local_grad(loss_of(model, nn.MSELoss())), optimizer, donate=in_place)
    theirs = getattr(torch.optim, name)(plain.parameters(), lr=0.1, **{**hyper, "fused": None})
    with torch.no_grad():
        for _ in range(5):
            state, _ = step(state, {"input": IDS, "target": TARGET})
    for _ in range(5):
        theirs.zero_grad()
        nn.functional.mse_loss(plain(IDS), TARGET).backward()
        theirs.step()
    for n, p in plain.named_parameters():
        torch.testing.assert_close(state.params[n], p.detach())


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"])
def test_the_others_refuse_as_torch_does(name: str) -> None:
    """A class that refuses sparse gradients in torch is a ConfigError that names the parameter and who takes them."""
    model, plain = one(), one()
    state = module_state(model).clone()
    theirs = torch_classes()[name](plain.parameters(), lr=0.1)  # type: ignore[call-arg]
    nn.functional.mse_loss(plain(IDS), TARGET).backward()
    with pytest.raises(RuntimeError, match="sparse"):
        theirs.step()
    optimizer = build_optimizer(name, state.params, lr=0.1)
    state = state.replace(opt_state=optimizer.init(state.params))
    with pytest.raises(
        ConfigError, match=rf"{name} does not support sparse gradients, and that of 'weight' is sparse.*\n.*SGD"
    ):
        train_step(local_grad(loss_of(model, nn.MSELoss())), optimizer)(state, {"input": IDS, "target": TARGET})


@pytest.mark.parametrize("hooks", [[GradClipHook(max_norm=0.1)], [GradAccumulateHook(3)]], ids=["clip", "accumulate"])
def test_grad_hooks_take_them(hooks: Any) -> None:
    """Clipped and accumulated sparse gradients are those of the same embedding with dense ones."""
    state, batch = module_state(one()).clone(), {"input": IDS, "target": TARGET}
    torch.manual_seed(0)
    dense = nn.Embedding(10, 2)
    found, _ = stack(local_grad(loss_of(one(), nn.MSELoss())), hooks)(state, batch)
    right, _ = stack(local_grad(loss_of(dense, nn.MSELoss())), hooks)(state, batch)
    torch.testing.assert_close(found["weight"].to_dense(), right["weight"])
    torch.testing.assert_close(tree.norm(found), tree.norm(right))
