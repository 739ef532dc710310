"""The order of samples: which samples are in which batch, as a pure function of (seed, epoch, step). It has no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ailab.rng import mix


@dataclass(frozen=True)
class Plan:
    """The order that a sampler makes for a dataset, instead of a permutation of all samples."""

    count: int  # samples of one pass
    draw: Callable[[int, torch.Generator], Tensor]  # (epoch, generator) -> (count,) int64; a pure function


@dataclass(frozen=True)
class Order:
    """The order of the samples of a dataset in each epoch.

    An epoch has `steps` batches. A lap is one pass over the dataset and has `lap_steps` batches. A longer epoch has several laps,
    each with a new permutation or a new draw of `plan`.
    """

    size: int  # samples of the dataset
    batch_size: int  # samples of a global batch, over all ranks
    shuffle: bool
    seed: int
    rank: int
    world_size: int
    lap_steps: int
    steps: int
    plan: Plan | None = None  # of a sampler, instead of a permutation

    @property
    def samples(self) -> int:
        """Number of samples of one epoch, over all ranks."""
        laps, rest = divmod(self.steps, self.lap_steps)
        return laps * min(self.size, self.lap_steps * self.batch_size) + min(self.size, rest * self.batch_size)

    def lap(self, epoch: int, lap: int = 0) -> Tensor:
        """The sample indices of one lap: (size,) int64 on the CPU, or (plan.count,) with a plan."""
        if self.plan is None and not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, lap))
        return self.plan.draw(epoch, generator) if self.plan else torch.randperm(self.size, generator=generator)

    def indices(self, epoch: int, step: int) -> Tensor:
        """The sample indices of one global batch: (at most batch_size,) int64."""
        lap, at = divmod(step, self.lap_steps)
        return self.lap(epoch, lap)[at * self.batch_size : (at + 1) * self.batch_size]

    def length(self, step: int) -> int:
        """Number of samples of the global batch of a step; it is below `batch_size` in the last batch of a lap."""
        at = step % self.lap_steps * self.batch_size
        return min(self.batch_size, (self.plan.count if self.plan else self.size) - at)

    def part(self, ids: Tensor) -> Tensor:
        """The contiguous part of a global batch for this rank. Parts differ by at most one sample. Rank 0 has at least one."""
        if self.world_size == 1:
            return ids
        start, end = (-(-len(ids) * rank // self.world_size) for rank in (self.rank, self.rank + 1))  # rounded up
        return ids[start:end]

    def batches(self, epoch: int, start: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """From step `start` on: the sample indices of each global batch, and those of this rank, on `device`."""
        lap = -1
        chunks: Sequence[Tensor] = ()
        for step in range(start, self.steps):
            if step // self.lap_steps != lap:
                lap = step // self.lap_steps
                chunks = torch.split(self.lap(epoch, lap).to(device), self.batch_size)
            ids = chunks[step % self.lap_steps]
            yield ids, self.part(ids)
