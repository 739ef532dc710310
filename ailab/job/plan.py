"""What of a run is compiled and how its gradients are synchronised: decided once, from the cfg and the machine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ailab.compile import Compiled, lift
from ailab.core.grad import local_grad
from ailab.cuda_graph import CudaRecorder, Replay
from ailab.errors import ConfigError
from ailab.job.build import Parts
from ailab.job.draws import Draws
from ailab.types import Loss, RunInfo, TrainState

_PAYS_FROM = 30_000  # training steps from which compiling for a CPU pays: it costs some 25 s and saves up to 1 ms a step


@dataclass(frozen=True)
class Plan:
    """What is compiled and how gradients are synchronised."""

    enabled: bool
    why: str
    cut: str  # "step", "grad" or "loss"
    sync: str  # "none", "ddp" or "graph"
    mode: str | None = None
    donate: bool = True
    rank: int | None = None  # whose own numbers a training step draws throughout; None: its core alone does
    compiled: list[Compiled] = field(default_factory=list)
    replay: Replay | None = None  # of the compiled steps, as CUDA graphs


def planned(cfg: Mapping[str, Any], info: RunInfo, parts: Parts, needed: Mapping[str, Any], draws: Draws | None = None) -> Plan:
    """Decide what to compile, as a pure function of the cfg and the machine: a resumed run decides the same.

    Args:
        cfg: completed.
        info: of the run.
        parts: of the run.
        needed: what hooks ask of the compile line: `{"cut": "loss"}`.
        draws: the random numbers of a training step, where there is one.

    Raises:
        ConfigError: when cfg.compile says another cut than a hook needs, or than random numbers need.
    """
    asked = cfg["compile"]
    options: dict[str, Any] = {k: v for k, v in asked.items() if v is not None} if isinstance(asked, dict) else {}
    enabled, why = _enabled(asked, info)
    sync = cfg["dist"]["sync"] if info.world_size > 1 else "none"
    cut = options.get("cut", needed.get("cut", "step"))
    if cut != needed.get("cut", cut):
        raise ConfigError(f"cfg.compile.cut is {cut!r}, and a hook of this run needs {needed['cut']!r}: leave the cut out.")
    if sync == "ddp" or (cut == "step" and parts.optimizer is not None and not parts.optimizer.traced):
        cut = "loss"  # no graph may hold DDP's backward
    rank = None
    if enabled and sync == "graph" and cut == "step" and draws is not None:
        # A graph has one generator. Replicas would drift apart if numbers that must be alike were drawn by rank.
        if draws.below and draws.above:
            if "cut" in options:
                raise ConfigError(
                    "cfg.compile.cut is 'step', and on several ranks one graph cannot draw random numbers both in the loss (other\n"
                    "  ones on each rank) and in grad or step hooks (the same on all ranks): leave the cut out, or cut='grad'."
                )
            cut, why = "grad", f"{why}; hooks around the gradient draw random numbers, and so does the loss"
        rank = None if draws.above else info.rank
    donate = options.get("donate", True)
    no_replay = _no_replay(options.get("cudagraph"), info, enabled, cut, donate)
    replay = None if no_replay else Replay(CudaRecorder(info.device), info.say)
    if options.get("cudagraph") and no_replay:
        info.say(f"cfg.compile.cudagraph: there is no CUDA graph: {no_replay}")
    return Plan(enabled, why, cut, sync, options.get("mode"), donate, rank, replay=replay)


def _no_replay(asked: bool | None, info: RunInfo, enabled: bool, cut: str, donate: bool) -> str:
    """Why steps are not recorded; "" where they are."""
    reasons = {
        "compile.cudagraph=False": asked is False,
        "it needs a CUDA device": info.device.type != "cuda",
        "nothing is compiled": not enabled,
        f"the cut is at the {cut}": cut != "step",
        "compile.donate=False": not donate,
        "several processes train together": info.world_size > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _enabled(asked: Any, info: RunInfo) -> tuple[bool, str]:
    if asked is False:
        return False, "compile=False"
    if asked == "auto" and info.device.type != "cuda":
        if info.total_steps < _PAYS_FROM:
            return False, f"auto: does not pay within {info.total_steps} steps on a CPU"
        if not any(shutil.which(c) for c in ("c++", "g++", "clang++")):
            return False, "auto: there is no C++ compiler"
    return True, "auto" if asked == "auto" else f"compile={asked!r}"


def verify_gradient(parts: Parts, state: TrainState) -> None:
    """Compare compiled with eager gradients where a custom `autograd.Function` takes part: a wrong one must never be silent."""
    loss, sample = parts.losses["val"], parts.sample
    with torch.enable_grad():
        total, _ = loss(state.params, state.buffers, sample)
    if not has_custom_backward(total):
        return
    grad = local_grad(loss, parts.trainable)
    with torch.no_grad():
        (eager, _), (compiled, _) = grad(state, sample), lift(grad, "verify")(state, sample)
    scale = max(float(g.abs().max()) for g in eager.values()) or 1.0
    worst = max((float((compiled[n] - g).abs().max()) / scale, n) for n, g in eager.items())
    if not worst[0] < 1e-2:
        raise ConfigError(
            f"cfg.compile: the compiled gradient of {worst[1]!r} is wrong by {worst[0]:.1%}: a custom autograd.Function\n"
            "  is not honoured by this version of torch. Use compile=dict(cut='loss') or compile=False."
        )


def has_custom_backward(total: Tensor) -> bool:
    """Whether a custom `autograd.Function` (or a custom operator's `register_autograd`) took part in `total`."""
    todo, seen = [total.grad_fn], set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        todo.extend(n for n, _ in node.next_functions)
    return False


def refuse_unused(loss: Loss, state: TrainState, parts: Parts) -> None:
    """DDP waits for every parameter's gradient; for one that has none it would leave a whole bucket without a reduction."""
    with torch.no_grad():
        used, _ = local_grad(loss, parts.trainable)(state, dict(parts.sample))
    if unused := [n for n in state.params if n in parts.trainable and n not in used]:
        raise ConfigError(
            f"cfg.model: the loss does not use {len(unused)} of {len(parts.trainable)} trainable parameters: "
            f"{', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''}.\n"
            f"  Freeze them, optimizer.freeze={unused[:8]}, or let DDP look for them in every step:\n"
            "  hooks.ddp=dict(type='DDPHook', find_unused_parameters=True). dist.sync='graph' needs neither."
        )
