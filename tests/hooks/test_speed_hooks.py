"""Hooks that measure time: throughput and profiles."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import info
from test_tensorboard import curve, events
from tiny import Net, Points, rows_of, tiny_cfg
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ailab.datasets import Stream
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.hooks.observe.profiler import ProfilerHook
from ailab.hooks.observe.throughput import PEAKS, ThroughputHook, _Meter, _peak
from ailab.testing import TinyNet, check_hook
from ailab.types import Logs

NAMES = {"samples_per_s", "step_ms", "data_ms", "compute_ms", "peak_memory_mib"}


class Clock:
    """A clock that moves only when it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_waiting_and_computing(tmp_path: Path) -> None:
    """With a clock that moves 2 s for each batch and 3 s for each step: 5 s a step, 2 of them for data, the first step left out."""
    clock = Clock()
    run = info(tmp_path)
    object.__setattr__(run, "phase_samples", {"train": 12})  # in 2 steps
    object.__setattr__(run, "flops", {"train": 1000.0})
    meter = _Meter("train", 6e3, run, clock)
    state, seen = TinyNet().state, []

    def batches(n: int) -> Iterator[dict[str, Any]]:
        for _ in range(n):
            clock.now += 2
            yield {}

    def bare(state: Any, batch: Any) -> Any:
        clock.now += 3
        state = state.replace(step=state.step + 1)
        return state, Logs((), torch.zeros(0, 2))

    step = meter.around_steps(2)(bare)

    def epoch(state: Any, batches: Any) -> Any:
        for batch in batches:
            state, logs = step(state, batch)
            seen.append(dict(logs.wall))
        return state, Logs((), torch.zeros(0, 2))

    state, logs = meter.around_epochs(epoch)(state, batches(5))
    wanted = dict(samples_per_s=6 / 5, step_ms=5e3, data_ms=2e3, compute_ms=3e3, mfu=1000 * 6 / 5 / 6e3)
    assert {n: logs.wall[n] for n in wanted} == pytest.approx(wanted)
    assert [len(w) for w in seen] == [0, 6, 6, 6, 6]  # from step 2 on, renewed at step 4
    assert {n: seen[3][n] for n in wanted} == pytest.approx(wanted)
    clock.now += 1000  # an evaluation: not of the next epoch
    _, logs = meter.around_epochs(epoch)(state, batches(2))
    assert {n: logs.wall[n] for n in wanted} == pytest.approx(wanted)


class Slow(Dataset[Any]):
    """5 ms a sample."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.005)
        return torch.zeros(4), torch.tensor(index % 3)


def test_the_numbers_flow_to_every_observer_and_to_no_checkpoint(tmp_path: Path) -> None:
    """Console, TensorBoard and, under wall_ names, the record; training and its checkpoints are bit for bit the same."""
    hooks = dict(checkpoint=dict(type="CheckpointHook"))
    watched = tiny_cfg(
        tmp_path / "a",
        speed=dict(type="ThroughputHook", interval=2, peak_flops=1e9),
        logger=dict(type="LoggerHook", interval=4),
        tensorboard=dict(type="TensorboardHook", interval=2),
        **hooks,
    )
    plain = tiny_cfg(tmp_path / "b", **hooks)
    fit(watched)
    fit(plain)
    a, b = (max((tmp_path / f / "checkpoints").glob("step_*")) / "state.pt" for f in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        mine = {k.removeprefix("wall_") for k in row if k.startswith("wall_")} - {"seconds"}
        assert mine == (NAMES | {"mfu"} if row["phase"] == "train" else NAMES)
        assert row["wall_step_ms"] == pytest.approx(row["wall_data_ms"] + row["wall_compute_ms"])
    lines = (tmp_path / "a" / "train.log").read_text().splitlines()
    running = [line for line in lines if "step 4" in line or "step 12" in line]
    assert len(running) == 2 and all("samples_per_s" in line and "mfu" in line and "samples/s" not in line for line in running)
    found = events(tmp_path / "a" / "tensorboard")
    assert [s for s, _ in curve(found, "wall/train/step_ms")] == [2, 4, 6, 8, 10, 12, 14]
    expected = [(r["step"], pytest.approx(r["wall_mfu"], rel=1e-5)) for r in rows if r["phase"] == "train"]
    assert curve(found, "wall/epoch/train/mfu") == expected


def test_the_wait_for_data_is_seen(tmp_path: Path) -> None:
    """Samples that take 5 ms each to read make at least 5 ms x 10 samples of waiting a step."""
    cfg = tiny_cfg(tmp_path, speed=dict(type="ThroughputHook"))
    cfg["data"] |= dict(train=dict(type=Slow), train_dataloader=dict(batch_size=10))
    fit({**cfg, "workflow": [{"phase": "train"}]})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(r["wall_data_ms"] > 50 and r["wall_data_ms"] < r["wall_step_ms"] for r in rows)
    assert all(r["wall_samples_per_s"] == pytest.approx(10e3 / r["wall_step_ms"], rel=1e-6) for r in rows)


def test_the_operations_of_a_sample_are_those_of_a_training_step(tmp_path: Path) -> None:
    """Utilisation times peak is what torch's counter finds in forward and backward of the bare model, per sample, times speed."""
    fit({**tiny_cfg(tmp_path, speed=dict(type="ThroughputHook", peak_flops=1e9)), "total_epochs": 1})
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(Net()(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long)).backward()
    per_sample = counter.get_total_flops() / 5
    assert per_sample == 2 * 2 * (4 * 8 + 8 * 3) + 2 * 8 * 3  # forward and by weight of both layers, by input of the second
    assert row["wall_mfu"] * 1e9 == pytest.approx(per_sample * row["wall_samples_per_s"])


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "iters"), [(4, False, None), (4, True, None), (3, False, 11), (4, True, 5)]
)
def test_the_samples_of_an_epoch_are_counted(batch_size: int, drop_last: bool, iters: int | None) -> None:
    """The number of samples per epoch counts short batches and further passes over the data."""
    stream = Stream(Points(10), batch_size=batch_size, shuffle=True, seed=0, pad=False, drop_last=drop_last, iters=iters)
    assert stream.samples == sum(len(batch["input"]) for batch in stream.epoch(0))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L40", None),
        ("NVIDIA A1000 Laptop GPU", None),
    ],
)
def test_a_peak_is_that_of_the_device_by_its_whole_name(device: str, peak: float | None) -> None:
    """An unknown device has no peak."""
    assert _peak(device) == peak and len(PEAKS) == len({words for words, _ in PEAKS})


def test_a_profile_is_a_chrome_trace_of_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In profile/, with the rank in its name: as many steps as asked for, and the run is bit for bit the same."""
    cfg = tiny_cfg(tmp_path / "a", profile=dict(type="ProfilerHook", wait=3, warmup=1, active=2, shapes=True))
    watched, plain = fit(cfg).state, fit(tiny_cfg(tmp_path / "b")).state
    [file] = (tmp_path / "a" / "profile").iterdir()
    assert file.name == "rank0_step00000006.json"
    found = json.loads(file.read_text())["traceEvents"]
    steps = [e for e in found if str(e.get("name", "")).startswith("ProfilerStep#")]
    assert len({e["name"] for e in steps}) == 2
    assert any("addmm" in str(e.get("name")) for e in found)
    assert f"profile of the 2 steps up to 6: {file}" in capsys.readouterr().out
    for name, value in plain.params.items():
        assert torch.equal(value, watched.params[name]), name


def test_a_run_that_is_too_short_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file, one line, and the profiler is stopped."""
    fit(tiny_cfg(tmp_path, profile=dict(type="ProfilerHook", wait=12, warmup=2, active=5)))
    assert "the run ended before the profile was complete. It needs 19 steps" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd._profiler_enabled()


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the place of the folder: one warning."""
    (tmp_path / "profile").write_text("")
    fit(tiny_cfg(tmp_path, profile=dict(type="ProfilerHook", wait=0, warmup=1, active=1)))
    assert capsys.readouterr().out.count("warning: hook 'profile' failed: FileExistsError") == 1


def test_settings_are_checked(tmp_path: Path) -> None:
    """Bad settings are a ConfigError, and hooks with good settings keep the laws."""
    run = info(tmp_path)
    for build in (
        lambda: ProfilerHook(warmup=0, run=run),
        lambda: ProfilerHook(wait=-1, run=run),
        lambda: ThroughputHook(interval=0, run=run),
        lambda: ThroughputHook(peak_flops=0.0, run=run),
    ):
        with pytest.raises(ConfigError, match=r"cfg\.hooks\.(profiler|throughput)"):
            build()
    check_hook(ProfilerHook(wait=0, warmup=1, active=1, run=run))
