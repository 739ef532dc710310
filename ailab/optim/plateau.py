"""ReduceLROnPlateau as pure functions. It depends on a metric, so it has a state instead of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ailab.optim.schedule import build_scheduler, dummy_optimizer

Memory: TypeAlias = dict[str, Tensor]
_COUNTS = ("num_bad_epochs", "cooldown_counter", "last_epoch")


@dataclass(frozen=True)
class Plateau:
    """`memory, lrs = update(memory, metric, lrs)`, once per epoch. The inputs are not changed."""

    init: Callable[[], Memory]  # 0-d tensors: "best" float64 and the counts int64
    update: Callable[[Memory, float, Sequence[float]], tuple[Memory, list[float]]]


def plateau(cfg: Mapping[str, Any], base_lrs: Sequence[float], *, path: str = "cfg.lr_scheduler") -> Plateau:
    """Pure functions around torch's own ReduceLROnPlateau. Its state is set before each step and read after it.

    Args:
        cfg: `dict(type="ReduceLROnPlateau", factor=0.5, patience=3)`; every argument of the class.
        base_lrs: learning rates of the cfg, one per parameter group.
        path: path in the cfg, for error messages.

    Raises:
        ConfigError: for an argument that the class does not take or accept.
    """
    optimizer = dummy_optimizer(base_lrs)
    scheduler: ReduceLROnPlateau = build_scheduler(cfg, optimizer, None, path)

    def memory() -> Memory:
        counts = {k: torch.tensor(getattr(scheduler, k), dtype=torch.int64) for k in _COUNTS}
        return {"best": torch.tensor(float(scheduler.best), dtype=torch.float64), **counts}

    start = memory()

    def init() -> Memory:
        return {k: v.clone() for k, v in start.items()}

    def update(old: Memory, metric: float, lrs: Sequence[float]) -> tuple[Memory, list[float]]:
        scheduler.best = float(old["best"])
        for key in _COUNTS:
            setattr(scheduler, key, int(old[key]))
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        scheduler.step(metric)  # pyright: ignore[reportUnknownMemberType]
        return memory(), [float(g["lr"]) for g in optimizer.param_groups]

    return Plateau(init, update)
