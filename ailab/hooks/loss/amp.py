"""AMPHook: the forward pass under autocast; for fp16 with a dynamic loss scale in the state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import ConfigError
from ailab.hooks.step.nonfinite import SkipNonFiniteHook
from ailab.hooks.step.rollback import rolled_back
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import LOSS_SCALE, Aux, Batch, Buffers, Grad, Loss, Mean, Params, RunInfo, Step, TrainState


@HOOKS.register_module()
def AMPHook(
    dtype: Literal["auto", "bf16", "fp16"] = "auto",
    init_scale: float = 2.0**16,
    growth_interval: int = 2000,
    *,
    run: RunInfo,
    name: str = "amp",
) -> list[Middleware[Any]]:
    """Train and validate under `torch.autocast`; parameters, gradients and updates stay in their own dtype.

    Args:
        dtype: "auto" is bf16 on a GPU that supports it, fp16 on any other GPU, and no autocast on a CPU.
        init_scale: first loss scale. For fp16 only.
        growth_interval: steps in a row without an overflow after which the loss scale doubles. At an overflow it is halved and
            the step is skipped, and its logs do not count. For fp16 only.

    Source: Micikevicius et al. 2018; the rule is that of `torch.amp.GradScaler`.
    """
    chosen = _dtype(dtype, run.device)
    if chosen is None:
        return []
    device = run.device.type
    if chosen is torch.float16:
        _refuse_hidden_overflows(run, name)

    def wrap(loss: Loss) -> Loss:
        def autocast(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            with torch.autocast(device, dtype=chosen):
                return loss(params, buffers, batch)

        return autocast

    hooks: list[Middleware[Any]] = [Middleware(name, wrap, "loss", phases=("train", "val", "test"))]
    return hooks if chosen is torch.bfloat16 else [*hooks, *_scaled(init_scale, growth_interval, name)]


def _dtype(asked: str, device: torch.device) -> torch.dtype | None:
    if asked != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}[asked]
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _refuse_hidden_overflows(run: RunInfo, name: str) -> None:
    """The loss scale must see every overflow; a SkipNonFiniteHook listed before it would hide them."""
    for other, entry in run.cfg["hooks"].items():
        if other == name:
            return
        if entry.get("type") in ("SkipNonFiniteHook", SkipNonFiniteHook) and entry.get("enable", True):
            raise ConfigError(
                f"cfg.hooks.{name}: with fp16 it must be listed before '{other}', which would hide overflows.\n"
                "  In that order an overflow skips the step and halves the loss scale, and is not an error."
            )


def _scaled(init_scale: float, growth_interval: int, name: str) -> list[Middleware[Any]]:
    """The loss scale: passed to the gradient core, which divides by it again, and updated in the step.

    It checks the gradient, not the new parameters: clipping by value or an optimizer that uses signs hides an overflow.
    """

    def init(state: TrainState) -> dict[str, Tensor]:
        device = state.step.device
        return {
            "scale": torch.tensor(init_scale, device=device),
            "growth": torch.zeros((), dtype=torch.int32, device=device),
            "finite": torch.ones((), dtype=torch.bool, device=device),  # of all gradients of the step in flight
        }

    def wrap_grad(grad: Grad) -> Grad:
        def scaled(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
            memory = state.slots[name]
            grads, aux = grad(state, {**batch, LOSS_SCALE: memory["scale"]})
            finite = memory["finite"] & tree.finite(grads)
            return grads, replace(aux, slots={**aux.slots, name: {**memory, "finite": finite}})

        return scaled

    def wrap_step(step: Step) -> Step:
        def adapted(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            after, logs = step(state, batch)
            memory = state.slots[name]
            finite = after.slots[name]["finite"]
            grown = memory["growth"] + 1 >= growth_interval
            doubled = torch.where(torch.isfinite(memory["scale"] * 2), memory["scale"] * 2, memory["scale"])
            scale = torch.where(finite, torch.where(grown, doubled, memory["scale"]), memory["scale"] * 0.5)
            growth = torch.where(finite & ~grown, memory["growth"] + 1, 0).to(torch.int32)
            kept, means = rolled_back(~finite, state, after, logs)
            return kept.with_slot(name, {"scale": scale, "growth": growth, "finite": memory["finite"]}), means

        return adapted

    return [Middleware(name, wrap_grad, "grad", holds_grad=False), Middleware(name, wrap_step, "step", init)]
