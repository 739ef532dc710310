"""GradAccumulateHook: the gradient of a batch from micro-batches, with the memory of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ailab import tree
from ailab.core.grad import reciprocal
from ailab.core.loss import batch_size
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Grad, Params, TrainState


@HOOKS.register_module()
def GradAccumulateHook(n: int, name: str = "accumulate") -> Middleware[Grad]:
    """Cut each batch into `n` micro-batches along dimension 0 and add their gradients: sums and weights, divided once.

    The step, the schedule and the logs see one batch. Buffers (BatchNorm) pass from one micro-batch to the next.

    Raises:
        ConfigError: when n < 1.
    """
    if n < 1:
        raise ConfigError(f"cfg.hooks.{name}.n is {n}; a batch is cut into at least 1 micro-batch.")

    def wrap(grad: Grad) -> Grad:
        def accumulated(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            parts = _cut(batch, n)
            if len(parts) == 1:
                return grad(state, batch)
            grads, total = grad(state, parts[0])
            grads = {k: g * total.weight.to(g.dtype) for k, g in grads.items()}
            for part in parts[1:]:
                more, aux = grad(state.replace(buffers=total.buffers), part)
                grads = {k: g + more[k] * aux.weight.to(g.dtype) for k, g in grads.items()}
                total = _add(total, aux)
            scale = reciprocal(total.weight)
            return {k: g * scale.to(g.dtype) for k, g in grads.items()}, total

        return accumulated

    return Middleware(name, wrap, "grad")


def _cut(batch: Batch, n: int) -> list[Batch]:
    """The micro-batches; the last one may be short. A field without a sample dimension goes to each of them."""
    size = batch_size(batch)
    each = -(-size // n)

    def part(value: Any, start: int) -> Any:
        return value[start : start + each] if isinstance(value, Tensor) and value.dim() > 0 else value

    return [tree.map(lambda v, s=start: part(v, s), batch) for start in range(0, size, each)]


def _add(a: Aux, b: Aux) -> Aux:
    """The sums of two micro-batches. Model outputs are those of the last one."""
    return replace(b, weight=a.weight + b.weight, logs={n: a.logs[n] + m for n, m in b.logs.items()})
