"""Numbers for observers: read the epoch's running means every n steps without stalling the device, and hand them on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ailab.core.epoch import TOTALS, epochs_done
from ailab.errors import AilabError, ConfigError
from ailab.optim import lrs
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What an observer is told: at a step within an epoch, or when a phase of an epoch has ended."""

    step: int  # optimizer updates so far
    epoch: int  # counted from 1
    phase: str
    final: bool  # the epoch's result, not a running mean
    means: Mapping[str, float]  # means over the epoch so far, by log name
    samples: float  # counted so far in this epoch: the weight of the loss
    lrs: tuple[float, ...]  # per parameter group, as last used
    wall: Mapping[str, float] = field(default_factory=dict)  # what hooks listed before measured with a clock


Emit = Callable[[Report], None]
STRIKES = 3  # failures after which an observer is off


class Strikes:
    """The failures of one observer, in whatever part of it."""

    def __init__(self) -> None:
        self.count = 0


def guarded(emit: Callable[[T], None], name: str, run: RunInfo, strikes: Strikes | None = None) -> Callable[[T], None]:
    """`emit`, switched off after three failures: an observer never ends a run. Errors of ailab's own pass."""
    mine = strikes or Strikes()

    def safe(told: T) -> None:
        if mine.count >= STRIKES:
            return
        try:
            emit(told)
        except AilabError:
            raise
        except Exception as e:  # whatever a writer, a network or a full disk may raise
            mine.count += 1
            off = "; it is switched off now" if mine.count == STRIKES else ""
            run.say(f"warning: hook {name!r} failed: {type(e).__name__}: {e}{off}")

    return safe


def observe(
    name: str,
    emit: Emit,
    run: RunInfo,
    *,
    every: int,
    begin: Callable[[TrainState], None] | None = None,
    strikes: Strikes | None = None,
) -> list[Middleware[Any]]:
    """The two middlewares of an observer: running means every `every` steps, and the results of each phase.

    On rank 0 only. A value is handed on once it has arrived on the host: at once on a CPU, at a later step on a GPU. `begin`
    is called before the first epoch of this process, with the state it starts from: resumed or fresh.
    """
    if every < 1:
        raise ConfigError(f"cfg.hooks.{name}: the interval is {every}; it counts steps, so it is at least 1.")
    if run.rank != 0:
        return []
    phases = [p["phase"] for p in run.cfg["workflow"] if p.get(name, {}).get("enable", True)]
    strikes = strikes or Strikes()
    emit, begin = guarded(emit, name, run, strikes), guarded(begin, name, run, strikes) if begin else None
    arriving = _Arriving(emit, run)

    def wrap(step: Step) -> Step:
        def observed(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0:
                arriving.expect(state, logs)
            arriving.emit_those_here()
            return state, logs

        return observed

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def reported(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            nonlocal begin
            if begin is not None:
                begin(state)
                begin = None
            state, logs = epoch(state, batches)
            arriving.emit_those_here(wait=True)
            for report in results(state, logs, run):
                if report.phase in phases:
                    emit(report)
            return state, logs

        return reported

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_epoch, "epoch")]


class _Arriving:
    """Running means on their way from the device to the host, and who is told of them."""

    def __init__(self, emit: Emit, run: RunInfo):
        self.emit, self.run = emit, run
        self.waiting: deque[tuple[int, Mapping[str, float], Tensor, torch.cuda.Event | None]] = deque()

    def expect(self, state: TrainState, logs: Mapping[str, Mean]) -> None:
        """Begin to fetch those of this state."""
        self.waiting.append((state.at, logs.wall if isinstance(logs, Logs) else {}, *_fetch(state)))

    def emit_those_here(self, *, wait: bool = False) -> None:
        """Tell of all that have arrived, in order; of all, if told to wait."""
        while self.waiting and (wait or self.waiting[0][3] is None or self.waiting[0][3].query()):
            step, wall, values, event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            self.emit(_running(step, values, self.run, wall))


def _fetch(state: TrainState) -> tuple[Tensor, torch.cuda.Event | None]:
    """Totals and learning rates as one host tensor, and the event after which it may be read."""
    rates = [r.to(torch.float64).reshape(1, 1).expand(1, 2) for r in lrs(state.opt_state)]
    values = torch.cat([state.slots[TOTALS], *rates])
    if values.device.type != "cuda":
        return values, None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def running(state: TrainState, run: RunInfo) -> Report:
    """The running means of the training phase at this state; waits for the device."""
    values, event = _fetch(state)
    if event is not None:
        event.synchronize()
    return _running(state.at, values, run, {})


def _running(step: int, values: Tensor, run: RunInfo, wall: Mapping[str, float]) -> Report:
    names = run.log_names["train"]
    rows = values.tolist()
    means = {n: (total / weight if weight else 0.0) for n, (total, weight) in zip(names, rows, strict=False)}
    epoch = (step - 1) // run.steps_per_epoch + 1
    return Report(step, epoch, "train", False, means, rows[0][1], tuple(r[0] for r in rows[len(names) :]), wall)


def results(state: TrainState, logs: Logs, run: RunInfo) -> list[Report]:
    """One final report per phase out of a workflow epoch's logs."""
    epoch, rates = epochs_done(state), tuple(float(r) for r in lrs(state.opt_state)) if run.base_lrs else ()
    rows = dict(zip(logs.names, logs.packed.tolist(), strict=True))
    out: list[Report] = []
    for phase in run.phase_steps:
        mine = {n[len(phase) + 1 :]: v for n, v in rows.items() if n.startswith(f"{phase}_")}
        means = {n: (total / weight if weight else 0.0) for n, (total, weight) in mine.items()}
        wall = {n[len(phase) + 1 :]: v for n, v in logs.wall.items() if n.startswith(f"{phase}_")}
        out.append(Report(state.at, epoch, phase, True, means, mine["loss"][1] if "loss" in mine else 0.0, rates, wall))
    return out
