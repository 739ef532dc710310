"""LrSchedulerHook: the learning rate as a function of `state.step`, computed on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.core.epoch import PROGRESS, epochs_done
from ailab.errors import ConfigError
from ailab.metrics.direction import known
from ailab.optim import lrs, with_lrs
from ailab.optim.plateau import plateau
from ailab.optim.schedule import follows_length, lr_at, lr_table
from ailab.registry import HOOKS, LR_SCHEDULERS
from ailab.signature import check_arguments, parameters
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

SLOT = "lr_scheduler"


@HOOKS.register_module()
def LrSchedulerHook(
    scheduler: Mapping[str, Any],
    by: Literal["epoch", "step"] = "epoch",
    metric: str = "val_loss",
    *,
    run: RunInfo,
    name: str = SLOT,
) -> Middleware[Any] | list[Middleware[Any]]:
    """Schedule the learning rate with a `torch.optim.lr_scheduler` class or `WarmupAndCosineAnnealingLR`.

    ChainedScheduler and SequentialLR work too. The schedule is computed once with torch's own class and stored as a table. The
    learning rate of a step is read from the table. So it is the same on every rank, after a resume and with gradient
    accumulation.

    A schedule by epoch follows the number of the epoch, and one by step counts steps. If a run continues with another number of
    steps per epoch, a schedule that takes its length from the run keeps its relative position: after half of the epochs it is at
    half of its length.

    Args:
        scheduler: `dict(type=..., **arguments)`. `total_steps` is filled in for a class that takes it.
        by: whether the scheduler counts epochs or optimizer steps.
        metric: the result that `ReduceLROnPlateau` monitors, such as "val_top1". It is read at the end of each epoch.

    Raises:
        ConfigError: for arguments that the scheduler does not accept, or a `metric` that no epoch of this run reports.
    """
    path = f"cfg.hooks.{name}.scheduler"
    if by not in ("epoch", "step"):
        raise ConfigError(f"cfg.hooks.{name}.by is {by!r}; it must be 'epoch' or 'step'.")
    if not run.steps_per_epoch:
        return []  # nothing is trained
    if scheduler.get("type") == "ReduceLROnPlateau":
        return _plateau(scheduler, metric, run, path, f"cfg.hooks.{name}.metric")
    schedule = _Schedule(scheduler, run, path, run.total_epochs if by == "epoch" else run.total_steps)

    def init(state: TrainState) -> dict[str, Tensor]:
        memory = {"origin": torch.zeros_like(state.step), "scale": torch.ones_like(schedule.table[0, :1])}
        # Of a schedule by step: the steps per epoch for which it is as long as the run; 0 where it has a length of its own.
        steps = torch.full_like(state.step, run.steps_per_epoch if follows_length(scheduler) else 0)
        return memory if by == "epoch" else {**memory, "steps": steps}

    def wrap(step: Step) -> Step:
        def scheduled(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            memory = state.slots[SLOT]
            now = state.slots[PROGRESS]["epoch"] if by == "epoch" else state.step
            rates = [rate * memory["scale"][0] for rate in lr_at(schedule.table, now - memory["origin"])]
            return step(state.replace(opt_state=with_lrs(state.opt_state, rates)), batch)

        return scheduled

    follow = Middleware(SLOT, wrap, "step", init, looks_back=False)
    return follow if by == "epoch" else [follow, Middleware(SLOT, schedule.placed, "epoch", role="result")]


class _Schedule:
    """The rates of a run by position, and what a schedule by step does where the number of steps per epoch has changed."""

    def __init__(self, scheduler: Mapping[str, Any], run: RunInfo, path: str, length: int):
        self.scheduler, self.run, self.path = scheduler, run, path
        self.table = self._of(length)

    def _of(self, length: int) -> Tensor:
        return lr_table(self.scheduler, self.run.base_lrs, length, path=self.path).to(self.run.device)

    def placed(self, epoch: Epoch) -> Epoch:
        """Look at the position before the first step: of a schedule as long as the run it is a share of it."""
        begun = False

        def found(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            nonlocal begun
            if not begun:
                begun, state = True, self._moved(state)
            return epoch(state, batches)

        return found

    def _moved(self, state: TrainState) -> TrainState:
        memory, steps = state.slots[SLOT], self.run.steps_per_epoch
        done = state.at - int(memory["origin"])
        if not (before := int(memory["steps"])):
            last = done + (self.run.total_epochs - epochs_done(state)) * steps
            if last >= len(self.table):
                self.table = self._of(last)
            return state
        if before == steps:
            return state
        moved = {"origin": state.step - done * steps // before, "steps": torch.full_like(memory["steps"], steps)}
        return state.with_slot(SLOT, {**memory, **moved})


def restart_lr(state: TrainState, base_lrs: tuple[float, ...], lr: float | None) -> TrainState:
    """The state with its schedule restarted, from the base learning rates of the cfg, or from `lr` for the first group."""
    scale = 1.0 if lr is None else lr / base_lrs[0]
    rates = [torch.full_like(old, base * scale) for old, base in zip(lrs(state.opt_state), base_lrs, strict=True)]
    state = state.replace(opt_state=with_lrs(state.opt_state, rates))
    memory = state.slots.get(SLOT, {})
    if "origin" not in memory:
        return state
    now = state.step if "steps" in memory else state.slots[PROGRESS]["epoch"]
    begun = {"origin": now.clone(), "scale": torch.full_like(memory["scale"], scale)}
    return state.with_slot(SLOT, {**memory, **begun})


def _plateau(scheduler: Mapping[str, Any], metric: str, run: RunInfo, path: str, asked: str) -> Middleware[Epoch]:
    """ReduceLROnPlateau: reduce the learning rates when a result stops improving. Updated at the end of each epoch."""
    mode, ranked = scheduler.get("mode"), f"{path}.mode"
    rules = {m: plateau({**scheduler, "mode": m}, run.base_lrs, path=path) for m in ((mode,) if mode else ("min", "max"))}

    def wrap(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            if metric not in logs:
                raise ConfigError(f"{asked}: epoch {epochs_done(state)} has no result {metric!r}; it has {', '.join(logs)}.")
            rates = [float(r) for r in lrs(state.opt_state)]
            rule = rules[known(mode, metric, run.directions, ranked)]
            before = state.slots[SLOT]
            before = {**before, "best": rule.init()["best"]} if bool(before["best"].isnan()) else before
            memory, new = rule.update(before, float(logs[metric].value), rates)
            rates_ = [torch.full_like(old, r) for old, r in zip(lrs(state.opt_state), new, strict=True)]
            memory = {k: v.to(state.step.device) for k, v in memory.items()}
            return state.replace(opt_state=with_lrs(state.opt_state, rates_)).with_slot(SLOT, memory), logs

        return watched

    def init(state: TrainState) -> dict[str, Tensor]:  # before it is known which results are better
        memory = {k: v.to(state.step.device) for k, v in next(iter(rules.values())).init().items()}
        return {**memory, "best": torch.full_like(memory["best"], float("nan"))}

    reads, ranks = {asked: metric}, {} if mode else {ranked: metric}
    return Middleware(SLOT, wrap, "epoch", init, role="result", reads=reads, ranks=ranks)


def _check(entry: Mapping[str, Any], path: str) -> list[str]:
    problems = check_arguments(
        parameters(LrSchedulerHook).without(("run", "name")), entry, path, "LrSchedulerHook", "LrSchedulerHook"
    )
    scheduler = entry.get("scheduler")
    if not isinstance(scheduler, Mapping):
        return problems
    return problems + LR_SCHEDULERS.check(_with_total_steps(scheduler), f"{path}.scheduler")


def _with_total_steps(scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry with the `total_steps` that the run fills in."""
    try:
        takes = parameters(LR_SCHEDULERS.get(scheduler.get("type"))).types
    except ConfigError:  # LR_SCHEDULERS.check reports it
        return scheduler
    return {"total_steps": 1, **scheduler} if "total_steps" in takes else scheduler


LrSchedulerHook.check = _check  # type: ignore[attr-defined]
