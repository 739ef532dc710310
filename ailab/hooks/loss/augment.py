"""AugmentHook: batch augmentation on the device, inside the step, with the random numbers of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ailab.registry import HOOKS, TRANSFORMS
from ailab.signature import check_arguments, parameters
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Buffers, Loss, Params


@HOOKS.register_module()
def AugmentHook(
    ops: Sequence[Mapping[str, Any]], field: str = "input", phases: Sequence[str] = ("train",), name: str = "augment"
) -> Middleware[Loss]:
    """Apply batch transforms (`BatchShift`, `BatchFlip`, ... of TRANSFORMS) to one field before the forward pass.

    Args:
        ops: transforms, each a dict with `type` and its arguments. They are applied in this order.
        field: batch field to change, (B, C, H, W).
        phases: phases in which it is applied. By default only "train".
    """
    built = [TRANSFORMS.build(op, f"cfg.hooks.{name}.ops.{i}") for i, op in enumerate(ops)]

    def wrap(loss: Loss) -> Loss:
        def augmented(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            value = batch[field]
            for op in built:
                value = op(value)
            return loss(params, buffers, {**batch, field: value})

        return augmented

    return Middleware(name, wrap, "loss", phases=tuple(phases))


def _check(entry: Mapping[str, Any], path: str) -> list[str]:
    problems = check_arguments(parameters(AugmentHook).without(("name",)), entry, path, "AugmentHook", "AugmentHook")
    ops = entry.get("ops")
    listed = enumerate(ops if isinstance(ops, (list, tuple)) else ())
    return problems + [p for i, op in listed for p in TRANSFORMS.check(op, f"{path}.ops.{i}")]


AugmentHook.check = _check  # type: ignore[attr-defined]
