"""Samplers: which samples an epoch has, as a function of (seed, epoch) and of numbers known beforehand.

`data.train_dataloader.sampler = dict(type="ClassBalancedSampler")`. A sampler has one method, `plan(dataset, size, batch_size)`,
called once; the plan draws each lap of the stream from its epoch and a generator, so that nothing is stored and any step can be
sought. A name of one's own registers with `@SAMPLERS.register_module()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.stream.order import Plan
from ailab.errors import DataError
from ailab.registry import SAMPLERS

Numbers = Sequence[float] | str | None  # one for each sample; or the name of an attribute, method or field that gives them


@SAMPLERS.register_module()
@dataclass(frozen=True)
class WeightedSampler:
    """Each place of the epoch is drawn on its own, a sample with a probability in proportion to its weight.

    Args:
        weights: one number >= 0 for each sample, or what of the dataset gives them.
        num_samples: of an epoch; as many as the dataset has when left out.
        replacement: without it no sample comes twice in an epoch, and none of weight 0 at all.
    """

    weights: Numbers
    num_samples: int | None = None
    replacement: bool = True

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """Draw `num_samples` of `size`."""
        weights = numbers(dataset, size, self.weights, ("weights",), "WeightedSampler.weights").double()
        count = self.num_samples or size
        if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool(weights.sum() > 0):
            raise DataError("WeightedSampler: weights are finite, 0 or more, and not all 0.")
        if not self.replacement and count > (most := int((weights > 0).sum())):
            raise DataError(f"WeightedSampler: {count} samples without replacement, and {most} have a weight above 0.")
        total = weights.cumsum(0)

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            noise = torch.rand(count if self.replacement else size, generator=generator, dtype=torch.float64)
            if self.replacement:  # the inverse of the distribution: torch.multinomial takes 2**24 categories at most
                return torch.searchsorted(total, noise * total[-1], right=True).clamp(max=_last(weights))
            # The largest of u**(1/w) are a draw without replacement (Efraimidis and Spirakis, 2006); in logarithms.
            return torch.where(weights > 0, noise.log() / weights, -math.inf).topk(count).indices

        return Plan(count, draw)


@SAMPLERS.register_module()
@dataclass(frozen=True)
class ClassBalancedSampler:
    """Each class equally often, to within one sample; within a class each sample equally often, to within one.

    Args:
        labels: the class of each sample, or what of the dataset gives it; by default its `labels`, `targets` or field "target".
        num_samples: of an epoch; as many as the dataset has when left out.
    """

    labels: Numbers = None
    num_samples: int | None = None

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """Draw `num_samples`, the same number of each class."""
        usual = ("labels", "targets", "target")
        labels = numbers(dataset, size, self.labels, usual, "ClassBalancedSampler.labels")
        groups = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
        count = self.num_samples or size

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            spare = torch.randperm(len(groups), generator=generator) < count % len(groups)  # who gives one more
            shares = [count // len(groups) + int(more) for more in spare]
            drawn = [_in_turns(group, share, generator) for group, share in zip(groups, shares, strict=True)]
            return torch.cat(drawn)[torch.randperm(count, generator=generator)]

        return Plan(count, draw)


@SAMPLERS.register_module()
@dataclass(frozen=True)
class LengthSampler:
    """Every sample once, in batches of samples of about the same length, so that little of them is padding.

    Shuffled, then sorted within pools of `pool` batches, and the batches shuffled again. A last batch that is not full has the
    samples left over, and stays the last.

    Args:
        lengths: of each sample, or what of the dataset gives them; by default its `lengths`.
        pool: batches that are sorted together: more of them pad less, and mix less.
    """

    lengths: Numbers = None
    pool: int = 50

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """Draw a permutation."""
        lengths = numbers(dataset, size, self.lengths, ("lengths",), "LengthSampler.lengths")
        full = size - size % batch_size

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            order = torch.randperm(size, generator=generator)
            pools = order[:full].split(self.pool * batch_size)
            sorted_ = torch.cat([p[lengths[p].argsort(stable=True)] for p in pools]).view(-1, batch_size)
            batches = sorted_[torch.randperm(len(sorted_), generator=generator)]
            return torch.cat([batches.flatten(), order[full:]])

        return Plan(size, draw)


@SAMPLERS.register_module()
@dataclass(frozen=True)
class CurriculumSampler:
    """The easiest samples first: epoch e draws from the easiest share of them, which grows to all of them.

    Source: Bengio et al., ICML 2009, with the linear pacing of Hacohen and Weinshall, arXiv:1904.03626. Epochs are as long as
    without it: a small share comes several times in an epoch, each sample equally often to within one.

    Args:
        difficulty: of each sample, or what of the dataset gives it; lower is easier.
        start: the share of the first epoch.
        epochs: until all samples take part.
    """

    difficulty: Numbers
    start: float = 0.2
    epochs: int = 10

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """Draw `size` samples of those whose turn has come."""
        if not 0 < self.start <= 1 or self.epochs < 1:
            raise DataError(f"CurriculumSampler: start is {self.start}, a share above 0; epochs is {self.epochs}, 1 or more.")
        difficulty = numbers(dataset, size, self.difficulty, ("difficulty",), "CurriculumSampler.difficulty")
        easiest = difficulty.argsort(stable=True)

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            share = min(1.0, self.start + (1 - self.start) * epoch / self.epochs)
            return _in_turns(easiest[: max(1, math.ceil(share * size))], size, generator)

        return Plan(size, draw)


def numbers(dataset: Any, size: int, given: Numbers, usual: Sequence[str], what: str) -> Tensor:
    """One number for each sample: (size,).

    Args:
        dataset: asked by name for an attribute or a method without arguments, then for a field of its `tensors`.
        size: its samples.
        given: the numbers, or a name.
        usual: names that are tried where nothing is given.
        what: the argument, for messages.

    Raises:
        DataError: there are none of that name, or not one for each sample.
    """
    names = (given,) if isinstance(given, str) else () if given is not None else usual
    values: Any = given if not names else next((v for n in names if (v := _called(dataset, n)) is not None), None)
    if values is None:
        raise DataError(
            f"{what}: {type(dataset).__name__} has no {' or '.join(map(repr, names))} with a number for each sample."
        )
    found = torch.as_tensor(values)
    if found.shape != (size,):
        raise DataError(f"{what}: expected {size} numbers, one for each sample, got {tuple(found.shape)}.")
    return found.cpu()


def _called(dataset: Any, name: str) -> Any:
    value = getattr(dataset, name, None)
    if value is not None:
        return value() if callable(value) else value
    stacked = getattr(dataset, "tensors", None)
    fields: Any = stacked() if callable(stacked) else None
    return cast("dict[str, Any]", fields).get(name) if isinstance(fields, dict) else None


def _in_turns(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the pool: permutations of it one after the other."""
    laps = [torch.randperm(len(pool), generator=generator) for _ in range(-(-count // len(pool)))]
    return pool[torch.cat(laps)[:count]]


def _last(weights: Tensor) -> int:
    """The last index that has a weight: rounding must not lead past it."""
    return int(weights.nonzero()[-1])
