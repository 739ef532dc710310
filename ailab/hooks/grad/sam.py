"""SAMHook: the gradient where the loss nearby is worst."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Grad, Params, TrainState


@HOOKS.register_module()
def SAMHook(rho: float = 0.05, adaptive: bool = False, name: str = "sam") -> Middleware[Grad]:
    """Sharpness-aware minimisation: the gradient at `params + rho * g / |g|` in place of `g`, for two gradients a step.

    Loss, metrics, weights and buffers (BatchNorm) are those of the first pass. `g` is the gradient that the hooks listed before
    give, over all ranks: listed after `accumulate` it climbs along the whole batch, listed before along each micro-batch. The
    second pass draws its own dropout.

    Args:
        rho: the radius, in the norm of all parameters together; 0 is the plain gradient.
        adaptive: measure each parameter by its own size (ASAM): climb by `rho * p^2 g / |p g|`.
        name: of this hook.

    Raises:
        ConfigError: when rho < 0.

    Source: Foret et al. 2021, arXiv:2010.01412; adaptive: Kwon et al. 2021, arXiv:2102.11600 (with eta = 0).
    """
    if not rho >= 0:
        raise ConfigError(f"cfg.hooks.{name}.rho is {rho}; it is at least 0.")

    def wrap(grad: Grad) -> Grad:
        if rho == 0:
            return grad

        def sharpened(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            with torch.no_grad():
                params = {**state.params, **_climbed(state.params, grads, rho, adaptive)}
            there = state.replace(params=params, slots={**state.slots, **aux.slots})
            grads, second = grad(there, batch)
            return grads, replace(aux, slots={**aux.slots, **second.slots})

        return sharpened

    return Middleware(name, wrap, "grad")


def _climbed(params: Params, grads: Params, rho: float, adaptive: bool) -> dict[str, Tensor]:
    """The parameters that have a gradient, moved uphill by `rho`."""
    scaled = {n: g * params[n].abs() if adaptive else g for n, g in grads.items()}
    factor = rho / (tree.norm(scaled) + 1e-12)
    return {n: params[n] + s * (params[n].abs() if adaptive else 1.0) * factor.to(s.dtype) for n, s in scaled.items()}
