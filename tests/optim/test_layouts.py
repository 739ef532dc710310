"""Memory layouts: an optimizer pairs elements by their index, wherever they lie in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab.build import loss_of
from ailab.compile import compile
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.step import train_step
from ailab.optim import build_optimizer

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "with gaps": lambda x: torch.stack([x, x], 4)[..., 0],
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": dict(momentum=0.9),
    "Adam": dict(amsgrad=True),
    "AdamW": dict(weight_decay=0.1),
    "Adagrad": {},
    "RMSprop": dict(momentum=0.9),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_mixture_of_layouts_is_torchs_update(name: str, fused: bool | None, in_place: bool) -> None:
    """Parameter, gradient and state each in a layout of its own: the values of plain torch.optim without a fused kernel (1e-6)."""
    if fused and name == "RMSprop":
        pytest.skip("it has no fused kernel")
    hyper = OPTIMIZERS[name] | ({} if fused is None else dict(fused=fused))
    g = torch.Generator().manual_seed(0)
    start, grads = torch.randn(4, 3, 2, 5, generator=g), [torch.randn(4, 3, 2, 5, generator=g) for _ in range(3)]
    plain = nn.Parameter(start.clone())
    reference = getattr(torch.optim, name)([plain], lr=0.1, foreach=False, **OPTIMIZERS[name])
    for grad in grads:
        plain.grad = grad.clone()
        reference.step()
    for of_param, of_grad, of_state in itertools.product(LAYOUTS, LAYOUTS, LAYOUTS):
        params = {"w": LAYOUTS[of_param](start.clone())}
        optimizer = build_optimizer(name, params, lr=0.1, **hyper)
        update = optimizer.update_ if in_place else optimizer.update
        assert update is not None
        state = optimizer.init(params)
        for i, grad in enumerate(grads):
            if i == 1:  # as a checkpoint of another run may leave it
                state = {
                    k: {"w": LAYOUTS[of_state](v["w"])} if isinstance(v, dict) and v["w"].dim() else v for k, v in state.items()
                }
            params, state = update({"w": LAYOUTS[of_grad](grad.clone())}, state, params)
        torch.testing.assert_close(params["w"], plain.detach(), rtol=1e-6, atol=1e-6)
        for key, value in reference.state[plain].items():
            if isinstance(value, Tensor) and value.dim():
                torch.testing.assert_close(state[key]["w"], value, rtol=1e-6, atol=1e-6)


class Transposed(nn.Module):
    """Its weight is contiguous, and the gradient of it is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, input: Tensor) -> Tensor:
        return (input[:, :, None] * self.weight.t()).sum(1)


@pytest.mark.parametrize("enabled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_gradient_in_another_layout_than_its_parameter(name: str, enabled: bool, aot_eager: None) -> None:
    """A model that uses its weight transposed is trained as plain torch trains it (1e-6)."""
    model, plain = Transposed(), Transposed()
    state = module_state(model).clone()
    optimizer = build_optimizer(name, state.params, lr=0.1)
    state = state.replace(opt_state=optimizer.init(state.params))
    step = compile(train_step(local_grad(loss_of(model, nn.MSELoss())), optimizer), enabled=enabled)
    reference = getattr(torch.optim, name)(plain.parameters(), lr=0.1)
    for i in range(3):
        g = torch.Generator().manual_seed(i)
        x, y = torch.randn(6, 4, generator=g), torch.randn(6, 3, generator=g)
        state, _ = step(state, {"input": x, "target": y})
        reference.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        reference.step()
    torch.testing.assert_close(state.params["weight"], plain.weight.detach(), rtol=1e-6, atol=1e-6)
