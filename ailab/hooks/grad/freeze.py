"""FreezeHook: parameters that stay as they are, for good or for the first steps."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ailab import tree
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
    """Leave the parameters whose names match as they are.

    For good, they are not differentiated at all, as with `optimizer.freeze`. With `until` they are part of the graph from the
    start, for it is the same graph all along: their gradient is zero, and they and their optimizer memory stay as they are
    until so many epochs (or steps) are through. Buffers (BatchNorm's running statistics) are not parameters and go on.

    Args:
        params: patterns of parameter names: `["backbone.*"]`.
        until: epochs (or steps) that are through when they begin to train; None: never.
        by: what `until` counts.
        run: given by the framework.
        name: of this hook.

    Raises:
        ConfigError: when `until` is below 1, or a pattern matches no parameter.
    """
    path = f"cfg.hooks.{name}"
    if until is not None and until < 1:
        raise ConfigError(f"{path}.until is {until}; it counts {by}s, so it is at least 1.")
    if until is None:
        return [_for_good(params, path, name)]
    steps, mine = until * (run.steps_per_epoch if by == "epoch" else 1), set[str]()

    def wrap_grad(grad: Grad) -> Grad:
        def held(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            grads, aux = grad(state, batch)
            frozen = state.step < steps
            return {n: torch.where(frozen, torch.zeros_like(g), g) if n in mine else g for n, g in grads.items()}, aux

        return held

    def wrap_step(step: Step) -> Step:
        def kept(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            frozen = state.step < steps
            params, memory = (_held(frozen, mine, getattr(state, f), getattr(after, f)) for f in ("params", "opt_state"))
            return after.replace(params=params, opt_state=memory), logs

        return kept

    return [Middleware(name, wrap_grad, "grad"), Middleware(name, wrap_step, "step", _finder(params, path, mine))]


def _for_good(params: Sequence[str], path: str, name: str) -> Middleware[Loss]:
    mine = set[str]()

    def wrap(loss: Loss) -> Loss:
        def frozen(values: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            return loss({n: p.detach() if n in mine else p for n, p in values.items()}, buffers, batch)

        return frozen

    return Middleware(name, wrap, "loss", _finder(params, path, mine), core={"frozen": mine})


def _finder(patterns: Sequence[str], path: str, found: set[str]) -> Callable[[TrainState], dict[str, Tensor]]:
    """An `init` that finds the names once the parameters are known, before anything is traced; there is nothing to remember."""

    def init(state: TrainState) -> dict[str, Tensor]:
        found.update(matching(patterns, state.params, path))
        return {}

    return init


def _held(frozen: Tensor, names: set[str], before: PyTree, after: PyTree) -> PyTree:
    """`after`, where `frozen` holds with what `before` has under these parameter names, at any level of nested dicts."""
    if not isinstance(after, dict):
        return after
    entries = cast("dict[str, Any]", after).items()
    return {
        k: v if k not in before else tree.where(frozen, before[k], v) if k in names else _held(frozen, names, before[k], v)
        for k, v in entries
    }


def matching(patterns: Sequence[str], names: Collection[str], path: str) -> set[str]:
    """The names that a pattern matches.

    Raises:
        ConfigError: for a pattern that matches none.
    """
    found: set[str] = set()
    for i, pattern in enumerate(patterns):
        hit = set(fnmatch.filter(names, pattern))
        if not hit:
            raise ConfigError(f"{path}.params[{i}]: no parameter matches {pattern!r}.{nearest(pattern, names)}")
        found |= hit
    return found
