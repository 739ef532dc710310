"""The cache of decoded images: the same bytes as without, shared by all processes, stale and damaged entries never used."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import encoded, photo
from test_loading import Files
from test_stream import equal, stream

from ailab.datasets import ClassificationImageDataset, read_image
from ailab.datasets.files import image
from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.cache import SHARED, Cache, little_memory, memory_held, run_cache
from ailab.datasets.files.image import ImageSettings, image_settings


@pytest.fixture(params=["ram", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    if request.param == "ram" and not SHARED.is_dir():
        pytest.skip("the system has no /dev/shm")
    made = run_cache(request.param, tmp_path)
    assert made is not None
    yield made
    made.clear()


def picture(path: Path, seed: int = 0) -> Path:
    path.write_bytes(encoded(photo(seed), "JPEG"))
    return path


def read(cache: Cache, path: Path, **settings: Any) -> tuple[torch.Tensor, bool]:
    """An image, and whether it was decoded now."""
    decoded: list[Any] = []
    original = image._decoded

    def watched(*args: Any) -> Any:
        decoded.append(args)
        return original(*args)

    image._decoded = watched
    try:
        with image_settings(ImageSettings(cache=cache)):
            return read_image(path, **settings), bool(decoded)
    finally:
        image._decoded = original


def test_a_picture_is_decoded_once(cache: Cache, tmp_path: Path) -> None:
    """The second time it comes from the cache, bit for bit and with the same strides, each size and mode on its own."""
    path = picture(tmp_path / "x")
    for settings in ({}, {"resize": 30}, {"resize": (20, 50)}, {"mode": "L"}, {"mode": "RGBA"}):
        plain = read_image(path, **settings)
        (first, made), (second, again) = read(cache, path, **settings), read(cache, path, **settings)
        assert (made, again) == (True, False)
        assert torch.equal(first, plain)
        assert torch.equal(second, plain)
        assert second[0].stride() == plain[0].stride()


def test_a_source_that_changes_is_read_again(cache: Cache, tmp_path: Path) -> None:
    """Another size or time of change of the file makes its entry worthless; a file that is gone is missing."""
    path = picture(tmp_path / "x")
    read(cache, path)
    os.utime(path, ns=(1, 1))
    assert read(cache, path)[1]
    time = path.stat().st_mtime_ns
    path.write_bytes(encoded(photo(9), "PNG"))
    os.utime(path, ns=(time, time))
    found, made = read(cache, path)
    assert made
    assert torch.equal(found, read_image(path))
    path.unlink()
    with pytest.raises(BadFile):
        read(cache, path)


def test_a_damaged_entry_is_never_used(cache: Cache, tmp_path: Path) -> None:
    """Cut anywhere, or on a disk flipped anywhere or with two blocks changed about, an entry is made again."""
    path = picture(tmp_path / "x")
    whole = read(cache, path)[0]
    (entry,) = (p for p in cache.folder.rglob("*") if p.is_file())
    content = entry.read_bytes()
    header, one, other = content[:64], content[64 : 64 + 4096], content[64 + 4096 : 64 + 8192]
    changed_about = header + other + one + content[64 + 8192 :]
    assert one != other and len(changed_about) == len(content)
    for at in [*range(48), *range(97, len(content), 97)]:  # the last 16 bytes of the header say nothing
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        for damaged in (content[:at], flipped, changed_about)[: 1 + 2 * cache.verify]:
            entry.write_bytes(damaged)
            found, made = read(cache, path)
            assert made
            assert torch.equal(found, whole)
    assert not read(cache, path)[1]


def test_bad_files_are_not_kept(cache: Cache, tmp_path: Path) -> None:
    """What cannot be read is refused each time, what was filled is reported each time, and neither leaves anything behind."""
    (tmp_path / "x").write_bytes(encoded(photo(0), "JPEG")[:500])
    for _ in range(2):
        with pytest.raises(BadFile):
            read(cache, tmp_path / "x")
    data = encoded(photo(0, (320, 240)), "JPEG")
    (tmp_path / "y").write_bytes(data[: len(data) * 9 // 10])
    for _ in range(2):
        with image_settings(ImageSettings("fill", cache)) as how:
            read_image(tmp_path / "y")
        assert len(how.notes) == 1
    assert not any(p.is_file() for p in cache.folder.rglob("*"))


def test_a_full_or_unusable_place_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept images are decoded, and no part of a file stays."""
    path = picture(tmp_path / "x")
    blocked = Cache(path / "cache")
    assert read(blocked, path)[1]
    assert read(blocked, path)[1]
    free = Cache(tmp_path / "c")
    monkeypatch.setattr("ailab.datasets.files.cache._FREE_SHARE", 1.0)
    assert read(free, path)[1]
    assert read(free, path)[1]
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    assert read(free, path)[1]
    assert not any(p.is_file() for p in free.folder.rglob("*"))


@pytest.mark.parametrize(
    ("mib", "expected"), [(64, "has only 64 MiB. Few"), (1024, None), (0, "has only 0 MiB"), (None, "does not exist here")]
)
def test_too_little_memory_is_reported(mib: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a run that asks for it, and for no other."""

    def statvfs(_: Path) -> Any:
        if mib is None:
            raise FileNotFoundError
        return SimpleNamespace(f_blocks=mib << 8, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    warning = little_memory("ram")
    assert warning is None if expected is None else expected in str(warning)
    assert little_memory("disk") is None and little_memory(None) is None


def borrowed(cache: Cache, path: Path) -> torch.Tensor:
    with image_settings(ImageSettings(cache=cache)):
        return read_image(path, borrow=True)


def test_what_is_borrowed_from_memory_is_read_where_it_lies(tmp_path: Path) -> None:
    """The same bits without a copy, from an entry of this source only; an image that is not borrowed is a copy."""
    cache = run_cache("ram", tmp_path)
    assert cache is not None
    path = picture(tmp_path / "x")
    plain = read_image(path)
    try:
        borrowed(cache, path).zero_()  # decoded now, and so its own
        one, other = borrowed(cache, path), borrowed(cache, path)
        assert one.data_ptr() == other.data_ptr()
        assert torch.equal(one, plain)
        with image_settings(ImageSettings(cache=cache)):
            read_image(path).zero_()
        assert torch.equal(borrowed(cache, path), plain)
        assert pickle.loads(pickle.dumps(cache))._maps == {}
        path.write_bytes(encoded(photo(9), "PNG"))
        for _ in range(2):
            assert torch.equal(borrowed(cache, path), read_image(path))
        assert torch.equal(one, plain)  # still there for who holds it
    finally:
        cache.clear()


def test_only_shared_memory_is_mapped_and_only_a_limited_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images on a disk are copied and checked each time; so are those past the number that a process may map."""
    disk, ram = run_cache("disk", tmp_path), run_cache("ram", tmp_path)
    assert disk is not None
    assert ram is not None
    paths = [picture(tmp_path / str(i), i) for i in range(3)]
    monkeypatch.setattr("ailab.datasets.files.cache._MAPPED", 2)
    try:
        for _ in range(3):
            assert all(torch.equal(borrowed(c, p), read_image(p)) for c in (disk, ram) for p in paths)
        assert (len(disk._maps), len(ram._maps)) == (0, 2)
    finally:
        ram.clear()


def test_what_a_killed_run_left_in_memory_is_swept_by_the_next(tmp_path: Path) -> None:
    """Not that of a run that lives, nor what is no cache of a run; a run's own goes with it."""
    mine, other, killed = (run_cache("ram", tmp_path / name) for name in ("mine", "other", "killed"))
    assert mine and other and killed
    path = picture(tmp_path / "x")
    code = f"from pathlib import Path; from ailab.datasets.files.cache import memory_held\n" \
           f"with memory_held('ram', Path({str(tmp_path / 'killed')!r})): print('held', flush=True); input()"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        with memory_held("ram", tmp_path / "other"):
            _ = [read(cache, path) for cache in (mine, other, killed)]
            with memory_held("ram", tmp_path / "mine"):
                assert all(not read(cache, path)[1] for cache in (mine, other, killed))
            assert not mine.folder.exists()
            run.kill()
            run.wait()
            with memory_held("ram", tmp_path / "mine"), memory_held("disk", tmp_path / "disk"):
                assert (mine.folder.exists(), other.folder.exists(), killed.folder.exists()) == (True, True, False)
    assert not mine.folder.exists() and not other.folder.exists()


@pytest.mark.parametrize("crop", [{}, {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}])
@pytest.mark.parametrize("then", [[], [{"type": "ToDtype", "dtype": torch.float32}, {"type": "Normalize", "inplace": True}]])
def test_epochs_from_mapped_images_equal_those_from_files(crop: dict[str, Any], then: list[Any], tmp_path: Path) -> None:
    """Nothing that follows the crop, in place or not, writes to the cache: each epoch is bit for bit the one without."""
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(4):  # as large as the crop: the whole of it may be taken as it is
        (folder / f"{i}.png").write_bytes(encoded(photo(i, (64, 64)), "PNG"))
    then = [{**t, "mean": [9.0] * 3, "std": [2.0] * 3} if t["type"] == "Normalize" else t for t in then]
    steps = [{"type": "RandomResizedCrop", "size": 64, **crop}, {"type": "RandomHorizontalFlip"}, *then]
    data = ClassificationImageDataset(tmp_path, transform=steps)
    assert data._borrow
    assert not type("Mine", (ClassificationImageDataset,), {})(tmp_path, transform=steps)._borrow  # it may write to them
    cache = run_cache("ram", tmp_path)
    assert cache is not None
    try:
        plain, cached = (stream(data, 2, cache=c) for c in (None, cache))
        for epoch in range(4):
            assert all(equal(a, b) for a, b in zip(plain.epoch(epoch), cached.epoch(epoch), strict=True))
        assert len(cache._maps) == 4
    finally:
        cache.clear()


def _race(job: tuple[Path, Path]) -> list[float]:
    torch.set_num_threads(1)
    with image_settings(ImageSettings(cache=Cache(job[0]))):
        return [float(read_image(job[1] / str(i)).float().mean()) for i in range(20)]


def test_processes_and_threads_share_it(cache: Cache, tmp_path: Path) -> None:
    """Four readers at once, processes or threads, get the images and leave one entry each."""
    for i in range(20):
        picture(tmp_path / str(i), i)
    wanted = [float(read_image(tmp_path / str(i)).float().mean()) for i in range(20)]
    with get_context("fork").Pool(4) as pool:
        assert pool.map(_race, [(cache.folder, tmp_path)] * 4, chunksize=1) == [wanted] * 4
    cache.clear()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(_race, [(cache.folder, tmp_path)] * 4)) == [wanted] * 4
    assert sum(p.is_file() for p in cache.folder.rglob("*")) == 20


def test_batches_are_the_same_with_it(cache: Cache, tmp_path: Path) -> None:
    """A stream over workers gives bitwise the batches of one without a cache, cold and warm."""
    for i in range(10):
        picture(tmp_path / str(i), i)
    plain = list(stream(Files(tmp_path, 10)).epoch(0))
    for workers in (0, 2):
        assert equal(list(stream(Files(tmp_path, 10), cache=cache, num_workers=workers).epoch(0)), plain)
