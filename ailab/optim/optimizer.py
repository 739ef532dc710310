"""What an optimizer is: two pure functions, `init` and `update`, over named parameters."""

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
    """An optimizer as values: `params, opt_state = update(grads, opt_state, params)`, called under `torch.no_grad()`.

    `update` leaves its inputs untouched. Parameters that `grads` lacks, and their state, come back as the same tensors. The
    structure, shapes and dtypes of a traced optimizer's state never change. It counts its updates once, where torch counts per
    parameter: a parameter whose first gradient comes late is corrected as if it had been there from the start.
    """

    name: str
    groups: tuple[Group, ...]
    init: Callable[[Params], OptState]
    update: Callable[[Params, OptState, Params], tuple[Params, OptState]]
    traced: bool  # False: it calls its class's own Python .step(), so it runs outside the graph
    update_: Callable[[Params, OptState, Params], tuple[Params, OptState]] | None = None  # the same, writing into its inputs
    closure_update: Callable[[Evaluate, OptState, Params], tuple[Params, OptState]] | None = None


def lrs(opt_state: OptState) -> list[Tensor]:
    """The learning rate of each group, () float64 each."""
    return list(opt_state["lr"].unbind())


def with_lrs(opt_state: OptState, new: Sequence[Tensor]) -> OptState:
    """The state with other learning rates, one () float64 tensor per group; everything else is shared."""
    # One vector: a 0-d float64 CPU input makes torch.compile trace the whole graph twice.
    return {**opt_state, "lr": torch.stack(list(new))}
