"""Skip a step inside the graph, and check the state on the host. Shared by SkipNonFiniteHook, SpikeHook and AMPHook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, Step, TrainState


def rolled_back(
    bad: Tensor, before: TrainState, after: TrainState, logs: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Where `bad`: the state before the step, with `step` counted, and logs of weight 0. Otherwise `after` and `logs`.

    Args:
        bad: whether to skip the step, () bool.
        before: the state before the step.
        after: the state after the step.
        logs: logs of the step. Entries that are not a `Mean` (model outputs) are not changed.
    """
    kept = tree.where(bad, before, after).replace(step=after.step)
    return kept, {n: _counted(m, ~bad) if isinstance(m, Mean) else m for n, m in logs.items()}


def _counted(mean: Mean, good: Tensor) -> Mean:
    """The mean where the step is `good`, else a mean of weight 0."""
    return Mean(torch.where(good, mean.total, torch.zeros_like(mean.total)), mean.weight * good)


def checked_on_host(check: Callable[[TrainState], None], every: int, name: str) -> list[Middleware[Any]]:
    """Middlewares that call `check(state)` after every `every`-th training step and at the end of each training epoch.

    Args:
        check: reads the device, and may raise to end the run.
        every: optimizer steps, at least 1.
        name: name of the hook.

    Raises:
        ConfigError: when `every` is below 1.
    """
    if every < 1:
        raise ConfigError(f"cfg.hooks.{name}.every is {every}; it counts steps and must be at least 1.")

    def wrap(step: Step) -> Step:
        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0:
                check(state)
            return state, logs

        return watched

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            check(state)
            return state, logs

        return watched

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_epoch, "epoch", phases=("train",))]
