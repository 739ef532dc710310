"""The laws of a hook as one function, for hooks of one's own: `check_hook(MyHook(0.1))` in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import compile
from ailab.core.epoch import PROGRESS, fresh_progress, tally, train_epoch, workflow
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.run import run_epochs
from ailab.core.step import train_step
from ailab.optim import Optimizer, build_optimizer
from ailab.stack import Middleware, as_hooks, at, stack, with_slots
from ailab.types import WEIGHT, Batch, Batches, Logs, Loss, Mean, Step, TrainState

Hooks = Middleware[Any] | Sequence[Middleware[Any]]


def check_hook(hooks: Hooks, *, compiled: bool = True) -> None:
    """Hold a hook to its laws on a tiny net: batch norm, SGD with momentum, two steps of 6 samples.

    Below the compile line: a step leaves its input and its batch as they were; the state keeps its structure, shapes and dtypes;
    a step hook that says it does not look back gives the same when the old state is gone; the compiled step gives the eager
    numbers (1e-5).
    Above it: state and logs are what they are without the hook, bitwise.

    Args:
        hooks: what the builder returned.
        compiled: whether to compare with a compiled step, which takes some seconds.

    Raises:
        AssertionError: naming the law and the first path in the state that breaks it.
    """
    found = as_hooks(hooks, "check_hook")
    net = TinyNet(found)
    plain = [h for h in found if h.depth in ("host", "epoch", "run")]
    if plain:
        _check_observer(TinyNet([h for h in found if h not in plain]), net)
    if any(h.depth in ("loss", "grad", "step") for h in found):
        _check_traced(net, compiled)


def check_identity(hooks: Hooks, *, steps: int = 8) -> None:
    """Hold a hook, in the setting in which it is to change nothing, to that: clip(inf), sam(0), an average that only watches.

    Args:
        hooks: what the builder returned.
        steps: of training.

    Raises:
        AssertionError: naming the first path of parameters, buffers or optimizer memory that is not bitwise what it is without.
    """
    ends: list[TrainState] = []
    for net in (TinyNet(as_hooks(hooks, "check_identity")), TinyNet()):
        step, state = stack(compile(net.step(), enabled=False, donate=False), at(net.hooks, "host")), net.state.clone()
        for i in range(steps):
            state, _ = step(state, net.batches[i % len(net.batches)])
        ends.append(state)
    mine, bare = ({f: getattr(state, f) for f in ("params", "buffers", "opt_state")} for state in ends)
    _same(mine, bare, "the hook changes nothing")


class TinyNet:
    """A run of two steps as small as can be, in Python, with some hooks around it."""

    def __init__(self, hooks: Sequence[Middleware[Any]] = ()):
        torch.manual_seed(0)
        self.hooks = list(hooks)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        bare = module_state(self.model).clone()
        self.optimizer: Optimizer = build_optimizer("SGD", bare.params, lr=0.1, momentum=0.9)
        state = bare.replace(opt_state=self.optimizer.init(bare.params)).with_slot(PROGRESS, fresh_progress(bare.step.device))
        self.state = with_slots(state, self.hooks)
        g = torch.Generator().manual_seed(1)
        self.batches: list[Batch] = [
            {"input": torch.randn(6, 4, generator=g), "target": torch.randint(3, (6,), generator=g), WEIGHT: torch.ones(6)}
            for _ in range(2)
        ]

    def loss(self, training: bool = True) -> Loss:
        """The loss in its hooks."""
        bare = loss_of(self.model, nn.CrossEntropyLoss(), training=training)
        return stack(bare, at(self.hooks, "loss", "train" if training else "val"))

    def step(self, *, destroy: bool = False) -> Step:
        """The training step in its traced hooks; with `destroy` the old parameters are gone once the bare step is through."""
        bare = train_step(stack(local_grad(self.loss()), at(self.hooks, "grad")), self.optimizer)
        return stack(_destroying(bare) if destroy else bare, at(self.hooks, "step"))

    def run(self, step: Step, begin: TrainState | None = None) -> tuple[TrainState, Mapping[str, Mean]]:
        """The state and the last logs after both batches, from `begin` or a copy of the first state."""
        state, logs = self.state.clone() if begin is None else begin, {}
        for batch in self.batches:
            state, logs = step(state, batch)
        return state, logs

    def epoch(self) -> tuple[TrainState, Logs]:
        """The state and the logs after a run of one epoch in the host, epoch and run hooks."""
        names = tuple(self.run(compile(self.step(), enabled=False))[1])
        step = compile(stack(self.step(), [tally(names)]), enabled=False)
        bare = train_epoch(stack(step, at(self.hooks, "host")), names)
        epoch = stack(workflow({"train": bare}), at(self.hooks, "epoch"))
        seen: list[Logs] = []

        def watched(state: TrainState, batches: Batches) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            seen.append(logs)
            return state, logs

        bare_run = run_epochs(watched, lambda number, start: {"train": self.batches}, 1)
        state = stack(bare_run, at(self.hooks, "run"))(with_slots(self.state.clone(), [tally(names)]))
        assert len(seen) == 1, "a run hook leaves the epochs of the run as they are"
        return state, seen[0]


def _destroying(step: Step) -> Step:
    def gone(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
        after, logs = step(state, batch)
        after = tree.clone(after)
        for leaf in tree.leaves([state.params, state.opt_state]):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(float("nan"))
        return after, logs

    return gone


def _check_traced(net: TinyNet, compiled: bool) -> None:
    kept, batches = net.state.clone(), tree.clone(net.batches)
    after, logs = net.run(compile(net.step(), enabled=False, donate=False), net.state)
    _same(net.state, kept, "a step leaves its input as it was")
    _same(net.batches, batches, "a step leaves its batch as it was")
    shapes = {p: (tuple(x.shape), x.dtype) for p, x in tree.items(kept)}
    assert {p: (tuple(x.shape), x.dtype) for p, x in tree.items(after)} == shapes, "a step keeps the structure of the state"
    if not any(h.looks_back for h in at(net.hooks, "step")):
        gone, _ = net.run(compile(net.step(destroy=True), enabled=False))
        _same(gone, after, "a hook that does not look back never reads the old state")
    if compiled:
        traced, traced_logs = net.run(compile(net.step()))
        _same(traced, after, "compiled equals eager", 1e-5)
        assert list(traced_logs) == list(logs), "compiled and eager steps report the same names"


def _check_observer(without: TinyNet, with_hook: TinyNet) -> None:
    (a, a_logs), (b, b_logs) = without.epoch(), with_hook.epoch()
    _same(b.replace(slots={k: v for k, v in b.slots.items() if k in a.slots}), a, "a host hook leaves the state as it is")
    mine = {n: m.value for n, m in b_logs.items() if n in a_logs}
    assert list(mine) == list(a_logs), "a host hook leaves the logs as they are"
    assert all(torch.equal(v, a_logs[n].value) for n, v in mine.items()), "a host hook leaves the logs as they are"


def _same(values: Any, wanted: Any, law: str, tolerance: float = 0.0) -> None:
    for (path, x), (_, y) in zip(tree.items(values), tree.items(wanted), strict=True):
        close = torch.equal(x, y) if not tolerance else torch.allclose(x, y, rtol=tolerance, atol=tolerance)
        assert close, f"{law}: {path} differs"
