"""The bare gradient: equal to `.backward()`, and true to every custom backward, eager and traced, on every torch served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import compile
from ailab.core.grad import _gradients, local_grad, reciprocal
from ailab.core.loss import module_state
from ailab.core.step import train_step
from ailab.job.plan import has_custom_backward
from ailab.optim import build_optimizer
from ailab.stack import Middleware, stack
from ailab.types import LOSS_SCALE, WEIGHT, Aux, Batch, Grad, Params, TrainState

# torch 2.11 makes an instance of a Function while it traces one, and warns of it; and warns while it imports its own inductor.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

# Inside torch.compile torch.func.grad of torch 2.11 and 2.13 can skip a custom backward and give the plain derivative, with no
# error: the two models below have backwards that no derivative of their forward equals.


class Reversed(torch.autograd.Function):
    """The identity, whose backward is minus three times the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return -3 * grad


class Saving(torch.autograd.Function):
    """A square, whose backward uses what was saved, and is five times too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 10 * x * grad


@torch.library.custom_op("ailab_tests::reversed", mutates_args=())
def reversed_op(x: Tensor) -> Tensor:
    return x.clone()


def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return -3 * grad


reversed_op.register_fake(_fake)
reversed_op.register_autograd(_backward)

CUSTOM: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # function, and by what its backward is off
    "function": (lambda x: Reversed.apply(x), -3.0),
    "saving_function": (lambda x: Saving.apply(x), 5.0),
    "operator": (lambda x: reversed_op(x), -3.0),
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda x: x.clone(),
    "saving_function": lambda x: x * x,
    "operator": lambda x: x.clone(),
}


class Net(nn.Module):
    """Two layers with something in between, so that the first layer's gradient goes through it and the second one's does not."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(4, 3), nn.Linear(3, 2), between

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.between(self.first(input)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.lstm(input.unsqueeze(1).repeat(1, 5, 1))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.second(self.first(input).tanh()))


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def data(dtype: torch.dtype = torch.float32, size: int = 6) -> Batch:
    gen = torch.Generator().manual_seed(1)
    return {n: torch.randn(size, d, generator=gen, dtype=torch.float64).to(dtype) for n, d in (("input", 4), ("target", 2))}


def by_backward(model: nn.Module, batch: Batch, criterion: nn.Module | None = None) -> Params:
    """The gradients of the plain module, by `.backward()`."""
    criterion = criterion or nn.MSELoss()
    criterion(model(batch["input"]), batch["target"]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(a: Params, b: Params, tolerance: float) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def applied(grad: Grad, state: TrainState, batch: Batch, compiled: bool) -> Params:
    """The gradients, read off one SGD step of lr 1 through the compile line: the way that a run takes."""
    optimizer = build_optimizer("SGD", state.params, lr=1.0)
    begun = state.replace(opt_state=optimizer.init(state.params))
    step = compile(train_step(grad, optimizer), enabled=compiled, donate=False)
    after, _ = step(begun, batch)
    return {n: begun.params[n].detach() - after.params[n] for n in state.params}


@pytest.mark.parametrize("make", [Net, normed, Recurrent, Tied], ids=["mlp", "batchnorm", "lstm", "tied"])
def test_equals_backward(make: Callable[[], nn.Module]) -> None:
    """In float64 the gradient of the pure loss is that of the plain module's `.backward()`, to 1e-12, by the same names."""
    model, plain, batch = make().double(), make().double(), data(torch.float64)
    grads, aux = local_grad(loss_of(model, nn.MSELoss()))(module_state(model), batch)
    close(grads, by_backward(plain, batch), 1e-12)
    assert aux.weight.item() == 6.0
    assert all(p.grad is None for p in model.parameters())
    assert not any(g.requires_grad for g in grads.values())


def test_a_scalar_loss_and_per_sample_losses_have_one_gradient() -> None:
    """A criterion that returns its mean and one that returns per-sample values differentiate alike, to 1e-12."""
    model, batch = Net().double(), data(torch.float64)
    state = module_state(model)
    each = lambda output, target: (output - target).square().mean(1)
    a, _ = local_grad(loss_of(model, each))(state, batch)
    b, _ = local_grad(loss_of(model, lambda output, target: each(output, target).mean()))(state, batch)
    close(a, b, 1e-12)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", list(CUSTOM))
def test_a_custom_backward_is_honoured(name: str, compiled: bool, aot_eager: None) -> None:
    """What autograd.Function.backward and register_autograd say is the gradient, eager and inside the compiled step."""
    function, factor = CUSTOM[name]
    batch, model = data(), Net(function)
    got = applied(local_grad(loss_of(model, nn.MSELoss())), module_state(model), batch, compiled)
    close(got, by_backward(Net(function), batch), 1e-6)
    plain = by_backward(Net(PLAIN[name]), batch)
    for n in got:  # only what lies before the function is scaled
        torch.testing.assert_close(got[n], plain[n] * (factor if n.startswith("first") else 1.0), rtol=1e-5, atol=1e-6)


def test_a_custom_backward_is_honoured_by_inductor() -> None:
    """The same with generated code, for all three at once."""

    def between(x: Tensor) -> Tensor:
        return reversed_op(Saving.apply(Reversed.apply(x)))  # type: ignore[no-any-return]

    batch, model = data(), Net(between)
    got = applied(local_grad(loss_of(model, nn.MSELoss())), module_state(model), batch, True)
    close(got, by_backward(Net(between), batch), 1e-5)


@pytest.mark.parametrize("name", list(CUSTOM))
def test_custom_backwards_are_found(name: str) -> None:
    """`has_custom_backward` tells a graph with a custom Function or operator from one without."""
    batch = data()
    assert has_custom_backward(Net(CUSTOM[name][0])(batch["input"]).sum())
    assert not has_custom_backward(Net(PLAIN[name])(batch["input"]).sum())
    assert not has_custom_backward(torch.zeros(()))


class Partly(Net):
    """Has a layer that its forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_unused_parameters_have_no_gradient(compiled: bool, aot_eager: None) -> None:
    """A parameter that the loss does not use has no entry, and an optimizer with weight decay leaves it alone, as torch's does."""
    model, batch = Partly(), data()
    grad, state = local_grad(loss_of(model, nn.MSELoss())), module_state(model)
    assert set(grad(state, batch)[0]) == {"first.weight", "first.bias", "second.weight", "second.bias"}
    optimizer = build_optimizer("AdamW", state.params, lr=0.1, weight_decay=0.5)
    step = compile(train_step(grad, optimizer), enabled=compiled, donate=False)
    after, _ = step(state.replace(opt_state=optimizer.init(state.params)), batch)
    assert torch.equal(after.params["unused.weight"], state.params["unused.weight"])
    assert not torch.equal(after.params["first.weight"], state.params["first.weight"])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_frozen_parameters_have_no_gradient(compiled: bool, aot_eager: None) -> None:
    """Parameters outside `trainable` are used in the forward and have no entry; the others' gradients do not change."""
    model, batch = Net(), data()
    state, loss = module_state(model), loss_of(model, nn.MSELoss())
    trainable = {"first.weight", "second.bias"}
    grads, _ = local_grad(loss, trainable)(state, batch)
    whole, _ = local_grad(loss)(state, batch)
    assert set(grads) == trainable
    assert all(torch.equal(grads[n], whole[n]) for n in trainable)
    got = applied(local_grad(loss, trainable), state, batch, compiled)
    assert {n for n, g in got.items() if g.any()} == trainable


def sam(rho: float) -> Middleware[Grad]:
    """Sharpness-aware minimisation: the gradient at the point that lies `rho` uphill; parameters made inside the graph."""

    def wrap(grad: Grad) -> Grad:
        def sharpened(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, _ = grad(state, batch)
            norm = tree.norm(grads)
            with torch.no_grad():
                uphill = {n: p + rho * grads[n] / norm for n, p in state.params.items()}
            assert not any(p.requires_grad for p in uphill.values())
            return grad(state.replace(params=uphill), batch)

        return sharpened

    return Middleware("sam", wrap, "grad")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("between", [torch.tanh, CUSTOM["saving_function"][0]], ids=["tanh", "function"])
def test_a_perturbed_state_differentiates(between: Callable[[Tensor], Tensor], compiled: bool, aot_eager: None) -> None:
    """Parameters that a grad hook computes, without requires_grad, are differentiated at their new values, in one graph."""
    batch, model, plain = data(), Net(between), Net(between)
    got = applied(stack(local_grad(loss_of(model, nn.MSELoss())), [sam(0.5)]), module_state(model), batch, compiled)
    first = by_backward(plain, batch)
    norm = torch.cat([g.reshape(-1) for g in first.values()]).norm()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p += 0.5 * first[name] / norm
    plain.zero_grad()
    close(got, by_backward(plain, batch), 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_parameters_need_not_require_grad(compiled: bool, aot_eager: None) -> None:
    """A state without a single tensor that requires grad (a resumed one) gives the same gradients, bitwise when eager."""
    model, batch = Net(), data()
    grad, state = local_grad(loss_of(model, nn.MSELoss())), module_state(model)
    a, b = applied(grad, state, batch, compiled), applied(grad, state.clone(), batch, False)
    close(a, b, 1e-6 if compiled else 0.0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_scale_is_divided_out(compiled: bool, aot_eager: None) -> None:
    """A loss scale that is a power of two changes no bit of the gradient, and the loss and its logs not at all."""
    model, batch = Net(), data()
    grad, state = local_grad(loss_of(model, nn.MSELoss())), module_state(model)
    scaled = {**batch, LOSS_SCALE: torch.tensor(2.0**12)}
    plain = applied(grad, state, batch, compiled)
    close(applied(grad, state, scaled, compiled), plain, 0.0)
    assert torch.equal(grad(state, scaled)[1].logs["loss"].total, grad(state, batch)[1].logs["loss"].total)


def test_the_loss_is_differentiated_times_its_scale() -> None:
    """Inside the backward the gradient is larger by the scale: that is what keeps small ones from vanishing in float16."""
    seen: list[Tensor] = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(grad)
            return grad

    model, batch = Net(Spy.apply), data()
    grad, state = local_grad(loss_of(model, nn.MSELoss())), module_state(model)
    grad(state, batch)
    grad(state, {**batch, LOSS_SCALE: torch.tensor(2.0**12)})
    assert torch.equal(seen[1], seen[0] * 2**12)


def test_a_batch_in_which_nothing_counts_has_a_zero_gradient() -> None:
    """With all weights 0 the gradient is 0, not NaN."""
    model, batch = Net(), {**data(), WEIGHT: torch.zeros(6)}
    grads, aux = local_grad(loss_of(model, nn.MSELoss()))(module_state(model), batch)
    assert len(grads) == 4
    assert not any(g.any() for g in grads.values())
    assert aux.weight.item() == 0.0


def test_reciprocal_is_finite() -> None:
    """`1 / weight` for any weight that counts, and finite for 0."""
    weights = torch.tensor([0.25, 1.0, 301.0])
    torch.testing.assert_close(reciprocal(weights), 1 / weights, rtol=0, atol=0)
    assert torch.isfinite(reciprocal(torch.zeros(())))


def test_the_state_is_untouched() -> None:
    """A gradient changes no bit of the state: neither parameters nor buffers, which come out anew."""
    model, batch = normed(), data()
    state = module_state(model)
    before = state.clone()
    _, aux = local_grad(loss_of(model, nn.MSELoss()))(state, batch)
    for a, b in zip(tree.leaves(state), tree.leaves(before), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(aux.buffers["1.running_mean"], state.buffers["1.running_mean"])


def test_the_engine_is_that_of_autograd_grad() -> None:
    """The engine that eager gradients call by its private name gives `torch.autograd.grad`'s bits, and None where it does."""
    torch.manual_seed(0)
    used, unused = torch.randn(3, 4, requires_grad=True), torch.randn(2, requires_grad=True)
    total, cotangent = (torch.tanh(used) ** 2).sum(), torch.tensor(0.3)
    wanted = torch.autograd.grad(total, [used, unused], cotangent, allow_unused=True, retain_graph=True)
    [mine, none] = _gradients(total, [used, unused], cotangent)
    assert wanted[0] is not None
    assert mine is not None
    assert torch.equal(mine, wanted[0])
    assert none is None
    assert wanted[1] is None
    assert used.grad is None
