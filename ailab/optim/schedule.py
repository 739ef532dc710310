"""Learning-rate schedules as tables. torch's own scheduler is run once at the start, on a dummy optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ailab.errors import ConfigError
from ailab.optim.groups import check_arguments
from ailab.optim.instance import instance
from ailab.registry import LR_SCHEDULERS

Factory: TypeAlias = Callable[[torch.optim.Optimizer], Any]  # optimizer -> scheduler


@LR_SCHEDULERS.register_module()
class WarmupAndCosineAnnealingLR(LRScheduler):
    """Linear warm-up to the base lr, then cosine annealing to `eta_min`, then constant.

    In closed form, at position t, with w = warmup_steps, T = total_steps, f = warmup_start_factor:

        t < w:    lr = base * (f + (1 - f) * t / w)
        t >= w:   lr = eta_min + (base - eta_min) * (1 + cos(pi * min(1, (t - w) / (T - w)))) / 2

    Args:
        optimizer: the optimizer whose learning rates are set.
        warmup_steps: length of the warm-up, at least 0, in the unit that the scheduler counts (steps or epochs). If it is
            `total_steps` or more, the run ends during the warm-up.
        total_steps: position at which `eta_min` is reached, at least 1, in the same unit.
        eta_min: final lr, for every parameter group.
        warmup_start_factor: lr at the start of the warm-up as a fraction of the base lr, in [0, 1].
        last_epoch: index of the last position, as for every torch scheduler. -1: start from the beginning.

    Raises:
        ValueError: when an argument is outside its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        total_steps: int,
        eta_min: float = 0.0,
        warmup_start_factor: float = 0.0,
        last_epoch: int = -1,
    ):
        if warmup_steps < 0 or total_steps < 1:
            raise ValueError(f"expected warmup_steps >= 0 and total_steps >= 1, got {warmup_steps} and {total_steps}")
        if not 0.0 <= warmup_start_factor <= 1.0:
            raise ValueError(f"expected 0 <= warmup_start_factor <= 1, got {warmup_start_factor}")
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.eta_min, self.warmup_start_factor = eta_min, warmup_start_factor
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates at `last_epoch`, one per group."""
        t, w, f = self.last_epoch, self.warmup_steps, self.warmup_start_factor
        if t < w:
            return [base * (f + (1 - f) * t / w) for base in self.base_lrs]
        done = min(1.0, (t - w) / max(1, self.total_steps - w))
        part = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * part for base in self.base_lrs]


class _Rates(torch.optim.Optimizer):
    """Parameter groups and their learning rates. It updates nothing: a `step` of torch's own would import the compiler."""

    def step(self, closure: Any = None) -> Any:
        """Do nothing. Schedulers check that it was called."""


def dummy_optimizer(base_lrs: Sequence[float]) -> torch.optim.Optimizer:
    """An optimizer with one group per lr. It has a momentum, which schedulers that cycle momentum need; it is not used."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base_lrs]
    return instance(_Rates, groups, defaults={"lr": base_lrs[0], "momentum": 0.9})


def build_scheduler(cfg: Mapping[str, Any], optimizer: torch.optim.Optimizer, n: int | None, path: str) -> Any:
    """The scheduler of `cfg`, with its nested `schedulers`. `total_steps` is `n` if the class takes it and `cfg` does not set it.

    Raises:
        ConfigError: for an unknown class, or an argument that it does not take or accept.
    """
    if "type" not in cfg:
        raise ConfigError(f"{path}: a scheduler needs a `type`, got {sorted(cfg)}.")
    cls: Any = LR_SCHEDULERS.get(cfg["type"], f"{path}.type")
    kwargs = {k: v for k, v in cfg.items() if k != "type"}
    check_arguments(cls, kwargs, path, reserved=("optimizer",))
    for key, value in kwargs.items():
        if key == "schedulers":
            parts = cast("Sequence[Mapping[str, Any]]", value)
            kwargs[key] = [build_scheduler(c, optimizer, n, f"{path}.schedulers.{i}") for i, c in enumerate(parts)]
    wants = inspect.signature(cls).parameters
    if "total_steps" in wants and "total_steps" not in kwargs and "epochs" not in kwargs and n is not None:
        kwargs["total_steps"] = max(1, n)
    try:
        # ChainedScheduler has its optimizer as an optional keyword, every other class as its first argument.
        return cls(optimizer=optimizer, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {cls.__name__} refuses {kwargs}: {error}") from error


def follows_length(cfg: Mapping[str, Any]) -> bool:
    """Whether the schedule, or a part of it, is given no length of its own and so has that of the run."""
    nested = cast("Sequence[Mapping[str, Any]]", cfg.get("schedulers", ()))
    takes = inspect.signature(LR_SCHEDULERS.get(cfg["type"])).parameters
    return ("total_steps" in takes and not {"total_steps", "epochs"} & {*cfg}) or any(follows_length(part) for part in nested)


def lr_table(
    cfg: Mapping[str, Any] | Factory,
    base_lrs: Sequence[float],
    n: int,
    *,
    path: str = "cfg.lr_scheduler",
) -> Tensor:
    """The learning rates at positions 0..n from torch's own scheduler, (n + 1, groups) float64.

    Row 0 is the lr of the first update. Each further row is one `scheduler.step()` later. The caller decides whether a position
    is a step or an epoch. Only the lr is scheduled: OneCycleLR and CyclicLR do not change momentum or betas.

    Args:
        cfg: `dict(type="CosineAnnealingLR", T_max=10)`, with `schedulers=[dict(...), ...]` for SequentialLR and
            ChainedScheduler; or a function from an optimizer to a scheduler. `total_steps` is `n`, if a class takes it and
            `cfg` does not set it.
        base_lrs: learning rates of the cfg, one per parameter group.
        n: the last position.
        path: path in the cfg, for error messages.

    Raises:
        ConfigError: for a cfg that does not fit, a schedule that ends before `n`, or one that needs a metric.
    """
    optimizer = dummy_optimizer(base_lrs)
    scheduler = cfg(optimizer) if callable(cfg) else build_scheduler(cfg, optimizer, n, path)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(f"{path}: ReduceLROnPlateau depends on a metric, so it cannot be a table; use plateau().")
    optimizer.step()  # without gradients: torch warns when a scheduler steps before its optimizer
    groups = optimizer.param_groups
    rows = [[float(g["lr"]) for g in groups]]
    for position in range(1, n + 1):
        try:
            scheduler.step()
        except ValueError as error:
            raise ConfigError(f"{path}: the schedule ends before position {position} of {n}: {error}") from error
        rows.append([float(g["lr"]) for g in groups])
    return torch.tensor(rows, dtype=torch.float64)


def lr_at(table: Tensor, position: Tensor) -> list[Tensor]:
    """The learning rates at `position`, () integer: one () float64 per group, the last row after the end. No device read."""
    row = table.index_select(0, position.clamp(0, table.shape[0] - 1).reshape(1))[0]
    return list(row.unbind())
