"""Numbers: halves are counted, summed and scaled in float32; a derivative that would be 0 is refused. The oracle is float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.core.grad import accumulated, local_core, local_grad
from ailab.core.loss import module_state
from ailab.core.reduce import control_message, reduced
from ailab.core.step import train_step
from ailab.errors import ConfigError
from ailab.hooks import GradClipHook, GradStatsHook, SAMHook
from ailab.metrics import PSNR, MeanIoU, Top1Accuracy
from ailab.optim import build_optimizer, with_lrs
from ailab.stack import stack, with_slots
from ailab.types import LOSS_SCALE, Aux, Batch, Mean, TrainState, pack

HALVES = [torch.bfloat16, torch.float16]


# ---- sums


@pytest.mark.parametrize("dtype", HALVES)
def test_a_users_mean_in_a_half_adds_in_float32(dtype: torch.dtype) -> None:
    """Of two `Mean`s that a user made in a half, the sum counts 70,000 samples: no half can hold the number."""
    mean = Mean(torch.tensor(600.0, dtype=dtype), torch.tensor(250.0, dtype=dtype))
    total = mean
    for _ in range(279):
        total = total + mean
    assert (float(total.total), float(total.weight)) == (280 * 600.0, 70_000.0)
    assert total.value.dtype == torch.float32
    assert float(total.value) == pytest.approx(2.4)


def test_a_mean_of_truths_counts_them() -> None:
    """`Mean.of(pred == label)` is the number of hits, of as many as there are."""
    mean = Mean.of(torch.tensor([True, True, False, True]))
    assert (float(mean.total), float(mean.weight), float(mean.value)) == (3.0, 4.0, 0.75)


@pytest.mark.parametrize("shape", [(2,), (1,)])
def test_a_mean_that_is_no_number_is_refused(shape: tuple[int, ...]) -> None:
    """A total or weight that is not 0-d is an error that names the log, and not a mixture of totals and weights."""
    logs = {"loss": Mean(torch.ones(()), torch.ones(())), "mine": Mean(torch.ones(shape), torch.ones(shape))}
    with pytest.raises(ConfigError, match=r"'mine' has \(\d,\) and \(\d,\)\. Sum them first"):
        pack(logs)


@pytest.mark.parametrize("weight", [torch.tensor(1003), torch.tensor(1003.0, dtype=torch.bfloat16)], ids=["integer", "half"])
def test_what_the_ranks_sum_keeps_its_digits(weight: Tensor) -> None:
    """Logs that come back from a reduction are float32 at least, whatever the dtype of the loss's weight."""
    aux = Aux({}, weight, {"x": Mean(torch.tensor(0.625), torch.tensor(3.0))})
    back = reduced(aux, {}, 2 * control_message(aux, {}, torch.float64), {})
    assert float(back.logs["x"].total) == 1.25
    assert float(back.weight) == 2 * float(weight)


@pytest.mark.parametrize("dtype", HALVES)
def test_metrics_of_halves_are_those_of_float32(dtype: torch.dtype) -> None:
    """Top-1 of 1003 samples, PSNR and mean IoU of outputs in a half equal those of the same values in float64."""
    torch.manual_seed(0)
    scores, label = torch.randn(1003, 5).to(dtype), torch.randint(5, (1003,))
    for metric in (Top1Accuracy(), PSNR()):
        args = (scores, label) if isinstance(metric, Top1Accuracy) else (scores, scores * 0.5)
        wide = tuple(a.double() if a.is_floating_point() else a for a in args)
        torch.testing.assert_close(metric(*args).total.double(), metric(*wide).total.double(), rtol=1e-5, atol=0)
        assert float(metric(*args).weight) == 1003
    half, whole = MeanIoU(5), MeanIoU(5)
    half.update(scores, label)
    whole.update(scores.double(), label)
    assert half.compute() == whole.compute()


def test_psnr_of_bytes_does_not_wrap_around() -> None:
    """PSNR of uint8 images is that of the same images as floats."""
    a, b = torch.tensor([[10, 250]], dtype=torch.uint8), torch.tensor([[20, 240]], dtype=torch.uint8)
    assert float(PSNR(255.0)(a, b).value) == pytest.approx(float(PSNR(255.0)(a.float(), b.float()).value))


# ---- gradients


def grads_of(dtype: torch.dtype, value: float, size: int = 512) -> dict[str, Tensor]:
    return {"a": torch.full((size,), value, dtype=dtype), "b": torch.full((size,), -value, dtype=dtype)}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_the_norm_of_halves_is_that_of_float64(dtype: torch.dtype, order: float) -> None:
    """1024 gradients of 4000 have the norm 128,000, which is no float16; the digits are those of float32."""
    grads = grads_of(dtype, 4000.0)
    right = torch.cat([g.double() for g in grads.values()]).norm(order)
    torch.testing.assert_close(tree.norm(grads).double() if order == 2.0 else tree.norm(grads, order).double(), right)
    mixed = {**grads, "c": torch.full((4,), 3.0, dtype=torch.float64)}
    right = torch.cat([g.double() for g in mixed.values()]).norm(order)
    torch.testing.assert_close(tree.norm(mixed, order).double(), right, rtol=1e-6, atol=0)


def test_the_norm_of_a_sparse_gradient_counts_each_element_once() -> None:
    """An index that comes twice is the sum of its values."""
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch 2.11 warns where nobody has said
        sparse = torch.sparse_coo_tensor([[1, 1, 3]], [3.0, 1.0, 3.0], (5,))
        assert float(tree.norm({"e": sparse})) == 5.0


def halves(dtype: torch.dtype, size: int = 256) -> tuple[nn.Module, TrainState, Batch]:
    torch.manual_seed(0)
    model = nn.Linear(8, 4).to(dtype)
    batch = {"input": torch.randn(size, 8).to(dtype), "target": torch.randint(4, (size,))}
    return model, module_state(model).clone(), batch


def right(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The gradient in float64, at the rounded parameters and inputs."""
    wide = nn.Linear(8, 4).double()
    wide.load_state_dict(model.state_dict())
    nn.functional.cross_entropy(wide(batch["input"].double()), batch["target"]).backward()
    return {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("count", [64, 301])
def test_micro_batches_of_halves_add_up(dtype: torch.dtype, count: int) -> None:
    """The gradient over many micro-batches of a model in a half is that of float64 within one rounding of each micro-batch."""
    model, state, batch = halves(dtype, count * 3)
    parts = [{n: v[i : i + 3] for n, v in batch.items()} for i in range(0, count * 3, 3)]
    loss = loss_of(model, nn.CrossEntropyLoss())
    by_mean, by_core = accumulated(local_grad(loss), state, parts)[0], local_core(loss, nominal=count * 3).many(state, parts)[0]
    for name, g in right(model, batch).items():
        for found in (by_mean, by_core):
            assert found[name].dtype == dtype
            torch.testing.assert_close(found[name].double(), g, rtol=0.02, atol=0.02 * float(g.abs().max()))


@pytest.mark.parametrize("scale", [2.0**12, 2.0**26])
def test_a_loss_scale_beyond_a_half_is_divided_by(scale: float) -> None:
    """Gradients in float16 are divided by the loss scale in float32: 1 / 2**26 is 0 as a float16."""
    model, state, batch = halves(torch.float16)
    tiny = lambda output, target: nn.functional.cross_entropy(output, target, reduction="none").float() * 2.0**-16
    plain, _ = local_grad(loss_of(model, tiny))(state, {**batch, LOSS_SCALE: torch.tensor(scale)})
    wanted = {n: g * 2.0**-16 for n, g in right(model, batch).items()}
    for n, g in wanted.items():
        torch.testing.assert_close(plain[n].double(), g, rtol=0.02, atol=2.0**-24)


@pytest.mark.parametrize("dtype", HALVES)
def test_clip_and_stats_of_halves(dtype: torch.dtype) -> None:
    """The norms that are logged, and the clipped gradient, are those of float64, where the norm itself is no float16."""

    def grad(state: TrainState, batch: Batch) -> Any:
        return grads_of(dtype, 4000.0), Aux({}, torch.ones(()), {})

    state = TrainState(torch.zeros((), dtype=torch.int64), grads_of(dtype, 1.0), {}, {})
    hooks = [*GradStatsHook(update=False), GradClipHook(max_norm=1.0)]
    grads, aux = stack(grad, hooks)(with_slots(state, hooks), {})
    assert float(aux.logs["grad/norm"].value) == float(aux.logs["grad_norm"].value) == pytest.approx(128_000.0, rel=1e-3)
    torch.testing.assert_close(tree.norm(grads), torch.tensor(1.0), rtol=0.01, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_of_tiny_halves_is_finite(adaptive: bool) -> None:
    """A perturbation along a gradient so small that rho / norm is no float16 has the radius rho."""
    seen: list[dict[str, Tensor]] = []

    def grad(state: TrainState, batch: Batch) -> Any:
        seen.append(state.params)
        return grads_of(torch.float16, 2.0**-24, 1), Aux({}, torch.ones(()), {})

    state = TrainState(torch.zeros((), dtype=torch.int64), grads_of(torch.float16, 1.0, 1), {}, {})
    stack(grad, [SAMHook(rho=0.5, adaptive=adaptive)])(state, {})
    moved = tree.norm({n: (seen[1][n] - seen[0][n]).double() for n in seen[0]})
    torch.testing.assert_close(moved, torch.tensor(0.5, dtype=torch.float64), rtol=0.01, atol=0)


# ---- derivatives through what keeps no graph


def small(**options: Any) -> tuple[Any, TrainState, Batch, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    loss, state = loss_of(model, nn.CrossEntropyLoss()), module_state(model).clone()
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    state = state.replace(opt_state=optimizer.init(state.params))
    return loss, state, {"input": torch.randn(5, 8), "target": torch.randint(3, (5,))}, optimizer


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones(())),
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "autograd": lambda f, x: torch.autograd.grad(f(x.clone().requires_grad_()), x, allow_unused=True),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch.func.jvp, when it is first imported
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("of", ["params", "lr of a step", "lr of an update"])
@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_a_derivative_through_a_gradient_or_a_step_is_an_error(name: str, of: str) -> None:
    """d/d params of `local_grad`, d/d lr of `train_step` and of an update raise under torch.func and under an outer graph."""
    loss, state, batch, optimizer = small()
    step = train_step(local_grad(loss), optimizer)

    def of_params(scale: Tensor) -> Tensor:
        params = {n: p.detach() * scale for n, p in state.params.items()}
        return tree.norm(local_grad(loss)(state.replace(params=params), batch)[0])

    def of_lr(lr: Tensor) -> Tensor:
        after, _ = step(state.replace(opt_state=with_lrs(state.opt_state, [lr])), batch)
        return tree.norm(after.params)

    def of_update(lr: Tensor) -> Tensor:
        grads = {n: torch.ones_like(p) for n, p in state.params.items()}
        return tree.norm(optimizer.update(grads, with_lrs(state.opt_state, [lr]), tree.clone(state.params))[0])

    f = {"params": of_params, "lr of a step": of_lr, "lr of an update": of_update}[of]
    with pytest.raises(ConfigError, match=r"is called inside a derivative[\s\S]*Differentiate the loss"):
        TRANSFORMS[name](f, torch.tensor(1.0))


def test_the_loss_can_be_differentiated() -> None:
    """What the error points to works: d loss after one SGD step / d lr is -|gradient|^2 at lr 0."""
    loss, state, batch, _ = small()
    params = {n: p.detach() for n, p in state.params.items()}
    value = lambda p: (lambda total, aux: total / aux.weight)(*loss(p, {}, batch))
    grads = torch.func.grad(value)(params)

    def after(lr: Tensor) -> Tensor:
        new = {n: p - lr * grads[n] for n, p in params.items()}
        return value(new)

    slope = torch.func.grad(after)(torch.tensor(0.0))
    torch.testing.assert_close(slope, -(tree.norm(grads) ** 2))


def test_an_ordinary_step_is_no_derivative() -> None:
    """With gradients enabled and parameters that require grad, a step runs: they are leaves."""
    loss, state, batch, optimizer = small()
    leaves = state.replace(params={n: p.detach().requires_grad_() for n, p in state.params.items()})
    with torch.enable_grad():
        train_step(local_grad(loss), optimizer)(leaves, batch)
