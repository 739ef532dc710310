"""Scalars for observers: the running means of the epoch every n steps, read without stalling the device."""

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
    """What an observer gets: running means at a training step, or the results of a phase when it has ended."""

    step: int  # optimizer updates so far
    epoch: int  # counted from 1
    phase: str
    final: bool  # the result of the epoch, not a running mean
    means: Mapping[str, float]  # means over the epoch so far, by log name
    samples: float  # so far in this epoch: the total weight of the loss
    lrs: tuple[float, ...]  # per parameter group, of the last step
    wall: Mapping[str, float] = field(default_factory=dict)  # wall-clock measurements of the hooks listed before


Emit = Callable[[Report], None]
MAX_FAILURES = 3  # failures after which an observer is switched off


class Failures:
    """The number of failures of one observer, over all of its parts."""

    def __init__(self) -> None:
        self.n = 0


def guarded(emit: Callable[[T], None], name: str, run: RunInfo, failures: Failures | None = None) -> Callable[[T], None]:
    """`emit`, but a failure is a warning, and after three failures it is switched off. ailab's own errors are raised."""
    count = failures or Failures()

    def safe(value: T) -> None:
        if count.n >= MAX_FAILURES:
            return
        try:
            emit(value)
        except AilabError:
            raise
        except Exception as e:  # a writer, a network or a full disk can raise anything
            count.n += 1
            off = "; it is switched off now" if count.n == MAX_FAILURES else ""
            run.say(f"warning: hook {name!r} failed: {type(e).__name__}: {e}{off}")

    return safe


def observe(
    name: str,
    emit: Emit,
    run: RunInfo,
    *,
    every: int,
    begin: Callable[[TrainState], None] | None = None,
    failures: Failures | None = None,
) -> list[Middleware[Any]]:
    """The two middlewares of an observer: running means every `every` steps, and the results of each phase.

    On rank 0 only. On a CPU a report comes at its step. On a GPU it comes at a later step, when its copy to the host is done.

    Args:
        name: name of the hook.
        emit: called with each report.
        run: the run.
        every: optimizer steps between two reports of running means, at least 1.
        begin: called once, before the first epoch of this process, with the state it starts from (fresh or resumed).
        failures: shared with the other parts of the observer.

    Raises:
        ConfigError: when `every` is below 1.
    """
    if every < 1:
        raise ConfigError(f"cfg.hooks.{name}: the interval is {every}; it counts steps and must be at least 1.")
    if run.rank != 0:
        return []
    phases = [p["phase"] for p in run.cfg["workflow"] if p.get(name, {}).get("enable", True)]
    failures = failures or Failures()
    emit, begin = guarded(emit, name, run, failures), guarded(begin, name, run, failures) if begin else None
    pending = _PendingReports(emit, run)

    def wrap(step: Step) -> Step:
        def observed(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0:
                pending.fetch(state, logs)
            pending.emit_ready()
            return state, logs

        return observed

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def reported(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            nonlocal begin
            if begin is not None:
                begin(state)
                begin = None
            pending.epoch = epochs_done(state) + 1
            state, logs = epoch(state, batches)
            pending.emit_ready(wait=True)
            for report in _phase_reports(state, logs, run):
                if report.phase in phases:
                    emit(report)
            return state, logs

        return reported

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_epoch, "epoch", role="observer")]


class _PendingReports:
    """Running means that are being copied from the device to the host."""

    def __init__(self, emit: Emit, run: RunInfo):
        self.emit, self.run = emit, run
        self.epoch = 1  # the running one
        self.queue: deque[tuple[int, Mapping[str, float], Tensor, torch.cuda.Event | None]] = deque()

    def fetch(self, state: TrainState, logs: Mapping[str, Mean]) -> None:
        """Start the copy of the running means of this state."""
        self.queue.append((state.at, logs.wall if isinstance(logs, Logs) else {}, *_fetch(state)))

    def emit_ready(self, *, wait: bool = False) -> None:
        """Emit the reports whose copy is done, in order; with `wait` all of them."""
        while self.queue and (wait or self.queue[0][3] is None or self.queue[0][3].query()):
            step, wall, values, event = self.queue.popleft()
            if event is not None:
                event.synchronize()
            self.emit(_running_report(step, self.epoch, values, self.run, wall))


def _fetch(state: TrainState) -> tuple[Tensor, torch.cuda.Event | None]:
    """Totals and learning rates as one host tensor, and the CUDA event after which it can be read."""
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
    """A report of the running means of the training phase at this state. It waits for the device."""
    values, event = _fetch(state)
    if event is not None:
        event.synchronize()
    return _running_report(state.at, epochs_done(state) + 1, values, run, {})


def _running_report(step: int, epoch: int, values: Tensor, run: RunInfo, wall: Mapping[str, float]) -> Report:
    names = run.log_names["train"]
    rows = values.tolist()
    means = {n: (total / weight if weight else 0.0) for n, (total, weight) in zip(names, rows, strict=False)}
    return Report(step, epoch, "train", False, means, rows[0][1], tuple(r[0] for r in rows[len(names) :]), wall)


def _phase_reports(state: TrainState, logs: Logs, run: RunInfo) -> list[Report]:
    """One final report per phase, from the logs of a workflow epoch."""
    epoch, rates = epochs_done(state), tuple(float(r) for r in lrs(state.opt_state)) if run.base_lrs else ()
    rows = dict(zip(logs.names, logs.packed.tolist(), strict=True))
    out: list[Report] = []
    for phase in run.phase_steps:
        mine = {n[len(phase) + 1 :]: v for n, v in rows.items() if n.startswith(f"{phase}_")}
        means = {n: (total / weight if weight else 0.0) for n, (total, weight) in mine.items()}
        wall = {n[len(phase) + 1 :]: v for n, v in logs.wall.items() if n.startswith(f"{phase}_")}
        out.append(Report(state.at, epoch, phase, True, means, mine["loss"][1] if "loss" in mine else 0.0, rates, wall))
    return out
