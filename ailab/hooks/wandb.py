"""WandbHook: every scalar of every phase to Weights & Biases, from rank 0."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any

from ailab.config import snapshot
from ailab.hooks.scalars import Report, observe
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import RunInfo, TrainState


@HOOKS.register_module()
def WandbHook(
    init_args: Mapping[str, Any] | None = None, interval: int = 50, *, run: RunInfo, name: str = "wandb"
) -> list[Middleware[Any]]:
    """Log running means as "train/<name>" every `interval` steps and results as "epoch/<phase>/<name>" over `trainer/step`.

    The run id is derived from the work_dir, so a resumed run continues the same W&B run. Nothing is waited for longer than ten
    seconds: where W&B cannot be reached the run is recorded offline. An observer: its failures never end training.

    Args:
        init_args: of `wandb.init` (`project`, `name`, `mode`, ...).
        interval: in optimizer steps.
        run: given by the framework.
        name: of this hook.
    """
    live: Any = None

    def begin(state: TrainState) -> None:
        nonlocal live
        live = _start(dict(init_args or {}), run)

    def emit(report: Report) -> None:
        if live is None:
            return
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        row: dict[str, Any] = {f"{prefix}/{k}": v for k, v in report.means.items()}
        row.update({f"lr/{i}": lr for i, lr in enumerate(report.lrs)})
        live.log({**row, "trainer/step": report.step, "trainer/epoch": report.epoch})

    def wrap(run_all: Any) -> Any:
        def finished(state: TrainState) -> TrainState:
            code = 1
            try:
                state = run_all(state)
                code = 0
                return state
            finally:
                if live is not None:
                    live.finish(exit_code=code)

        return finished

    return [*observe(name, emit, run, every=interval, begin=begin), Middleware(name, wrap, "run")]


def _start(args: dict[str, Any], run: RunInfo) -> Any:
    wandb: Any = importlib.import_module("wandb")

    settings = wandb.Settings(init_timeout=10, console="off", disable_git=True, save_code=False)
    identity = hashlib.sha256(str(run.work_dir.resolve()).encode()).hexdigest()[:16]
    common: dict[str, Any] = {
        "id": identity,
        "resume": "allow",
        "dir": str(run.work_dir),
        "config": snapshot(run.cfg),
        "settings": settings,
    }
    if args.get("mode") == "offline":
        common.pop("resume")  # ignored offline, with a warning
    try:
        started = wandb.init(**{**common, **args})
    except wandb.errors.CommError as e:
        run.say(f"warning: W&B cannot be reached ({e}); recording offline")
        started = wandb.init(**{**common, **args, "mode": "offline"})
    started.define_metric("*", step_metric="trainer/step")
    return started
