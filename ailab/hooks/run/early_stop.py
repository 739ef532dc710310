"""EarlyStopHook: end the run when a result stops improving."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ailab import dist
from ailab.core.epoch import ask_to_stop, epochs_done
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Epoch, Logs, PyTree, RunInfo, TrainState


@HOOKS.register_module()
def EarlyStopHook(
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    patience: int = 10,
    min_delta: float = 0.0,
    *,
    run: RunInfo,
    name: str = "early_stop",
) -> list[Middleware[Epoch]]:
    """End the run after `patience` epochs in a row in which `metric` did not improve by more than `min_delta`.

    The best value and the count are in the state. So a resumed run stops at the same epoch as a run that was not interrupted. The
    CheckpointHook saves the last epoch. NaN is not an improvement.

    Args:
        metric: the result to monitor, such as "val_loss".
        mode: "min" if lower is better, "max" if higher is better.
        patience: workflow epochs without an improvement, at least 1.
        min_delta: smallest change that counts as an improvement, in the units of the metric, at least 0.

    Raises:
        ConfigError: for a setting out of range, or a metric that no epoch of this run reports.
    """
    if patience < 1 or not min_delta >= 0 or mode not in ("min", "max"):
        raise ConfigError(
            f"cfg.hooks.{name}: patience={patience}, min_delta={min_delta}, mode={mode!r}.\n"
            "  patience must be at least 1, min_delta at least 0, and mode 'min' or 'max'."
        )
    if not run.steps_per_epoch:
        return []  # nothing is trained
    sign = 1.0 if mode == "max" else -1.0

    def init(state: TrainState) -> PyTree:
        worst = torch.full((), -sign * float("inf"), dtype=torch.float64, device=state.step.device)
        return {"best": worst, "bad": torch.zeros_like(state.step)}

    def wrap(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            if metric not in logs:
                raise ConfigError(
                    f"cfg.hooks.{name}.metric: epoch {epochs_done(state)} has no {metric!r}; it has {', '.join(logs)}."
                )
            memory = state.slots[name]
            value, best, bad = float(logs[metric].value), float(memory["best"]), int(memory["bad"])
            better = sign * (value - best) > min_delta
            best, bad = (value, 0) if better else (best, bad + 1)
            after = {"best": torch.full_like(memory["best"], best), "bad": torch.full_like(memory["bad"], bad)}
            state = state.with_slot(name, after)
            if dist.any_rank(bad >= patience, run.device):  # all ranks must stop at the same epoch, or the run would hang
                run.say(f"stopped after epoch {epochs_done(state)}: {metric} was not better than {best:.6g} for {bad} epochs")
                state = ask_to_stop(state)
            return state, logs

        return watched

    return [Middleware(name, wrap, "epoch", init, reads={f"cfg.hooks.{name}.metric": metric})]
