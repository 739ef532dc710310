"""SkipNonFiniteHook: skip or refuse steps with NaN or infinite gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError, NonFiniteError
from ailab.hooks.step.rollback import checked_on_host, rolled_back
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Buffers, Grad, Mean, Params, Step, TrainState


@HOOKS.register_module()
def SkipNonFiniteHook(
    policy: Literal["raise", "skip"] = "raise", max_in_a_row: int = 10, every: int = 10, name: str = "skip_nonfinite"
) -> list[Middleware[Any]]:
    """Skip a step whose gradient, new parameters or new buffers are not finite.

    It is a `where` inside the graph, without a device read per step. A buffer that was not finite before does not count: a mask
    may hold -inf.

    A skipped step counts in `state.step`. Parameters, buffers, optimizer state and the other slots do not change. The log
    "skipped" is the fraction of such steps. The hook checks the gradient of the hooks listed before it, over all ranks.

    Args:
        policy: "raise" ends the run at the next check on the host, with the number of the first such step. "skip" continues.
        max_in_a_row: skipped steps in a row after which "skip" ends the run, at least 1.
        every: optimizer steps between two checks on the host, at least 1. There is also one at the end of each training epoch.

    Raises:
        ConfigError: when `max_in_a_row` or `every` is below 1.
        NonFiniteError: under "raise", at the first check after such a step; under "skip", after `max_in_a_row` of them in a row.
    """
    if policy not in ("raise", "skip"):
        raise ConfigError(f"cfg.hooks.{name}.policy is {policy!r}; it must be 'raise' or 'skip'.")
    if max_in_a_row < 1:
        raise ConfigError(f"cfg.hooks.{name}.max_in_a_row is {max_in_a_row}; it must be at least 1.")

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
            bad = ~(after.slots[name]["finite"] & tree.finite(after.params) & _still_finite(state.buffers, after.buffers))
            kept, means = rolled_back(bad, state, after, logs)
            row = torch.where(bad, memory["row"] + 1, 0)
            first = torch.where(bad & (memory["first"] == 0), after.step, memory["first"])
            now = {**memory, "row": row, "longest": torch.maximum(memory["longest"], row), "first": first}
            skipped = bad.to(torch.float32)
            return kept.with_slot(name, now), {**means, "skipped": Mean(skipped, torch.ones_like(skipped))}

        return skipping

    def check(state: TrainState) -> None:
        memory = state.slots[name]
        if policy == "skip" and int(memory["longest"]) >= max_in_a_row:
            raise NonFiniteError(f"{max_in_a_row} steps in a row were not finite; the run was at step {state.at}.")
        if policy == "raise" and (first := int(memory["first"])):
            raise NonFiniteError(
                f"step {first} is not finite, in its gradient, parameters or buffers. It was skipped: nothing has changed.\n"
                f"  Lower optimizer.lr, add hooks.clip = dict(type='GradClipHook', max_norm=1.0), or skip such\n"
                f"  steps: hooks.{name}.policy='skip'."
            )

    return [
        Middleware(name, wrap_grad, "grad", holds_grad=False),
        Middleware(name, wrap, "step", _memory),
        *checked_on_host(check, every, name),
    ]


def _still_finite(before: Buffers, after: Buffers) -> Tensor | bool:
    """Whether each floating-point buffer is finite, or was not finite before, () bool. Two calls for all of them."""
    names = [n for n, b in after.items() if b.is_floating_point()]
    if not names:
        return True
    now, then = (tree.finite_each([buffers[n] for n in names]) for buffers in (after, before))
    return (now | ~then).all()


def _memory(state: TrainState) -> dict[str, Tensor]:
    count = torch.zeros((), dtype=torch.int64, device=state.step.device)
    return {
        "row": count,  # skips in a row
        "longest": count.clone(),  # of the whole run: a check on the host may come after a row has ended
        "first": count.clone(),  # step of the first skip, counted from 1
        "finite": torch.ones((), dtype=torch.bool, device=state.step.device),  # of all gradients of the current step
    }
