"""The bare training and evaluation steps: `(TrainState, Batch) -> (TrainState, Logs)`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ailab.compile import crosses
from ailab.optim import Optimizer
from ailab.optim.derivative import refuse_derivative
from ailab.optim.optimizer import Evaluate
from ailab.types import OUTPUT, Aux, Batch, Buffers, Grad, Loss, Mean, Params, Step, TrainState, seal

_GRADS, _AUX = "_grads", "_aux"


def requested(aux: Aux, outputs: Collection[str]) -> dict[str, object]:
    """The logs, the model outputs that a host hook reads, and what the ranks agreed on."""
    read = {OUTPUT + n: aux.outputs[n] for n in outputs if n in aux.outputs}
    return {**aux.logs, **read, **{OUTPUT + n: v for n, v in aux.control.items()}}


def tensor_outputs(loss: Loss, outputs: Collection[str]) -> Loss:
    """`loss`, of whose outputs only tensors come out, and those that are asked for: a graph cannot return any other object."""

    def lean(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
        total, aux = loss(params, buffers, batch)
        return total, replace(aux, outputs={n: v for n, v in aux.outputs.items() if n in outputs or crosses(v)})

    return lean


def train_step(grad: Grad, optimizer: Optimizer, outputs: Collection[str] = (), *, donate: bool = False) -> Step:
    """One optimizer update, pure: the state in is untouched.

    Args:
        grad: a gradient core, in whatever grad hooks wrap it.
        optimizer: `(init, update)`.
        outputs: names of model outputs that shall come out with the logs.
        donate: write the new parameters into the old ones, for an eager step whose state is consumed and that no hook around
            it looks back at.
    """
    update = optimizer.update_ if donate and optimizer.update_ is not None else optimizer.update

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
        refuse_derivative(state.params, state.opt_state, "train_step")
        grads, aux = grad(state, batch)
        with torch.no_grad():
            if optimizer.closure_update is None:
                params, opt_state = update(grads, state.opt_state, state.params)
            else:
                params, opt_state = optimizer.closure_update(_closure(grad, state, batch), state.opt_state, state.params)
            after = TrainState(state.step + 1, params, aux.buffers, opt_state, {**state.slots, **aux.slots})
        return after, requested(aux, outputs)  # type: ignore[return-value]

    return step


def _closure(grad: Grad, state: TrainState, batch: Batch) -> Evaluate:
    """The loss and its gradient as a function of the parameters alone, for optimizers that look more than once (LBFGS)."""

    def evaluate(params: Params) -> tuple[Tensor, Params]:
        grads, aux = grad(state.replace(params=params), batch)
        return aux.logs["loss"].value, grads

    return evaluate


def eval_step(loss: Loss, outputs: Collection[str] = ()) -> Step:
    """The loss and the metrics of one batch; the state comes back as it went in."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
        with torch.no_grad():
            _, aux = loss(state.params, state.buffers, batch)
        return state, requested(aux, outputs)  # type: ignore[return-value]

    return step


def given(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
    """A gradient core that was computed before: the second half of a step that is cut at the gradient."""
    return batch[_GRADS], batch[_AUX]


def split_step(grad: Grad, finish: Step, outputs: Collection[str] = ()) -> Step:
    """A step cut at the gradient: `grad` on the host (DDP's backward), then `finish`, compiled apart.

    `finish` is `train_step(given, optimizer, outputs)` in its step hooks. Of the model's outputs it is given those that are asked
    for and are tensors. Others (None, a cache) are passed by.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
        grads, aux = grad(state, batch)
        asked = {n: v for n, v in aux.outputs.items() if n in outputs}
        inside = {n: v for n, v in asked.items() if crosses(v)}
        after, logs = finish(state, {**batch, _GRADS: grads, _AUX: replace(aux, outputs=inside)})
        return after, logs if len(inside) == len(asked) else seal(logs, after.step.device).with_outputs(asked)

    return step
