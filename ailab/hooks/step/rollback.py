"""A step undone inside the graph, and a run ended from the host once it shows: what SkipNonFiniteHook and SpikeHook share."""

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
    """The state before the step, with its count gone on, and logs that count nothing, where `bad` holds; else what came out.

    Args:
        bad: () bool.
        before: the state that went into the step.
        after: the state that came out.
        logs: of the step; what are no means (model outputs that travel along) stay as they are.
    """
    kept = tree.where(bad, before, after).replace(step=after.step)
    return kept, {n: _counted(m, ~bad) if isinstance(m, Mean) else m for n, m in logs.items()}


def _counted(mean: Mean, good: Tensor) -> Mean:
    """The mean of a step that was taken, and nothing of one that was not."""
    return Mean(torch.where(good, mean.total, torch.zeros_like(mean.total)), mean.weight * good)


def ended_by(look: Callable[[TrainState], None], every: int, name: str) -> list[Middleware[Any]]:
    """`look(state)` after every `every`-th training step and at the end of each training epoch; it reads the device and may raise.

    Raises:
        ConfigError: when `every` is below 1.
    """
    if every < 1:
        raise ConfigError(f"cfg.hooks.{name}.every is {every}; it counts steps, so it is at least 1.")

    def wrap(step: Step) -> Step:
        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0:
                look(state)
            return state, logs

        return watched

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            look(state)
            return state, logs

        return watched

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_epoch, "epoch", phases=("train",))]
