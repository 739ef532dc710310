"""Pure functions for any other `torch.optim.Optimizer` class: its state is copied in and out around its own `.step()`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ailab import tree
from ailab.errors import AilabError
from ailab.optim.instance import instance
from ailab.optim.optimizer import Evaluate, Group, Optimizer, OptState
from ailab.types import Params


class _Stateful:
    """An instance of the class with its own parameters. Its values matter only during a call."""

    def __init__(self, cls: type[torch.optim.Optimizer], groups: tuple[Group, ...], params: Params):
        self.own = {n: nn.Parameter(params[n].detach().clone()) for g in groups for n in g.names}
        self.optimizer = instance(cls, [{"params": [self.own[n] for n in g.names], **g.hyper} for g in groups])

    def load(self, opt_state: OptState, params: Params) -> None:
        """Copy values and state into the instance."""
        with torch.no_grad():
            for name, own in self.own.items():
                own.copy_(params[name])
        self.optimizer.state.clear()
        for name, saved in opt_state["state"].items():
            self.optimizer.state[self.own[name]] = tree.clone(saved)
        for group, lr, saved in zip(self.optimizer.param_groups, opt_state["lr"].tolist(), opt_state["groups"], strict=True):
            group.update(tree.clone(saved))
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
        return new, {**opt_state, "state": saved, "groups": self.groups()}

    def groups(self) -> list[dict[str, Any]]:
        """The entries of each group except params and lr. Some classes keep state there."""
        skipped = ("params", "param_names", "lr")
        return [tree.clone({k: v for k, v in g.items() if k not in skipped}) for g in self.optimizer.param_groups]


def stateful_optimizer(cls: type[torch.optim.Optimizer], groups: tuple[Group, ...], params: Params) -> Optimizer:
    """`cls` as `init` and `update`. Not traced.

    The opt_state is `{"lr": (groups,) float64, "state": {name: {key: value}}, "groups": [{key: value}]}`. Its `state` is filled
    by the first update, as in torch. Attributes that a class keeps outside `state` and `param_groups` are not in it. LBFGS, which
    needs a closure, has `closure_update`.
    """
    adapter = _Stateful(cls, groups, params)

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
            adapter.set_grads(grads)
            return loss

        adapter.optimizer.step(cast("Any", closure))  # the stubs want a float; torch reads a () tensor
        return adapter.export(opt_state, params)

    def refuse(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        raise AilabError(f"{cls.__name__} evaluates the loss several times a step; call closure_update instead of update.")

    if issubclass(cls, torch.optim.LBFGS):
        return Optimizer(cls.__name__, groups, init, refuse, traced=False, closure_update=closure_update)
    return Optimizer(cls.__name__, groups, init, update, traced=False)
