"""SpikeHook: log loss spikes, skip their steps, or end the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.errors import ConfigError, SpikeError
from ailab.hooks.step.rollback import checked_on_host, rolled_back
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Step, TrainState


@HOOKS.register_module()
def SpikeHook(
    policy: Literal["log", "skip", "raise"] = "log",
    threshold: float = 6.0,
    window: int = 100,
    every: int = 10,
    name: str = "spike",
) -> list[Middleware[Any]]:
    """Compare the loss of each step with the last `window` losses. A loss far above their mean is a spike.

    A spike is more than `threshold` standard deviations above the mean of the window. The deviation is taken as at least 1 % of
    the mean. There are no spikes before the window is full. A spike enters the window clipped to the limit: a lasting change of
    the loss is followed, and a single spike does not widen the limit much. A loss that is not finite does not enter the window
    and is not a spike (see SkipNonFiniteHook). The log "spike" is the fraction of steps with a spike.

    Args:
        policy: "log" only logs. "skip" also skips the step, as SkipNonFiniteHook does. "raise" skips the step and ends the run.
        threshold: in standard deviations, positive. inf: no loss is a spike.
        window: number of recent losses to compare with, at least 2.
        every: optimizer steps between two checks on the host, at least 1. For "raise" only.

    Raises:
        ConfigError: for a `threshold` that is not positive, a `window` below 2, or `every` below 1.
        SpikeError: under "raise", at the first check after a spike. It names the step of the spike.
    """
    path = f"cfg.hooks.{name}"
    if policy not in ("log", "skip", "raise"):
        raise ConfigError(f"{path}.policy is {policy!r}; it must be 'log', 'skip' or 'raise'.")
    if not threshold > 0 or window < 2 or every < 1:
        raise ConfigError(
            f"{path}: threshold={threshold} must be positive, window={window} at least 2, every={every} at least 1."
        )

    def init(state: TrainState) -> dict[str, Tensor]:
        device = state.step.device
        count = torch.zeros((), dtype=torch.int64, device=device)
        return {"losses": torch.zeros(window, device=device), "seen": count, "first": count.clone()}

    def wrap(step: Step) -> Step:
        def compared(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            loss = logs["loss"]
            value = torch.where(loss.weight > 0, loss.value.float(), torch.nan)  # nothing counted: a step that was skipped
            spike, memory = _compare(state.slots[name], value, threshold)
            memory["first"] = torch.where(spike & (memory["first"] == 0), after.step, memory["first"])
            if policy != "log":
                after, logs = rolled_back(spike, state, after, logs)
            hit = spike.float()
            return after.with_slot(name, memory), {**logs, "spike": Mean(hit, torch.ones_like(hit))}

        return compared

    def check(state: TrainState) -> None:
        if first := int(state.slots[name]["first"]):
            raise SpikeError(
                f"the loss of step {first} was more than {threshold:g} standard deviations above the mean "
                f"of the {window} steps before.\n"
                f"  The step was skipped. hooks.{name}.policy='skip' skips such steps and continues."
            )

    hooks: list[Middleware[Any]] = [Middleware(name, wrap, "step", init, looks_back=policy != "log")]
    return [*hooks, *checked_on_host(check, every, name)] if policy == "raise" else hooks


def _compare(memory: Mapping[str, Tensor], loss: Tensor, threshold: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether the loss, (), is a spike, and the memory with this loss in its window."""
    losses, count = memory["losses"], memory["seen"]
    window = losses.shape[0]
    mean = losses.mean()
    deviation = torch.maximum(losses.std(), 0.01 * mean.abs()).clamp(min=1e-12)
    bound = mean + threshold * deviation
    finite = torch.isfinite(loss)
    spike = finite & (count >= window) & (loss > bound)
    here = (torch.arange(window, device=loss.device) == count % window) & finite
    losses = torch.where(here, torch.where(spike, bound, loss), losses)
    return spike, {**memory, "losses": losses, "seen": count + finite}
