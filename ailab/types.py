"""The values and the callable types of a run: one immutable `TrainState`, `Mean` logs, and one shape at six depths.

run     (TrainState) -> TrainState
epoch   (TrainState, batches) -> (TrainState, Logs)
step    (TrainState, Batch) -> (TrainState, Logs)        host above the compile line, traced below it
grad    (TrainState, Batch) -> (Params, Aux)
loss    (Params, Buffers, Batch) -> (Tensor, Aux)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError, DonatedError
from ailab.tree import widened as widened

PyTree: TypeAlias = Any  # nested dicts, lists, tuples and dataclasses of tensors and plain values
Params: TypeAlias = dict[str, Tensor]
Buffers: TypeAlias = dict[str, Tensor]
Batch: TypeAlias = dict[str, Any]  # fields by name; tensors have the samples along dimension 0
LOSS_SCALE = "_loss_scale"  # the reserved batch field: (), the loss is differentiated times this and gradients divided by it
VIEWS = "_views"  # the reserved batch field: [(share, fields)], how often and with which other fields the criterion is asked
GIVEN = "_given"  # the reserved batch field: the outputs of the model by name, where they are known; it is not called then
OUTPUT = "@"  # prefix under which model outputs that a host hook reads travel beside the logs
ALL_OUTPUTS = "*"  # what a host hook asks for that reads each output of the model, whatever their names
Direction: TypeAlias = Literal["min", "max"]  # which of two values of a result is better, the lower or the higher
DRAW = "_draw"  # the reserved batch field: int, the number of an evaluation's batch; its random numbers are a function of it
STOP = "_stop"  # the reserved batch field: (), 1 where this rank asks to end the run; comes out as how many ranks do
WEIGHT = "_weight"  # the reserved batch field: (B,) float32, 1 for a sample that counts and 0 for padding
SIZE = "_size"  # the reserved batch field: () float32, samples of the whole batch that this one is a part of


def batch_size(batch: Batch) -> int:
    """Samples in a batch, padding included: the first dimension of its first tensor, at the top or in a nested field.

    Raises:
        ConfigError: when no field holds a tensor with a sample dimension.
    """
    for v in batch.values():
        if isinstance(v, Tensor) and v.dim() > 0:
            return int(v.shape[0])
    for v in tree.leaves(batch):
        if isinstance(v, Tensor) and v.dim() > 0:
            return int(v.shape[0])
    raise ConfigError(f"no field of the batch is a tensor with one row per sample. Fields: {', '.join(batch) or 'none'}.")


@dataclass(frozen=True)
class TrainState:
    """Everything a run remembers; a pytree, so it can be cloned, moved, averaged and saved as one value.

    A compiled step that donates reuses the memory of the state it is given. That state is then emptied, and reading any field
    of it raises `DonatedError`.
    """

    step: Tensor  # () int64: optimizer updates so far; the only clock of the run
    params: Params  # by dotted name, as in Module.named_parameters(); parameters of the loss under "loss."
    buffers: Buffers  # by dotted name; a step returns new ones and never writes to these
    opt_state: PyTree
    slots: dict[str, PyTree] = field(default_factory=dict)  # memory of hooks, by hook name

    @property
    def at(self) -> int:
        """`step` as a Python int; no device read for a state that came out of a compiled step."""
        known = self.__dict__.get("_at")
        if known is None:
            known = int(self.step)
            object.__setattr__(self, "_at", known)
        return known

    def known_at(self, at: int) -> None:
        """Say what `step` is, where nobody has said it, so that `at` need not read it. For `compile.py` alone."""
        self.__dict__.setdefault("_at", at)

    def replace(self, **changes: Any) -> TrainState:
        """A state with these fields changed; the others are shared."""
        return self._known(TrainState(**{**self._fields(), **changes}))

    def with_slot(self, name: str, value: PyTree) -> TrainState:
        """A state whose slot `name` holds `value`."""
        return self._known(TrainState(self.step, self.params, self.buffers, self.opt_state, {**self.slots, name: value}))

    def _known(self, other: TrainState) -> TrainState:
        """`other`, which need not read `at` from the device where it is that of this state."""
        if "_at" in self.__dict__ and other.step is self.step:
            object.__setattr__(other, "_at", self.__dict__["_at"])
        return other

    def _fields(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "params": self.params,
            "buffers": self.buffers,
            "opt_state": self.opt_state,
            "slots": self.slots,
        }

    def clone(self) -> TrainState:
        """A copy that shares no memory; the way to keep a state that a compiled step will consume."""
        return tree.clone(self)

    def consume(self, at: int) -> TrainState:
        """Move the content to a new state at step `at` and empty this one. For `compile.py` alone."""
        heir = object.__new__(TrainState)
        heir.__dict__.update(self.__dict__, _at=at)
        self.__dict__.clear()
        self.__dict__["_consumed_by"] = at
        return heir

    def __getattr__(self, name: str) -> Any:
        # Reached only when normal look-up fails: for a consumed state, or for a name that no state has.
        if "_consumed_by" in self.__dict__ and name in _FIELDS:
            raise DonatedError(
                f"state.{name} was read after step {self.__dict__['_consumed_by']} had consumed this TrainState.\n"
                "  A compiled step reuses the memory of its input: `state, logs = step(state, batch)`.\n"
                "  To keep the old state: `kept = state.clone()` before the call, or `compile(step, donate=False)`."
            )
        raise AttributeError(f"TrainState has no field {name!r}")


_FIELDS = frozenset(f.name for f in fields(TrainState))


@dataclass(frozen=True)
class Mean:
    """A mean as a monoid: adds over micro-batches, steps and ranks, and is divided once, at the end; halves as float32."""

    total: Tensor  # () weighted sum
    weight: Tensor  # () sum of the weights; usually the number of samples

    def __add__(self, other: Mean) -> Mean:
        return Mean(widened(self.total) + widened(other.total), widened(self.weight) + widened(other.weight))

    @property
    def value(self) -> Tensor:
        """`total / weight`; 0 where nothing was counted. ()."""
        weight = widened(self.weight)
        return widened(self.total) / (weight + (weight == 0))

    @staticmethod
    def of(values: Tensor, weight: Tensor | None = None) -> Mean:
        """The mean of per-sample `values` (B,), each counted with `weight` (B,) or once; summed in float32 at least."""
        values = widened(values) if values.is_floating_point() else values.float()  # a bool can count to one
        if weight is None:
            return Mean(values.sum(), torch.full((), float(values.numel()), dtype=values.dtype, device=values.device))
        weight = weight.to(values.dtype)
        return Mean(torch.dot(values, weight), weight.sum())


@dataclass(frozen=True)
class Sum:
    """A loss that is the sum over the samples of the global batch, and not their mean.

    Its gradient is that of the sum, however many micro-batches and ranks share the batch.
    """

    values: Tensor  # (B,) one value per sample; or () the sum over the samples at hand, which padding cannot be masked in


@dataclass(frozen=True)
class Aux:
    """What a loss or gradient reports beside its value."""

    buffers: Buffers  # after the forward
    weight: Tensor  # () what the loss total is to be divided by
    logs: dict[str, Mean]
    outputs: dict[str, Any] = field(default_factory=dict)  # the model's outputs by name, detached
    slots: dict[str, PyTree] = field(default_factory=dict)  # new values for slots of hooks at grad depth
    control: dict[str, Tensor] = field(default_factory=dict)  # what all ranks agreed on in this step's reduction: `_stop`


class Logs(Mapping[str, Mean]):
    """The numbers of one step, or of many: `logs["loss"].value`. Iterates over the names of the means.

    Below the compile line logs are a plain `dict[str, Mean]`; above it they are this view of one packed tensor, so that a step
    hands out a single small tensor and a name costs nothing until it is read.
    """

    __slots__ = ("names", "outputs", "packed", "wall")

    def __init__(
        self,
        names: tuple[str, ...],
        packed: Tensor,
        outputs: dict[str, Any] | None = None,
        wall: Mapping[str, float] | None = None,
    ):
        self.names = names
        self.packed = packed  # (len(names), 2) float64: total, weight
        self.outputs: dict[str, Any] = outputs or {}  # model outputs that a host hook asked for
        self.wall: Mapping[str, float] = wall or {}  # what a host hook measured with a clock: no result, differs by run

    def __getitem__(self, name: str) -> Mean:
        if name not in self.names:
            raise KeyError(name)
        row = self.packed[self.names.index(name)]
        return Mean(row[0], row[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def values_as_floats(self) -> dict[str, float]:
        """Every mean as a Python float: one device read."""
        rows = self.packed.tolist()
        return {name: (total / weight if weight else 0.0) for name, (total, weight) in zip(self.names, rows, strict=True)}

    def prefixed(self, prefix: str) -> Logs:
        """The same numbers under `prefix + name`."""
        wall = {prefix + n: v for n, v in self.wall.items()}
        return Logs(tuple(prefix + n for n in self.names), self.packed, self.outputs, wall)

    def with_wall(self, wall: Mapping[str, float]) -> Logs:
        """The same numbers, and these of a clock beside them."""
        return Logs(self.names, self.packed, self.outputs, {**self.wall, **wall})

    def with_outputs(self, outputs: Mapping[str, Any]) -> Logs:
        """The same numbers, and these model outputs beside those that are there."""
        return Logs(self.names, self.packed, {**self.outputs, **outputs}, self.wall)

    @staticmethod
    def join(parts: Iterable[Logs]) -> Logs:
        """The numbers of several logs side by side; the names must differ."""
        parts = list(parts)
        if not parts:
            return Logs((), torch.zeros(0, 2, dtype=torch.float64))
        wall = {n: v for p in parts for n, v in p.wall.items()}
        return Logs(tuple(n for p in parts for n in p.names), torch.cat([p.packed for p in parts]), None, wall)


def pack(logs: Mapping[str, Mean], device: torch.device | None = None) -> Tensor:
    """Logs as one (len(logs), 2) float64 tensor of totals and weights, detached; on `device` where there are none."""
    if isinstance(logs, Logs):
        return logs.packed
    if not logs:
        return torch.zeros(0, 2, dtype=torch.float64, device=device)
    flat = [t.detach() for m in logs.values() for t in (m.total, m.weight)]
    if any(t.dim() for t in flat):
        strange = {n: m for n, m in logs.items() if m.total.dim() or m.weight.dim()}
        shapes = [f"{n!r} has {tuple(m.total.shape)} and {tuple(m.weight.shape)}" for n, m in strange.items()]
        raise ConfigError(f"the total and the weight of a Mean are numbers, of shape (): {', '.join(shapes)}. Sum them first.")
    if len({t.dtype for t in flat}) > 1:
        flat = [t.to(torch.float64) for t in flat]
    return torch.stack(flat).to(torch.float64).view(-1, 2)


def seal(logs: Mapping[str, Any], device: torch.device | None = None) -> Logs:
    """What a step on `device` reported as one packed tensor, and the model outputs with it; sealed logs as they are."""
    if isinstance(logs, Logs):
        return logs
    means = {n: m for n, m in logs.items() if isinstance(m, Mean)}
    return Logs(
        tuple(means), pack(means, device), {n.removeprefix(OUTPUT): v for n, v in logs.items() if not isinstance(v, Mean)}
    )


Loss: TypeAlias = Callable[[Params, Buffers, Batch], tuple[Tensor, Aux]]  # the total, to be divided by aux.weight
Grad: TypeAlias = Callable[[TrainState, Batch], tuple[Params, Aux]]  # the gradient of total / weight
Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Mapping[str, Any]]]  # Means, and outputs under "@"
Batches: TypeAlias = Any  # Iterable[Batch], or {phase: Iterable[Batch]} for a whole workflow
Epoch: TypeAlias = Callable[[TrainState, Batches], tuple[TrainState, Logs]]
Run: TypeAlias = Callable[[TrainState], TrainState]


@dataclass(frozen=True)
class HostMemory:
    """What a host hook gathers over an epoch outside of the state: a checkpoint in mid-epoch holds it beside the state."""

    save: Callable[[], PyTree]  # tensors and plain values; None where there is nothing, or nothing that could be read again
    restore: Callable[[PyTree], None]  # what `save` gave, before the first epoch of a resumed run


@dataclass(frozen=True)
class RunInfo:
    """The facts of a run, fixed before the first step; a hook builder with a parameter `run` is given them."""

    cfg: Mapping[str, Any]
    work_dir: Path
    device: torch.device
    seed: int
    rank: int
    world_size: int
    total_epochs: int
    phase_steps: Mapping[str, int]  # steps of one epoch, by phase, in the order of the workflow
    log_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what each step of a phase reports
    result_names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what a phase of an epoch reports
    directions: dict[str, Direction] = field(
        default_factory=dict
    )  # which is better, by result as "val_top1", where that is known
    memories: dict[str, HostMemory] = field(default_factory=dict)  # of host hooks, by name
    notes: list[str] = field(default_factory=list)  # lines that the log file is still to get
    phase_samples: Mapping[str, int] = field(default_factory=dict)  # of one epoch, over all ranks
    flops: dict[str, float] = field(default_factory=dict)  # of one sample in a step of a phase, where a hook asks (core)
    base_lrs: tuple[float, ...] = ()  # per parameter group, before any schedule
    say: Callable[[str], None] = print  # one line to the console, on rank 0
    # (file, write): give every line of the console to `write`, which appends it to the file; False where there is no console.
    log_to: Callable[[Path, Callable[[str], None]], bool] = lambda file, write: False
    # What a resumed run has to have alike, by section; on rank 0. One dict for the whole run.
    fingerprint: Callable[[], dict[str, Any]] = dict
    # What the model is, as the bytes of model.json in each checkpoint; on rank 0. None: none is written.
    model_json: Callable[[], bytes | None] = lambda: None
    # What the hooks remember at a state at which none of them was there before, by slot; and where each is in the cfg.
    fresh_slots: Callable[[TrainState], dict[str, PyTree]] = lambda state: {}
    slots: dict[str, tuple[str, str]] = field(default_factory=dict)  # slot: (path in the cfg, role of the hook)
    late: tuple[str, ...] = ()  # entries of opt_state that only the first update makes
    # By the names of the user's module: the model as evaluation sees it.
    model_state: Callable[[TrainState], dict[str, Tensor]] = lambda state: state.params
    # As the torch.optim class would give it.
    optimizer_state: Callable[[TrainState], dict[str, Any]] = lambda state: state.opt_state

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of one epoch; 0 without a train phase."""
        return self.phase_steps.get("train", 0)

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.steps_per_epoch * self.total_epochs

    @property
    def results(self) -> tuple[str, ...]:
        """The results of an epoch, as "val_top1"."""
        return tuple(f"{phase}_{n}" for phase, names in self.result_names.items() for n in names)
