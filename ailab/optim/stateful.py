"""Pure functions for any other `torch.optim.Optimizer` class: its state is copied in and out around its own `.step()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ailab import tree
from ailab.errors import AilabError, ConfigError
from ailab.optim.instance import instance
from ailab.optim.optimizer import Evaluate, Group, Optimizer, OptState
from ailab.types import Params

_PLAIN = (Tensor, bool, int, float, str, type(None))
_NO_MEMORY = ("params", "param_names", "lr")  # entries of a group that are kept elsewhere


class _Stateful:
    """An instance of the class with its own parameters. Its values matter only during a call."""

    def __init__(self, cls: type[torch.optim.Optimizer], groups: tuple[Group, ...], params: Params, path: str):
        self.own = {n: nn.Parameter(params[n].detach().clone()) for g in groups for n in g.names}
        self.optimizer = instance(cls, [{"params": [self.own[n] for n in g.names], **g.hyper} for g in groups])
        self.hyper = [tree.clone({k: v for k, v in g.items() if k not in _NO_MEMORY}) for g in self.optimizer.param_groups]
        self.path, self.attributes = path, _attributes(self.optimizer)
        self.checked = False

    def load(self, opt_state: OptState, params: Params) -> None:
        """Copy values and state into the instance."""
        with torch.no_grad():
            for name, own in self.own.items():
                own.copy_(params[name])
        self.optimizer.state.clear()
        for name, saved in opt_state["state"].items():
            self.optimizer.state[self.own[name]] = _placed(saved, self.own[name].device)
        rates, memory = opt_state["lr"].tolist(), opt_state["groups"]
        for group, hyper, lr, saved in zip(self.optimizer.param_groups, self.hyper, rates, memory, strict=True):
            group.update(tree.clone({**hyper, **saved}))
            group["lr"] = lr

    def set_grads(self, grads: Params) -> None:
        """Copy gradients into the instance; a missing one is None."""
        for name, own in self.own.items():
            own.grad = grads[name].detach().clone() if name in grads else None

    def export(self, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        """Copy values and state out of the instance; a parameter without a gradient keeps its tensor."""
        new = {
            n: p if n not in self.own or self.own[n].grad is None else self.own[n].detach().clone() for n, p in params.items()
        }
        state = self.optimizer.state
        saved = {n: tree.clone(dict(state[own])) for n, own in self.own.items() if state.get(own)}
        after = {**opt_state, "state": saved, "groups": self.groups()}
        if not self.checked:
            self._check(after)
        return new, after

    def groups(self) -> list[dict[str, Any]]:
        """The entries of each group that the class has changed. Some classes keep state there. The others are those of the cfg."""
        pairs = zip(self.optimizer.param_groups, self.hyper, strict=True)
        changed = [{k: v for k, v in g.items() if k not in _NO_MEMORY and not _equal(v, h.get(k, _equal))} for g, h in pairs]
        return [tree.clone(c) for c in changed]

    def _check(self, after: OptState) -> None:
        """Refuse, after the first update, memory that no checkpoint would hold."""
        name = type(self.optimizer).__name__
        strange = [p for p, leaf in tree.items([after["state"], after["groups"]]) if type(leaf) not in _PLAIN]
        if strange:
            raise ConfigError(
                f"{self.path}.type: {name} keeps at {strange[0]!r} what is no tensor and no plain number, list or dict;\n"
                "  a checkpoint would not hold it."
            )
        now = _attributes(self.optimizer)
        moved = [n for n, v in now.items() if not _equal(v, self.attributes.get(n, _equal))]
        if moved and not type(self.optimizer).__module__.startswith("torch.optim"):
            raise ConfigError(
                f"{self.path}.type: {name} remembers {', '.join(map(repr, moved))} as attributes of its own,\n"
                "  which no checkpoint holds."
                " Keep them in self.state[p] or in self.param_groups."
            )
        self.checked = True


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a class keeps beside what every optimizer of torch has; tensors are copies."""
    usual = vars(instance(torch.optim.SGD, [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}]))
    return {n: tree.clone(v) for n, v in vars(optimizer).items() if n not in usual and not callable(v)}


def _equal(a: Any, b: Any) -> bool:
    """Whether two trees have the same leaves at the same paths; of what is neither tensor nor plain value, the same object."""
    left, right = dict(tree.items(a)), dict(tree.items(b))
    return left.keys() == right.keys() and all(_same(v, right[p]) for p, v in left.items())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    return a is b or (type(a) in _PLAIN and type(a) is type(b) and (a == b or (a != a and b != b)))


def _placed(saved: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A copy of the memory of one parameter beside it; a counter called "step" stays where it is, as torch leaves it."""
    return {
        k: tree.clone(v) if k == "step" else tree.map(lambda t: t.detach().to(device, copy=True), v) for k, v in saved.items()
    }


def stateful_optimizer(
    cls: type[torch.optim.Optimizer], groups: tuple[Group, ...], params: Params, path: str = "cfg.optimizer"
) -> Optimizer:
    """`cls` as `init` and `update`. Not traced.

    The opt_state is `{"lr": (groups,) float64, "state": {name: {key: value}}, "groups": [{key: value}]}`. Its `state` is filled
    by the first update, as in torch, and its `groups` hold what the class has changed in its `param_groups`. LBFGS, which needs a
    closure, has `closure_update`.

    Raises:
        ConfigError: at the first update, for a class that keeps memory in attributes of its own or in objects that no checkpoint
            can hold.
    """
    adapter = _Stateful(cls, groups, params, path)

    def init(params: Params) -> OptState:
        device = params[groups[0].names[0]].device
        rates = torch.tensor([g.hyper["lr"] for g in groups], dtype=torch.float64, device=device)
        return {"lr": rates, "state": {}, "groups": adapter.groups()}

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        adapter.load(opt_state, params)
        adapter.set_grads(grads)
        adapter.optimizer.step()
        return adapter.export(opt_state, params)

    def closure_update(evaluate: Evaluate, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        adapter.load(opt_state, params)

        def closure() -> Tensor:
            loss, grads = evaluate({n: adapter.own[n].detach().clone() if n in adapter.own else p for n, p in params.items()})
            adapter.set_grads({n: g.contiguous() for n, g in grads.items()})  # LBFGS views them as vectors
            return loss

        adapter.optimizer.step(cast("Any", closure))  # the stubs want a float; torch reads a () tensor
        return adapter.export(opt_state, params)

    def refuse(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        raise AilabError(f"{cls.__name__} evaluates the loss several times a step; call closure_update instead of update.")

    if issubclass(cls, torch.optim.LBFGS):
        return Optimizer(cls.__name__, groups, init, refuse, traced=False, closure_update=closure_update)
    return Optimizer(cls.__name__, groups, init, update, traced=False)
