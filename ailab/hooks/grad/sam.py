"""SAMHook: sharpness-aware minimisation."""

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
    """Use the gradient at the perturbed parameters `params + rho * g / |g|` in place of the gradient `g` at `params`.

    This computes two gradients per step. Loss, metrics, sample weights and buffers (BatchNorm) are those of the first one. `g` is
    the gradient of the hooks listed before this one, over all ranks. Listed after `accumulate` it perturbs with the gradient of
    the whole batch. Listed before `accumulate` it perturbs with the gradient of each micro-batch. The second forward pass draws
    new dropout masks.

    Args:
        rho: radius of the perturbation, as the 2-norm over all parameters, at least 0. 0 is the plain gradient.
        adaptive: scale the perturbation by the size of each parameter (ASAM): `rho * p^2 g / |p g|`.

    Raises:
        ConfigError: when rho < 0.

    Source: Foret et al. 2021, arXiv:2010.01412; adaptive: Kwon et al. 2021, arXiv:2102.11600 (with eta = 0).
    """
    if not rho >= 0:
        raise ConfigError(f"cfg.hooks.{name}.rho is {rho}; it must be at least 0.")

    def wrap(grad: Grad) -> Grad:
        if rho == 0:
            return grad

        def sharpened(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            with torch.no_grad():
                params = {**state.params, **_perturbed(state.params, grads, rho, adaptive)}
            perturbed = state.replace(params=params, slots={**state.slots, **aux.slots})
            grads, second = grad(perturbed, batch)
            return grads, replace(aux, slots={**aux.slots, **second.slots})

        return sharpened

    return Middleware(name, wrap, "grad")


def _perturbed(params: Params, grads: Params, rho: float, adaptive: bool) -> dict[str, Tensor]:
    """The parameters that have a gradient, moved along it by `rho`."""
    along = {n: g * params[n].abs() if adaptive else g for n, g in grads.items()}
    factor = rho / (tree.norm(along) + 1e-12)
    moves = tree.scaled({n: a * params[n].abs() for n, a in along.items()} if adaptive else along, factor)
    return {n: params[n] + move for n, move in moves.items()}
