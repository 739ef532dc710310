"""Seeds from integers by a pure function, so that the state of a generator never has to be stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

_MASK = (1 << 64) - 1


def _scramble(z: int) -> int:
    """The output function of SplitMix64: a bijection of 64-bit words. Each input bit changes about half of the output bits."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix(*ints: int) -> int:
    """One seed in [0, 2**63) from any integers. Another value, order or number of integers gives another seed.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64). torch's CPU
    generator reads only the low 32 bits of a seed; they are as well mixed as the others.
    """
    h = len(ints)
    for i in ints:
        h = _scramble((h + 0x9E3779B97F4A7C15 + _scramble(i & _MASK)) & _MASK)
    return h >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default generators that a step on `device` uses. It takes 1 us; `torch.manual_seed` takes 100 us."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def generator_states(device: torch.device) -> list[Tensor]:
    """The states of the default generators that a step on `device` uses. Another draw makes another state."""
    return [g.get_state() for g in _generators(device)]


def _generators(device: torch.device) -> list[torch.Generator]:
    on_device = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
    return [torch.default_generator, *on_device]


class _Step:
    """The step that runs now: what its random numbers are a function of."""

    def __init__(self, device: torch.device, seed: int, at: int):
        self.device, self.seed, self.at = device, seed, at
        self.calls = 0  # of functions that draw by rank


_step: _Step | None = None


def begin_step(device: torch.device, seed: int, at: int) -> None:
    """Seed the default generators for step `at`: what it draws is a function of `(seed, at)`, but for `drawn_by_rank`."""
    global _step
    _step = _Step(device, seed, at)
    seed_device(device, mix(seed, at))


def end_step() -> None:
    """After this `drawn_by_rank` changes nothing."""
    global _step
    _step = None


def drawn_by_rank(fn: Callable[P, T], rank: int) -> Callable[P, T]:
    """`fn`, whose random numbers are a function of `(seed, step, rank)` and of how often it was called in this step.

    What the step draws around it does not depend on what `fn` draws, so it is the same on all ranks. In a graph nothing changes:
    a graph is seeded once, by whoever calls it.
    """

    @wraps(fn)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling() or _step is None:  # in this order: a graph must not depend on `_step`
            return fn(*args, **kwargs)
        step, kept = _step, generator_states(_step.device)
        step.calls += 1
        seed_device(step.device, mix(step.seed, step.at, rank, step.calls))
        try:
            return fn(*args, **kwargs)
        finally:
            for generator, state in zip(_generators(step.device), kept, strict=True):
                generator.set_state(state)

    return drawing
