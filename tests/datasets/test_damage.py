"""A folder of good images with damaged ones among them, and the order over every way to read it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import DAMAGED, LINKS, damage, encoded, photo
from test_stream import Noisy, equal, stream
from torch.utils.data import Dataset

from ailab.datasets import read_image
from ailab.types import WEIGHT

KINDS = [*DAMAGED, *LINKS]


class Pictures(Dataset[Any]):
    """A random window of each image, from the global generator."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        picture = read_image(self.folder / f"{index:05}.jpg")
        top, left = torch.randint(12, (2,)).tolist()
        return {"input": picture[:, top : top + 48, left : left + 64], "id": index}


def two_folders(root: Path, good: int, bad: int) -> dict[int, str]:
    """`root/clean`, all good, and `root/mixed`, where some are damaged; {index: kind} of those."""
    places = torch.randperm(good + bad, generator=torch.Generator().manual_seed(0))[:bad].tolist()
    kinds: dict[int, str] = {}
    bases = [photo(i, (60, 80)) for i in range(50)]
    for name in ("clean", "mixed"):
        (root / name).mkdir()
    for i in range(good + bad):
        path = root / "clean" / f"{i:05}.jpg"
        path.write_bytes(encoded(bases[i % 50], "PNG" if i % 3 == 0 else "JPEG"))
        if i not in places:
            os.link(path, root / "mixed" / path.name)
    for k, i in enumerate(places):
        kinds[i] = damage(root / "mixed" / f"{i:05}.jpg", KINDS[k % len(KINDS)], i)
    return kinds


def resident(field: str = "VmHWM") -> int:
    """MB of the workers, the most of any: now (VmRSS), or at most so far (VmHWM)."""
    found = [0]
    for worker in multiprocessing.active_children():
        if worker.name.startswith("rank"):  # of other tests
            continue
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        found += [int(line.split()[1]) // 1024 for line in lines if line.startswith(field)]
    return max(found)


def check_folder(root: Path, good: int, bad: int) -> None:
    """Every damaged file is listed with its kind, and nothing else has changed."""
    kinds = two_folders(root, good, bad)
    clean, mixed = (
        stream(
            Pictures(root / name, good + bad),
            32,
            num_workers=2,
            persistent_workers=True,
            prefetch_factor=4,
            timeout=60,
            max_bad_frac=0.5,
            report=lambda _: None,
        )
        for name in ("clean", "mixed")
    )
    begun = 0
    for epoch in range(2):
        for batch, whole in zip(batches(mixed, epoch), batches(clean, epoch), strict=True):
            begun = begun or resident("VmRSS")
            real = batch[WEIGHT].bool()
            assert [i for i in whole["id"][whole[WEIGHT].bool()].tolist() if i not in kinds] == batch["id"][real].tolist()
            assert torch.equal(batch["input"][real], whole["input"][real])
    assert {b.sample: b.kind for b in mixed.bad} == kinds
    assert all(b.path == str(root / "mixed" / f"{b.sample:05}.jpg") for b in mixed.bad)
    assert not clean.bad
    growth = resident() - begun
    print(f"{bad} damaged files of {len(KINDS)} kinds among {good}: worker memory grew by {growth} MB")
    assert 0 <= growth < 100


def batches(source: Any, epoch: int) -> Iterator[Any]:
    start = time.monotonic()
    for batch in source.epoch(epoch):
        assert time.monotonic() - start < 50, "a batch takes too long"
        yield batch
        start = time.monotonic()


def test_damaged_files_are_listed_and_nothing_else_changes(tmp_path: Path) -> None:
    """60 damaged files of all kinds among 240: each listed with its kind, good samples bitwise as in a clean folder."""
    check_folder(tmp_path, 240, 2 * len(KINDS))


@pytest.mark.nightly
def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    """1,000 damaged files of 30 kinds among 5,000 good ones, twice: no hang, no memory, no other sample changed."""
    check_folder(tmp_path, 5000, 1000)


@pytest.fixture(scope="module")
def reference() -> list[list[Any]]:
    return [list(stream(Noisy(23)).epoch(epoch)) for epoch in range(3)]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("workers", [1, 4])
def test_three_epochs_are_the_same_however_they_are_read(
    workers: int, method: str, persistent: bool, reference: list[list[Any]]
) -> None:
    """Bitwise the batches of one process: for each start method, persistent or not, from a resume point, over 1 and 2 ranks."""
    settings = {"num_workers": workers, "multiprocessing_context": method, "persistent_workers": persistent}
    for world in (1, 2):
        ranks = [stream(Noisy(23), rank=r, world_size=world, **settings) for r in range(world)]
        for epoch, start in ((0, 0), (1, 3), (1, 0), (2, 0)):
            parts = [list(rank.epoch(epoch, start)) for rank in ranks]
            for step, whole in enumerate(reference[epoch][start:]):
                real = whole[WEIGHT].bool()
                mine = [part[step] for part in parts]
                for name in ("id", "noise"):
                    joined = torch.cat([b[name][b[WEIGHT].bool()] for b in mine])
                    assert torch.equal(joined, whole[name][real])
                assert world > 1 or equal(mine[0], whole)
