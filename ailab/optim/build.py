"""An optimizer from a class of torch.optim, or any other, by name or by itself."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ailab.errors import ConfigError, nearest
from ailab.optim.groups import make_groups
from ailab.optim.optimizer import Optimizer
from ailab.optim.rows import ROWS
from ailab.optim.stateful import stateful_optimizer
from ailab.optim.traced import traced_optimizer
from ailab.types import Params


def torch_classes() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer class of torch.optim by its name."""
    found = {n: v for n, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)}
    return {n: c for n, c in found.items() if c is not torch.optim.Optimizer}


def _resolve(named: Any, path: str) -> type[torch.optim.Optimizer]:
    known = torch_classes()
    if isinstance(named, str) and named in known:
        return known[named]
    if isinstance(named, type) and issubclass(named, torch.optim.Optimizer):
        return named
    near = nearest(str(named), known)  # pyright: ignore[reportUnknownArgumentType]
    offered = ", ".join(sorted(known))
    raise ConfigError(
        f"{path}.type: {named!r} is no optimizer.{near}\n  A class derived from torch.optim.Optimizer, or one of: {offered}."
    )


def build_optimizer(
    cls_or_name: type[torch.optim.Optimizer] | str,
    params: Params,
    *,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    path: str = "cfg.optimizer",
    frozen: Collection[str] = (),
    **hyper: Any,
) -> Optimizer:
    """An optimizer with the arguments and defaults of its torch class.

    Args:
        cls_or_name: a name in torch.optim, or any class derived from `torch.optim.Optimizer`.
        params: every parameter by dotted name; only shapes, dtypes and devices are read, and one device is expected.
        param_groups: entries such as `dict(params="*.bias", weight_decay=0.0)`: a glob pattern or a list of them, and
            hyper-parameters that differ. The first match wins; the names without a match form the first group.
        path: where the cfg says so, for error messages.
        frozen: names that are in no group.
        **hyper: arguments of the class.

    Raises:
        ConfigError: for an unknown class, an argument that the class does not take or refuses, or a pattern without a match.
    """
    cls = _resolve(cls_or_name, path)
    groups = make_groups(cls, params, param_groups, path, frozen, hyper)
    # A user's class of the same name is not torch's.
    if cls.__name__ in ROWS and torch_classes().get(cls.__name__) is cls:
        return traced_optimizer(cls.__name__, groups, params)
    return stateful_optimizer(cls, groups, params)
