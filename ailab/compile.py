"""The compile line: only TrainState, Batch and Logs cross it. Here a pure step becomes one graph that reuses its input's memory."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ailab import tree
from ailab.compiler import (
    Settings,
    allow_traced_grad,
    graphs_compiled,
    lifted_settings,
    mode_options,
    overlap_options,
    refusal,
    tracing_errors,
    use_own_cache,
)
from ailab.cuda_graph import Captured, Replay
from ailab.errors import ConfigError
from ailab.rng import begin_step, drawn_by_rank, end_step, mix
from ailab.types import DRAW, Batch, Logs, Step, TrainState, seal


class Compiled:
    """A step above the compile line: `state, logs = step(state, batch)`, where `logs` is a `Logs`.

    Seeds the generators from `(seed, state.step)` before each step, so that any step can be replayed and no generator state is
    stored. With `donate` the state passed in is consumed: its memory holds the new state, and touching the old one raises
    `DonatedError`.

    Args:
        step: `(TrainState, Batch) -> (TrainState, Logs)`, pure; traced as one graph (`fullgraph=True`), one per batch shape.
        enabled: False runs the step eagerly, with everything else the same.
        donate: reuse the memory of the state that is passed in; it may not be read afterwards.
        mode: of `torch.compile`.
        seed: of the model's randomness; the generators are seeded from `(seed, state.step)` before each step. None: they are
            not, for a step inside another one.
        rank: of this process, for a step of which all that is drawn shall differ between ranks (evaluation). None: only what a
            core over several ranks draws below its reduction does. A graph of a whole step has one generator: it is all or none.
        name: of the step, in reports and tracebacks.
        report: called with one line when a further graph is compiled: what differs from the first.
        overlap: the step sums over ranks: let the compiler hide that behind what it computes.
        replay: record the compiled step, and launch the recording in its place; it needs `donate`.
    """

    def __init__(
        self,
        step: Step,
        *,
        enabled: bool = True,
        donate: bool = True,
        mode: str | None = None,
        seed: int | None = 0,
        rank: int | None = None,
        name: str = "train",
        report: Callable[[str], None] | None = None,
        overlap: bool = False,
        replay: Replay | None = None,
    ):
        self.overlap, self.replay = overlap, replay if enabled and donate else None
        self.step, self.enabled, self.donate, self.mode, self.name = step, enabled, donate, mode, name
        self.seed, self.rank, self.report = seed, rank, report
        self.graphs: dict[Any, Callable[..., Any]] = {}  # by the layout of everything that goes in
        self._layouts: dict[Any, int] = {}  # of states that were seen, numbered
        self._layout = 0  # number of this one's
        self._settings = Settings()
        self._state: weakref.ref[TrainState] | None = None  # to the state whose leaves are below, as long as anybody has it
        self._leaves: list[Tensor] = []
        self._tracked: dict[Any, list[bool]] = {}  # by structure: which leaves require grad
        self._device: torch.device = torch.device("cpu")

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        """One step; the state that was passed in is consumed unless `donate` is off."""
        if self._state is None or state is not self._state():
            self._enter(state)
        run = self._graph if self.enabled else self._eager
        if self.seed is None:
            after, logs = run(state, batch)
        else:
            seed = self.seed
            if DRAW in batch:
                seed, batch = mix(seed, batch[DRAW]), {k: v for k, v in batch.items() if k != DRAW}
            begin_step(self._device, seed, state.at)
            try:
                after, logs = (run if self.rank is None else drawn_by_rank(run, self.rank))(state, batch)
            finally:
                end_step()
        self._state = weakref.ref(after, self._forget)
        return after, logs

    def _forget(self, state: weakref.ref[TrainState]) -> None:
        """Nobody has the last state any more: nor shall this step hold its tensors."""
        if state is self._state:
            self._state, self._leaves = None, []

    def _enter(self, state: TrainState) -> None:
        """Flatten a state that did not come out of the previous call."""
        self._device = state.step.device
        if not self.enabled:
            return
        if self.donate:
            _refuse_shared(state)
        everything = list(tree.items(state))
        structure = tuple([(path, None if isinstance(leaf, Tensor) else leaf) for path, leaf in everything])
        leaves = [leaf for _, leaf in everything if isinstance(leaf, Tensor)]
        tracked = self._tracked.setdefault(structure, [leaf.requires_grad for leaf in leaves])
        leaves = [_alike(leaf, grad) for leaf, grad in zip(leaves, tracked, strict=True)]
        last = self._state() if self._state is not None and self.donate else None
        if last is not None and _share_memory(self._leaves, leaves):
            last.consume(state.at + 1)  # `state` was made of it, and this step writes to what they share
        self._leaves = leaves
        layout = (structure, *[_layout(leaf) for leaf in self._leaves])
        self._layout = self._layouts.setdefault(layout, len(self._layouts))

    def _eager(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        at, clock = state.at, state.step
        with torch.no_grad():
            after, logs = self.step(state, batch)
            out = seal(logs, clock.device)
        if after is not state:
            after.known_at(at + (after.step is not clock))  # an evaluation step does not advance it
            if self.donate:
                state.consume(after.at)
        return after, out

    def _graph(self, state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        fields = _fields(batch)
        with torch.no_grad():
            # All that a graph depends on is in this key, so that the graph itself checks nothing: guards cost 15 % of a small step.
            settings = self._settings(self._device)
            key = (self._layout, settings, _shared(fields), *[(k, _layout(v)) for k, v in fields.items()])
            run, given = self.graphs.get(key), state
            if isinstance(run, Captured) and run.homes is not self._leaves:
                state = self._at_home(run, state, fields)
            names, packed, outputs, leaves, ticks = run(self._leaves, fields) if run else self._first(key, state, fields)
        at = state.at + ticks
        if self.donate:
            if given is not state:
                given.consume(at)
            return state.consume(at), Logs(names, packed, outputs)
        after = tree.unflatten(state, _merge(state, leaves))
        after.known_at(at)
        self._enter(after)
        return after, Logs(names, packed, outputs)

    def _at_home(self, run: Captured, state: TrainState, fields: Batch) -> TrainState:
        """The state with its values where the recorded step reads and writes them; as it is while there is no recording."""
        homes = run.adopt(self._leaves, fields)
        if homes is None:
            return state
        self._leaves = homes
        moved = tree.unflatten(state, _merge(state, homes))
        moved.known_at(state.at)
        return moved

    def _first(self, key: Any, state: TrainState, fields: Batch) -> Any:
        """Compile a graph for this layout, run it, and keep it."""
        if tree.transformed():
            raise ConfigError(
                "a compiled step is called inside a transform of torch.func: differentiate the loss in its place."
            )
        run = _without_guards(_flat(self.step, state, self.donate, f"{self.name}_step"), self.mode, self.overlap)
        elsewhere = {k: v.device for k, v in fields.items() if isinstance(v, Tensor) and v.dim() and v.device != self._device}
        if elsewhere:
            field, device = next(iter(elsewhere.items()))
            raise ConfigError(f"the batch's {field!r} is on {device}, and the state on {self._device}: move it there.")
        if any(t.is_conj() or t.is_neg() for t in tree.leaves(fields)):
            run = _on_plain_memory(run)
        try:
            with allow_traced_grad():
                result = run(self._leaves, fields)
        except tracing_errors() as e:
            raise refusal(e, f"the {self.name} step", holds_more=self.seed is not None) from e
        if _is_other(self._leaves, result[3], self.donate):
            raise ConfigError(
                f"a {self.name} step changes the structure of the state: other tensors come out than went in.\n"
                "  A hook has to return what it was given, in shape and dtype; make its memory in `init`."
            )
        if self.graphs and self.report is not None:
            self.report(
                f"{self.name} step: compiled graph {len(self.graphs) + 1}, for {_difference(next(iter(self.graphs)), key)}"
            )
        self.graphs[key] = run if self.replay is None else self.replay.of(run, self.name)
        return result


compile = Compiled


def lift(
    fn: Callable[..., Any], name: str, *, split: bool = False, report: Callable[[str], None] | None = None
) -> Callable[..., Any]:
    """A pure function below the line as a graph of its own, for a run that is cut at the loss or the gradient.

    Args:
        fn: its last argument is a batch, or a list of micro-batches. Of these, tensors cross the line.
        name: of the function, in reports and tracebacks.
        split: cut the graph at DDP's buckets: gradients then come out one part after the other, and are summed meanwhile.
        report: called with one line when a further graph is compiled.
    """
    use_own_cache()
    compiled = torch.compile(_own_code(fn, name), fullgraph=True, dynamic=False)
    settings, graphs = lifted_settings(split), 0

    def lifted(*args: Any) -> Any:
        nonlocal graphs
        *head, last = args
        last = [_fields(batch) for batch in last] if isinstance(last, list) else _fields(last)
        before = graphs_compiled()
        try:
            with settings:
                result = compiled(*head, last)
        except tracing_errors() as e:
            raise refusal(e, f"the {name}", holds_more=isinstance(last, list)) from e
        if graphs_compiled() > before:
            graphs += 1
            if graphs > 1 and report is not None:
                report(f"{name}: compiled graph {graphs}, for a batch with {_shapes(last)}")
        return result

    return lifted


def _shapes(batch: Any) -> str:
    return ", ".join(f"{path} {tuple(leaf.shape)}" for path, leaf in tree.items(batch) if leaf.dim())


def _own_code(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn` with a code object of its own: Dynamo keeps its cache, and its limit on recompiles, by code object."""
    code = fn.__code__.replace(co_name=name)
    return types.FunctionType(code, fn.__globals__, name, fn.__defaults__, fn.__closure__)


def _without_guards(fn: Callable[..., Any], mode: str | None, overlap: bool) -> Callable[..., Any]:
    """`fn` compiled as one graph that is run as it is; whoever calls it knows that the graph fits."""
    use_own_cache()
    options = {**mode_options(mode), **(overlap_options() if overlap else {})}
    options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
    return torch.compile(fn, fullgraph=True, dynamic=False, options=options)


def _layout(value: Any) -> Any:
    """All that a graph depends on in a tensor; in a nest of them, of each."""
    if isinstance(value, Tensor):
        bits = value.is_conj(), value.is_neg()  # values that are to be read as their conjugates, or negated
        return value.shape, value.stride(), value.dtype, value.requires_grad, value.device, bits
    return tuple([(path, _layout(leaf)) for path, leaf in tree.items(value)])


def _alike(leaf: Tensor, tracked: bool) -> Tensor:
    """The same memory as a plain tensor that requires grad where that of the first state did: a graph depends on both."""
    return leaf if type(leaf) is Tensor and leaf.requires_grad == tracked else leaf.detach().requires_grad_(tracked)


def _on_plain_memory(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` for fields that hold conjugated or negated values: the compiler's code reads memory as it is."""

    def resolved(leaves: list[Tensor], fields: Batch) -> Any:
        return run(leaves, tree.map(lambda t: t.resolve_conj().resolve_neg(), fields))

    return resolved


def _is_other(before: list[Tensor], after: list[Tensor], donate: bool) -> bool:
    """Whether the leaves that came out have another structure than those that went in. A donating graph gives none where not."""
    if donate:
        return bool(after)
    return [(t.shape, t.dtype) for t in before] != [(t.shape, t.dtype) for t in after]


def _shared(fields: Batch) -> tuple[int, ...]:
    """Which fields are one tensor: a graph reads it once. Empty where all are apart."""
    ids = [id(v) for v in (fields.values() if all(type(v) is Tensor for v in fields.values()) else tree.leaves(fields))]
    return () if len(set(ids)) == len(ids) else tuple([ids.index(i) for i in ids])


def _refuse_shared(state: TrainState) -> None:
    """Refuse to donate a state that holds the same memory at two places: both would be written to."""
    places: dict[int, str] = {}
    for path, leaf in tree.items(state):
        if isinstance(leaf, Tensor) and leaf.numel() and places.setdefault(leaf.data_ptr(), path) != path:
            raise ConfigError(
                f"state.{path} and state.{places[leaf.data_ptr()]} are the same memory, and a compiled step would write to both.\n"
                "  Begin with `state.clone()`, which takes them apart."
            )


def _share_memory(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(a.data_ptr() == b.data_ptr() and a.numel() for a, b in zip(some, others, strict=False))


def _difference(first: tuple[Any, ...], key: tuple[Any, ...]) -> str:
    """What a key has that the first one has not, in words."""
    if key[1] != first[1]:
        return "other settings of torch (autocast, precision, determinism, threads, ...)"
    fields = [f"{name} {tuple(layout[0]) if isinstance(layout[0], torch.Size) else 'nested'}" for name, layout in key[3:]]
    changed = [f for f, now, was in zip(fields, key[3:], first[3:], strict=False) if now != was]
    return "a batch with " + ", ".join(changed or fields) if key[2:] != first[2:] else "a state of another layout"


def _fields(batch: Batch) -> Batch:
    """The fields of a batch that may go under the line."""
    return batch if all(type(v) is Tensor for v in batch.values()) else {k: v for k, v in batch.items() if crosses(v)}


def crosses(value: Any) -> bool:
    """Whether a batch field may go under the line: tensors, in any nesting."""
    return isinstance(value, Tensor) or (
        not isinstance(value, (str, bytes)) and all(isinstance(x, Tensor) for x in tree.leaves(value))
    )


def _merge(state: TrainState, tensors: list[Tensor]) -> list[Any]:
    """All leaves of a state like `state`, its plain values kept and its tensors replaced, in order."""
    rest = iter(tensors)
    return [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(state)]


def _flat(step: Step, like: TrainState, donate: bool, name: str) -> Callable[..., Any]:
    """The step over a flat list of tensors, so that the state is flattened once and not per call."""
    template = tree.unflatten(like, [None if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves(like)])

    def flat(leaves: list[Tensor], batch: Batch) -> tuple[tuple[str, ...], Tensor, dict[str, Any], list[Tensor], int]:
        rest = iter(leaves)
        state = tree.unflatten(template, [next(rest) if leaf is None else leaf for leaf in tree.leaves(template)])
        after, logs = step(state, batch)
        out = seal(logs, state.step.device)
        new = [leaf for leaf in tree.leaves(after) if isinstance(leaf, Tensor)]
        ticks = int(after.step is not state.step)  # an evaluation step does not advance the clock
        same = [(a.shape, a.dtype) for a in leaves] == [(b.shape, b.dtype) for b in new]
        if not donate or not same:
            return out.names, out.packed, out.outputs, new, ticks
        changed = [(a, b) for a, b in zip(leaves, new, strict=True) if a is not b]
        # Every value is copied before any is written: one may be (a view of) an old leaf, which no tensor tells while it is
        # traced. The compiler drops the copies that are not needed.
        values = [b.clone() for _, b in changed]
        for (old, _), value in zip(changed, values, strict=True):
            old.copy_(value)
        return out.names, out.packed, out.outputs, [], ticks

    return _own_code(flat, name)
