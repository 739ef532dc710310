"""Evaluate and export other parameters than those that are trained, such as their moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ailab import tree
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Step, TrainState

EvalState = Callable[[TrainState], TrainState]


def evaluated(eval_state: EvalState, name: str) -> Middleware[Step]:
    """A middleware with which validation and test use `eval_state(state)`. A checkpoint's `model_state` is that of it too.

    Args:
        eval_state: a pure function that returns the state with other parameters and buffers.
        name: name of the hook.
    """

    def wrap(step: Step) -> Step:
        def evaluating(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(eval_state(state), batch)
            return after.replace(params=state.params, buffers=state.buffers), logs

        return evaluating

    return Middleware(name, wrap, "step", phases=("val", "test"), core={"eval_state": eval_state})


def tensors_of(state: TrainState, use_buffers: bool) -> dict[str, Tensor]:
    """The tensors to average: the parameters, and with `use_buffers` the buffers. Their names never clash."""
    return {**state.params, **state.buffers} if use_buffers else dict(state.params)


def average_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to begin an average with. Those of halves are float32: a step of 0.001 is below the resolution of a half."""
    return {n: tree.widened(v.detach()).clone() for n, v in values.items()}


def in_dtype_of(like: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values by the names of `like`, each in its dtype there."""
    return {n: values[n].to(t.dtype) for n, t in like.items()}


def holding(state: TrainState, values: Mapping[str, Tensor]) -> TrainState:
    """The state with its parameters replaced by `values`, in their dtype, and those of its buffers that `values` has."""
    averaged = {n: b for n, b in state.buffers.items() if n in values}
    buffers = {**state.buffers, **in_dtype_of(averaged, values)}
    return state.replace(params=in_dtype_of(state.params, values), buffers=buffers)
