"""SWAHook: stochastic weight averaging, the equal-weight average of the parameters over the last part of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ailab import tree
from ailab.core.epoch import PROGRESS
from ailab.errors import ConfigError
from ailab.hooks.step.eval_state import average_of, evaluated, holding, tensors_of
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, RunInfo, Step, TrainState


@HOOKS.register_module()
def SWAHook(
    start: int,
    every: int = 1,
    by: Literal["epoch", "step"] = "epoch",
    use_buffers: bool = True,
    eval: bool = True,
    *,
    run: RunInfo,
    name: str = "swa",
) -> list[Middleware[Step]]:
    """Average the parameters after `start`, `start + every`, ... epochs or steps, all with the same weight.

    The slot holds {"n": number of samples, "mean": their average, of halves in float32}. Before the first sample the parameters
    are evaluated.

    Args:
        start: completed epochs (or steps) at which the first sample is taken, at least 1.
        every: epochs (or steps) between two samples, at least 1.
        by: whether `start` and `every` count epochs or optimizer steps.
        use_buffers: average the buffers too (running statistics; counters are copied). False: evaluate with the model's buffers.
        eval: validate and test with the average, in the dtype of the parameters, and save it as `model_state` of a checkpoint.

    Raises:
        ConfigError: when `start` or `every` is below 1, or the run ends before `start`.

    Source: Izmailov et al. 2018, arXiv:1803.05407; equal to `torch.optim.swa_utils.AveragedModel`.
    """
    if start < 1 or every < 1:
        raise ConfigError(f"cfg.hooks.{name}: start={start}, every={every}; both are at least 1 {by}.")
    end = run.total_epochs if by == "epoch" else run.total_steps
    if run.steps_per_epoch and start > end:
        raise ConfigError(f"cfg.hooks.{name}.start is {start}, and the run ends after {end} {by}s: there would be no average.")

    def init(state: TrainState) -> dict[str, Any]:
        count = torch.zeros((), dtype=torch.int64, device=state.step.device)
        return {"n": count, "mean": average_of(tensors_of(state, use_buffers))}

    def wrap(step: Step) -> Step:
        def averaged(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            memory, progress = state.slots[name], state.slots[PROGRESS]
            since = (state.step if by == "step" else progress["epoch"] + 1) - start
            due = (since >= 0) & (since % every == 0)
            if by == "epoch":
                due = due & (state.step - progress["began"] == run.steps_per_epoch)  # its last step
            n = memory["n"] + due
            weight = torch.where(due, n.to(torch.float64).clamp(min=1).reciprocal(), 0.0)  # the first sample replaces
            mean = tree.lerp(memory["mean"], tensors_of(state, use_buffers), weight)
            return state.with_slot(name, {"n": n, "mean": mean}), logs

        return averaged

    def view(state: TrainState) -> TrainState:
        begun = state.slots[name]["n"] > 0
        mean: dict[str, Tensor] = state.slots[name]["mean"]
        return holding(state, tree.where(begun, mean, tensors_of(state, use_buffers)))

    hooks = [Middleware(name, wrap, "step", init, looks_back=False)]
    return [*hooks, evaluated(view, name)] if eval else hooks
