"""A hook at the wrong depth, found on the first, shrunk step: what it returned or raised, and where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ailab.errors import AilabError, ConfigError
from ailab.job.build import explained
from ailab.stack import TRACED, Middleware
from ailab.types import Aux, TrainState

_SHAPES: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "loss": ("(total, Aux)", lambda a, b: isinstance(a, Tensor) and isinstance(b, Aux)),
    "grad": ("(gradients by name, Aux)", lambda a, b: isinstance(a, dict) and isinstance(b, Aux)),
    "step": ("(TrainState, logs by name)", lambda a, b: isinstance(a, TrainState) and isinstance(b, Mapping)),
}


def guarded(hooks: Sequence[Middleware[Any]], paths: Mapping[int, str]) -> list[Middleware[Any]]:
    """The hooks, those below the compile line watched: each has to return what its depth returns, and is blamed for what it raises.

    Args:
        hooks: of one phase.
        paths: where each is in the cfg, by its id.

    Raises:
        ConfigError: out of a watched hook.
    """
    return [_guarded(h, paths.get(id(h), f"hook {h.name!r}")) if h.depth in TRACED else h for h in hooks]


def _guarded(hook: Middleware[Any], path: str) -> Middleware[Any]:
    given = "params, buffers, batch" if hook.depth == "loss" else "state, batch"
    what = (
        f"{path} failed at depth '{hook.depth}', where it is given {given} and returns {_SHAPES[hook.depth][0]}\n"
        "  (what needs a number, a file or a clock belongs at 'host')"
    )

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        raised: list[Exception] = []  # by what is inside, and so not this hook's doing

        def inside(*args: Any) -> Any:
            try:
                return inner(*args)
            except Exception as e:
                raised.append(e)
                raise

        wrapped: Any = explained(lambda: hook.wrap(inside), f"{path}: its wrap failed")
        if not callable(wrapped):
            raise ConfigError(f"{path}: its wrap returned {type(wrapped).__name__}; it has to return the function that wraps.")

        def checked(*args: Any) -> Any:
            def call() -> Any:
                try:
                    return wrapped(*args)
                except Exception as e:
                    if any(e is other for other in raised):
                        raise _Inside(e) from e
                    raise

            try:
                result = explained(call, what)
            except _Inside as passed:
                raise passed.cause from passed.cause.__cause__
            _refuse(result, hook.depth, path)
            return result

        return checked

    return replace(hook, wrap=wrap)


class _Inside(AilabError):
    """What came from inside a hook, on its way out."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


def _refuse(result: Any, depth: str, path: str) -> None:
    """Refuse a result that is not of its depth, and say of which it is."""
    pair = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
    fitting = [d for d, (_, fits) in _SHAPES.items() if fits(*pair)]
    if depth in fitting:
        return
    came = ", ".join(type(part).__name__ for part in result) if isinstance(result, tuple) else type(result).__name__
    hint = f"That is what a hook at '{fitting[0]}' returns: Middleware(name, wrap, '{fitting[0]}')." if fitting else ""
    raise ConfigError(f"{path}, at depth '{depth}', returned ({came}) and not {_SHAPES[depth][0]}.\n  {hint}".rstrip())
