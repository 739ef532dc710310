"""GradAccumulateHook: the gradient of a batch from micro-batches, with the memory of one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ailab import dist, tree
from ailab.core.grad import Core, accumulated
from ailab.errors import ConfigError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import SIZE, WEIGHT, Aux, Batch, Grad, Params, TrainState, batch_size


@HOOKS.register_module()
def GradAccumulateHook(n: int, name: str = "accumulate") -> Middleware[Grad]:
    """Cut each batch into `n` micro-batches along dimension 0 and add their gradients: sums and weights, divided once.

    The step, the schedule and the logs see one batch. Buffers (BatchNorm) and slots pass from one micro-batch to the next.
    With several processes gradients are exchanged once, after the last micro-batch, unless a grad hook listed before this one
    needs them after each.

    Raises:
        ConfigError: when n < 1.
    """
    if n < 1:
        raise ConfigError(f"cfg.hooks.{name}.n is {n}; a batch is cut into at least 1 micro-batch.")

    def wrap(grad: Grad) -> Grad:
        # Directly around a core over several processes: one reduction for all micro-batches. A hook in between needs each
        # reduced, and has no `many`.
        many = grad.many if isinstance(grad, Core) else lambda state, parts: accumulated(grad, state, parts)

        def accumulating(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            parts, sizes = _cut(batch, n)
            if len(parts) == 1:
                return grad(state, batch)
            grads, total, outputs = many(state, parts)
            joined = {name: _joined([o[name] for o in outputs], sizes) for name in total.outputs}
            return grads, replace(total, outputs=joined)

        return accumulating

    return Middleware(name, wrap, "grad", holds_grad=False)


def _cut(batch: Batch, n: int) -> tuple[list[Batch], list[int]]:
    """The micro-batches and their sizes; the last one may be short. A field without a sample dimension goes to each of them.

    With several processes there are always `n`, so that all ranks make the same reductions, however many samples each has: in
    place of one that would be empty comes the first one again, with weights of 0; it has no size.
    """
    size = batch_size(batch)
    each = -(-size // n)

    def part(value: Any, start: int) -> Any:
        return value[start : start + each] if _by_sample(value, size) else value

    starts = range(0, size, each)
    parts: list[Batch] = [tree.map(lambda v, s=start: part(v, s), batch) for start in starts]
    missing = n - len(parts) if dist.world_size() > 1 else 0
    device = next(v.device for v in tree.leaves(batch) if isinstance(v, Tensor))
    whole = batch[WEIGHT].sum() if WEIGHT in batch else torch.full((), float(size), device=device)
    parts = [{SIZE: whole, **part} for part in parts]
    parts += [{**parts[0], WEIGHT: torch.zeros(each, device=device)} for _ in range(missing)]
    return parts, [min(each, size - start) for start in starts]


def _joined(values: list[Any], sizes: list[int]) -> Any:
    """A model output of all micro-batches; that of the last one where it is not one value per sample."""
    real = values[: len(sizes)]
    return torch.cat(real) if all(_by_sample(v, n) for v, n in zip(real, sizes, strict=True)) else real[-1]


def _by_sample(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
