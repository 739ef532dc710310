"""Parameter groups from glob patterns, with their hyper-parameters checked."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ailab.errors import ConfigError, more, nearest
from ailab.optim.instance import instance
from ailab.optim.optimizer import Group
from ailab.types import Params


def check_arguments(cls: type, given: Mapping[str, Any], path: str, reserved: Collection[str]) -> None:
    """Check that the constructor of `cls` takes every keyword of `given`.

    Raises:
        ConfigError: for the first keyword that it does not take, with the nearest name and all names.
    """
    taken = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    offered = [n for n in taken if n not in reserved]
    topic = cls.__name__ if cls.__module__.startswith("torch.") else None
    for key in given:
        if key not in offered:
            raise ConfigError(
                f"{path}.{key}: {cls.__name__} takes no {key!r}.{nearest(key, offered)}\n"
                f"  {cls.__name__} takes: {', '.join(offered)}.{more(topic)}"
            )


def _patterns(entry: Mapping[str, Any], path: str) -> list[str]:
    came: Any = entry.get("params")
    patterns: list[Any] = list(came) if isinstance(came, (list, tuple)) else [came]  # pyright: ignore[reportUnknownArgumentType]
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{path}.params: expected a glob pattern over parameter names or a list of them, got {came!r}.")
    return patterns


def split(names: Sequence[str], param_groups: Sequence[Mapping[str, Any]], path: str) -> list[tuple[list[str], dict[str, Any]]]:
    """`(names, overrides)` of each group: first the names that no pattern matches, if any, then one per entry.

    A name belongs to the first entry that matches it. Patterns are those of `fnmatch`: `*` matches dots too.

    Raises:
        ConfigError: when a pattern matches no name, or when earlier entries have every name that an entry matches.
    """
    rest, found = list(names), list[tuple[list[str], dict[str, Any]]]()
    for i, entry in enumerate(param_groups):
        at = f"{path}.param_groups[{i}]"
        patterns = _patterns(entry, at)
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in names):
                raise ConfigError(
                    f"{at}.params: {pattern!r} matches no trainable parameter.{nearest(pattern, names)}\n"
                    f"  There are {len(names)}: {', '.join(list(names)[:8])}{', ...' if len(names) > 8 else ''}"
                )
        mine = [n for n in rest if any(fnmatchcase(n, p) for p in patterns)]
        if not mine:
            raise ConfigError(f"{at}.params: earlier entries have every parameter that {patterns} matches. Change their order.")
        rest = [n for n in rest if n not in mine]
        found.append((mine, {k: v for k, v in entry.items() if k != "params"}))
    return [(rest, dict[str, Any]()), *found] if rest else found


def _placeholders(names: Sequence[str], params: Params) -> list[nn.Parameter]:
    """Empty parameters with the same device, dtype and number of dimensions, for torch's own checks."""
    empty = [torch.empty((0,) * params[n].dim(), dtype=params[n].dtype, device=params[n].device) for n in names]
    return [nn.Parameter(e) if e.is_floating_point() or e.is_complex() else nn.Parameter(e, requires_grad=False) for e in empty]


def _defaults(cls: type[torch.optim.Optimizer], names: Sequence[str], params: Params, given: Mapping[str, Any], path: str):
    """Every hyper-parameter, `given` or torch's default, checked by torch's class."""
    try:
        group = instance(cls, _placeholders(names, params), **given).param_groups[0]
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"{path}: {cls.__name__} refuses {dict(given)} for {names[0]!r} and others like it: {error}"
        ) from error
    if group.get("differentiable"):
        raise ConfigError(f"{path}.differentiable: True is not supported; the update runs without autograd.")
    hyper = {k: v for k, v in group.items() if k not in ("params", "param_names")}
    return hyper | {"lr": float(hyper["lr"])}


def make_groups(
    cls: type[torch.optim.Optimizer],
    params: Params,
    param_groups: Sequence[Mapping[str, Any]] | None,
    path: str,
    frozen: Collection[str],
    hyper: Mapping[str, Any],
) -> tuple[Group, ...]:
    """The groups of all parameters that are not frozen, with every hyper-parameter.

    Raises:
        ConfigError: for a hyper-parameter that the class does not take or accept, for a pattern without a match, or when there is
            no parameter to train.
    """
    names = [n for n in params if n not in frozen]
    if not names:
        raise ConfigError(f"{path}: there is no parameter to train; {len(params)} exist and {len(frozen)} are frozen.")
    check_arguments(cls, hyper, path, reserved=("params",))
    parts = split(names, param_groups or [], path)
    groups: list[Group] = []
    for i, (mine, overrides) in enumerate(parts):
        entry = i - (len(parts) - len(param_groups or []))
        at = path if entry < 0 else f"{path}.param_groups[{entry}]"
        check_arguments(cls, overrides, at, reserved=("params",))
        groups.append(Group(tuple(mine), _defaults(cls, mine, params, {**hyper, **overrides}, at)))
    return tuple(groups)
