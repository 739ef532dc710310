"""A table of the torch.optim classes: the state that each class keeps, and its functional form.

The update is torch's own functional form (`torch.optim.adam.adam` and so on). A row has what the functional form does not tell:
the names, the order and the initial values of its state lists.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

Hyper: TypeAlias = Mapping[str, Any]
# (parameter, hyper) -> initial value, None where there is no such state
StateInit: TypeAlias = Callable[[Tensor, Hyper], Tensor | None]


@dataclass(frozen=True)
class Row:
    """One class of torch.optim. The order of `slots`, `scalars`, step is that of the list arguments of the functional form."""

    slots: dict[str, StateInit]  # per parameter
    scalars: dict[str, float] = field(default_factory=dict[str, float])  # per group: equal for all of its parameters
    counts: bool = True  # the functional form takes a list of step counts
    fused: bool = False  # there is a fused kernel
    unpack: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])  # tuples that are several arguments
    from_lr: tuple[str, ...] = ()  # state that is initialised with the lr of the first update
    padded: bool = False  # the functional form takes None where a parameter has no such state


def _zeros(param: Tensor, _: Hyper) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def _full(param: Tensor, value: float) -> Tensor:
    fill = complex(value, value) if param.is_complex() else value
    return torch.full_like(param, fill, memory_format=torch.preserve_format)


def _zeros_if(wanted: Callable[[Hyper], bool]) -> StateInit:
    return lambda param, hyper: _zeros(param, hyper) if wanted(hyper) else None


def _row_var(param: Tensor, _: Hyper) -> Tensor | None:
    return param.new_zeros((*param.shape[:-1], 1)) if param.dim() > 1 else None


def _col_var(param: Tensor, _: Hyper) -> Tensor | None:
    return param.new_zeros((*param.shape[:-2], 1, param.shape[-1])) if param.dim() > 1 else None


def _variance(param: Tensor, _: Hyper) -> Tensor | None:
    return None if param.dim() > 1 else torch.zeros_like(param)


_BETAS = {"betas": ("beta1", "beta2")}
_MOMENTS: dict[str, StateInit] = {"exp_avg": _zeros, "exp_avg_sq": _zeros}
_ADAM = Row({**_MOMENTS, "max_exp_avg_sq": _zeros_if(lambda h: h["amsgrad"])}, fused=True, unpack=_BETAS)

ROWS: dict[str, Row] = {
    "Adadelta": Row({"square_avg": _zeros, "acc_delta": _zeros}),
    "Adafactor": Row(
        {"row_var": _row_var, "col_var": _col_var, "variance": _variance}, unpack={"eps": ("eps1", "eps2")}, padded=True
    ),
    "Adagrad": Row({"sum": lambda p, h: _full(p, h["initial_accumulator_value"])}, fused=True),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": Row({"exp_avg": _zeros, "exp_inf": _zeros}, unpack=_BETAS),
    "ASGD": Row({"ax": _zeros}, {"mu": 1.0, "eta": 0.0}, from_lr=("eta",)),
    "Muon": Row({"momentum_buffer": _zeros}, counts=False),
    "NAdam": Row(_MOMENTS, {"mu_product": 1.0}, unpack=_BETAS),
    "RAdam": Row(_MOMENTS, unpack=_BETAS),
    "RMSprop": Row(
        {
            "square_avg": _zeros,
            "grad_avg": _zeros_if(lambda h: h["centered"]),
            "momentum_buffer": _zeros_if(lambda h: h["momentum"] > 0),
        }
    ),
    "Rprop": Row(
        {"prev": _zeros, "step_size": lambda p, h: _full(p, h["lr"])},
        unpack={"etas": ("etaminus", "etaplus"), "step_sizes": ("step_size_min", "step_size_max")},
        from_lr=("step_size",),
    ),
    "SGD": Row({"momentum_buffer": _zeros_if(lambda h: h["momentum"] != 0)}, counts=False, fused=True),
}


def functional(name: str) -> Callable[..., None]:
    """The in-place functional form of the torch.optim class `name`."""
    lower = name.lower()
    public = getattr(torch.optim, "functional", None)  # torch >= 2.15
    if public is not None and hasattr(public, lower):
        return getattr(public, lower)
    module = next(m for m in (f"torch.optim.{lower}", f"torch.optim._{lower}") if importlib.util.find_spec(m))
    return getattr(importlib.import_module(module), lower)


def cpu_kernel(name: str, hyper: Hyper) -> Callable[..., None] | None:
    """torch's private CPU kernel of fused Adam and AdamW, without 40 us of Python around it. None for other classes.

    Called as `kernel(params, grads, *lists, step=..., lr=..., **hyper)`. `step` is the count before this update.
    """
    decoupled = name == "AdamW" or hyper.get("decoupled_weight_decay")
    kernel: Any = getattr(torch, "_fused_adamw_" if decoupled else "_fused_adam_", None)
    if name not in ("Adam", "AdamW") or kernel is None:
        return None
    takes = ("beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")

    def run(*lists: list[Tensor], step: Tensor, lr: float, **how: Any) -> None:
        steps = [step + 1] * len(lists[0])  # the kernel only reads them
        kernel(*lists, steps, lr=lr, **{k: how[k] for k in takes}, grad_scale=None, found_inf=None)

    return run


def arguments(row: Row, fn: Callable[..., None], hyper: Hyper, has_complex: bool) -> dict[str, Any]:
    """The keyword arguments of `fn` from `hyper`, without lr and the choice of implementation."""
    flat: dict[str, Any] = {"has_complex": has_complex}
    for key, value in hyper.items():
        flat.update(zip(row.unpack[key], value, strict=True) if key in row.unpack else [(key, value)])
    chosen_later = {"lr", "foreach", "fused", "capturable", "differentiable"}
    return {k: v for k, v in flat.items() if k in inspect.signature(fn).parameters and k not in chosen_later}
