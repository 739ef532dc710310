"""Samplers: what an epoch holds, from (seed, epoch) alone, over the same stream as any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_stream import equal, numbers, stream
from torch.utils.data import TensorDataset

from ailab.config import check
from ailab.datasets import ClassBalancedSampler, CurriculumSampler, LengthSampler, WeightedSampler
from ailab.errors import ConfigError, DataError

LABELS = torch.tensor([0] * 70 + [1] * 20 + [2] * 7)
LENGTHS = torch.arange(97) * 37 % 89
SAMPLERS = {
    "weighted": WeightedSampler([float(i % 5) for i in range(97)]),
    "distinct": WeightedSampler([float(1 + i % 5) for i in range(97)], num_samples=50, replacement=False),
    "balanced": ClassBalancedSampler(LABELS.tolist(), num_samples=60),
    "length": LengthSampler(LENGTHS.tolist(), pool=3),
    "curriculum": CurriculumSampler(LENGTHS.tolist(), start=0.3, epochs=4),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_a_pure_order(name: str) -> None:
    """Each epoch is another draw, the same for every rank, world size and resume point; laps go on with further draws."""
    sampler = SAMPLERS[name]
    ours = stream(numbers(97), 8, sampler=sampler, iters=20)
    for epoch in range(3):
        batches = [b["target"] for b in ours.epoch(epoch)]
        assert len(batches) == 20
        assert equal([b["target"] for b in stream(numbers(97), 8, sampler=sampler, iters=20).epoch(epoch, 13)], batches[13:])
        ranks = [stream(numbers(97), 8, sampler=sampler, iters=20, rank=r, world_size=2).epoch(epoch) for r in range(2)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            real = torch.cat([p["target"][p["_weight"].bool()] for p in parts])
            assert torch.equal(real, ours.indices(epoch, step))
    assert not torch.equal(ours.order.lap(0), ours.order.lap(1))
    assert not torch.equal(ours.order.lap(0), ours.order.lap(0, 1))
    assert not torch.equal(ours.order.lap(0), stream(numbers(97), 8, sampler=sampler, seed=6).order.lap(0))


def draws(sampler: Any, epochs: int = 1, size: int = 97, batch: int = 8, dataset: Any = None) -> torch.Tensor:
    order = stream(dataset or numbers(size), batch, sampler=sampler).order
    return torch.stack([order.lap(epoch) for epoch in range(epochs)])


def test_weights_are_frequencies() -> None:
    """With replacement the counts are multinomial: within 5 standard deviations of what the weights say; weight 0 never comes."""
    weights = torch.tensor([float(i % 5) for i in range(97)])
    drawn = draws(WeightedSampler(weights.tolist(), num_samples=20_000))[0]
    expected = weights / weights.sum() * 20_000
    assert ((drawn.bincount(minlength=97) - expected).abs() <= 5 * expected.sqrt()).all()
    assert set(drawn.tolist()) == set(weights.nonzero()[:, 0].tolist())


def test_without_replacement_nothing_comes_twice() -> None:
    """Samples are distinct, and the first of three with weights 1, 2, 3 comes as often as successive draws say (exact sums)."""
    drawn = draws(SAMPLERS["distinct"], 20)
    assert all(len(set(d.tolist())) == 50 for d in drawn)
    pairs = draws(WeightedSampler([1.0, 2.0, 3.0], num_samples=2, replacement=False), 6000, 3, 2)
    left_out = (3 - pairs.sum(1)).bincount(minlength=3) / 6000  # indices sum to 3
    chance = [2 / 6 * 3 / 4 + 3 / 6 * 2 / 3, 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3, 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4]
    assert left_out.tolist() == pytest.approx(chance, abs=0.025)


def test_classes_are_balanced() -> None:
    """Every class gives the same number to within one, and its own samples equally often to within one."""
    for count in (60, 97, 100):
        for drawn in draws(ClassBalancedSampler(LABELS.tolist(), num_samples=count), 5):
            classes = LABELS[drawn].bincount(minlength=3)
            assert classes.sum() == count
            assert classes.max() - classes.min() <= 1
            times = drawn.bincount(minlength=97)
            assert all(int(times[c == LABELS].max() - times[c == LABELS].min()) <= 1 for c in range(3))


def test_labels_come_from_the_dataset() -> None:
    """A field of an in-memory dataset, an attribute or a method gives the numbers; what is not there is named."""

    class Named(TensorDataset):
        targets = LABELS

        def labels_of(self) -> list[int]:
            return LABELS.tolist()

    named = Named(torch.zeros(97, 2), torch.arange(97))
    wanted = draws(ClassBalancedSampler(LABELS.tolist()), 2)
    assert torch.equal(draws(ClassBalancedSampler(), 2, dataset=named), wanted)
    assert torch.equal(draws(ClassBalancedSampler("labels_of"), 2, dataset=named), wanted)
    with pytest.raises(DataError, match="has no 'labels' or 'targets' or 'target'"):
        draws(ClassBalancedSampler())
    with pytest.raises(DataError, match="expected 97 numbers, one per sample, got"):
        draws(WeightedSampler([1.0]))
    for weights in ([-1.0] * 97, [0.0] * 97, [float("nan")] * 97):
        with pytest.raises(DataError, match="not all 0"):
            draws(WeightedSampler(weights))
    with pytest.raises(DataError, match="expected at least 2 samples of weight above 0 without replacement, got 1"):
        draws(WeightedSampler([1.0, *[0.0] * 96], num_samples=2, replacement=False))


def test_batches_of_one_length_pad_little() -> None:
    """An epoch is a permutation; batches are sorted within their pool: a fifth of a random order's padding."""
    lengths = (torch.rand(1003, generator=torch.Generator().manual_seed(1)) * 500).long()
    sampler = LengthSampler(lengths.tolist(), pool=20)
    for drawn in draws(sampler, 3, 1003, 16):
        assert torch.equal(drawn.sort().values, torch.arange(1003))
        batches = [lengths[b] for b in drawn[:992].split(16)]
        waste = sum(int((b.max() - b).sum()) for b in batches)
        shuffled = lengths[torch.randperm(1003, generator=torch.Generator().manual_seed(2))][:992].split(16)
        assert waste * 5 < sum(int((b.max() - b).sum()) for b in shuffled)
    assert not torch.equal(*(b.sort().values for b in draws(sampler, 2, 1003, 16)[:, :16]))


def test_a_curriculum_grows_to_all() -> None:
    """Epoch e has the easiest ceil(share * size), each equally often to within one; from `epochs` on every sample once."""
    sampler = CurriculumSampler(LENGTHS.tolist(), start=0.3, epochs=4)
    by_difficulty = LENGTHS.argsort(stable=True)
    for epoch, drawn in enumerate(draws(sampler, 6)):
        most = [30, 47, 64, 81, 97, 97][epoch]
        assert set(drawn.tolist()) == set(by_difficulty[:most].tolist())
        times = drawn.bincount(minlength=97)[by_difficulty[:most]]
        assert int(times.max() - times.min()) <= 1
    with pytest.raises(DataError, match="expected 0 < start <= 1"):
        draws(CurriculumSampler([1.0] * 97, start=0))


def test_a_sampler_of_the_cfg_is_checked() -> None:
    """An unknown sampler, a wrong argument, and shuffle beside a sampler are found before anything is built."""

    def problems(**loader: Any) -> str:
        cfg = {"model": {"type": "MLP", "sizes": [1, 1]}, "data": {"val": {"type": "Digits"}, "val_dataloader": loader}}
        with pytest.raises(ConfigError) as caught:
            check.check(cfg)
        return str(caught.value)

    assert "Did you mean 'WeightedSampler'?" in problems(sampler={"type": "WeightSampler", "weights": [1]})
    assert "takes no 'weihgts'" in problems(sampler={"type": "WeightedSampler", "weihgts": [1]})
    assert "leave shuffle out" in problems(sampler={"type": "ClassBalancedSampler"}, shuffle=True)
