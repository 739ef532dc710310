"""What goes wrong while samples are read: each bad one found, listed once and replaced; workers lost and nothing else changed."""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encoded, photo
from test_stream import Noisy, equal, stream
from torch.utils.data import Dataset, TensorDataset

from ailab.datasets import read_image
from ailab.datasets.files.bad_file import BadSample
from ailab.datasets.stream.transport import BatchSender
from ailab.errors import DataError
from ailab.types import WEIGHT
from ailab.workdir.bad_samples import BadSampleLog


class Made(Dataset[Any]):
    """Sample i is whatever `make` gives for it."""

    def __init__(self, size: int, make: Any):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def good(i: int) -> dict[str, Any]:
    return {"x": torch.full((3,), float(i)), "y": i, "name": str(i), "deep": {"z": np.float32(i)}}


WRONG = {
    "nan tensor": ({"x": torch.tensor([0, float("nan"), 0])}, "not_a_number"),
    "nan number": ({"y": float("nan")}, "not_a_number"),
    "nan numpy": ({"deep": {"z": np.float32("nan")}}, "not_a_number"),
    "shape": ({"x": torch.zeros(4)}, "wrong_shape"),
    "dtype": ({"x": torch.zeros(3, dtype=torch.uint8)}, "wrong_type"),
    "none": ({"y": None}, "wrong_type"),
    "text": ({"x": "text"}, "wrong_type"),
    "another field": ({"w": 1}, "wrong_type"),
    "nested": ({"deep": {"z": [1, 2]}}, "wrong_type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sample_that_is_not_what_the_others_are_is_bad(name: str) -> None:
    """NaN, another shape, type or field out of user code is a bad sample of that kind, and its place is filled."""
    change, kind = WRONG[name]
    ours = stream(Made(200, lambda i: {**good(i), **(change if i == 7 else {})}), 8, shuffle=False, report=lambda _: None)
    batches = list(ours.epoch(0))
    assert [(b.sample, b.kind) for b in ours.bad] == [(7, kind)]
    assert batches[0]["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 0]
    assert batches[0][WEIGHT].tolist() == [1] * 7 + [0]
    clean = list(stream(Made(200, good), 8, shuffle=False).epoch(0))
    assert all(equal(a, b) for a, b in zip(batches[1:], clean[1:], strict=True))


def test_infinities_and_python_numbers_are_no_damage() -> None:
    """-inf of an attention mask, both infinities together, and ints among floats are samples as any other."""
    edge = torch.tensor([float("inf"), float("-inf"), 0])
    ours = stream(Made(20, lambda i: {**good(i), "x": edge, "y": i if i % 2 else float(i)}), report=lambda _: None)
    list(ours.epoch(0))
    assert ours.bad == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.float64])
def test_numbers_of_any_width_are_looked_at_or_let_through(dtype: torch.dtype) -> None:
    """A NaN is found in halves, doubles and complex numbers, a sum that overflows is none; 8-bit floats pass unseen."""
    fine = (torch.full((9,), 60000.0) if dtype == torch.float16 else torch.arange(9.0)).to(dtype)
    hole = torch.tensor([0, float("nan"), *[0] * 7]).to(dtype)
    ours = stream(Made(200, lambda i: {"x": hole if i == 3 else fine}), 8, report=lambda _: None)
    list(ours.epoch(0))
    assert [b.sample for b in ours.bad] == ([] if dtype == torch.float8_e4m3fn else [3])


def test_a_missing_number_may_be_allowed() -> None:
    """With `nan_is_bad=False` NaN goes through; in memory too a NaN is a bad sample without it."""
    x = torch.arange(200.0)
    x[5] = float("nan")
    for dataset in (TensorDataset(x, torch.arange(200)), Made(200, lambda i: (x[i], i))):
        strict, lax = (stream(dataset, 8, nan_is_bad=bad, report=lambda _: None) for bad in (True, False))
        seen = torch.cat([b["input"] for b in lax.epoch(0)])
        assert (seen.isnan().sum(), lax.bad) == (1, [])
        weights = [(b["input"], b[WEIGHT]) for b in strict.epoch(0)]
        assert not any(bool(v.isnan().any()) for v, _ in weights)
        assert sum(float(w.sum()) for _, w in weights) == 199
        assert [b.sample for b in strict.bad] == [5]


def test_samples_of_any_size_pass_one_by_one() -> None:
    """A batch of one sample has the shape of that sample: nothing has to be equal."""
    ours = stream(Made(6, lambda i: torch.zeros(i + 1)), 1, shuffle=False)
    assert [b["input"].shape[1] for b in ours.epoch(0)] == [1, 2, 3, 4, 5, 6]


def test_a_read_that_fails_for_the_moment_is_tried_again() -> None:
    """EIO is retried twice, in the exception or behind it; the third time the sample is bad; other errors are not retried."""
    calls: dict[int, int] = {}

    def flaky(i: int, times: int, number: int) -> Any:
        calls[i] = calls.get(i, 0) + 1
        if i == 3 and calls[i] <= times:
            if times % 2:
                raise OSError(number, "weather")
            try:
                raise OSError(number, "weather")
            except OSError as error:
                raise ValueError("no image") from error
        return torch.rand(2)

    clean = list(stream(Made(400, lambda i: torch.rand(2)), 50).epoch(0))
    for times, number, bad in ((1, errno.EIO, 0), (2, errno.ESTALE, 0), (3, errno.EIO, 1), (1, errno.ENOENT, 1)):
        calls.clear()
        ours = stream(Made(400, lambda i, t=times, n=number: flaky(i, t, n)), 50, report=lambda _: None)
        batches = list(ours.epoch(0))
        assert len(ours.bad) == bad
        assert calls[3] == (1 if number == errno.ENOENT else min(times + 1, 3))
        assert bad or equal(batches, clean)


def test_damaged_images_that_are_used_are_reported_and_do_not_count(tmp_path: Path) -> None:
    """`truncated="fill"` reaches `read_image` in a worker too; what is kept is listed apart, and is no bad sample."""
    data = encoded(photo(3, (320, 240)), "JPEG")
    for i in range(4):
        (tmp_path / str(i)).write_bytes(data[: len(data) * 9 // 10] if i == 2 else data)
    for workers in (0, 1):
        for truncated, bad in (("fill", []), ("skip", [(2, "truncated")])):
            lines: list[str] = []
            ours = stream(
                Files(tmp_path), 4, shuffle=False, truncated=truncated, num_workers=workers, report=lines.append, max_bad_frac=1
            )
            (batch,) = ours.epoch(0)
            assert [(b.sample, b.kind) for b in ours.bad] == bad
            assert batch[WEIGHT].tolist() == ([1, 1, 1, 1] if not bad else [1, 1, 0, 1])
            assert ("is damaged and was used" if not bad else "is bad and was replaced") in lines[0]
            assert str(tmp_path / "2") in lines[0]
            assert len(lines) == 2


class Files(Dataset[Any]):
    def __init__(self, folder: Path, size: int = 4):
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return read_image(self.folder / str(index)), index


def test_bad_samples_are_written_down_once(tmp_path: Path) -> None:
    """One escaped JSON line a sample, whichever rank or earlier run finds it; a torn line of a killed one is passed over."""
    path = tmp_path / "run" / "bad_samples.jsonl"
    dataset = Made(400, lambda i: {"x": i} if i not in (7, 30) else [][i])

    def run() -> list[str]:
        lines: list[str] = []
        ranks = [stream(dataset, 8, rank=r, world_size=2, report=lines.append) for r in range(2)]
        for rank in ranks:
            rank.record_bad(BadSampleLog(path))
        for epoch in range(3):
            for rank in ranks:
                list(rank.epoch(epoch))
        return [line for line in lines if "was replaced" in line]

    assert len(run()) == 2
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted((r["split"], r["sample"], r["kind"], r["kept"]) for r in rows) == [
        ("data", 7, "IndexError", False),
        ("data", 30, "IndexError", False),
    ]
    whole = path.read_bytes()
    assert run() == []
    assert path.read_bytes() == whole
    path.write_bytes(whole[: whole.index(b"\n") + 20])
    assert len(run()) == 1
    again = path.read_text().splitlines()
    assert [json.loads(again[0]), json.loads(again[2])] == rows
    log = BadSampleLog(path)
    assert log("other", BadSample(1, "text\x1b", "new\nline\x1b[31m", "\udcff"), False)
    assert path.read_bytes().count(b"\n") == 4
    assert b"\x1b" not in path.read_bytes()


def test_a_log_that_cannot_be_written_costs_no_run(tmp_path: Path) -> None:
    """Where the file cannot be made, bad samples are news each time, and nothing is raised."""
    (tmp_path / "file").touch()
    log = BadSampleLog(tmp_path / "file" / "x.jsonl")
    assert log("a", BadSample(1, "k", "m"), False)
    assert not BadSampleLog(tmp_path / "y.jsonl")._known


def test_lines_have_an_end(tmp_path: Path) -> None:
    """At most 1,000 lines of one kind are written, and 10 reported one by one; the counts go on."""
    log = BadSampleLog(tmp_path / "x.jsonl")
    assert all(log("a", BadSample(i, "truncated", ""), False) for i in range(1100))
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 1000
    lines: list[str] = []
    ours = stream(Made(200, lambda i: {"x": i} if i >= 15 else [][i]), 100, report=lines.append, max_bad_frac=0.5)
    list(ours.epoch(0))
    assert (len(lines), len(ours.bad)) == (11, 15)
    assert lines[-1] == "data: 15 of 200 samples were bad so far (15 IndexError)."


class Mortal(Noisy):
    """Noisy, whose worker is gone at sample 20 as long as there are tokens left."""

    def __init__(self, tokens: Path, how: str):
        super().__init__(40)
        self.tokens, self.how = tokens, how

    def __getitem__(self, index: int) -> Any:
        left = sorted(self.tokens.iterdir())
        if index == 20 and left and multiprocessing.parent_process() is not None:
            left[0].unlink()
            if self.how == "hangs":
                time.sleep(1000)
            if self.how == "exits":
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL if self.how == "killed" else signal.SIGSEGV)
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("how", "times", "says"),
    [("killed", 1, "SIGKILL"), ("crashes", 3, "SIGSEGV"), ("exits", 1, "exit code 3"), ("hangs", 1, "no data worker")],
)
def test_a_lost_worker_is_replaced_at_the_same_place(how: str, times: int, says: str, tmp_path: Path) -> None:
    """A worker that is killed, crashes, exits or hangs is replaced and reported, and the batches are bitwise the same."""
    for i in range(times):
        (tmp_path / str(i)).touch()
    lines: list[str] = []
    settings = {"num_workers": 2, "persistent_workers": True, "timeout": 2 if how == "hangs" else 60, "report": lines.append}
    ours = stream(Mortal(tmp_path, how), **settings)
    assert equal(list(ours.epoch(0)), list(stream(Noisy(40)).epoch(0)))
    assert not list(tmp_path.iterdir())
    assert len(lines) == times
    assert [line for line in lines if says not in line or "The workers are replaced" not in line] == []
    assert equal(list(ours.epoch(1)), list(stream(Noisy(40)).epoch(1)))
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def _own_workers(others: set[int | None]) -> list[int]:
    return [w.pid for w in multiprocessing.active_children() if w.pid and w.pid not in others]


@pytest.mark.parametrize("how", ["killed", "slow", "hangs"])
def test_a_worker_lost_between_two_epochs_is_replaced_and_a_slow_one_awaited(how: str) -> None:
    """A persistent worker that died or hangs between two passes is replaced, one that is slow is waited for; same batches."""
    lines: list[str] = []
    others = {w.pid for w in multiprocessing.active_children()}
    ours = stream(Noisy(11), num_workers=2, persistent_workers=True, timeout=2 if how == "hangs" else 60, report=lines.append)
    list(ours.epoch(0))
    before = _own_workers(others)
    os.kill(before[0], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "slow":
        threading.Timer(1.5, os.kill, (before[0], signal.SIGCONT)).start()
    assert equal(list(ours.epoch(1)), list(stream(Noisy(11)).epoch(1)))
    says = {"killed": "was killed by SIGKILL", "hangs": "no data worker gave a batch for 2 s"}
    assert len(lines) == (how != "slow") and all(says[how] in line and "step 0 of epoch 1" in line for line in lines)
    assert (_own_workers(others) == before) == (how == "slow")
    assert equal(list(ours.epoch(2)), list(stream(Noisy(11)).epoch(2)))


def test_workers_that_die_again_and_again_end_the_run(tmp_path: Path) -> None:
    """The fourth loss in an epoch is a DataError with the signal, the step, the samples and what to do about memory."""
    for i in range(9):
        (tmp_path / str(i)).touch()
    ours = stream(Mortal(tmp_path, "killed"), num_workers=1, report=lambda _: None, shuffle=False, name="cfg.data.train")
    with pytest.raises(DataError, match=r"was killed by SIGKILL, at or after step [45] of epoch 0, after 3 times") as caught:
        list(ours.epoch(0))
    assert "[20, 21, 22, 23]" in str(caught.value) or "[16, 17, 18, 19]" in str(caught.value)
    assert "memory" in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 5


def test_new_workers_know_nothing_of_the_lost_ones(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process complains, while it works or as it ends, of others that it inherited."""
    tokens, pack = [tmp_path / str(i) for i in range(3)], BatchSender.pack
    _ = [token.touch() for token in tokens]

    def failing(sender: BatchSender, batch: Any) -> Any:
        sys.unraisablehook = sys.__unraisablehook__  # pytest's keeps to itself what a process could not raise
        if left := [token for token in tokens if token.exists()]:
            left[0].unlink(missing_ok=True)
            raise RuntimeError("no room")
        gc.collect()
        return pack(sender, batch)

    monkeypatch.setattr(BatchSender, "pack", failing)
    ours = stream(Noisy(40), num_workers=2, persistent_workers=True, report=lambda _: None, multiprocessing_context="fork")
    gc.disable()  # the exception of a lost worker holds its iterator in a cycle
    try:
        assert len(list(ours.epoch(0))) == 10
    finally:
        gc.enable()
    assert capfd.readouterr().err == ""


def test_a_worker_that_dies_beside_a_step_does_not_disturb_it(tmp_path: Path) -> None:
    """The main process is not interrupted: a death is found when the next batch is asked for."""
    others = {child.pid for child in multiprocessing.active_children()}
    ours = stream(Noisy(40), num_workers=2, prefetch_factor=1, report=lambda _: None)
    batches = ours.epoch(0)
    found = [next(batches)]
    for worker in multiprocessing.active_children():
        if worker.pid and worker.pid not in others:
            os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # a handler of SIGCHLD would raise here
    found += list(batches)
    assert equal(found, list(stream(Noisy(40)).epoch(0)))
