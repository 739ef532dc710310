"""Samplers: they choose the samples of each epoch, as a pure function of (seed, epoch) and of one number per sample.

Set one with `data.train_dataloader.sampler = dict(type="ClassBalancedSampler")`. A sampler has one method, `plan(dataset, size,
batch_size)`, which is called once. The plan draws the samples of each pass from the epoch and a generator. So a sampler has no
state, and a resumed run can start at any step. Register your own with `@SAMPLERS.register_module()`.
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

PerSample = Sequence[float] | str | None  # one per sample; or the name of an attribute, method or field


@SAMPLERS.register_module()
@dataclass(frozen=True)
class WeightedSampler:
    """Draws samples at random, with a probability in proportion to their weight.

    Args:
        weights: One number >= 0 per sample, or the name of an attribute, method or field of the dataset that has them.
        num_samples: Number of samples per epoch. Default: the size of the dataset.
        replacement: Whether a sample may occur more than once per epoch. A sample of weight 0 never occurs.
    """

    weights: PerSample
    num_samples: int | None = None
    replacement: bool = True

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """The plan for a dataset. Raises `DataError` for invalid weights, or too few samples without replacement."""
        weights = per_sample(dataset, size, self.weights, ("weights",), "WeightedSampler.weights").double()
        count = self.num_samples or size
        if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool(weights.sum() > 0):
            raise DataError("WeightedSampler: weights must be finite, at least 0, and not all 0.")
        if not self.replacement and count > (most := int((weights > 0).sum())):
            raise DataError(
                f"WeightedSampler: expected at least {count} samples of weight above 0 without replacement, got {most}."
            )
        total = weights.cumsum(0)

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            noise = torch.rand(count if self.replacement else size, generator=generator, dtype=torch.float64)
            if self.replacement:  # the inverse of the distribution: torch.multinomial takes 2**24 categories at most
                return torch.searchsorted(total, noise * total[-1], right=True).clamp(max=_last_nonzero(weights))
            # The largest u**(1/w) are a draw without replacement (Efraimidis and Spirakis, 2006). Here in logarithms.
            return torch.where(weights > 0, noise.log() / weights, -math.inf).topk(count).indices

        return Plan(count, draw)


@SAMPLERS.register_module()
@dataclass(frozen=True)
class ClassBalancedSampler:
    """Draws every class equally often, and within a class every sample equally often, both to within one sample.

    Args:
        labels: The class of each sample, or the name of an attribute, method or field of the dataset that has it. Default:
            `labels`, `targets` or the field "target" of the dataset.
        num_samples: Number of samples per epoch. Default: the size of the dataset.
    """

    labels: PerSample = None
    num_samples: int | None = None

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """The plan for a dataset. Raises `DataError` if the dataset has no labels."""
        usual = ("labels", "targets", "target")
        labels = per_sample(dataset, size, self.labels, usual, "ClassBalancedSampler.labels")
        groups = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
        count = self.num_samples or size

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            spare = torch.randperm(len(groups), generator=generator) < count % len(groups)  # the classes with one more sample
            shares = [count // len(groups) + int(more) for more in spare]
            drawn = [_repeated_permutations(group, share, generator) for group, share in zip(groups, shares, strict=True)]
            return torch.cat(drawn)[torch.randperm(count, generator=generator)]

        return Plan(count, draw)


@SAMPLERS.register_module()
@dataclass(frozen=True)
class LengthSampler:
    """Gives every sample once, in batches of samples of similar length, which need little padding.

    The samples are shuffled and then sorted by length within pools of `pool` batches. Then the batches are shuffled. A last batch
    that is not full stays the last.

    Args:
        lengths: The length of each sample, or the name of an attribute, method or field of the dataset that has it. Default:
            `lengths` of the dataset.
        pool: Number of batches that are sorted together. More batches mean less padding and less randomness.
    """

    lengths: PerSample = None
    pool: int = 50

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """The plan for a dataset. Raises `DataError` if the dataset has no lengths."""
        lengths = per_sample(dataset, size, self.lengths, ("lengths",), "LengthSampler.lengths")
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
    """Curriculum learning: the first epochs use only the easiest samples. The fraction in use grows linearly to all samples.

    Every epoch has as many samples as the dataset. The samples in use are repeated, each equally often to within one. Source:
    Bengio et al., ICML 2009, with the linear pacing of Hacohen and Weinshall, arXiv:1904.03626.

    Args:
        difficulty: The difficulty of each sample (lower is easier), or the name of an attribute, method or field of the dataset
            that has it.
        start: Fraction of the samples in the first epoch, above 0 and at most 1.
        epochs: Number of epochs until all samples are in use.
    """

    difficulty: PerSample
    start: float = 0.2
    epochs: int = 10

    def plan(self, dataset: Any, size: int, batch_size: int) -> Plan:
        """The plan for a dataset. Raises `DataError` for invalid arguments, or if the dataset has no difficulty."""
        if not 0 < self.start <= 1 or self.epochs < 1:
            raise DataError(
                f"CurriculumSampler: expected 0 < start <= 1 and epochs of at least 1, got {self.start} and {self.epochs}."
            )
        difficulty = per_sample(dataset, size, self.difficulty, ("difficulty",), "CurriculumSampler.difficulty")
        easiest = difficulty.argsort(stable=True)

        def draw(epoch: int, generator: torch.Generator) -> Tensor:
            share = min(1.0, self.start + (1 - self.start) * epoch / self.epochs)
            return _repeated_permutations(easiest[: max(1, math.ceil(share * size))], size, generator)

        return Plan(size, draw)


def per_sample(dataset: Any, size: int, given: PerSample, usual: Sequence[str], what: str) -> Tensor:
    """One number per sample: (size,).

    Args:
        dataset: The dataset. A name is looked up as an attribute, a method without arguments, or a field of its `tensors`.
        size: Number of samples.
        given: The numbers, or a name.
        usual: Names to try if `given` is None.
        what: The argument, for messages.

    Raises:
        DataError: The dataset has no such name, or the number of values is not `size`.
    """
    names = (given,) if isinstance(given, str) else () if given is not None else usual
    values: Any = given if not names else next((v for n in names if (v := _from_dataset(dataset, n)) is not None), None)
    if values is None:
        raise DataError(f"{what}: {type(dataset).__name__} has no {' or '.join(map(repr, names))} with one number per sample.")
    found = torch.as_tensor(values)
    if found.shape != (size,):
        raise DataError(f"{what}: expected {size} numbers, one per sample, got the shape {tuple(found.shape)}.")
    return found.cpu()


def _from_dataset(dataset: Any, name: str) -> Any:
    value = getattr(dataset, name, None)
    if value is not None:
        return value() if callable(value) else value
    stacked = getattr(dataset, "tensors", None)
    fields: Any = stacked() if callable(stacked) else None
    return cast("dict[str, Any]", fields).get(name) if isinstance(fields, dict) else None


def _repeated_permutations(pool: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` samples: permutations of the pool, one after the other."""
    laps = [torch.randperm(len(pool), generator=generator) for _ in range(-(-count // len(pool)))]
    return pool[torch.cat(laps)[:count]]


def _last_nonzero(weights: Tensor) -> int:
    """The last index with a weight above 0. Rounding must not give a higher index."""
    return int(weights.nonzero()[-1])
