"""Build an optimizer from a name in torch.optim or any optimizer class."""

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
    """Every optimizer class of torch.optim, by name."""
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
        f"{path}.type: {named!r} is not an optimizer.{near}\n  Give a subclass of torch.optim.Optimizer, or one of: {offered}."
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
        params: every parameter by dotted name. Only shapes, dtypes and devices are read. All must be on one device.
        param_groups: entries such as `dict(params="*.bias", weight_decay=0.0)`: a glob pattern or a list of them, and
            hyper-parameters that differ. The first match counts. The names without a match are the first group.
        path: path in the cfg, for error messages.
        frozen: names of parameters that are not trained.
        **hyper: arguments of the class.

    Raises:
        ConfigError: for an unknown class, an argument that the class does not take or accept, or a pattern without a match.
    """
    cls = _resolve(cls_or_name, path)
    groups = make_groups(cls, params, param_groups, path, frozen, hyper)
    # A user's class of the same name is another class.
    if cls.__name__ in ROWS and torch_classes().get(cls.__name__) is cls:
        return traced_optimizer(cls.__name__, groups, params)
    return stateful_optimizer(cls, groups, params, path)
