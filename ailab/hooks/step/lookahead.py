"""LookaheadHook: slow weights that follow the parameters every k steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ailab import tree
from ailab.errors import ConfigError
from ailab.hooks.step.eval_state import average_of, in_dtype_of
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Params, Step, TrainState


@HOOKS.register_module()
def LookaheadHook(k: int = 5, alpha: float = 0.5, name: str = "lookahead") -> Middleware[Step]:
    """After every `k`-th step set `slow += alpha * (params - slow)` and `params = slow`. The optimizer state is not changed.

    The slow weights are in `state.slots[name]`, of halves in float32. They start as the initial parameters.

    Args:
        k: optimizer steps between two updates of the slow weights, at least 1.
        alpha: step size of the slow weights, in [0, 1]. 1 is the inner optimizer alone.

    Raises:
        ConfigError: when k < 1, or alpha is outside [0, 1].

    Source: Zhang et al. 2019, arXiv:1907.08610.
    """
    if k < 1:
        raise ConfigError(f"cfg.hooks.{name}.k is {k}; it counts steps and must be at least 1.")
    if not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"cfg.hooks.{name}.alpha is {alpha}; it must be in [0, 1].")

    def init(state: TrainState) -> Params:
        return average_of(state.params)

    def wrap(step: Step) -> Step:
        def looked_ahead(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            due = state.step % k == 0
            weight = torch.where(due, torch.full((), alpha, dtype=torch.float64, device=due.device), 0.0)
            slow = tree.lerp(state.slots[name], state.params, weight)
            params = tree.where(due, in_dtype_of(state.params, slow), state.params)
            return state.replace(params=params).with_slot(name, slow), logs

        return looked_ahead

    return Middleware(name, wrap, "step", init, looks_back=False)
