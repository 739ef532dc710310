"""EMAHook: an exponential moving average of the parameters, kept in the state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Params, Step, TrainState


@HOOKS.register_module()
def EMAHook(decay: float = 0.999, warmup: bool = True, eval: bool = True, name: str = "ema") -> list[Middleware[Step]]:
    """Keep `average = d * average + (1 - d) * params` after each step, in `state.slots[name]`; buffers are copied.

    Args:
        decay: in [0, 1]; 0 keeps the parameters themselves.
        warmup: use `d = min(decay, (1 + n) / (10 + n))` at step n, so that a short run is not dominated by its start.
        eval: validate (and test) with the average; nothing is swapped, the evaluation is handed another state.
        name: of the slot.

    Raises:
        ConfigError: when `decay` is outside [0, 1].

    Source: Polyak and Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"cfg.hooks.{name}.decay is {decay}; a decay lies in [0, 1].")

    def init(state: TrainState) -> Params:
        return tree.clone(state.params)

    def wrap(step: Step) -> Step:
        def averaged(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            mean = tree.lerp(state.slots[name], state.params, 1.0 - _decay(state.step, decay, warmup))
            return state.with_slot(name, mean), logs

        return averaged

    def wrap_eval(step: Step) -> Step:
        def of_average(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state.replace(params=state.slots[name]), batch)
            return after.replace(params=state.params), logs

        return of_average

    hooks = [Middleware(name, wrap, "step", init, looks_back=False)]
    return [*hooks, Middleware(name, wrap_eval, "step", phases=("val", "test"))] if eval else hooks


def _decay(step: Tensor, decay: float, warmup: bool) -> Tensor:
    n = step.to(torch.float64)  # of 1 - 0.9999 float32 keeps four digits
    full = torch.full_like(n, decay)
    return torch.minimum(full, (1 + n) / (10 + n)) if warmup else full
