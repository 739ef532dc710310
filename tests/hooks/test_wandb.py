"""W&B: what its files hold, and what a run is like when W&B raises, sleeps or hangs."""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tensorboard import picture_cfg
from tiny import rows_of, tiny_cfg

from ailab.errors import ConfigError
from ailab.fit import fit

BLOCK = 32768


@pytest.fixture(autouse=True)
def environment_kept() -> Iterator[None]:
    """wandb leaves the address of its service in the environment; a process that a later test starts would look for it there."""
    before = dict(os.environ)
    yield
    for name in [n for n in os.environ if n.startswith("WANDB_") and n not in before]:
        del os.environ[name]


def records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format."""
    data, at, part = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if not kind:
            return
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield part
            part = b""


def history(work_dir: Path) -> list[dict[str, Any]]:
    """The rows that an offline run has logged."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb")
    [file] = (work_dir / "wandb").glob("offline-run-*/run-*.wandb")
    found, until = [], time.monotonic() + 30
    while not any(r.WhichOneof("record_type") == "exit" for r in found) and time.monotonic() < until:
        time.sleep(0.1)  # W&B's own process writes the file, a little later
        found = [pb.Record.FromString(data) for data in records(file)]
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_an_offline_run_holds_every_scalar_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are those of metrics.jsonl, the tags those of TensorBoard, and the axis is trainer/step."""
    pytest.importorskip("wandb", reason="an optional writer")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = picture_cfg(tmp_path)
    cfg["hooks"]["wandb"] = dict(type="WandbHook", interval=1, images=2, wait_s=60, init_args=dict(mode="offline", project="p"))
    fit(cfg)
    rows, record = history(tmp_path), rows_of(tmp_path)
    running = [r for r in rows if "train/loss" in r]
    assert [r["trainer/step"] for r in running] == list(range(1, 10))
    assert all(r["lr/0"] == pytest.approx(0.01) and "train/top1" in r for r in running)
    for phase in ("train", "val"):
        for name in ("loss", "top1"):
            wanted = [(r["step"], pytest.approx(r[name])) for r in record if r["final"] and r["phase"] == phase]
            tag = f"epoch/{phase}/{name}"
            assert [(r["trainer/step"], r[tag]) for r in rows if tag in r] == wanted, tag
    assert [r["trainer/step"] for r in rows if any(k.startswith("samples/val") for k in r)] == [3, 6, 9]
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/samples/*.png"))) == 6


class Fake(types.ModuleType):
    """The part of wandb that the hook uses. `how` is the way in which it fails."""

    def __init__(self, how: str, seconds: float = 0.0):
        super().__init__("wandb")
        self.how, self.seconds = how, seconds
        self.rows: list[dict[str, Any]] = []
        self.modes: list[Any] = []
        self.finished: list[int] = []
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))

    def Settings(self, **given: Any) -> Any:
        return given

    def _misbehave(self, here: str) -> None:
        if not self.how.endswith(here):
            return
        if self.how.startswith("raise"):
            raise RuntimeError("no such luck")
        if self.how.startswith("sleep"):
            time.sleep(self.seconds)
        if self.how.startswith("hang"):
            threading.Event().wait()

    def init(self, **given: Any) -> Any:
        self.modes.append(given.get("mode"))
        if self.how == "unreachable" and given.get("mode") != "offline":
            raise self.errors.Error("no route to host\nmore of it")
        self._misbehave("init")
        return self

    def teardown(self) -> None: ...

    def define_metric(self, *args: Any, **kwargs: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self._misbehave("log")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self._misbehave("finish")
        self.finished.append(exit_code)


def trained(folder: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Any, float]:
    """The last state of a run with this W&B, and how long the run took."""
    monkeypatch.setitem(sys.modules, "wandb", fake)
    began = time.monotonic()
    state = fit(tiny_cfg(folder, wandb=dict(type="WandbHook", interval=1, **more))).state
    return state, time.monotonic() - began


@pytest.mark.parametrize(
    "how", [f"{what}_{where}" for what in ("raise", "sleep", "hang") for where in ("init", "log", "finish")]
)
def test_a_bad_service_neither_delays_nor_changes_a_run(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises, sleeps or hangs, at the start, in the middle or at the end: same final state, and at most `wait_s` longer."""
    plain = fit(tiny_cfg(tmp_path / "plain")).state
    fake = Fake(how, seconds=30)
    state, took = trained(tmp_path / "run", fake, monkeypatch, wait_s=0.3)
    assert took < 5
    for name, value in plain.params.items():
        assert torch.equal(value, state.params[name]), name


def test_failures_are_reported_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failing observer warns three times and is switched off. A slow one gives a warning at the end."""
    trained(tmp_path / "a", Fake("raise_log"), monkeypatch)
    out = capsys.readouterr().out
    assert out.count("warning: hook 'wandb' failed: RuntimeError: no such luck") == 3
    assert out.count("it is switched off now") == 1
    trained(tmp_path / "b", Fake("hang_log"), monkeypatch, wait_s=0.2)
    assert capsys.readouterr().out.count("warning: W&B did not take everything within 0.2 s") == 1


def test_an_unreachable_service_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One warning, then a second start in offline mode that gets every row and the exit code."""
    fake = Fake("unreachable")
    trained(tmp_path, fake, monkeypatch)
    assert fake.modes == [None, "offline"] and fake.finished == [0] and len(fake.rows) == 21
    assert capsys.readouterr().out.count("warning: W&B cannot be reached (no route to host); recording offline") == 1


@pytest.mark.nightly
def test_a_service_that_refuses_connections_is_recorded_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real client against a closed port: within 10 s of the end of a short run its file has every row."""
    pytest.importorskip("wandb", reason="an optional writer")
    for key, value in (("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", "0" * 40), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{key}", value)
    began = time.monotonic()
    fit(tiny_cfg(tmp_path, wandb=dict(type="WandbHook", interval=1)))
    assert time.monotonic() - began < 15
    assert "warning: W&B cannot be reached" in capsys.readouterr().out
    assert [r["trainer/step"] for r in history(tmp_path) if "train/loss" in r] == list(range(1, 16))


def test_rows_come_in_order_and_a_resumed_run_has_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id depends on the work_dir alone; steps rise; a run that fails ends with code 1."""
    given: list[dict[str, Any]] = []
    fake = Fake("well")
    monkeypatch.setattr(fake, "init", lambda **kwargs: (given.append(kwargs), fake)[1])
    trained(tmp_path, fake, monkeypatch)
    steps = [r["trainer/step"] for r in fake.rows]
    assert steps == sorted(steps) and len(steps) == 21
    trained(tmp_path, fake, monkeypatch)
    assert given[0]["id"] == given[1]["id"] and given[0]["resume"] == "allow"
    bad = tiny_cfg(tmp_path / "other", wandb=dict(type="WandbHook"))
    bad["optimizer"] = dict(type="SGD", lr=1e30)
    with pytest.raises(Exception, match="loss"):
        fit(bad)
    assert given[2]["id"] != given[0]["id"] and fake.finished == [0, 0, 1]


def test_settings_are_checked(tmp_path: Path) -> None:
    """A negative count or time is a ConfigError."""
    for bad in (dict(images=-1), dict(wait_s=-1.0)):
        with pytest.raises(ConfigError, match=r"cfg\.hooks\.wandb: .* both must be at least 0"):
            fit(tiny_cfg(tmp_path / "run", wandb=dict(type="WandbHook", **bad)))
