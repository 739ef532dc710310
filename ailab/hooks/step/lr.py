"""LrSchedulerHook: the learning rate as a function of `state.step`, computed on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.core.epoch import epochs_done
from ailab.errors import ConfigError
from ailab.optim import lrs, with_lrs
from ailab.optim.plateau import plateau
from ailab.optim.schedule import lr_at, lr_table
from ailab.registry import HOOKS, LR_SCHEDULERS
from ailab.signature import check_arguments, parameters
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

SLOT = "lr_scheduler"


@HOOKS.register_module()
def LrSchedulerHook(
    scheduler: Mapping[str, Any], by: Literal["epoch", "step"] = "epoch", metric: str = "val_loss", *, run: RunInfo
) -> Middleware[Any] | list[Middleware[Any]]:
    """Schedule the learning rate with a `torch.optim.lr_scheduler` class or `WarmupAndCosineAnnealingLR`.

    ChainedScheduler and SequentialLR work too. The schedule is computed once with torch's own class and stored as a table. The
    learning rate of a step is read from the table. So it is the same on every rank, after a resume and with gradient
    accumulation.

    Args:
        scheduler: `dict(type=..., **arguments)`. `total_steps` is filled in for a class that takes it.
        by: whether the scheduler counts epochs or optimizer steps.
        metric: the result that `ReduceLROnPlateau` monitors, such as "val_top1". It is read at the end of each epoch.

    Raises:
        ConfigError: for arguments that the scheduler does not accept, or a `metric` that no epoch of this run reports.
    """
    path = "cfg.hooks.lr_scheduler.scheduler"
    if by not in ("epoch", "step"):
        raise ConfigError(f"cfg.hooks.lr_scheduler.by is {by!r}; it must be 'epoch' or 'step'.")
    if not run.steps_per_epoch:
        return []  # nothing is trained
    if scheduler.get("type") == "ReduceLROnPlateau":
        return _plateau(scheduler, metric, run, path)
    every = run.steps_per_epoch if by == "epoch" else 1
    table = lr_table(scheduler, run.base_lrs, run.total_steps // max(every, 1), path=path).to(run.device)

    def init(state: TrainState) -> dict[str, Tensor]:
        return {"origin": torch.zeros_like(state.step), "scale": torch.ones_like(table[0, :1])}

    def wrap(step: Step) -> Step:
        def scheduled(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            memory = state.slots[SLOT]
            position = torch.div(state.step - memory["origin"], every, rounding_mode="floor")
            rates = [rate * memory["scale"][0] for rate in lr_at(table, position)]
            return step(state.replace(opt_state=with_lrs(state.opt_state, rates)), batch)

        return scheduled

    return Middleware(SLOT, wrap, "step", init, looks_back=False)


def restart_lr(state: TrainState, base_lrs: tuple[float, ...], lr: float | None) -> TrainState:
    """The state with its schedule restarted, from the base learning rates of the cfg, or from `lr` for the first group."""
    scale = 1.0 if lr is None else lr / base_lrs[0]
    rates = [torch.full_like(old, base * scale) for old, base in zip(lrs(state.opt_state), base_lrs, strict=True)]
    state = state.replace(opt_state=with_lrs(state.opt_state, rates))
    if SLOT not in state.slots or "origin" not in state.slots[SLOT]:
        return state
    memory = {"origin": state.step.clone(), "scale": torch.full_like(state.slots[SLOT]["scale"], scale)}
    return state.with_slot(SLOT, memory)


def _plateau(scheduler: Mapping[str, Any], metric: str, run: RunInfo, path: str) -> Middleware[Epoch]:
    """ReduceLROnPlateau: reduce the learning rates when a result stops improving. Updated at the end of each epoch."""
    rule = plateau(scheduler, run.base_lrs, path=path)

    def wrap(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            if metric not in logs:
                raise ConfigError(f"{path}: epoch {epochs_done(state)} has no result {metric!r}; it has {', '.join(logs)}.")
            rates = [float(r) for r in lrs(state.opt_state)]
            memory, new = rule.update(state.slots[SLOT], float(logs[metric].value), rates)
            rates_ = [torch.full_like(old, r) for old, r in zip(lrs(state.opt_state), new, strict=True)]
            return state.replace(opt_state=with_lrs(state.opt_state, rates_)).with_slot(SLOT, memory), logs

        return watched

    return Middleware(SLOT, wrap, "epoch", lambda state: rule.init(), reads={"cfg.hooks.lr_scheduler.metric": metric})


def _check(entry: Mapping[str, Any], path: str) -> list[str]:
    problems = check_arguments(parameters(LrSchedulerHook).without(("run",)), entry, path, "LrSchedulerHook", "LrSchedulerHook")
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
