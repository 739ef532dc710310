"""Which samples are in which batch: a pure function of (seed, epoch, step) with nothing to store, replay or restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ailab.rng import mix


@dataclass(frozen=True)
class Plan:
    """Another order than a permutation: what a sampler makes of a dataset."""

    count: int  # samples of a lap
    draw: Callable[[int, torch.Generator], Tensor]  # (epoch, generator) -> (count,) int64, from these two alone


@dataclass(frozen=True)
class Order:
    """The order of a dataset's samples in each epoch.

    An epoch has `steps` batches. A lap is one pass over the dataset, `lap_steps` batches; an epoch that is longer goes on with
    further laps, each another permutation, or another draw of `plan`.
    """

    size: int  # samples of the dataset
    batch_size: int  # of the global batch
    shuffle: bool
    seed: int
    rank: int
    world_size: int
    lap_steps: int
    steps: int
    plan: Plan | None = None  # instead of a permutation

    @property
    def samples(self) -> int:
        """Samples of one epoch, all ranks together."""
        laps, rest = divmod(self.steps, self.lap_steps)
        return laps * min(self.size, self.lap_steps * self.batch_size) + min(self.size, rest * self.batch_size)

    def lap(self, epoch: int, lap: int = 0) -> Tensor:
        """Every sample once: (size,) int64 on the CPU; with a plan what that draws."""
        if self.plan is None and not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(mix(self.seed, epoch, lap))
        return self.plan.draw(epoch, generator) if self.plan else torch.randperm(self.size, generator=generator)

    def indices(self, epoch: int, step: int) -> Tensor:
        """The samples of one global batch: (at most batch_size,) int64."""
        lap, at = divmod(step, self.lap_steps)
        return self.lap(epoch, lap)[at * self.batch_size : (at + 1) * self.batch_size]

    def part(self, ids: Tensor) -> Tensor:
        """This rank's contiguous part of a global batch; parts differ by at most one sample, and rank 0's is never empty."""
        if self.world_size == 1:
            return ids
        start, end = (-(-len(ids) * rank // self.world_size) for rank in (self.rank, self.rank + 1))  # rounded up
        return ids[start:end]

    def batches(self, epoch: int, start: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """From step `start` on: the ids of the global batch and of this rank's part, on `device`; one permutation a lap."""
        lap = -1
        chunks: Sequence[Tensor] = ()
        for step in range(start, self.steps):
            if step // self.lap_steps != lap:
                lap = step // self.lap_steps
                chunks = torch.split(self.lap(epoch, lap).to(device), self.batch_size)
            ids = chunks[step % self.lap_steps]
            yield ids, self.part(ids)
