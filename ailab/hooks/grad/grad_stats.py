"""GradStatsHook: log the size of gradients and of parameter updates."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError, nearest
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Grad, Mean, Params, Step, TrainState

_NONE: Mapping[str, str] = MappingProxyType({})


@HOOKS.register_module()
def GradStatsHook(patterns: Mapping[str, str] = _NONE, update: bool = True, name: str = "grad_stats") -> list[Middleware[Any]]:
    """Log the 2-norm and the largest absolute element of the gradient, and the relative size of the parameter update.

    For all parameters together the logs are "grad/norm", "grad/max" and "update/ratio". The ratio is the 2-norm of the update
    divided by the 2-norm of the parameters before it. About 1e-3 is usual. For each label of `patterns` there are the logs
    "grad/norm/<label>", "grad/max/<label>" and "update/ratio/<label>". The gradient is that of the hooks listed before this one:
    listed before `clip` it is the unclipped gradient. All logs are computed on the device and averaged over the steps of an
    epoch; a step that moves no parameter, such as one that was skipped, has no ratio.

    Args:
        patterns: {label: glob pattern of parameter names}, such as `{"encoder": "encoder.*"}`.
        update: log "update/ratio" as well.

    Raises:
        ConfigError: when a pattern matches no parameter.
    """
    groups: dict[str, list[str]] = {}  # parameter names by log suffix; filled by `init`, before tracing

    def init(state: TrainState) -> dict[str, Tensor]:
        groups[""] = list(state.params)
        for label, pattern in patterns.items():
            groups[f"/{label}"] = fnmatch.filter(state.params, pattern)
            if not groups[f"/{label}"]:
                hint = nearest(pattern, state.params)
                raise ConfigError(f"cfg.hooks.{name}.patterns.{label}: no parameter matches {pattern!r}.{hint}")
        return {}

    def wrap_grad(grad: Grad) -> Grad:
        def measured(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            logs = dict(aux.logs)
            for suffix, names in groups.items():
                matched = [grads[n] for n in names if n in grads]
                logs[f"grad/norm{suffix}"] = _norm(matched, 2.0, state.step)
                logs[f"grad/max{suffix}"] = _norm(matched, float("inf"), state.step)
            return grads, replace(aux, logs=logs)

        return measured

    def wrap_step(step: Step) -> Step:
        def measured(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            ratios: dict[str, Mean] = {}
            for suffix, names in groups.items():
                moved = _norm([after.params[n] - state.params[n] for n in names], 2.0, state.step)
                size = tree.norm([state.params[n] for n in names])
                # A step that was skipped has moved nothing, and does not count.
                ratios[f"update/ratio{suffix}"] = Mean(moved.total / (size + 1e-12), moved.weight * (moved.total != 0))
            return after, {**logs, **ratios}

        return measured

    hooks: list[Middleware[Any]] = [Middleware(name, wrap_grad, "grad", init)]
    return [*hooks, Middleware(name, wrap_step, "step")] if update else hooks


def _norm(tensors: list[Tensor], order: float, like: Tensor) -> Mean:
    """The norm of all tensors together as a `Mean` of weight 1; of weight 0, on the device of `like`, where there is no tensor."""
    if not tensors:
        return Mean(torch.zeros((), device=like.device), torch.zeros((), device=like.device))
    norm = tree.norm(tensors, order)
    return Mean(norm, torch.ones_like(norm))
