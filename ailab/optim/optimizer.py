"""An optimizer as two pure functions, `init` and `update`, over named parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ailab.types import Params, PyTree

OptState: TypeAlias = PyTree
Evaluate: TypeAlias = Callable[[Params], tuple[Tensor, Params]]  # params -> (loss (), gradients)


@dataclass(frozen=True)
class Group:
    """Parameters that share their hyper-parameters."""

    names: tuple[str, ...]
    hyper: dict[str, Any]  # every hyper-parameter of the class, "lr" as a float before any schedule


@dataclass(frozen=True)
class Optimizer:
    """A functional optimizer: `params, opt_state = update(grads, opt_state, params)`, called under `torch.no_grad()`.

    `update` does not change its inputs. Parameters without a gradient, and their state, are returned as the same tensors. The
    structure, shapes and dtypes of a traced optimizer's state never change. There is one step count for all parameters, where
    torch counts per parameter. So the bias correction of a parameter whose first gradient comes late uses the count of all
    updates.
    """

    name: str
    groups: tuple[Group, ...]
    init: Callable[[Params], OptState]
    update: Callable[[Params, OptState, Params], tuple[Params, OptState]]
    traced: bool  # False: it calls the Python .step() of its class, outside the graph
    update_: Callable[[Params, OptState, Params], tuple[Params, OptState]] | None = None  # in place: it writes into its inputs
    closure_update: Callable[[Evaluate, OptState, Params], tuple[Params, OptState]] | None = None


def lrs(opt_state: OptState) -> list[Tensor]:
    """The learning rate of each parameter group, () float64 each."""
    return list(opt_state["lr"].unbind())


def with_lrs(opt_state: OptState, new: Sequence[Tensor]) -> OptState:
    """The state with new learning rates, one () float64 tensor per group. Everything else is shared."""
    # One vector: a 0-d float64 CPU input makes torch.compile trace the whole graph twice.
    return {**opt_state, "lr": torch.stack(list(new))}
