"""SpikeHook: a loss that leaves the range of its recent past is logged, left out, or ends the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.errors import ConfigError, SpikeError
from ailab.hooks.step.rollback import ended_by, rolled_back
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
    """Compare the loss of each step with the last `window` ones: a spike lies `threshold` deviations above their mean.

    The deviation is the standard one, and at least 1 % of the mean. Nothing is a spike before the window is full. A spike enters
    the window as the bound it broke, so a lasting change is followed and a single one widens nothing; a loss that is not finite
    does not enter and is no spike (see SkipNonFiniteHook). The fraction of spikes is the log "spike".

    Args:
        policy: "log" does nothing else. "skip" undoes the step, as SkipNonFiniteHook does. "raise" undoes it and ends the run.
        threshold: in deviations; inf is never.
        window: losses to compare with.
        every: steps between two looks from the host, for "raise".
        name: of the slot.

    Raises:
        ConfigError: for a threshold that is not positive, a window below 2, `every` below 1.
        SpikeError: under "raise", at the first look after a spike; names its step.
    """
    path = f"cfg.hooks.{name}"
    if policy not in ("log", "skip", "raise"):
        raise ConfigError(f"{path}.policy is {policy!r}; it is 'log', 'skip' or 'raise'.")
    if not threshold > 0 or window < 2 or every < 1:
        raise ConfigError(
            f"{path}: threshold={threshold} is to be positive, window={window} at least 2, every={every} at least 1."
        )

    def init(state: TrainState) -> dict[str, Tensor]:
        device = state.step.device
        count = torch.zeros((), dtype=torch.int64, device=device)
        return {"losses": torch.zeros(window, device=device), "seen": count, "first": count.clone()}

    def wrap(step: Step) -> Step:
        def compared(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            spike, memory = _judged(state.slots[name], logs["loss"].value.float(), threshold)
            memory["first"] = torch.where(spike & (memory["first"] == 0), after.step, memory["first"])
            if policy != "log":
                after, logs = rolled_back(spike, state, after, logs)
            seen = spike.float()
            return after.with_slot(name, memory), {**logs, "spike": Mean(seen, torch.ones_like(seen))}

        return compared

    def look(state: TrainState) -> None:
        if first := int(state.slots[name]["first"]):
            raise SpikeError(
                f"the loss of step {first} lay {threshold:g} deviations or more above that of the {window} steps before.\n"
                f"  The step was undone. hooks.{name}.policy='skip' goes on without such steps."
            )

    hooks: list[Middleware[Any]] = [Middleware(name, wrap, "step", init, looks_back=policy != "log")]
    return [*hooks, *ended_by(look, every, name)] if policy == "raise" else hooks


def _judged(memory: Mapping[str, Tensor], loss: Tensor, threshold: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether a loss, (), is a spike, and the memory with it."""
    losses, seen = memory["losses"], memory["seen"]
    window = losses.shape[0]
    mean = losses.mean()
    deviation = torch.maximum(losses.std(), 0.01 * mean.abs()).clamp(min=1e-12)
    bound = mean + threshold * deviation
    finite = torch.isfinite(loss)
    spike = finite & (seen >= window) & (loss > bound)
    here = (torch.arange(window, device=loss.device) == seen % window) & finite
    losses = torch.where(here, torch.where(spike, bound, loss), losses)
    return spike, {**memory, "losses": losses, "seen": seen + finite}
