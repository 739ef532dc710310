"""What stays in memory between forward and backward: accumulation, activation checkpointing; and that numbers do not change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_cfg
from torch import Tensor, nn

from ailab.build import loss_of
from ailab.compile import lift
from ailab.config import check
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.hooks import GradAccumulateHook, RematHook
from ailab.job.assemble import assemble
from ailab.stack import stack
from ailab.types import Aux, Batch, Grad, Params, TrainState


class Held:
    """A saved tensor that reports when it is freed."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def peak(call: Callable[[], Any], params: Params) -> int:
    """The peak of the bytes saved for the backward pass, without parameters and views of parameters."""
    live, most = 0, 0
    mine = {p.untyped_storage().data_ptr() for p in params.values()}

    def freed(size: int) -> None:
        nonlocal live
        live -= size

    def pack(tensor: Tensor) -> Held:
        nonlocal live, most
        held = Held(tensor)
        size = 0 if tensor.untyped_storage().data_ptr() in mine else tensor.numel() * tensor.element_size()
        live += size
        most = max(most, live)
        weakref.finalize(held, freed, size)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        call()
    assert live == 0, "a graph outlived its gradient"
    return most


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 16))


class Blocks(nn.Module):
    """Four blocks, the last two of them one and the same, and a head that has the weight of the first one's first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block(), block()])
        self.blocks.append(self.blocks[2])
        self.head = nn.Linear(16, 64)
        self.head.weight = self.blocks[0][0].weight  # type: ignore[index]

    def forward(self, input: Tensor) -> Tensor:
        for one in self.blocks:
            input = input + one(input)
        return self.head(input)


def setting() -> tuple[nn.Module, TrainState, Batch]:
    torch.manual_seed(0)
    model = Blocks()
    g = torch.Generator().manual_seed(1)
    batch = {"input": torch.randn(24, 16, generator=g), "target": torch.randint(64, (24,), generator=g)}
    return model, module_state(model).clone(), batch


def seeded(grad: Grad, state: TrainState, batch: Batch) -> tuple[Params, Aux]:
    torch.manual_seed(3)
    return grad(state, batch)


@pytest.mark.parametrize("n", [2, 4, 12])
def test_accumulation_holds_one_micro_batch(n: int) -> None:
    """The peak of saved bytes is that of one micro-batch: a graph is freed before the next one is built."""
    model, state, batch = setting()
    grad = local_grad(loss_of(model, nn.CrossEntropyLoss()))
    part = {k: v[: 24 // n] for k, v in batch.items()}
    whole = peak(lambda: grad(state, batch), state.params)
    one = peak(lambda: grad(state, part), state.params)
    assert peak(lambda: GradAccumulateHook(n)(grad)(state, batch), state.params) == one
    assert one < 1.1 * whole / n + 8_000  # statistics of batch norm do not shrink with the batch


def test_accumulation_passes_running_statistics_on() -> None:
    """BatchNorm's buffers after a batch in micro-batches are those of one forward after the other."""
    model, state, batch = setting()
    _, aux = GradAccumulateHook(3)(local_grad(loss_of(model, nn.CrossEntropyLoss())))(state, batch)
    for i in (0, 8, 16):
        model(batch["input"][i : i + 8])
    first = "blocks.0.1."  # before any dropout
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(aux.buffers[first + name], model.get_buffer(first + name))
    assert all(int(aux.buffers[n]) == int(b) for n, b in model.named_buffers() if "num_batches" in n)


def test_a_parameter_that_one_micro_batch_does_not_use() -> None:
    """A gradient that only some micro-batches have counts for those, by their weights."""

    def grad(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        x = batch["input"]
        names = ["a", "b"] if bool(x[0] > 1) else ["a"]
        return {n: x.mean() for n in names}, Aux({}, torch.tensor(float(len(x))), {})

    state = TrainState(torch.tensor(0), {"a": torch.zeros(()), "b": torch.zeros(())}, {}, {}, {})
    for order in ([1.0, 2.0], [2.0, 1.0]):
        grads, _ = GradAccumulateHook(2)(grad)(state, {"input": torch.tensor(order)})
        assert {n: float(g) for n, g in grads.items()} == {"a": 1.5, "b": 1.0}


@pytest.mark.parametrize("modules", [["blocks.*"], ["blocks.0", "blocks.2"], ["*.2", "head"]])
def test_remat_changes_no_number(modules: list[str]) -> None:
    """Gradients and buffers are bitwise those without the hook: dropout falls alike, statistics move once, ties stay tied."""
    model, state, batch = setting()
    bare = loss_of(model, nn.CrossEntropyLoss())
    a, a_aux = seeded(local_grad(bare), state, batch)
    kept = state.clone()
    b, b_aux = seeded(local_grad(stack(bare, [RematHook(modules)])), state, batch)
    assert list(a) == list(b)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(x, b_aux.buffers[n]) for n, x in a_aux.buffers.items())
    assert all(torch.equal(x, state.buffers[n]) for n, x in kept.buffers.items())
    assert torch.equal(a_aux.outputs["output"], b_aux.outputs["output"])


def test_remat_keeps_the_ends_of_blocks_only() -> None:
    """What a forward leaves for its backward falls to the inputs of the blocks and what is outside of them."""
    model, state, batch = setting()
    bare = loss_of(model, nn.CrossEntropyLoss())
    before = peak(lambda: seeded(local_grad(bare), state, batch), state.params)
    remat = stack(bare, [RematHook(["blocks.*"])])
    after = peak(lambda: seeded(local_grad(remat), state, batch), state.params)
    ends = 24 * 16 * 4
    outside = 24 * 16 * 4 + 2 * 24 * 64 * 4 + 24 * 8  # the head's input, log-probabilities and logits, targets
    assert before > 4 * 3 * 24 * 64 * 4
    assert after <= 4 * ends + outside + 2_500 * 4  # and the buffers of each block


def test_remat_compiled_to_the_loss_equals_eager(aot_eager: None) -> None:
    """With a separately compiled loss, gradients and buffers are those of eager mode, dropout included."""
    model, state, batch = setting()
    remat = stack(loss_of(model, nn.CrossEntropyLoss()), [RematHook(["blocks.*"])])
    a, a_aux = seeded(local_grad(remat), state, batch)
    b, b_aux = seeded(local_grad(lift(remat, "loss")), state, batch)
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-5, atol=1e-6)
    for n, x in a_aux.buffers.items():
        torch.testing.assert_close(b_aux.buffers[n], x)


@pytest.mark.nightly
def test_remat_with_inductor_saves_memory() -> None:
    """In generated code what is saved falls as well, and the gradient is that of the compiled loss without the hook."""
    found = []
    for hooks in ([], [RematHook(["blocks.*"])]):
        torch._dynamo.reset()
        model, state, batch = setting()  # one for each: the hook alters the module itself
        loss = stack(loss_of(model, nn.CrossEntropyLoss()), hooks)
        grad = local_grad(lift(loss, "loss"))
        asked = functools.partial(seeded, grad, state, batch)
        found.append((peak(asked, state.params), asked()[0]))
    (before, a), (after, b) = found
    assert after < 0.7 * before
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-4, atol=1e-5)


def test_remat_is_cut_at_the_loss(tmp_path: Path, aot_eager: None) -> None:
    """A compiled run with the hook compiles up to the loss by itself, gives eager's state, and refuses another cut."""
    hook = dict(remat=dict(type="RematHook", modules=["first", "norm"]))
    more = {"total_epochs": 1, "optimizer": dict(type="SGD", lr=0.1)}  # Adam would make much of a gradient that is all rounding
    eager = fit({**tiny_cfg(tmp_path / "eager", **hook), **more})
    cfg = {**tiny_cfg(tmp_path / "compiled", **hook), **more, "compile": True}
    job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
    assert job.plan.cut == "loss"
    compiled = fit(cfg)
    for n, p in eager.state.params.items():
        torch.testing.assert_close(compiled.state.params[n], p, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"cfg\.compile\.cut is 'step', and a hook of this run needs 'loss'"):
        assemble(check.complete({**cfg, "compile": dict(cut="step")}), torch.device("cpu"), say=lambda line: None)


def test_remat_changes_training_only(tmp_path: Path) -> None:
    """Sub-modules become sub-classes of their classes, once however often it is asked; evaluation computes as before."""
    model, state, batch = setting()
    classes = [type(m) for m in model.modules()]
    evaluate = loss_of(model, nn.CrossEntropyLoss(), training=False)
    with torch.no_grad():
        before, _ = evaluate(state.params, state.buffers, batch)
    hook = RematHook(["blocks.*"])
    once = [type(m) for m in stack(loss_of(model, nn.CrossEntropyLoss()), [hook]).model.modules()]
    twice = [type(m) for m in stack(loss_of(model, nn.CrossEntropyLoss()), [hook]).model.modules()]
    assert once == twice != classes
    assert all(issubclass(a, b) for a, b in zip(once, classes, strict=True))
    with torch.no_grad():
        assert torch.equal(evaluate(state.params, state.buffers, batch)[0], before)


def test_a_loss_that_is_no_module_cannot_be_changed() -> None:
    """A hook that changes modules refuses a loss that was not made of one."""

    def loss(params: Params, buffers: Params, batch: Batch) -> Any:
        return torch.zeros(()), Aux({}, torch.ones(()), {})

    with pytest.raises(ConfigError, match="not made of a module"):
        stack(loss, [RematHook(["blocks.*"])])
