"""TensorboardHook: every scalar of every phase as TensorBoard events."""

from __future__ import annotations

from typing import Any

from ailab.hooks.scalars import Report, observe
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import RunInfo, TrainState


@HOOKS.register_module()
def TensorboardHook(
    interval: int = 50, log_dir: str | None = None, *, run: RunInfo, name: str = "tensorboard"
) -> list[Middleware[Any]]:
    """Every scalar of every phase as TensorBoard events over `state.step`.

    Running means of the training phase are "train/<name>", every `interval` steps; results of a phase "epoch/<phase>/<name>";
    the learning rate is "lr/<group>". A resumed run purges what the interrupted one wrote after its checkpoint.

    Args:
        interval: in optimizer steps.
        log_dir: `work_dir/tensorboard` by default.
        run: given by the framework.
        name: of this hook.
    """
    writer: Any = None

    def begin(state: TrainState) -> None:
        nonlocal writer
        from torch.utils.tensorboard import SummaryWriter

        purge = state.at + 1 if state.at and run.steps_per_epoch else None  # an evaluation adds to what is there
        writer = SummaryWriter(log_dir or str(run.work_dir / "tensorboard"), purge_step=purge)

    def emit(report: Report) -> None:
        if writer is None:
            return
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        for key, value in report.means.items():
            writer.add_scalar(f"{prefix}/{key}", value, report.step)
        for i, lr in enumerate(report.lrs if not report.final else ()):
            writer.add_scalar(f"lr/{i}", lr, report.step)

    def wrap(run_all: Any) -> Any:
        def closed(state: TrainState) -> TrainState:
            try:
                return run_all(state)
            finally:
                if writer is not None:
                    writer.close()

        return closed

    return [*observe(name, emit, run, every=interval, begin=begin), Middleware(name, wrap, "run")]
