"""Middleware and the one rule of order: each hook wraps everything listed before it, `stack(f, [a, b]) == b(a(f))`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, Generic, Literal, TypeVar, cast

from ailab.errors import ConfigError
from ailab.tree import clone, items
from ailab.types import Batch, PyTree, TrainState

F = TypeVar("F", bound=Callable[..., Any])
Depth = Literal["loss", "grad", "step", "host", "epoch", "run"]
DEPTHS: tuple[Depth, ...] = ("loss", "grad", "step", "host", "epoch", "run")  # from the inside out
TRACED: frozenset[str] = frozenset({"loss", "grad", "step"})  # below the compile line
Role = Literal["observer", "end", "result"]
ROLES: tuple[Role, ...] = ("observer", "end", "result")  # the last that a hook has counts


@dataclass(frozen=True)
class Middleware(Generic[F]):
    """A named function that wraps a callable of one depth. Callable itself: `ema(0.99)(step)` is a step.

    Three fields make most hooks: a name, a wrap and a depth. The others say what a hook needs or promises beyond that.
    """

    name: str
    wrap: Callable[[F], F]
    depth: Depth

    # Its memory, `state.slots[name]`, made before anything is compiled.
    init: Callable[[TrainState], PyTree] | None = None
    # The phases that it serves. None: training, and for an epoch hook the workflow as a whole.
    phases: tuple[str, ...] | None = None
    # Changes the bare callable of its depth, before any hook wraps it.
    bare: Callable[[F], F] | None = None
    # Settings for the bare callables and the run: {"ddp": {"bucket_cap_mb": 50}}.
    core: Mapping[str, Any] = field(default_factory=dict)

    # Promises. Step depth: whether it reads the state that it passed on after the call; if none does, eager steps donate.
    looks_back: bool = True
    # Grad depth: whether it may read one gradient after it has asked for another; if none does, gradients are DDP's buckets.
    holds_grad: bool = True

    # What of a run depends on it: "result", what is trained or reported; "end", no more than when the run ends; or nothing, of an
    # "observer". A resumed run has the same results, and may have another end. None: see `role_of`.
    role: Role | None = None

    # Checks before the first step. (fields, phase) -> problems.
    check: Callable[[Collection[str], str], list[str]] | None = None
    # Results that it needs, as "val_top1", by the path in the cfg that says so.
    reads: Mapping[str, str] = field(default_factory=dict)
    # Results of which it needs to know whether lower or higher is better, by the path in the cfg that can say so.
    ranks: Mapping[str, str] = field(default_factory=dict)
    # (some samples with the model's outputs, phase) -> names of results that it adds to those of the steps.
    reports: Callable[[Batch, str], Collection[str]] | None = None

    def __call__(self, inner: F) -> F:
        """`inner` in this hook."""
        return self.wrap(inner)


def stack(bare: F, hooks: Iterable[Middleware[Any]]) -> F:
    """Wrap `bare` in every hook, first listed innermost."""
    hooks = list(hooks)
    for hook in hooks:
        bare = bare if hook.bare is None else hook.bare(bare)
    for hook in hooks:
        bare = hook(bare)
    return bare


def at(hooks: Iterable[Middleware[Any]], depth: Depth, phase: str | None = None) -> list[Middleware[Any]]:
    """The hooks of one depth that serve `phase`, in their order; at epoch depth without a phase, those of the whole workflow."""
    if depth == "run" or (depth == "epoch" and phase is None):
        return [h for h in hooks if h.depth == depth and h.phases is None]
    if depth == "epoch":
        return [h for h in hooks if h.depth == depth and h.phases is not None and phase in h.phases]
    return [h for h in hooks if h.depth == depth and (phase or "train") in (h.phases or ("train",))]


def with_slots(state: TrainState, hooks: Iterable[Middleware[Any]]) -> TrainState:
    """The state with the memory of every hook that keeps one.

    Raises:
        ConfigError: when two hooks claim the same slot, or one keeps a plain number: a graph has it as a constant.
    """
    for hook in hooks:
        if hook.init is not None:
            if hook.name in state.slots:
                raise ConfigError(f"cfg.hooks: two hooks keep state under the name {hook.name!r}; give one another `name`.")
            memory = hook.init(state)
            _refuse_plain(hook.name, memory)
            # A copy: memory that begins as the parameters themselves must not be theirs, for a step may write into both.
            state = state.with_slot(hook.name, clone(memory))
    return state


def role_of(hook: Middleware[Any]) -> Role:
    """What a hook says of itself; else "result" below the compile line, "end" around the workflow, and "observer" elsewhere."""
    if hook.role is not None:
        return hook.role
    if hook.depth in TRACED:
        return "result"
    return "end" if hook.depth == "epoch" and hook.phases is None else "observer"


def _refuse_plain(name: str, memory: PyTree) -> None:
    plain = [f"{path or 'the slot'} = {leaf!r}" for path, leaf in items(memory) if isinstance(leaf, Number)]
    if plain:
        raise ConfigError(
            f"hook {name!r} keeps a plain number in its memory, {', '.join(plain[:5])}; a compiled step would never change it.\n"
            "  Keep a 0-d tensor: torch.zeros((), dtype=torch.int64, device=state.step.device)."
        )


def core_settings(hooks: Iterable[Middleware[Any]], key: str) -> dict[str, Any]:
    """What the hooks ask of a bare callable under `key`; a later hook wins."""
    found: dict[str, Any] = {}
    for hook in hooks:
        found.update(hook.core.get(key, {}))
    return found


def unchanged(f: F) -> F:
    """The identity: the wrap of a hook that only sets something (`core`) or only keeps memory."""
    return f


def as_hooks(built: Any, path: str) -> list[Middleware[Any]]:
    """What a hook builder returned, as a list.

    Raises:
        ConfigError: when it is no `Middleware`, or one of a depth that does not exist.
    """
    found: Sequence[Any] = built if isinstance(built, (list, tuple)) else [built]
    for hook in found:
        if not isinstance(hook, Middleware):
            raise ConfigError(
                f"{path}: the builder returned {type(hook).__name__}, not a Middleware.\n"
                "  Return Middleware(name, wrap, depth) or a list of them."
            )
        if hook.depth not in DEPTHS:
            raise ConfigError(f"{path}: there is no depth {hook.depth!r}; a hook sits at one of: {', '.join(DEPTHS)}.")
    return cast("list[Middleware[Any]]", list(found))
