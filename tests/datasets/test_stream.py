"""The stream: batches are a pure function of (seed, epoch, step), each sample counts once, bad ones are replaced and listed."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ailab.datasets import Stream
from ailab.errors import DataError
from ailab.rng import mix
from ailab.types import WEIGHT, Batch


class Noisy(Dataset[Any]):
    """Sample i: its id, and noise from each global generator."""

    def __init__(self, size: int, bad: tuple[int, ...] = ()):
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if index in self.bad:
            raise OSError("truncated\x1b[31m image")
        noise = [torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand())]
        return {"id": index, "noise": torch.stack(noise), "name": f"n{index}", "nested": {"y": (index / 2, np.float64(1))}}


def numbers(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size * 3).view(size, 3).double(), torch.arange(size))


def stream(dataset: Any, size: int = 4, **settings: Any) -> Stream:
    return Stream(dataset, **{"batch_size": size, "shuffle": True, "seed": 5, "pad": True, "device": "cpu", **settings})


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.fixture(scope="module")
def reference() -> list[list[Batch]]:
    return [list(stream(Noisy(11)).epoch(epoch)) for epoch in range(3)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_freed_when_it_is_done_with(workers: int) -> None:
    """Not when the garbage collector comes by: the next batch takes its memory."""
    gc.collect()
    gc.disable()
    try:
        seen: list[weakref.ref[Tensor]] = []
        for batch in stream(Noisy(11), num_workers=workers).epoch(0):
            seen.append(weakref.ref(next(v for v in batch.values() if isinstance(v, Tensor))))
            del batch
            assert not [i for i, ref in enumerate(seen[:-1]) if ref() is not None], "the stream may hold the one at hand"
    finally:
        gc.enable()


LOADERS = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"num_workers": 2, "persistent_workers": True},
    {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "forkserver"},
    {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"},
]


@pytest.mark.parametrize("settings", LOADERS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))
def test_batches_do_not_depend_on_workers_nor_on_where_they_start(settings: Any, reference: list[list[Batch]]) -> None:
    """Bitwise the same for any workers, persistent or not, however started; from any step; after a pass that was left early."""
    ours = stream(Noisy(11), **settings)
    next(ours.epoch(1))
    for epoch, start in ((1, 0), (0, 2), (2, 1)):
        assert equal(list(ours.epoch(epoch, start)), reference[epoch][start:])


@pytest.mark.parametrize("dataset", [Noisy(11), numbers(11)], ids=["loader", "memory"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_ranks_together_have_the_batches_of_one_process(dataset: Any, world: int) -> None:
    """The parts of all ranks, in order and without padding, are the global batch: `indices`, and the same samples."""
    field = "id" if isinstance(dataset, Noisy) else "target"
    alone = stream(dataset, pad=False)
    ranks = [stream(dataset, rank=r, world_size=world) for r in range(world)]
    for epoch in range(2):
        parts = zip(*(list(rank.epoch(epoch)) for rank in ranks), strict=True)
        for step, (batch, part) in enumerate(zip(alone.epoch(epoch), parts, strict=True)):
            real = [{k: v[p[WEIGHT].bool()] for k, v in p.items() if isinstance(v, Tensor)} for p in part]
            assert all(torch.equal(torch.cat([r[k] for r in real]), batch[k]) for k in real[0] if k != WEIGHT)
            assert torch.equal(alone.indices(epoch, step), batch[field])
            assert {len(p[WEIGHT]) for p in part} == {-(-4 // world)}


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("engine", ["loader", "memory"])
def test_evaluation_counts_each_sample_once(engine: str, pad: bool) -> None:
    """For sizes 1..20 over 1..4 ranks each sample has weight 1 exactly once, in equally many steps; size 0 is a DataError."""
    make, field = (Noisy, "id") if engine == "loader" else (numbers, "target")
    for size in range(1, 21):
        for world in range(1, 5):
            ranks = [stream(make(size), 5, shuffle=False, pad=pad, rank=r, world_size=world) for r in range(world)]
            passes = [list(rank.epoch(0)) for rank in ranks]
            assert {len(p) for p in passes} == {-(-size // 5)}
            seen = torch.cat([b[field][b[WEIGHT].bool()] if WEIGHT in b else b[field] for p in passes for b in p])
            assert sorted(seen.tolist()) == list(range(size))
    with pytest.raises(DataError, match=r"data\.val: the dataset .* is empty"):
        stream(make(0), pad=pad, name="data.val")


def test_padding_repeats_the_batch_and_weighs_nothing() -> None:
    """Fillers are the samples of the rank's part in turn, bit for bit, with weight 0; a rank without any copies the batch's."""
    for dataset, field in ((Noisy(11), "id"), (numbers(11), "target")):
        ours = stream(dataset, 8)
        batch, real = list(ours.epoch(0))[-1], ours.indices(0, 1)
        assert torch.equal(batch[field], real.repeat(3)[:8])
        assert batch[WEIGHT].tolist() == [1] * 3 + [0] * 5
        assert all(torch.equal(v[3:6], v[:3]) for k, v in batch.items() if isinstance(v, Tensor) and k != WEIGHT)
    for dataset, field in ((Noisy(5), "id"), (numbers(5), "target")):
        last = [list(stream(dataset, rank=r, world_size=2).epoch(0))[-1] for r in range(2)]
        only = stream(dataset).indices(0, 1).tolist()
        assert [b[field].tolist() for b in last] == [only * 2, only * 2]
        assert sorted(b[WEIGHT].sum().item() for b in last) == [0, 1]


def test_a_rank_without_samples_and_padding_gets_one_that_weighs_nothing() -> None:
    """Without `pad` too every rank takes part in every step: rank 0 with a sample, one without any with a copy of weight 0."""
    for dataset, field in ((Noisy(5), "id"), (numbers(5), "target")):
        first, last = (list(stream(dataset, pad=False, rank=r, world_size=2).epoch(0))[-1] for r in range(2))
        assert torch.equal(first[field], last[field])
        assert WEIGHT not in first
        assert last[WEIGHT].tolist() == [0]


def test_epochs_have_different_orders() -> None:
    """Epochs, seeds and laps are permutations of the same samples, each another one."""
    ours, other = stream(numbers(50)), stream(numbers(50), seed=6)
    orders = [s.order.lap(*at) for s, at in ((ours, (0,)), (ours, (1,)), (ours, (0, 1)), (other, (0,)), (other, (1,)))]
    assert all(o.sort().values.equal(torch.arange(50)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) == len(orders)
    assert stream(numbers(50), shuffle=False).order.lap(3).equal(torch.arange(50))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_untouched(workers: int) -> None:
    """Reading data neither consumes nor seeds the host's generators, so a model's randomness does not depend on the data."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    list(stream(Noisy(5), num_workers=workers).epoch(0))
    list(stream(numbers(5)).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]


@pytest.mark.parametrize("dataset", [Noisy(10), numbers(10)], ids=["loader", "memory"])
def test_iters_wraps_around_into_further_permutations(dataset: Any) -> None:
    """`iters` steps, fewer or more than the data has; each whole pass has every sample once, and starts anywhere."""
    field = "id" if isinstance(dataset, Noisy) else "target"
    ours = stream(dataset, 5, iters=5, pad=False)
    batches = [b[field].tolist() for b in ours.epoch(3)]
    assert ours.steps == len(ours) == len(batches) == 5
    assert [sorted(batches[i] + batches[i + 1]) for i in (0, 2)] == [list(range(10))] * 2
    assert batches[:2] != batches[2:4]
    assert [b[field].tolist() for b in ours.epoch(3, 3)] == batches[3:]
    assert [ours.indices(3, s).tolist() for s in range(5)] == batches
    assert len(list(stream(dataset, 5, iters=1).epoch(0))) == 1


def test_drop_last_leaves_out_the_short_batch() -> None:
    """floor(N / B) steps, all full; fewer samples than one batch is a DataError."""
    assert [len(b["target"]) for b in stream(numbers(11), drop_last=True, pad=False).epoch(0)] == [4, 4]
    with pytest.raises(DataError, match=r"train: 3 samples make no batch of 4"):
        stream(numbers(3), drop_last=True, name="train")


def test_fields_keep_their_kind() -> None:
    """float64 becomes float32, ints stay int64, uint8 stays; strings become a list; nesting and names stay."""
    batch = next(stream(Noisy(4), shuffle=False).epoch(0))
    assert (batch["id"].dtype, batch["noise"].dtype) == (torch.int64, torch.float32)
    assert batch["name"] == ["n0", "n1", "n2", "n3"]
    assert [t.dtype for t in batch["nested"]["y"]] == [torch.float32] * 2
    pictures = TensorDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.rand(4, dtype=torch.float64))
    memory = next(stream(pictures).epoch(0))
    assert {k: v.dtype for k, v in memory.items()} == {"input": torch.uint8, "target": torch.float32, WEIGHT: torch.float32}


def test_both_engines_give_the_same_batches() -> None:
    """A dataset read sample by sample has the batches of the same tensors in memory."""
    data = numbers(11)
    for pad in (True, False):
        read = stream([data[i] for i in range(11)], pad=pad)
        assert equal(list(read.epoch(2)), list(stream(data, pad=pad).epoch(2)))


def test_a_collate_fn_is_given_the_samples_as_they_are() -> None:
    """The user's collate_fn sees raw samples; its tuple becomes fields, and padding is masked as ever."""

    def stacked(samples: list[Any]) -> Any:
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    data = numbers(11)
    assert equal(list(stream(data, collate_fn=stacked).epoch(0)), list(stream(data).epoch(0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_and_listed_once(workers: int) -> None:
    """A bad sample's place is a good one of the batch, weight 0 with `pad`; all others are as without it; one escaped line."""
    lines: list[str] = []
    ours = stream(Noisy(100, bad=(7,)), 8, num_workers=workers, report=lines.append)
    for epoch in range(2):
        for batch, clean in zip(ours.epoch(epoch), stream(Noisy(100), 8).epoch(epoch), strict=True):
            good = batch[WEIGHT].bool()
            assert torch.equal(good, clean[WEIGHT].bool() & (clean["id"] != 7))
            assert torch.equal(batch["noise"][good], clean["noise"][good])
            assert set(batch["id"][~good].tolist()) <= set(batch["id"][good].tolist())
    (bad,) = ours.bad
    assert (bad.sample, bad.kind) == (7, "OSError")
    assert lines[1:] == ["data: 1 of 100 samples were bad so far (1 OSError)."]
    assert "sample 7 is bad" in lines[0]
    assert "truncated\\x1b[31m image (test_stream.py:" in lines[0]
    short = [b["id"] for b in stream(Noisy(100, bad=(7,)), 8, pad=False, report=lines.append).epoch(0)]
    assert sum(map(len, short)) == 100
    assert 7 not in torch.cat(short)


def test_a_batch_of_bad_samples_has_weight_zero() -> None:
    """When nothing in a batch can be read a later sample stands in, so shapes and the number of steps stay."""
    batches = list(stream(Noisy(400, bad=(0, 1, 2)), 1, shuffle=False, report=lambda _: None, iters=5).epoch(0))
    assert [(b["id"].item(), b[WEIGHT].item()) for b in batches] == [(3, 0), (3, 0), (3, 0), (3, 1), (4, 1)]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Noisy(400, bad=tuple(range(0, 400, 50))), "more than 4 of 400 samples are bad"),
        (Noisy(9999, bad=tuple(range(16, 60))), "no sample of this batch can be read"),
        (Noisy(2000, bad=tuple(range(16))), "every sample so far failed in the same way"),
        ([torch.zeros(i) for i in range(1, 9)], "set a collate_fn that pads them"),
        (["text"] * 8, "8 wrong_type"),
    ],
    ids=["too many", "all", "programming error", "ragged", "no sample"],
)
def test_data_that_cannot_be_used_ends_with_the_counts(dataset: Any, message: str) -> None:
    """Too many bad samples, a programming error and samples that do not collate are DataErrors that name the split."""
    with pytest.raises(DataError, match=message) as caught:
        list(stream(dataset, 16, name="data.train", shuffle=False, report=lambda _: None).epoch(0))
    assert str(caught.value).startswith("data.train: ")


def test_a_dataset_without_an_index_is_refused() -> None:
    """What can only be iterated has no order that could be sought in."""
    with pytest.raises(DataError, match="has no __len__ and __getitem__"):
        stream(iter([1, 2]))


def test_the_seed_mixer_separates_its_arguments() -> None:
    """Order, number and value of the integers all matter, also in the low 32 bits, and the result is a valid seed."""
    seeds = [mix(*args) for args in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**63,), (5, 6, 7), (5, 7, 6)]]
    seeds += [mix(0, epoch, index) for epoch in range(100) for index in range(100)]
    assert len({s & 0xFFFFFFFF for s in seeds}) >= len(seeds) - 1  # 2e-3 collisions expected
    assert all(0 <= s < 2**63 for s in seeds)
    assert mix(0, 1, 2) == 809110492729517673


SURVIVES = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {tests!r})
from test_stream import Noisy, stream
ours = stream(Noisy(40), num_workers=2, persistent_workers=True)
batches = ours.epoch(0)
next(batches)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
assert len(list(batches)) == 9
print(*(worker.pid for worker in multiprocessing.active_children()))
"""


def test_workers_outlive_a_signal_and_not_the_main_process() -> None:
    """A signal to the process group leaves the workers to the main process. They end at its exit, and nothing waits for them."""
    script = SURVIVES.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_batch_from_memory_costs_microseconds() -> None:
    """An in-memory batch of (128, 64) float32 costs the host far less than a step: < 100 us here, 10 us measured alone."""
    ours = stream(TensorDataset(torch.rand(12800, 64), torch.zeros(12800, dtype=torch.long)), 128)
    list(ours.epoch(0))
    best = 1.0
    for epoch in range(5):
        start = time.perf_counter()
        count = sum(1 for _ in ours.epoch(epoch))
        best = min(best, (time.perf_counter() - start) / count)
    assert best < 100e-6
