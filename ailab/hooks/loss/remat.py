"""RematHook: activation checkpointing of sub-modules."""

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
    """Activation checkpointing: recompute the matching sub-modules in the backward pass. Less memory, one more forward pass.

    Only the inputs and outputs of these sub-modules are kept. Dropout uses the same masks again. Running statistics are updated
    once. The results are the same as without the hook. A compiled run is compiled with `cut="loss"`: in one graph of the whole
    step torch 2.11 ignores checkpointing, and torch 2.15 refuses random numbers in it.

    Args:
        modules: glob patterns of names of the model's sub-modules, such as `["blocks.*"]`. If a sub-module and its parent both
            match, the parent is used.

    Raises:
        ConfigError: when a pattern matches no sub-module, or `compile` sets another cut than "loss".

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    path = f"cfg.hooks.{name}"
    if not modules:
        raise ConfigError(f"{path}.modules is empty; name sub-modules of the model, such as ['blocks.*'].")

    def change(model: nn.Module) -> None:
        for module in _matching(model, modules, path):
            if not hasattr(type(module), "rematerialized"):
                module.__class__ = _rematerialized(type(module))

    cut = {"compile": {"cut": "loss"}}
    return Middleware(name, unchanged, "loss", role="observer", bare=lambda loss: remodelled(loss, change), core=cut)


def _matching(model: nn.Module, patterns: Sequence[str], path: str) -> list[nn.Module]:
    names = [n for n, _ in model.named_modules() if n]
    for i, pattern in enumerate(patterns):
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"{path}.modules[{i}]: no sub-module matches {pattern!r}.{nearest(pattern, names)}")
    hit = [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
    return [model.get_submodule(n) for n in hit if not any(n.startswith(other + ".") for other in hit)]


@cache
def _rematerialized(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `cls` that keeps only its inputs for the backward pass."""

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
