"""SkipNonFiniteHook: a NaN or infinite gradient never reaches the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import NonFiniteError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Grad, Mean, Params, Step, TrainState


@HOOKS.register_module()
def SkipNonFiniteHook(max_in_a_row: int = 10, every: int = 10, name: str = "skip_nonfinite") -> list[Middleware[Any]]:
    """Undo a step whose gradient or new parameters are not finite: a `where` inside the graph, no device read per step.

    `state.step` and the data go on; parameters, buffers, optimizer state and the other slots stay as they were. Counts the
    skipped steps as the log "skipped" (their fraction). It sees the gradient as the hooks listed before it leave it.

    Args:
        max_in_a_row: skips in a row after which the run ends.
        every: steps between two looks at that counter from the host.
        name: of the slot.

    Raises:
        NonFiniteError: after `max_in_a_row` skips in a row, at the next look.
    """

    def init(state: TrainState) -> dict[str, Tensor]:
        device = state.step.device
        return {
            "row": torch.zeros((), dtype=torch.int64, device=device),  # skips in a row
            "finite": torch.ones((), dtype=torch.bool, device=device),  # of all gradients of the step in flight
        }

    def wrap_grad(grad: Grad) -> Grad:
        def watched(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            memory = state.slots[name]
            finite = memory["finite"] & tree.finite(grads)
            return grads, replace(aux, slots={**aux.slots, name: {**memory, "finite": finite}})

        return watched

    def wrap(step: Step) -> Step:
        def skipping(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            memory = state.slots[name]
            finite = after.slots[name]["finite"] & tree.finite(after.params)
            kept = tree.where(finite, after, state)
            row = torch.where(finite, 0, memory["row"] + 1)
            skipped = 1 - finite.to(torch.float32)
            means = {n: _counted(m, finite) if isinstance(m, Mean) else m for n, m in logs.items()}  # outputs travel along
            kept = kept.replace(step=after.step).with_slot(name, {**memory, "row": row})
            return kept, {**means, "skipped": Mean(skipped, torch.ones_like(skipped))}

        return skipping

    def wrap_host(step: Step) -> Step:
        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0 and int(state.slots[name]["row"]) >= max_in_a_row:
                raise NonFiniteError(f"{max_in_a_row} steps in a row were not finite, the last one step {state.at}.")
            return state, logs

        return watched

    return [
        Middleware(name, wrap_grad, "grad", holds_grad=False),
        Middleware(name, wrap, "step", init),
        Middleware(name, wrap_host, "host"),
    ]


def _counted(mean: Mean, finite: Tensor) -> Mean:
    """The mean of a step that was taken, and nothing of one that was skipped."""
    return Mean(torch.where(finite, mean.total, torch.zeros_like(mean.total)), mean.weight * finite)
