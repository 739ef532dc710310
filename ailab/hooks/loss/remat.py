"""RematHook: activation checkpointing of the sub-modules whose names match."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ailab.core.loss import homes, remodelled
from ailab.errors import ConfigError, nearest
from ailab.registry import HOOKS
from ailab.stack import Middleware, unchanged
from ailab.types import Loss


@HOOKS.register_module()
def RematHook(modules: Sequence[str], name: str = "remat") -> Middleware[Loss]:
    """Forget what the matching sub-modules computed, and compute it again in the backward: less memory for one more forward.

    Of a sub-module only the inputs and the outputs are kept. Dropout falls the same way again; running statistics move once.
    Numbers are those without the hook. Where a run is compiled, it is cut at the loss: in one graph of the whole step torch
    does not honour the request (2.11), or refuses random numbers in it (2.15).

    Args:
        modules: patterns of names of the model's sub-modules: `["blocks.*"]`; of nested ones that match, the outermost counts.
        name: of this hook.

    Raises:
        ConfigError: when a pattern matches no sub-module, or `compile` asks for another cut than "loss".

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    path = f"cfg.hooks.{name}"
    if not modules:
        raise ConfigError(f"{path}.modules is empty; name sub-modules of the model, such as ['blocks.*'].")

    def change(model: nn.Module) -> None:
        for module in _outermost(model, modules, path):
            if not hasattr(type(module), "rematerialized"):
                module.__class__ = _rematerialized(type(module))

    return Middleware(name, unchanged, "loss", bare=lambda loss: remodelled(loss, change), core={"compile": {"cut": "loss"}})


def _outermost(model: nn.Module, patterns: Sequence[str], path: str) -> list[nn.Module]:
    names = [n for n, _ in model.named_modules() if n]
    for i, pattern in enumerate(patterns):
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{path}.modules[{i}]: no sub-module matches {pattern!r}.{nearest(pattern, names)}")
    hit = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    return [model.get_submodule(n) for n in hit if not any(n.startswith(other + ".") for other in hit)]


@cache
def _rematerialized(cls: type[nn.Module]) -> type[nn.Module]:
    """A class of modules like `cls` that keep nothing for their backward but their inputs."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler functionalizes what is written to buffers
            return checkpoint(cls.forward, self, *args, use_reentrant=False, **kwargs)
        return _checkpointed(cls.forward, self, args, kwargs)

    return type(
        f"Rematerialized{cls.__name__}", (cls,), {"forward": forward, "__module__": cls.__module__, "rematerialized": True}
    )


def _checkpointed(forward: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As torch's checkpoint, of a pure function: buffers are written to once, and not again as the backward computes them anew."""
    places = [(store, key) for _, store, key in homes(module)]
    buffers = {id(store) for m in module.modules() for store in (m._buffers,)}

    def pure(values: list[Tensor], *args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        kept = [store[key] for store, key in places]
        try:
            for (store, key), value in zip(places, values, strict=True):
                store[key] = value.clone() if id(store) in buffers else value  # a buffer may be written to: twice
            out = forward(module, *args, **kwargs)
            return out, [store[key].detach() for store, key in places if id(store) in buffers]
        finally:
            for (store, key), old in zip(places, kept, strict=True):
                store[key] = old

    out, written = checkpoint(pure, [store[key] for store, key in places], *args, use_reentrant=False, **kwargs)
    for (store, key), value in zip([p for p in places if id(p[0]) in buffers], written, strict=True):
        store[key] = value
    return out
