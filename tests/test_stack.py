"""Middleware, the one rule of order, and what a depth admits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ailab.errors import ConfigError
from ailab.stack import DEPTHS, Depth, Middleware, as_hooks, at, core_settings, stack, unchanged, with_slots
from ailab.types import TrainState


def appending(tag: str) -> Middleware[Any]:
    """A hook that adds its tag to what the inner callable returns."""

    def wrap(inner: Callable[[], str]) -> Callable[[], str]:
        return lambda: f"{inner()}{tag}"

    return Middleware(tag, wrap, "step")


def hook(name: str, depth: Depth, phases: tuple[str, ...] | None = None, **rest: Any) -> Middleware[Any]:
    return Middleware(name, unchanged, depth, phases=phases, **rest)


def empty() -> TrainState:
    return TrainState(torch.tensor(0), {"w": torch.ones(2)}, {}, {}, {})


def test_each_hook_wraps_what_is_listed_before_it() -> None:
    """stack(f, [a, b]) is b(a(f)): the list reads as the results come out."""
    a, b = appending("a"), appending("b")
    f = lambda: "f"
    assert stack(f, [a, b])() == b(a(f))() == "fab"
    assert stack(f, [b, a])() == "fba"


@given(st.lists(st.sampled_from("abcd"), max_size=5), st.integers(0, 5))
def test_stacking_is_associative(tags: list[str], cut: int) -> None:
    """Stacking a list at once equals stacking its two parts one after the other; the empty list is the identity."""
    hooks, f = [appending(t) for t in tags], lambda: "f"
    assert stack(f, hooks)() == stack(stack(f, hooks[:cut]), hooks[cut:])() == "f" + "".join(tags)
    assert stack(f, []) is f


def test_at_keeps_one_depth_in_order() -> None:
    """`at` gives the hooks of one depth, in the order of the list."""
    hooks = [hook(f"{depth}{i}", depth) for i in range(2) for depth in DEPTHS]
    for depth in DEPTHS:
        assert [h.name for h in at(hooks, depth)] == [f"{depth}0", f"{depth}1"]


@pytest.mark.parametrize("depth", ["loss", "grad", "step", "host"])
def test_phases_of_a_step(depth: Depth) -> None:
    """Without phases a hook serves training alone; with phases exactly those."""
    hooks = [hook("plain", depth), hook("both", depth, ("train", "val")), hook("val", depth, ("val",))]
    names = {phase: [h.name for h in at(hooks, depth, phase)] for phase in ("train", "val", "test")}
    assert names == {"train": ["plain", "both"], "val": ["both", "val"], "test": []}
    assert at(hooks, depth) == at(hooks, depth, "train")


def test_phases_of_an_epoch() -> None:
    """At epoch depth a hook without phases is around the whole workflow, one with phases around each of those."""
    hooks = [hook("all", "epoch"), hook("val", "epoch", ("val",)), hook("run", "run")]
    assert [h.name for h in at(hooks, "epoch")] == ["all"]
    assert [h.name for h in at(hooks, "epoch", "val")] == ["val"]
    assert at(hooks, "epoch", "train") == []
    assert [h.name for h in at(hooks, "run")] == ["run"]


def test_slots_are_made_in_order() -> None:
    """A hook that keeps memory gets a slot of its name, made from the state with the slots before it; others get none."""
    hooks = [
        hook("a", "step", init=lambda s: {"n": torch.tensor(len(s.slots))}),
        hook("b", "step"),
        hook("c", "grad", init=lambda s: {"n": torch.tensor(len(s.slots))}),
    ]
    state = with_slots(empty(), hooks)
    assert {k: int(v["n"]) for k, v in state.slots.items()} == {"a": 0, "c": 1}


def test_slots_share_no_memory_with_the_state() -> None:
    """A slot that begins as the parameters is a copy of them: a step may write to both."""
    before = empty()
    state = with_slots(before, [hook("slow", "step", init=lambda s: s.params)])
    state.slots["slow"]["w"].zero_()
    assert torch.equal(before.params["w"], torch.ones(2))


def test_two_hooks_cannot_share_a_slot() -> None:
    """A second hook with memory under the same name is refused, with the name and the way out."""
    twice = [hook("ema", "step", init=lambda s: torch.zeros(1))] * 2
    with pytest.raises(ConfigError, match=r"'ema'.*\bname\b"):
        with_slots(empty(), twice)


def test_later_core_settings_win() -> None:
    """Settings for a bare callable are merged by key, and a later hook's value wins."""
    hooks = [hook("a", "run", core={"ddp": {"x": 1, "y": 1}}), hook("b", "run", core={"ddp": {"y": 2}, "other": {"z": 3}})]
    assert core_settings(hooks, "ddp") == {"x": 1, "y": 2}
    assert core_settings(hooks, "none") == {}


def test_as_hooks_takes_one_or_several() -> None:
    """One middleware and a list or tuple of them are the same to the caller."""
    a, b = hook("a", "step"), hook("b", "host")
    assert as_hooks(a, "cfg.hooks.a") == [a]
    assert as_hooks((a, b), "cfg.hooks.a") == as_hooks([a, b], "cfg.hooks.a") == [a, b]
    assert as_hooks([], "cfg.hooks.a") == []


@pytest.mark.parametrize("built", [None, lambda step: step, [unchanged], "ema"])
def test_as_hooks_refuses_what_is_no_middleware(built: Any) -> None:
    """A builder that returns something else is refused with its path, what came, and what to return."""
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.mine: .* not a Middleware[\s\S]*Middleware\(name, wrap, depth\)"):
        as_hooks(built, "cfg.hooks.mine")


def test_as_hooks_refuses_a_depth_that_does_not_exist() -> None:
    """An unknown depth is refused with the depths that there are."""
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.mine: there is no depth 'batch'.*loss, grad, step, host, epoch, run"):
        as_hooks(Middleware("mine", unchanged, "batch"), "cfg.hooks.mine")  # type: ignore[arg-type]
