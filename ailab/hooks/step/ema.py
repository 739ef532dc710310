"""EMAHook: an exponential moving average of the parameters, kept in the state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.hooks.step.eval_state import average_of, evaluated, holding, tensors_of
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Params, Step, TrainState


@HOOKS.register_module()
def EMAHook(
    decay: float = 0.999, warmup: bool = True, use_buffers: bool = False, eval: bool = True, name: str = "ema"
) -> list[Middleware[Step]]:
    """Keep `average = d * average + (1 - d) * params` after each step, in `state.slots[name]`; of halves in float32.

    Args:
        decay: d, in [0, 1]. With 0 the average is the parameters themselves.
        warmup: use `d = min(decay, (1 + n) / (10 + n))` at step n, so that the average of a short run forgets its start.
        use_buffers: average the buffers too (running statistics; counters are copied). False: evaluate with the model's buffers.
        eval: validate and test with the average, and save it as `model_state` of a checkpoint. The parameters themselves are not
            replaced. A resumed run continues with them. It is evaluated and saved in the dtype of the parameters.

    Raises:
        ConfigError: when `decay` is outside [0, 1].

    Source: Polyak and Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"cfg.hooks.{name}.decay is {decay}; it must be in [0, 1].")

    def init(state: TrainState) -> Params:
        return average_of(tensors_of(state, use_buffers))

    def wrap(step: Step) -> Step:
        def averaged(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            now = tensors_of(state, use_buffers)
            return state.with_slot(name, tree.lerp(state.slots[name], now, 1.0 - _decay(state.step, decay, warmup))), logs

        return averaged

    hooks = [Middleware(name, wrap, "step", init, looks_back=False)]
    return [*hooks, evaluated(lambda state: holding(state, state.slots[name]), name)] if eval else hooks


def _decay(step: Tensor, decay: float, warmup: bool) -> Tensor:
    n = step.to(torch.float64)  # of 1 - 0.9999 float32 keeps four digits
    full = torch.full_like(n, decay)
    return torch.minimum(full, (1 + n) / (10 + n)) if warmup else full
