"""The compile line: only TrainState, Batch and Logs cross it. Here a pure step becomes one graph that reuses its input's memory."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.exc
import torch._dynamo.utils
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.rng import mix, seed_device
from ailab.types import Batch, Logs, Step, TrainState, seal

def allow_traced_grad() -> Any:
    """A context in which Dynamo traces `torch.autograd.grad`; a private switch, off by default on every supported version."""
    return torch._dynamo.config.patch(trace_autograd_ops=True)


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far; a private counter."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def last_recompile_reason() -> str:
    """Why Dynamo last compiled a second graph for the same code, in its own words; a private record."""
    metrics = torch._dynamo.utils.get_compilation_metrics()
    return str(getattr(metrics[-1], "recompile_reason", None) or "unknown") if metrics else "unknown"


class Compiled:
    """A step above the compile line: `state, logs = step(state, batch)`, where `logs` is a `Logs`.

    Seeds the generators from `(seed, state.step, rank)` before each step, so that any step can be replayed and no generator
    state is stored. With `donate` the state passed in is consumed: its memory holds the new state, and touching the old one
    raises `DonatedError`.
    """

    def __init__(
        self,
        step: Step,
        *,
        enabled: bool,
        donate: bool,
        mode: str | None,
        seed: int,
        rank: int,
        name: str,
        report: Callable[[str], None] | None,
    ):
        self.step, self.enabled, self.donate, self.mode, self.name = step, enabled, donate, mode, name
        self.seed, self.rank, self.report = seed, rank, report
        self.recompiles = 0  # graphs compiled for shapes that had been seen before
        self._shapes: set[tuple[Any, ...]] = set()
        self._state: TrainState | None = None  # the state whose leaves are below
        self._leaves: list[Tensor] = []
        self._tracked: list[bool] = []  # which leaves require grad
        self._run: Callable[..., Any] | None = None
        self._device: torch.device = torch.device("cpu")

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        if state is not self._state:
            self._enter(state)
        at = state.at
        seed_device(self._device, mix(self.seed, at, self.rank))
        after, logs = self._graph(state, batch) if self.enabled else self._eager(state, batch)
        self._state = after
        return after, logs

    def _enter(self, state: TrainState) -> None:
        """Flatten a state that did not come out of the previous call."""
        self._device = state.step.device
        if not self.enabled:
            return
        self._leaves = self._alike([leaf for leaf in tree.leaves(state) if isinstance(leaf, Tensor)])
        if self._run is None:
            self._run = torch.compile(
                _flat(self.step, state, self.donate, self.name), fullgraph=True, mode=self.mode, dynamic=False
            )

    def _alike(self, leaves: list[Tensor]) -> list[Tensor]:
        """The same memory as plain tensors that require grad where those of the first state did: a graph depends on both."""
        self._tracked = self._tracked or [leaf.requires_grad for leaf in leaves]
        return [
            leaf if type(leaf) is Tensor and leaf.requires_grad == tracked else leaf.detach().requires_grad_(tracked)
            for leaf, tracked in zip(leaves, self._tracked, strict=True)
        ]

    def _eager(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        at = state.at + 1
        with torch.no_grad():
            after, logs = self.step(state, batch)
            out = seal(logs)
        if after is not state:
            object.__setattr__(after, "_at", at)
            if self.donate:
                state.consume(at)
        return after, out

    def _graph(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        fields = {k: v for k, v in batch.items() if _crosses(v)}
        shape = tuple([v.shape if isinstance(v, Tensor) else None for v in fields.values()])
        known = shape in self._shapes
        before = graphs_compiled()
        with torch.no_grad():
            names, packed, outputs, leaves = self._call(fields, known)
        if not known:
            self._shapes.add(shape)
        elif graphs_compiled() != before:
            self._recompiled()
        if self.donate:
            return state.consume(state.at + 1), Logs(names, packed, outputs)
        after = tree.unflatten(state, _merge(state, leaves))
        self._leaves = self._alike(leaves)
        return after, Logs(names, packed, outputs)

    def _call(self, fields: Batch, known: bool) -> Any:
        assert self._run is not None
        if known:
            try:
                return self._run(self._leaves, fields)
            except torch._dynamo.exc.Unsupported:
                pass  # a guard failed, and the gradient can be traced only inside the switch below
        try:
            with allow_traced_grad():
                return self._run(self._leaves, fields)
        except torch._dynamo.exc.TorchDynamoException as e:
            what = str(e).strip().splitlines()[0]
            raise ConfigError(
                f"cfg.compile: the {self.name} step cannot be traced as one graph: {what}\n"
                "  compile=False runs it as it is; compile=dict(cut='loss') compiles the forward and backward only."
            ) from e

    def _recompiled(self) -> None:
        self.recompiles += 1
        if self.report is not None:
            self.report(f"{self.name} step was compiled again for shapes it had seen: {last_recompile_reason()}")


def compile(  # noqa: A001 - read as ailab.compile
    step: Step,
    *,
    enabled: bool = True,
    donate: bool = True,
    mode: str | None = None,
    seed: int = 0,
    rank: int = 0,
    name: str = "train",
    report: Callable[[str], None] | None = None,
) -> Compiled:
    """Lift a pure step over the compile line.

    Args:
        step: `(TrainState, Batch) -> (TrainState, Logs)`, pure; traced as one graph (`fullgraph=True`), one per batch shape.
        enabled: False runs the step eagerly, with everything else the same.
        donate: reuse the memory of the state that is passed in; it may not be read afterwards.
        mode: of `torch.compile`.
        seed: of the model's randomness; the generators are seeded from `(seed, state.step, rank)` before each step.
        rank: this process's number, so that dropout differs between ranks.
        name: of the step, in reports and tracebacks.
        report: called with one line when a graph is compiled for shapes that had been seen before.
    """
    return Compiled(step, enabled=enabled, donate=donate, mode=mode, seed=seed, rank=rank, name=name, report=report)


def lift(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A pure function below the line as a graph of its own, for a run that is cut at the loss or the gradient."""
    compiled = torch.compile(_own_code(fn, name), fullgraph=True, dynamic=False)
    switch = allow_traced_grad()
    whole = torch._dynamo.config.patch(optimize_ddp=False)  # DDP would cut the graph at its buckets

    def lifted(*args: Any) -> Any:
        with switch, whole:
            return compiled(*args)

    return lifted


def _own_code(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn` with a code object of its own: Dynamo keeps its cache, and its limit on recompiles, by code object."""
    code = fn.__code__.replace(co_name=name)
    return types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)


def _crosses(value: Any) -> bool:
    """Whether a batch field may go under the line: tensors, in any nesting."""
    return isinstance(value, Tensor) or (not isinstance(value, (str, bytes)) and all(isinstance(x, Tensor) for x in tree.leaves(value)))


def _merge(state: TrainState, tensors: list[Tensor]) -> list[Any]:
    """All leaves of a state like `state`, its plain values kept and its tensors replaced, in order."""
    rest = iter(tensors)
    return [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(state)]


def _flat(step: Step, like: TrainState, donate: bool, name: str) -> Callable[..., Any]:
    """The step over a flat list of tensors, so that the state is flattened once and not per call."""
    template = tree.unflatten(like, [None if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(like)])

    def flat(leaves: list[Tensor], batch: Batch) -> tuple[tuple[str, ...], Tensor, dict[str, Any], list[Tensor]]:
        rest = iter(leaves)
        state = tree.unflatten(template, [next(rest) if leaf is None else leaf for leaf in tree.leaves(template)])
        after, logs = step(state, batch)
        out = seal(logs)
        new = [leaf for leaf in tree.leaves(after) if isinstance(leaf, Tensor)]
        if not donate:
            return out.names, out.packed, out.outputs, new
        changed = [(a, b) for a, b in zip(leaves, new, strict=True) if a is not b]
        # Every value is copied before any is written: one may be (a view of) an old leaf, which no tensor tells while it is
        # traced. The compiler drops the copies that are not needed.
        values = [b.clone() for _, b in changed]
        for (old, _), value in zip(changed, values, strict=True):
            old.copy_(value)
        return out.names, out.packed, out.outputs, []

    return _own_code(flat, f"{name}_step")
