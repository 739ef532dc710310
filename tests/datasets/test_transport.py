"""Batches from workers through memory that stays: every bit and stride arrives, memory is reused, and nothing is lost for good."""

from __future__ import annotations

import gc
import pickle
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stream import Noisy, equal, stream
from torch import Tensor
from torch.utils.data import Dataset

from ailab import tree
from ailab.datasets.stream.transport import BatchMessage, BatchReceiver, BatchSender

NEST: dict[str, Any] = {
    "plain": torch.arange(24.0).view(2, 3, 4),
    "odd": torch.arange(7, dtype=torch.uint8),
    "nested": {"flag": torch.tensor([True, False]), "list": [torch.tensor(3), "text", None], "half": torch.ones(3).bfloat16()},
    "pixels": torch.rand(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
    "turned": torch.arange(6).view(2, 3).T,
    "complex": torch.tensor([1 + 2j]),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "empty": torch.zeros(0, 4),
    "sparse": torch.eye(3).to_sparse(),
    "tracked": torch.ones(2, requires_grad=True),
}


counts_mapped_memory = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux alone tells what is mapped")


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.layout is not torch.strided:
            return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
        return (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()) and torch.equal(a, b)
    return type(a) is type(b) and a == b


def sent(sender: BatchSender, batch: dict[str, Any], iteration: int) -> BatchMessage:
    sender.start(iteration)
    return sender.pack(batch)


def test_a_batch_arrives_as_it_was() -> None:
    """Values, dtypes, shapes and strides of every leaf, whether it lies in the memory or not."""
    message = sent(BatchSender(), NEST, 1)
    moved = [list(tree.items(NEST))[i][0] for i in message.layouts]
    assert moved == ["plain", "odd", "nested.flag", "nested.list.0", "nested.half", "pixels", "complex", "tracked"]
    arrived = BatchReceiver(pin=False).unpack(message)
    for (path, left), (name, got) in zip(tree.items(NEST), tree.items(arrived), strict=True):
        assert path == name and same(left, got), path


def test_what_was_allocated_in_the_buffer_is_not_copied() -> None:
    """A batch as large as the last one is made in its buffer; a larger one, and what was not allocated there, arrives as well."""
    sender, receiver = BatchSender(), BatchReceiver(pin=False)
    for rows, inside in ((5000, False), (5000, True), (50, True), (5000, True), (40_000, False), (40_000, True)):
        sender.start(1)
        first, second = (sender.allocate((rows, 3), d) for d in (torch.uint8, torch.float64))
        batch = {"a": first.fill_(rows % 255), "own": torch.full((rows,), 2.0), "b": second.fill_(rows)}
        wanted = tree.clone(batch)
        message = sender.pack(batch)
        buffer = sender._buffers[message.number]
        assert [message.layouts[i].of(buffer).data_ptr() == t.data_ptr() for i, t in ((0, first), (2, second))] == [
            inside,
            inside,
        ]
        arrived = receiver.unpack(message)
        assert all(same(arrived[n], wanted[n]) for n in wanted)


def test_memory_is_used_again_once_it_is_copied_out() -> None:
    """Not before: what is under way keeps its values."""
    sender, receiver = BatchSender(), BatchReceiver(pin=False)
    first, second = (sent(sender, {"x": torch.full((4,), n)}, 1) for n in (1.0, 2.0))
    assert first.number != second.number
    one = receiver.unpack(first)
    third = sent(sender, {"x": torch.full((4,), 3.0)}, 1)
    assert third.number == first.number and third.buffer is None, "the main process has mapped it, so it is not sent again"
    assert [v["x"][0].item() for v in (one, receiver.unpack(second), receiver.unpack(third))] == [1, 2, 3]


def test_larger_batches_take_the_place_of_smaller_ones() -> None:
    """Ragged batches do not pile up memories."""
    sender, receiver = BatchSender(), BatchReceiver(pin=False)
    for rows in (10, 100_000, 20, 200_000, 3):
        message = sent(sender, {"x": torch.full((rows,), float(rows))}, 1)
        assert message.number == 0 and (receiver.unpack(message)["x"] == rows).all()


def test_buffers_of_dropped_batches_are_free_in_the_next_iteration() -> None:
    """Messages that were never unpacked cost no memory, and their buffers are sent again."""
    sender, receiver = BatchSender(), BatchReceiver(pin=False)
    for _ in range(3):
        sent(sender, {"x": torch.zeros(4)}, 1)
    numbers = [sent(sender, {"x": torch.full((4,), float(n))}, 2) for n in range(3)]
    assert sorted(p.number for p in numbers) == [0, 1, 2]
    assert [receiver.unpack(p)["x"][0].item() for p in numbers] == [0, 1, 2]


def _shared_bytes() -> int:
    """Of shared memory that this process has mapped."""
    return sum(
        int(line.split("-")[1].split()[0], 16) - int(line.split("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "/torch_" in line or "/dev/shm/" in line
    )


@counts_mapped_memory
def test_epochs_that_are_broken_off_leave_no_memory_behind() -> None:
    """With workers that stay: as many memories as there are batches under way, not as many as were given up in thirty epochs."""
    data = stream(Noisy(40), num_workers=2, persistent_workers=True)
    whole = list(stream(Noisy(40)).epoch(0))
    before = _shared_bytes()
    gc.freeze()  # what the whole session has made is not looked through thirty times
    try:
        for _ in range(30):
            assert equal(list(islice(data.epoch(0), 3)), whole[:3])
            gc.collect()
    finally:
        gc.unfreeze()
    assert 0 < _shared_bytes() - before <= 2 * 4 * (1 << 17), "64 KiB each and a page or two"


class Wide(Dataset[Any]):
    """A megabyte a sample."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.full((1 << 18,), float(index))}


@counts_mapped_memory
def test_batches_cost_the_host_no_new_shared_memory() -> None:
    """It maps as many memories as there can be batches under way, two ahead and the one at hand, not as many as come."""
    seen = [_shared_bytes() for _ in stream(Wide(), num_workers=1).epoch(0)]
    assert len(seen) == 16 and max(seen) <= 3 * 4 * 9 / 8 * (1 << 20) + (1 << 20)  # of 4 MiB and an eighth more


def test_a_batch_keeps_its_values_while_later_ones_come() -> None:
    """It is in memory of its own."""
    batches = list(stream(Wide(), num_workers=2, shuffle=False).epoch(0))
    assert [b["x"][:, 0].tolist() for b in batches] == [[4.0 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(16)]
    assert all(b["x"].data_ptr() % 64 == 0 for b in batches)


@pytest.fixture
def full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with 64 MB of /dev/shm that others have filled."""

    def refuse(_: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", refuse)


@pytest.mark.usefixtures("full_memory")
def test_without_shared_memory_batches_go_through_the_pipe() -> None:
    """They arrive as they were, and nothing is kept of them."""
    plain = {n: v for n, v in NEST.items() if n not in ("turned", "conjugate", "empty", "sparse")}
    sender, receiver = BatchSender(), BatchReceiver(pin=False)
    for _ in range(2):
        message = pickle.loads(pickle.dumps(sent(sender, plain, 1)))
        assert message.number == -1
        arrived = receiver.unpack(message)
        assert all(same(a, b) for a, b in zip(tree.leaves(plain), tree.leaves(arrived), strict=True))
    assert not sender._buffers and not receiver._buffers
    whole = list(stream(Noisy(11)).epoch(0))
    assert equal(list(stream(Noisy(11), num_workers=2, multiprocessing_context="fork").epoch(0)), whole)


def test_a_parcel_says_where_it_comes_from() -> None:
    """Two processes number their memories alike."""
    receiver = BatchReceiver(pin=False)
    mine = sent(BatchSender(), {"x": torch.ones(3)}, 1)
    other = BatchMessage(mine.process + 1, mine.number, torch.zeros_like(mine.buffer), mine.batch, mine.layouts)  # pyright: ignore
    assert receiver.unpack(other)["x"].sum() == 0 and receiver.unpack(mine)["x"].sum() == 3


@counts_mapped_memory
def test_shared_memory_goes_with_the_workers() -> None:
    """When an epoch is over, or given up, whose workers end with it."""
    before, data = _shared_bytes(), stream(Wide(), num_workers=2)
    for steps in (None, 3):
        for _ in islice(data.epoch(0), steps):
            assert _shared_bytes() > before
        gc.collect()
        assert _shared_bytes() == before
