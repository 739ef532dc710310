"""GradAccumulateHook: gradient accumulation over micro-batches. It needs the memory of one micro-batch."""

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
    """Split each batch into `n` micro-batches along dimension 0 and accumulate their gradients.

    Sums and weights are accumulated and divided once. So the result is the gradient of the whole batch. The step, the schedule
    and the logs see one batch. Buffers (BatchNorm) and slots pass from one micro-batch to the next. With several processes
    gradients are all-reduced once, after the last micro-batch. If a grad hook is listed before this one, they are all-reduced
    after each micro-batch.

    Args:
        n: micro-batches per batch of one process, at least 1. The last one may be smaller.

    Raises:
        ConfigError: when n < 1.
    """
    if n < 1:
        raise ConfigError(f"cfg.hooks.{name}.n is {n}; it must be at least 1.")

    def wrap(grad: Grad) -> Grad:
        # Directly around a core over several processes: one all-reduce for all micro-batches. A hook in between needs each
        # micro-batch all-reduced, and has no `many`.
        many = grad.many if isinstance(grad, Core) else lambda state, parts: accumulated(grad, state, parts)

        def accumulating(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            parts, sizes = _micro_batches(batch, n)
            if len(parts) == 1:
                return grad(state, batch)
            grads, total, outputs = many(state, parts)
            joined = {name: _join_outputs([o[name] for o in outputs], sizes) for name in total.outputs}
            return grads, replace(total, outputs=joined)

        return accumulating

    return Middleware(name, wrap, "grad", core={"micro_batches": {"n": n}}, holds_grad=False)


def _micro_batches(batch: Batch, n: int) -> tuple[list[Batch], list[int]]:
    """The micro-batches and their sizes. The last one may be smaller. A field without a sample dimension is in each of them.

    With several processes there are always `n` micro-batches, so that all ranks make the same all-reduces, however many samples
    they have. A micro-batch that would be empty is replaced by the first one with weights of 0. It is not in the sizes.
    """
    size = batch_size(batch)
    each = -(-size // n)

    def part(value: Any, start: int) -> Any:
        return value[start : start + each] if _is_per_sample(value, size) else value

    starts = range(0, size, each)
    parts: list[Batch] = [tree.map(lambda v, s=start: part(v, s), batch) for start in starts]
    missing = n - len(parts) if dist.world_size() > 1 else 0
    device = next(v.device for v in tree.leaves(batch) if isinstance(v, Tensor))
    whole = batch[WEIGHT].sum() if WEIGHT in batch else torch.full((), float(size), device=device)
    parts = [{SIZE: whole, **part} for part in parts]
    parts += [{**parts[0], WEIGHT: torch.zeros(each, device=device)} for _ in range(missing)]
    return parts, [min(each, size - start) for start in starts]


def _join_outputs(values: list[Any], sizes: list[int]) -> Any:
    """A model output of all micro-batches. Where it is not one value per sample, the output of the last one."""
    real = values[: len(sizes)]
    return torch.cat(real) if all(_is_per_sample(v, n) for v, n in zip(real, sizes, strict=True)) else real[-1]


def _is_per_sample(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size
