"""The picture of a run: every callable from the run down to the core, with its hooks at their depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ailab.job.assemble import Job
from ailab.stack import DEPTHS, Depth, Middleware, at
from ailab.tree import nbytes

_MAY = {
    "run": "resume, open and close writers, catch signals",
    "epoch": "evaluate, save, report, stop early",
    "host": "do I/O every n steps",
    "step": "map state to state",
    "grad": "call the gradient again",
    "loss": "change the forward",
}


def picture(job: Job) -> str:
    """The stack of design, outermost first; within a depth the hook that is listed last stands first."""
    lines = [f"{'depth':<7}{'hooks, outermost first':<50}  may"]
    for depth in reversed(DEPTHS):
        lines.append(f"{depth:<7}{_hooks(job, depth):<50}  {_MAY[depth]}")
        if depth == "epoch":
            lines.append(" fold   ---------- one batch at a time; logs add up ----------")
        if depth == "host":
            lines.append(f" line   ========== {_line(job)} ==========")
    state = f"{len(job.state.params)} parameter tensors, {nbytes(job.state) / 2**20:.1f} MiB of state"
    return "\n".join([*lines, f"core   {type(job.parts.model).__name__}: {state}"])


def _hooks(job: Job, depth: Depth) -> str:
    if depth == "run":
        return _names(at(next(iter(job.hooks.values())), depth))
    parts: dict[str, str] = {}
    if depth == "epoch":
        parts["all"] = _names(at(next(iter(job.hooks.values())), depth))
    for phase, hooks in job.hooks.items():
        parts[phase] = _names(at(hooks, depth, phase)) if depth != "grad" or phase == "train" else ""
    return "; ".join(f"{phase}: {names}" for phase, names in parts.items() if names) or "-"


def _names(hooks: Sequence[Middleware[Any]]) -> str:
    return ", ".join(h.name for h in reversed(hooks))


def _line(job: Job) -> str:
    plan = job.plan
    what = f"compiled at the {plan.cut}" if plan.enabled else "eager"
    sync = f", gradients by {plan.sync}" if plan.sync != "none" else ""
    return f"{what} ({plan.why}){sync}: only TrainState, Batch and Logs cross"
