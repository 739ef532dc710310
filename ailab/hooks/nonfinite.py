"""SkipNonFiniteHook: a NaN or infinite gradient never reaches the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import NonFiniteError
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Step, TrainState


@HOOKS.register_module()
def SkipNonFiniteHook(max_in_a_row: int = 10, every: int = 10, name: str = "skip_nonfinite") -> list[Middleware[Step]]:
    """Undo a step whose new parameters are not finite: a `where` inside the graph, no device read per step.

    `state.step` and the data go on; parameters, buffers, optimizer state and the other slots stay as they were. Counts the
    skipped steps as the log "skipped" (their fraction).

    Args:
        max_in_a_row: skips in a row after which the run ends.
        every: steps between two looks at that counter from the host.
        name: of the slot.

    Raises:
        NonFiniteError: after `max_in_a_row` skips in a row, at the next look.
    """

    def init(state: TrainState) -> Tensor:
        return torch.zeros((), dtype=torch.int64, device=state.step.device)

    def wrap(step: Step) -> Step:
        def skipping(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            finite = torch.isfinite(tree.norm(after.params))
            kept = tree.where(finite, after, state)
            row = torch.where(finite, torch.zeros_like(after.step), state.slots[name] + 1)
            skipped = 1 - finite.to(torch.float32)
            means = {n: Mean(torch.where(finite, m.total, torch.zeros_like(m.total)), m.weight * finite) for n, m in logs.items()}
            return kept.replace(step=after.step).with_slot(name, row), {**means, "skipped": Mean(skipped, torch.ones_like(skipped))}

        return skipping

    def wrap_host(step: Step) -> Step:
        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0 and int(state.slots[name]) >= max_in_a_row:
                raise NonFiniteError(f"{max_in_a_row} steps in a row were not finite, the last one step {state.at}.")
            return state, logs

        return watched

    return [Middleware(name, wrap, "step", init), Middleware(name, wrap_host, "host")]
