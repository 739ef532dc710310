"""GradClipHook: gradient clipping by norm or by value."""

from __future__ import annotations

from dataclasses import replace

import torch

from ailab import tree
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Grad, Mean, Params, TrainState


@HOOKS.register_module()
def GradClipHook(max_norm: float | None = None, max_value: float | None = None, name: str = "grad_clip") -> Middleware[Grad]:
    """Scale the gradient of all parameters so that its 2-norm is at most `max_norm`, or clamp it to +-`max_value`.

    Logs the norm before clipping as "grad_norm". `max_norm=inf` only logs.

    Args:
        max_norm: largest 2-norm of the gradient of all parameters together.
        max_value: largest absolute value of an element of the gradient.

    Raises:
        ConfigError: unless exactly one of the two is given and it is positive.

    Source: Pascanu, Mikolov, Bengio 2013; equal to `torch.nn.utils.clip_grad_norm_`.
    """
    bound = max_norm if max_norm is not None else max_value
    if (max_norm is None) == (max_value is None) or bound is None or not bound > 0:
        raise ConfigError(f"cfg.hooks.{name}: give one of max_norm and max_value, positive; got {max_norm} and {max_value}.")

    def wrap(grad: Grad) -> Grad:
        def clipped(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            norm = tree.norm(grads)
            if max_norm is None:
                grads = {n: g.clamp(-bound, bound) for n, g in grads.items()}
            else:
                grads = tree.scaled(grads, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
            return grads, replace(aux, logs={**aux.logs, "grad_norm": Mean(norm, torch.ones_like(norm))})

        return clipped

    return Middleware(name, wrap, "grad", holds_grad=False)
