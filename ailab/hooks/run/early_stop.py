"""EarlyStopHook: end the run when a result stops improving."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ailab import dist
from ailab.core.epoch import ask_to_stop, epochs_done
from ailab.errors import ConfigError
from ailab.metrics.direction import is_better, known
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Epoch, Logs, PyTree, RunInfo, TrainState


@HOOKS.register_module()
def EarlyStopHook(
    metric: str = "val_loss",
    mode: Literal["min", "max"] | None = None,
    patience: int = 10,
    min_delta: float = 0.0,
    *,
    run: RunInfo,
    name: str = "early_stop",
) -> list[Middleware[Epoch]]:
    """End the run after `patience` epochs in a row in which `metric` did not improve by more than `min_delta`.

    The best value and the count are in the state. So a resumed run stops at the same epoch as a run that was not interrupted. The
    CheckpointHook saves the last epoch. NaN is not an improvement.

    A run that was stopped stays stopped if the same cfg is started again. With more epochs, with other settings of this hook or
    without it, the run continues. If the count has reached `patience` by then, it starts again at 0.

    Args:
        metric: the result to monitor, such as "val_loss".
        mode: "min" if lower is better, "max" if higher is better. None: a loss goes down, and a metric says it itself.
        patience: workflow epochs without an improvement, at least 1.
        min_delta: smallest change that counts as an improvement, in the units of the metric, at least 0.

    Raises:
        ConfigError: for a setting out of range, a metric that no epoch of this run reports, or one of which is not known which
            is better.
    """
    if patience < 1 or not min_delta >= 0 or mode not in ("min", "max", None):
        raise ConfigError(
            f"cfg.hooks.{name}: patience={patience}, min_delta={min_delta}, mode={mode!r}.\n"
            "  patience must be at least 1, min_delta at least 0, and mode 'min' or 'max'."
        )
    if not run.steps_per_epoch:
        return []  # nothing is trained
    path = f"cfg.hooks.{name}"

    def init(state: TrainState) -> PyTree:
        none_yet = torch.full((), float("nan"), dtype=torch.float64, device=state.step.device)
        return {"best": none_yet, "bad": torch.zeros_like(state.step)}

    def wrap(epoch: Epoch) -> Epoch:
        def watched(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            went_on = int(state.slots[name]["bad"]) >= patience  # after it had been ended
            state, logs = epoch(state, batches)
            if metric not in logs:
                raise ConfigError(f"{path}.metric: epoch {epochs_done(state)} has no {metric!r}; it has {', '.join(logs)}.")
            memory = state.slots[name]
            value, best, bad = float(logs[metric].value), float(memory["best"]), 0 if went_on else int(memory["bad"])
            better = is_better(value, best, known(mode, metric, run.directions, f"{path}.mode"), min_delta)
            best, bad = (value, 0) if better else (best, bad + 1)
            after = {"best": torch.full_like(memory["best"], best), "bad": torch.full_like(memory["bad"], bad)}
            state = state.with_slot(name, after)
            if dist.any_rank(bad >= patience, run.device):  # all ranks must stop at the same epoch, or the run would hang
                run.say(f"stopped after epoch {epochs_done(state)}: {metric} was not better than {best:.6g} for {bad} epochs")
                state = ask_to_stop(state)
            return state, logs

        return watched

    ranks = {} if mode else {f"{path}.mode": metric}
    return [Middleware(name, wrap, "epoch", init, role="end", reads={f"{path}.metric": metric}, ranks=ranks)]
