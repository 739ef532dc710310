"""Evaluate, and hand to the user, another model than the one that trains: an average of it, say. Nothing is swapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ailab.stack import Middleware
from ailab.types import Batch, Mean, Step, TrainState

View = Callable[[TrainState], TrainState]


def evaluated(view: View, name: str) -> Middleware[Step]:
    """Validation and test are handed `view(state)`, and a checkpoint's `model_state` is that of it.

    Args:
        view: gives a state with other parameters and buffers; pure.
        name: of the hook.
    """

    def wrap(step: Step) -> Step:
        def viewed(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(view(state), batch)
            return after.replace(params=state.params, buffers=state.buffers), logs

        return viewed

    return Middleware(name, wrap, "step", phases=("val", "test"), core={"eval_state": view})


def tensors_of(state: TrainState, use_buffers: bool) -> dict[str, Tensor]:
    """What is averaged: the parameters, and the buffers too where asked; the names of a module's tensors differ."""
    return {**state.params, **state.buffers} if use_buffers else dict(state.params)


def holding(state: TrainState, values: Mapping[str, Tensor]) -> TrainState:
    """The state with these in place of its parameters, and of its buffers as far as `values` has them."""
    buffers = {n: values.get(n, b) for n, b in state.buffers.items()}
    return state.replace(params={n: values[n] for n in state.params}, buffers=buffers)
