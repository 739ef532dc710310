"""What keeps no graph refuses to be differentiated: a derivative through it would be 0, with no error."""

from __future__ import annotations

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.types import Params, PyTree


def refuse_derivative(params: Params, opt_state: PyTree, what: str) -> None:
    """Refuse to run inside a derivative, which would be exactly 0 in silence: the gradient and the update keep no graph.

    Raises:
        ConfigError: inside a transform of torch.func; or with gradients enabled, where the parameters were computed from something
            that requires grad, or the optimizer's memory (a learning rate) requires it.
    """
    if torch.compiler.is_compiling():
        return
    inside = tree.transformed()
    if not inside and torch.is_grad_enabled():
        memory = [t for t in tree.leaves(opt_state) if isinstance(t, Tensor)]
        inside = any(p.grad_fn is not None for p in params.values()) or any(t.requires_grad for t in memory)
    if inside:
        raise ConfigError(
            f"{what} is called inside a derivative (torch.func, or a state that was computed with grad), and keeps no graph:\n"
            "  the derivative would be 0. Differentiate the loss, `loss(params, buffers, batch)`, and write the update out."
        )
