"""Convert the optimizer state to and from the `state_dict()` format of torch.optim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ailab import tree
from ailab.errors import CheckpointError
from ailab.optim.optimizer import Optimizer, OptState
from ailab.optim.rows import ROWS


def _groups(opt: Optimizer, opt_state: OptState) -> list[dict[str, Any]]:
    """`param_groups` of a torch state dict. Parameters are numbered in the order of the names in the groups."""
    packed, start = list[dict[str, Any]](), 0
    live: list[dict[str, Any]] = opt_state.get("groups") or [{} for _ in opt.groups]
    for group, lr, saved in zip(opt.groups, opt_state["lr"].tolist(), live, strict=True):
        numbers = list(range(start, start + len(group.names)))
        packed.append({**group.hyper, **tree.clone(saved), "lr": lr, "params": numbers})
        start += len(numbers)
    return packed


def torch_state_dict(opt: Optimizer, opt_state: OptState) -> dict[str, Any]:
    """The `state_dict()` of the torch class: `{"state": {index: {key: value}}, "param_groups": [...]}`.

    Parameters are numbered in the order of `opt.groups` and of their names. Tensors are copies. Before the first update the state
    is empty, as in torch.
    """
    entries: dict[int, dict[str, Any]] = {}
    names = [(g, n) for g, group in enumerate(opt.groups) for n in group.names]
    if not opt.traced:
        saved = cast("dict[str, dict[str, Any]]", opt_state["state"])
        entries = {i: tree.clone(saved[n]) for i, (_, n) in enumerate(names) if n in saved}
    elif float(opt_state["step"]) > 0:
        row = ROWS[opt.name]
        for i, (g, name) in enumerate(names):
            entry = {"step": opt_state["step"].clone()} if row.counts else {}
            entry |= {k: opt_state[k][g].clone() for k in row.scalars}
            entries[i] = entry | {k: opt_state[k][name].clone() for k in row.slots if name in opt_state.get(k, {})}
    return {"state": entries, "param_groups": _groups(opt, opt_state)}


def _checked(opt: Optimizer, sd: Mapping[str, Any]) -> list[list[Any]]:
    """The parameter indices of each group of `sd`."""
    expected, found = [len(g.names) for g in opt.groups], [len(g["params"]) for g in sd["param_groups"]]
    if expected != found:
        raise CheckpointError(
            f"the {opt.name} state has groups of {found} parameters, but this optimizer has groups of {expected}."
        )
    return [list(g["params"]) for g in sd["param_groups"]]


def _filled(like: Any, value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(like.shape).clone()


def _read(opt: Optimizer, like: OptState, named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a traced optimizer. Where `named` has no entry, that of `like`."""
    row, new = ROWS[opt.name], cast("dict[str, Any]", tree.clone(like))
    # torch counts per parameter. SGD and Muon have no count: if there is a momentum, the count is at least 1.
    counts = [float(e["step"]) if "step" in e else float(any(v is not None for v in e.values())) for e in named.values()]
    new["step"] = torch.full_like(new["step"], max(counts))
    for key in row.slots:
        held: dict[str, Tensor] = new.get(key, {})
        for name, old in held.items():
            value = named[name].get(key)
            if value is not None and value.shape != old.shape:
                raise CheckpointError(f"{key} of {name} is {tuple(value.shape)}, expected {tuple(old.shape)}.")
            held[name] = old if value is None else _filled(old, value)
    for key in row.scalars:
        for at, group in enumerate(opt.groups):
            found = [named[n][key] for n in group.names if key in named[n]]
            new[key][at] = _filled(new[key][at], found[0]) if found else new[key][at]
    return new


def from_torch_state_dict(opt: Optimizer, opt_state_like: OptState, sd: Mapping[str, Any]) -> OptState:
    """The state of a torch `state_dict()`, `sd`. Entries that `sd` does not have are taken from `opt_state_like`.

    torch has a step count per parameter, and this package has one for all: the largest is used. For a traced optimizer only lr is
    read from the groups. The other hyper-parameters are those that it was built with.

    Raises:
        CheckpointError: when the groups of `sd` do not have the sizes of `opt.groups`, or a tensor has another shape.
    """
    lr_like, numbers = opt_state_like["lr"], _checked(opt, sd)
    lr = _filled(lr_like, [float(g["lr"]) for g in sd["param_groups"]])
    names = [n for g in opt.groups for n in g.names]
    named = {n: sd["state"].get(i, {}) for n, i in zip(names, [i for at in numbers for i in at], strict=True)}
    if opt.traced:
        return {**_read(opt, opt_state_like, named), "lr": lr}
    groups = [{k: v for k, v in g.items() if k not in ("params", "param_names", "lr")} for g in sd["param_groups"]]
    return {"lr": lr, "state": {n: tree.clone(dict(e)) for n, e in named.items() if e}, "groups": tree.clone(groups)}
