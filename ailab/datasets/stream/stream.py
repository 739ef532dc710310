"""The batches of one phase, as a pure function of (seed, epoch, step). They do not depend on workers, ranks or resumption."""

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
from ailab.datasets.files.bad_file import BadSample
from ailab.datasets.files.cache import Cache
from ailab.datasets.files.image import ImageSettings
from ailab.datasets.stream.bad import BadSampleTracker
from ailab.datasets.stream.loading import Fetcher, SampleSettings, narrow
from ailab.datasets.stream.order import Order, Plan
from ailab.datasets.stream.prefetch import on_device
from ailab.datasets.stream.workers import Workers
from ailab.errors import DataError
from ailab.types import SIZE, WEIGHT, Batch

_BLOCK_BATCHES, _BLOCK_BYTES = 32, 1 << 20  # at most, of one gather
_ALIGNED_BYTES = 64
_MEMORY_SHARE = 0.3  # of the free device memory, for an in-memory dataset


class Stream:
    """The batches of one phase, on the device.

    Args:
        dataset: A map-style dataset, with `__len__` and `__getitem__`. Its samples are tuples or dicts. A dataset with a method
            `tensors() -> dict[str, Tensor]` (all samples stacked, nothing random), or a `TensorDataset`, is kept on the device
            and needs no workers.
        batch_size: Samples of a global batch, over all ranks.
        shuffle: Whether each epoch is a new permutation. Otherwise samples come in the order of the dataset.
        seed: Seed of the order. The random numbers of a sample are seeded with (seed, epoch, index).
        device: Device of the batches.
        sized: Whether each batch has the field `_size`, (): the samples of its global batch. A `Sum` needs it with several ranks.
        pad: Whether every batch has the same shape: ceil(batch_size / world_size) slots, and a field `_weight` (slots,) float32,
            which is 0 for padding. Padding repeats the samples of the batch in turn. Without it the last batch is shorter; a
            rank without samples then gets one sample with `_weight` 0, and only this batch has the field.
        rank: Rank of this process. It gets a contiguous part of each global batch.
        world_size: Number of ranks. Their parts differ by at most one sample.
        drop_last: Whether to leave out a last batch that is not full.
        iters: Steps of an epoch. Default: one pass over the dataset. A longer epoch goes on with a new permutation.
        num_workers: Number of worker processes. 0 loads in the main process.
        pin_memory: Whether to copy batches to pinned memory first. Default: only for a CUDA device.
        collate_fn: A function list of samples -> batch. Default: each field is stacked.
        name: Name of the split, for messages.
        report: Called with one line about each bad sample. Default: a warning of the logger "ailab.data".
        max_bad_frac: Fraction of the dataset that may be bad.
        sampler: Chooses the samples of each epoch, see `ailab.datasets.stream.sampling`. `shuffle` is then ignored.
        truncated: For truncated images: "skip" makes a bad sample, "fill" fills the missing rows; see `read_image`.
        nan_is_bad: Whether a sample with a NaN is bad.
        double: Whether fields of float64 stay float64. Otherwise they become float32.
        cache: The cache of decoded images.
        **dataloader_kwargs: Further arguments of `Workers` and of `torch.utils.data.DataLoader`.

    Raises:
        DataError: The dataset is empty, has no length, or has too few samples for one batch with `drop_last`. While iterating:
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
        sized: bool = False,
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
        double: bool = False,
        cache: Cache | None = None,
        **dataloader_kwargs: Any,
    ):
        size = _length(dataset, name)
        plan = _planned(sampler, dataset, size, batch_size, name) if sampler is not None else None
        count = plan.count if plan else size
        lap = count // batch_size if drop_last else math.ceil(count / batch_size)
        if not lap:
            raise DataError(f"{name}: {count} samples make no batch of {batch_size} with drop_last=True.")
        self.order = Order(size, batch_size, shuffle, seed, rank, world_size, lap, lap if iters is None else iters, plan)
        self.pad, self.sized = pad, sized
        self.device = torch.device(device)
        self._slots = math.ceil(batch_size / world_size)
        report = report or logging.getLogger("ailab.data").warning
        self._bad = BadSampleTracker(name, size, max_bad_frac, report, share=1 / world_size)
        self._weights: dict[int, Tensor] = {}
        self._sizes: dict[int, Tensor] = {}
        self._tensors = None if collate_fn else _in_memory(dataset, self.device, double)
        if self._tensors is not None and nan_is_bad and _have_nan(self._tensors):
            self._tensors = None  # load sample by sample, so that the bad ones are replaced
        if self._tensors is None:
            settings = SampleSettings(seed, collate_fn, nan_is_bad, ImageSettings(truncated, cache), double)
            fetcher = Fetcher(dataset, settings, self._slots if pad else None, batch_size)
            pin = self.device.type == "cuda" if pin_memory is None else pin_memory and torch.cuda.is_available()
            self._workers = Workers(
                fetcher, self.order, name, report, num_workers=num_workers, pin_memory=pin, **dataloader_kwargs
            )

    def __len__(self) -> int:
        return self.steps

    @property
    def bad(self) -> list[BadSample]:
        """The bad samples up to now, once each. They were replaced."""
        return list(self._bad.found.values())

    @property
    def damaged(self) -> list[BadSample]:
        """The samples up to now that are damaged but were used, once each."""
        return list(self._bad.damaged.values())

    def record_bad(self, record: Callable[[str, BadSample, bool], bool]) -> None:
        """Set the function that records bad samples.

        Args:
            record: (split, sample, kept) -> whether the sample is new and has to be reported. Called once per sample. `kept` is
                True for a damaged sample that is used.
        """
        self._bad.record = record

    def close(self) -> None:
        """Kill the worker processes, if there are any."""
        if self._tensors is None:
            self._workers.close()

    @property
    def steps(self) -> int:
        """Number of steps of one epoch."""
        return self.order.steps

    @property
    def samples(self) -> int:
        """Number of samples of one epoch, over all ranks."""
        return self.order.samples

    @property
    def tail(self) -> int:
        """Samples of the last global batch of an epoch's lap, if it is short; else 0."""
        order = self.order
        last = order.length(order.lap_steps - 1)
        return last if last < order.batch_size and order.steps >= order.lap_steps else 0

    def indices(self, epoch: int, step: int) -> Tensor:
        """The sample indices of one global batch, over all ranks: (at most batch_size,) int64."""
        return self.order.indices(epoch, step)

    def epoch(self, epoch: int, start: int = 0, *, lean: bool = False) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on. Batches before it are not loaded.

        Args:
            epoch: Number of the epoch, from 0.
            start: Step of the first batch.
            lean: Whether to leave out `_weight` if it is 1 everywhere. It saves work if the step is not compiled, since then
                batches may have different fields.
        """
        batches = self._gather(epoch, start, lean) if self._tensors is not None else self._load(epoch, start, lean)
        if not self.sized:
            return batches
        return ({**batch, SIZE: self._size(self.order.length(step))} for step, batch in enumerate(batches, start))

    # In memory: one gather for a block of batches takes a third of the time of one gather per batch.

    def _gather(self, epoch: int, start: int, lean: bool) -> Iterator[Batch]:
        assert self._tensors is not None
        home = next(iter(self._tensors.values())).device
        sample = sum(t[0].nbytes for t in self._tensors.values())
        block = min(_BLOCK_BATCHES, max(1, _BLOCK_BYTES // max(1, sample * self._slots)))
        planned = self.order.batches(epoch, start, home)
        while some := list(islice(planned, block)):
            picked = [self._slot_ids(ids, mine) for ids, mine in some]
            sizes = [p.size(0) for p in picked]  # len() of a tensor is a Python function: 1 us a call
            columns = {n: _gathered(values, picked, sizes, self.device) for n, values in self._tensors.items()}
            for i, (_, mine) in enumerate(some):
                batch: Batch = {name: parts[i] for name, parts in columns.items()}
                real = mine.size(0)
                if (self.pad and not (lean and real == sizes[i])) or not real:
                    batch[WEIGHT] = self._weight(real, sizes[i])
                yield batch

    def _slot_ids(self, ids: Tensor, mine: Tensor) -> Tensor:
        """The sample index of each slot: this rank's part of a global batch, repeated in turn."""
        slots = self._slots if self.pad else max(mine.size(0), 1)
        if mine.size(0) == slots:
            return mine
        some = mine if mine.size(0) else ids[:1]
        return some.repeat(math.ceil(slots / len(some)))[:slots]

    def _weight(self, real: int, slots: int) -> Tensor:
        """(slots,) float32: `real` ones, then zeros. Batches share the tensor; they are never written to."""
        if real not in self._weights:
            self._weights[real] = (torch.arange(slots, device=self.device) < real).float()
        return self._weights[real]

    def _size(self, samples: int) -> Tensor:
        """() float32: how many samples a global batch has."""
        if samples not in self._sizes:
            self._sizes[samples] = torch.tensor(float(samples), device=self.device)
        return self._sizes[samples]

    # Any other dataset: by a DataLoader whose items are whole batches.

    def _load(self, epoch: int, start: int, lean: bool) -> Iterator[Batch]:
        def batches() -> Iterator[Batch]:
            for loaded in self._workers.batches(epoch, start):
                self._bad.add(loaded.bad, loaded.asked, loaded.damaged)
                if loaded.batch is None:
                    raise self._bad.error(loaded.failure)
                if lean and loaded.asked == self._slots and not loaded.bad:
                    loaded.batch.pop(WEIGHT, None)
                yield loaded.batch

        yield from on_device(batches(), self.device)
        self._bad.end_epoch()


def _gathered(values: Tensor, picked: list[Tensor], sizes: list[int], device: torch.device) -> Sequence[Tensor]:
    """The samples of each batch, with one gather. The address of each batch is a multiple of 64.

    The last bits of a matrix product depend on the address of its operands. A batch must be the same whether it is the first one
    after a resumption or the third of a block.
    """
    each = _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, values[0].nbytes)  # samples from one aligned address to the next
    padded = [-(-n // each) * each for n in sizes]
    if padded == sizes:
        return values.index_select(0, torch.cat(picked)).to(device).split(sizes)
    parts = [torch.cat([p, p[:1].expand(n - p.size(0))]) for p, n in zip(picked, padded, strict=True)]
    gathered = values.index_select(0, torch.cat(parts)).to(device).split(padded)
    return [g[:n] for g, n in zip(gathered, sizes, strict=True)]


def _length(dataset: Any, name: str) -> int:
    """The number of samples of a dataset.

    Raises:
        DataError: The dataset is empty, or has no `__len__` or `__getitem__`.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise DataError(f"{name}: {type(dataset).__name__} has no __len__ and __getitem__. Samples are read by index.")
    if not len(dataset):
        raise DataError(f"{name}: the dataset ({type(dataset).__name__}) is empty.")
    return len(dataset)


def _planned(sampler: Any, dataset: Any, size: int, batch_size: int, name: str) -> Plan:
    """The plan of a sampler; what it refuses is said with the place of the sampler in the cfg."""
    try:
        return sampler.plan(dataset, size, batch_size)
    except DataError as error:
        raise DataError(f"{name}_dataloader.sampler: {error}") from error


def _in_memory(dataset: Any, device: torch.device, double: bool) -> dict[str, Tensor] | None:
    """All samples as stacked tensors, on the device if they fit; None for a dataset that is read sample by sample."""
    stacked = getattr(dataset, "tensors", None)
    found: Any
    if type(dataset) is TensorDataset:
        found = wrap_sample(stacked)
    else:
        found = stacked() if callable(stacked) else None
    if found is None:
        return None
    tensors: dict[str, Tensor] = {name: t.detach() if double else narrow(t.detach()) for name, t in found.items()}
    if device.type == "cuda" and tree.nbytes(tensors) > _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
        return tensors
    return {name: t.to(device) for name, t in tensors.items()}


def _have_nan(tensors: dict[str, Tensor]) -> bool:
    """Whether any tensor has a NaN."""
    return any(t.is_floating_point() and bool(t.sum().isnan()) and bool(t.isnan().any()) for t in tensors.values())
