"""FreezeHook: parameters that are not trained, for the whole run or for its first epochs or steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ailab import tree
from ailab.core.epoch import PROGRESS
from ailab.errors import ConfigError, nearest
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Aux, Batch, Buffers, Grad, Loss, Mean, Params, PyTree, RunInfo, Step, TrainState


@HOOKS.register_module()
def FreezeHook(
    params: Sequence[str],
    until: int | None = None,
    by: Literal["epoch", "step"] = "epoch",
    *,
    run: RunInfo,
    name: str = "freeze",
) -> list[Middleware[Any]]:
    """Freeze the parameters whose names match.

    Without `until` they are frozen for the whole run. No gradient is computed for them, as with `optimizer.freeze`. With `until`
    the step is one graph for the whole run, so their gradient is computed and set to zero. They and their optimizer state do not
    change until `until` epochs (or steps) are done. Buffers (running statistics of BatchNorm) are still updated.

    Args:
        params: glob patterns of parameter names, such as `["backbone.*"]`.
        until: completed epochs (or steps) after which they are trained. None: they are never trained.
        by: whether `until` counts epochs or optimizer steps.

    Raises:
        ConfigError: when `until` is below 1, or a pattern matches no parameter.
    """
    path = f"cfg.hooks.{name}"
    if until is not None and until < 1:
        raise ConfigError(f"{path}.until is {until}; it counts {by}s and must be at least 1.")
    if until is None:
        return [_freeze_always(params, path, name)]
    frozen_names = set[str]()

    def holds(state: TrainState) -> Tensor:
        return (state.slots[PROGRESS]["epoch"] if by == "epoch" else state.step) < until

    def wrap_grad(grad: Grad) -> Grad:
        def held(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            frozen = holds(state)
            return {n: torch.where(frozen, torch.zeros_like(g), g) if n in frozen_names else g for n, g in grads.items()}, aux

        return held

    def wrap_step(step: Step) -> Step:
        def kept(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            frozen = holds(state)
            params, memory = (
                _keep_frozen(frozen, frozen_names, getattr(state, f), getattr(after, f)) for f in ("params", "opt_state")
            )
            return after.replace(params=params, opt_state=memory), logs

        return kept

    return [Middleware(name, wrap_grad, "grad"), Middleware(name, wrap_step, "step", _find_names(params, path, frozen_names))]


def _freeze_always(params: Sequence[str], path: str, name: str) -> Middleware[Loss]:
    frozen_names = set[str]()

    def wrap(loss: Loss) -> Loss:
        def frozen(values: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            return loss({n: p.detach() if n in frozen_names else p for n, p in values.items()}, buffers, batch)

        return frozen

    return Middleware(name, wrap, "loss", _find_names(params, path, frozen_names), core={"frozen": frozen_names})


def _find_names(patterns: Sequence[str], path: str, found: set[str]) -> Callable[[TrainState], dict[str, Tensor]]:
    """An `init` that fills `found` when the parameters are known, before tracing. It adds no state."""

    def init(state: TrainState) -> dict[str, Tensor]:
        found.update(matching_names(patterns, state.params, path))
        return {}

    return init


def _keep_frozen(frozen: Tensor, names: set[str], before: PyTree, after: PyTree) -> PyTree:
    """`after`. Where `frozen` is true, the entries of these parameter names are those of `before`, in nested dicts too."""
    if not isinstance(after, dict):
        return after
    kept: dict[str, Any] = {}
    for key, value in cast("dict[str, Any]", after).items():
        if key not in before:  # the memory of an optimizer that makes it at the first update
            kept |= {} if key in names and bool(frozen) else {key: value}
        else:
            old = before[key]
            kept[key] = tree.where(frozen, old, value) if key in names else _keep_frozen(frozen, names, old, value)
    return kept


def matching_names(patterns: Sequence[str], names: Collection[str], path: str) -> set[str]:
    """The names that match one of the patterns.

    Raises:
        ConfigError: when a pattern matches no name.
    """
    found: set[str] = set()
    for i, pattern in enumerate(patterns):
        hit = set(fnmatch.filter(names, pattern))
        if not hit:
            raise ConfigError(f"{path}.params[{i}]: no parameter matches {pattern!r}.{nearest(pattern, names)}")
        found |= hit
    return found
