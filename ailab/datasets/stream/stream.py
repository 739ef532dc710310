"""The batches of one phase: a pure function of (seed, epoch, step), whatever the workers, the ranks or the resume point."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ailab import tree
from ailab.binding import wrap_sample
from ailab.datasets.files.bad_file import Bad
from ailab.datasets.files.cache import Cache
from ailab.datasets.files.image import Reading
from ailab.datasets.stream.bad import BadSamples
from ailab.datasets.stream.loading import Fetcher, Reader, narrow
from ailab.datasets.stream.order import Order
from ailab.datasets.stream.prefetch import on_device
from ailab.datasets.stream.workers import Workers
from ailab.errors import DataError
from ailab.types import WEIGHT, Batch

_BLOCK_BATCHES, _BLOCK_BYTES = 32, 1 << 20  # gathered at a time, at most
_ALIGNED_BYTES = 64
_MEMORY_SHARE = 0.3  # of the free device memory that an in-memory dataset may take


class Stream:
    """The batches of one phase, on the device.

    Args:
        dataset: map-style: anything with `__len__` and `__getitem__`, whose samples are tuples or dicts. One with a method
            `tensors() -> dict[str, Tensor]` (all samples stacked, nothing random), or a `TensorDataset`, is kept on the device
            and read without workers.
        batch_size: samples of a global batch, over all ranks.
        shuffle: another permutation for each epoch; else samples come in their own order.
        seed: of the order, and with (epoch, index) of each sample's own randomness.
        rank: which contiguous part of each global batch this stream yields.
        world_size: number of parts; they differ by at most one sample.
        drop_last: leave out a last batch that is not full.
        pad: give every batch the same shape, ceil(batch_size / world_size) slots, and a field `_weight` (slots,) float32, 0 for
            padding. Padding repeats the samples of the batch in turn, so that batch statistics stay as they are. Without `pad`
            the last batch is short; a rank that has no sample of it gets one with `_weight` 0, a field of no other batch then.
        device: where batches go.
        iters: steps of an epoch; past the end of the dataset it goes on with further permutations.
        name: the split, for messages.
        report: called with one line about each bad sample.
        max_bad_frac: share of the dataset that may be unreadable.
        sampler: draws other epochs than permutations: see `ailab.datasets.stream.sampling`. `shuffle` is not asked then.
        truncated: what becomes of truncated pictures: see `read_image`.
        nan_is_bad: a sample with a NaN in it counts as bad.
        cache: keeps the pictures that samples are made of.
        dataloader_kwargs: of `Workers`, and of `torch.utils.data.DataLoader`.

    Raises:
        DataError: the dataset is empty, has no length, or has too few samples for one batch with `drop_last`. While iterating:
            too many samples are bad, or samples do not collate.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        device: torch.device | str = "cpu",
        pad: bool,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        iters: int | None = None,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        name: str = "data",
        report: Callable[[str], None] | None = None,
        max_bad_frac: float = 0.01,
        sampler: Any = None,
        truncated: Literal["skip", "fill"] = "skip",
        nan_is_bad: bool = True,
        cache: Cache | None = None,
        **dataloader_kwargs: Any,
    ):
        size = _length(dataset, name)
        plan = sampler.plan(dataset, size, batch_size) if sampler is not None else None
        count = plan.count if plan else size
        lap = count // batch_size if drop_last else math.ceil(count / batch_size)
        if not lap:
            raise DataError(f"{name}: {count} samples make no batch of {batch_size} with drop_last=True.")
        self.order = Order(size, batch_size, shuffle, seed, rank, world_size, lap, lap if iters is None else iters, plan)
        self.pad = pad
        self.device = torch.device(device)
        self._slots = math.ceil(batch_size / world_size)
        report = report or logging.getLogger("ailab.data").warning
        self._bad = BadSamples(name, size, max_bad_frac, report, share=1 / world_size)
        self._weights: dict[int, Tensor] = {}
        self._tensors = None if collate_fn else _in_memory(dataset, self.device)
        if self._tensors is not None and nan_is_bad and _holes(self._tensors):
            self._tensors = None  # by sample, bad ones are found and replaced
        if self._tensors is None:
            reader = Reader(seed, collate_fn, nan_is_bad, Reading(truncated, cache))
            fetcher = Fetcher(dataset, reader, self._slots if pad else None, batch_size)
            pin = self.device.type == "cuda" if pin_memory is None else pin_memory and torch.cuda.is_available()
            self._workers = Workers(
                fetcher, self.order, name, report, num_workers=num_workers, pin_memory=pin, **dataloader_kwargs
            )

    def __len__(self) -> int:
        return self.steps

    @property
    def bad(self) -> list[Bad]:
        """The samples that could not be read so far, once each."""
        return list(self._bad.found.values())

    @property
    def kept(self) -> list[Bad]:
        """The samples that are damaged, and were good enough to be used."""
        return list(self._bad.kept.values())

    def record_bad(self, record: Callable[[str, Bad, bool], bool]) -> None:
        """Give each bad sample to `record(split, sample, kept)`, once; it says whether that is news, to be reported."""
        self._bad.record = record

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return self.order.steps

    @property
    def samples(self) -> int:
        """Samples of one epoch, all ranks together."""
        return self.order.samples

    def indices(self, epoch: int, step: int) -> Tensor:
        """The samples of one global batch, all ranks together: (at most batch_size,) int64."""
        return self.order.indices(epoch, step)

    def epoch(self, epoch: int, start: int = 0, *, lean: bool = False) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on. Nothing before it is read.

        Args:
            epoch: which permutation.
            start: of the first batch.
            lean: leave `_weight` out where every slot counts: less work for a step that is not compiled, and to which it is
                all the same whether batches have the same fields.
        """
        return self._gather(epoch, start, lean) if self._tensors is not None else self._load(epoch, start, lean)

    # In memory: one gather for a block of batches, which costs a third of one each.

    def _gather(self, epoch: int, start: int, lean: bool) -> Iterator[Batch]:
        assert self._tensors is not None
        home = next(iter(self._tensors.values())).device
        sample = sum(t[0].nbytes for t in self._tensors.values())
        block = min(_BLOCK_BATCHES, max(1, _BLOCK_BYTES // max(1, sample * self._slots)))
        planned = self.order.batches(epoch, start, home)
        while some := list(islice(planned, block)):
            picked = [self._filled(ids, mine) for ids, mine in some]
            sizes = [p.size(0) for p in picked]  # len() of a tensor is a Python function: 1 us a call
            columns = {n: _taken(values, picked, sizes, self.device) for n, values in self._tensors.items()}
            for i, (_, mine) in enumerate(some):
                batch: Batch = {name: parts[i] for name, parts in columns.items()}
                real = mine.size(0)
                if (self.pad and not (lean and real == sizes[i])) or not real:
                    batch[WEIGHT] = self._weight(real, sizes[i])
                yield batch

    def _filled(self, ids: Tensor, mine: Tensor) -> Tensor:
        """This rank's part of a global batch, repeated in turn to fill every slot; what of it counts is in the weights."""
        slots = self._slots if self.pad else max(mine.size(0), 1)
        if mine.size(0) == slots:
            return mine
        some = mine if mine.size(0) else ids[:1]
        return some.repeat(math.ceil(slots / len(some)))[:slots]

    def _weight(self, real: int, slots: int) -> Tensor:
        """(slots,): `real` ones, then zeros. One tensor for all batches alike; nobody writes to a batch."""
        if real not in self._weights:
            self._weights[real] = (torch.arange(slots, device=self.device) < real).float()
        return self._weights[real]

    # Any other dataset: a DataLoader whose items are whole batches.

    def _load(self, epoch: int, start: int, lean: bool) -> Iterator[Batch]:
        def batches() -> Iterator[Batch]:
            for loaded in self._workers.batches(epoch, start):
                self._bad.add(loaded.bad, loaded.asked, loaded.kept)
                if loaded.batch is None:
                    raise self._bad.error(loaded.failure)
                if lean and loaded.asked == self._slots and not loaded.bad:
                    loaded.batch.pop(WEIGHT, None)
                yield loaded.batch

        yield from on_device(batches(), self.device)
        self._bad.end_epoch()


def _taken(values: Tensor, picked: list[Tensor], sizes: list[int], device: torch.device) -> Sequence[Tensor]:
    """The samples of each batch, gathered at once; each batch at an address that is a multiple of 64.

    The last bits of a matrix product depend on the address of its operands, and a batch must not depend on whether it is the
    first that is read, after a resumption, or the third of a block.
    """
    each = _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, values[0].nbytes)  # samples after which an address is aligned again
    room = [-(-n // each) * each for n in sizes]
    if room == sizes:
        return values.index_select(0, torch.cat(picked)).to(device).split(sizes)
    parts = [torch.cat([p, p[:1].expand(n - p.size(0))]) for p, n in zip(picked, room, strict=True)]
    gathered = values.index_select(0, torch.cat(parts)).to(device).split(room)
    return [g[:n] for g, n in zip(gathered, sizes, strict=True)]


def _length(dataset: Any, name: str) -> int:
    """The number of samples.

    Raises:
        DataError: there are none, or the dataset cannot say.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: {type(dataset).__name__} has no __len__ and __getitem__; batches are read by index.")
    if not len(dataset):
        raise DataError(f"{name}: the dataset ({type(dataset).__name__}) is empty.")
    return len(dataset)


def _in_memory(dataset: Any, device: torch.device) -> dict[str, Tensor] | None:
    """All samples as stacked tensors, on the device if they fit well; None for a dataset that is read by sample."""
    stacked = getattr(dataset, "tensors", None)
    found: Any
    if type(dataset) is TensorDataset:
        found = wrap_sample(stacked)
    else:
        found = stacked() if callable(stacked) else None
    if found is None:
        return None
    tensors: dict[str, Tensor] = {name: narrow(t.detach()) for name, t in found.items()}
    if device.type == "cuda" and tree.nbytes(tensors) > _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return {name: t.to(device) for name, t in tensors.items()}


def _holes(tensors: dict[str, Tensor]) -> bool:
    """Whether there is a NaN in any of them."""
    return any(t.is_floating_point() and bool(t.sum().isnan()) and bool(t.isnan().any()) for t in tensors.values())
