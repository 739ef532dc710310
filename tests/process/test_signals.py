"""SIGTERM and Ctrl-C: served at once where no step can be lost, at the next step boundary otherwise, and never with a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from tiny import NoisyPoints, cfg_file, ended, launch, newest_state, rows_of

from ailab import dist
from ailab.errors import Preempted, StopNow
from ailab.process.signals import Signals
from ailab.stack import Middleware
from ailab.workdir import checkpoint

SAVE = "checkpoint=dict(type='CheckpointHook'), resume=dict(type='ResumeHook')"
TOLD = "stopping after this step; "
QUIT = "stopped at once by {}; checkpoints that were saved are whole.\n"


class SlowPoints(NoisyPoints):
    """Takes a minute for sample 20, the first time that it is read; `folder/reading` is there then."""

    def __init__(self, folder: str):
        super().__init__()
        self.marker = Path(folder) / "reading"

    def __getitem__(self, index: int) -> Any:
        if index == 20 and not self.marker.exists():
            self.marker.write_text(str(os.getpid()))
            time.sleep(60)
        return super().__getitem__(index)


def Slow(*, step: int, folder: str, name: str) -> Middleware[Any]:
    """A hook that takes a minute for one training step; `folder/stepping` is there then."""

    def wrap(train: Any) -> Any:
        def slow(state: Any, batch: Any) -> Any:
            if state.at == step and not (Path(folder) / "stepping").exists():
                (Path(folder) / "stepping").touch()
                time.sleep(60)
            return train(state, batch)

        return slow

    return Middleware(name, wrap, "host")


def appeared(found: Callable[[], Any]) -> Any:
    """The first truth that `found` gives within 30 s."""
    for _ in range(1500):
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_waits_for_a_sample_stops_at_once(workers: int, by: int, tmp_path: Path) -> None:
    """The state at the step boundary is saved without the batch, workers are gone, and the resumed run is the undisturbed one."""
    slow = f"cfg['data']['train'] = dict(type=__import__('test_signals').SlowPoints, folder={str(tmp_path)!r})"
    count = f"cfg['data']['train_dataloader']['num_workers'] = {workers}"
    argv = [cfg_file(tmp_path, slow, count, hooks=SAVE)]
    run = launch(argv, tmp_path / "log")
    reader = int(appeared(lambda: (tmp_path / "reading").exists() and (tmp_path / "reading").read_text()))
    os.kill(run.pid, by)
    run.join(10)
    assert run.exitcode == 143, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not Path(f"/proc/{reader}").exists()
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and 0 <= saved.step < 5
    assert ended(argv, tmp_path / "log") == 0
    (tmp_path / "whole").mkdir()
    assert ended([cfg_file(tmp_path / "whole", slow, count, hooks=SAVE)], tmp_path / "log") == 0
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole" / "run")
    assert newest_state(tmp_path / "run") == newest_state(tmp_path / "whole" / "run")


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_quits_with_one_line(by: int, code: int, tmp_path: Path) -> None:
    """The first answers at once, the second ends the run: exit code 130 or 143, no traceback; the run can be resumed."""
    hooks = f"{SAVE}, slow=dict(type=__import__('test_signals').Slow, step=7, folder={str(tmp_path)!r})"
    workers = "cfg['data']['train']['type'] = NoisyPoints; cfg['data']['train_dataloader']['num_workers'] = 1"
    argv, log = [cfg_file(tmp_path, workers, hooks=hooks)], tmp_path / "log"
    run = launch(argv, log)
    appeared((tmp_path / "stepping").exists)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(run.pid, by)
    appeared(lambda: TOLD in log.read_text())
    time.sleep(0.6)  # what comes at once is the same signal, passed on by a launcher
    os.kill(run.pid, by)
    run.join(10)
    assert run.exitcode == code
    name = signal.Signals(by).name
    after = log.read_text().partition(TOLD)[2].partition("\n")[2]
    assert after == ("Preempted: " if by == signal.SIGTERM else "") + QUIT.format(name)
    assert children and not any(Path(f"/proc/{child}").exists() for child in children)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 5  # type: ignore[union-attr]
    assert ended(argv, log) == 0
    assert [r["step"] for r in rows_of(tmp_path / "run")] == [5, 5, 10, 10, 15, 15]


@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_before_the_first_step_a_signal_ends_the_run_at_once(by: int, code: int, tmp_path: Path) -> None:
    """Nothing is there to be saved: building and the first compilation are not waited for."""
    hooks = f"{SAVE}, slow=dict(type=__import__('test_signals').Slow, step=0, folder={str(tmp_path)!r})"
    run = launch([cfg_file(tmp_path, hooks=hooks)], tmp_path / "log")
    appeared((tmp_path / "stepping").exists)
    os.kill(run.pid, by)
    run.join(10)
    assert run.exitcode == code
    text = (tmp_path / "log").read_text()
    assert text.endswith(QUIT.format(signal.Signals(by).name)) and "Traceback" not in text
    assert not (tmp_path / "run" / "checkpoints").exists()


def frame_in(module: str) -> FrameType:
    """The frame of a function of a module."""
    space: dict[str, Any] = {"__name__": module, "sys": sys}
    exec("def f(): return sys._getframe()", space)
    return space["f"]()


def test_where_a_signal_comes_decides(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag in a step and in a compilation, which is named; an exception while data are read; a second one spares a save."""
    step, data, compiler = (frame_in(m) for m in ("user.model", "ailab.datasets.stream.workers", "torch._dynamo.convert_frame"))
    save = frame_in("ailab.workdir.commit")
    for first, said in ((step, "this step"), (compiler, "this compilation and the step after it")):
        signals = Signals()
        assert signals() is False
        signals._handle(signal.SIGTERM, first)
        assert signals() is True
        assert capfd.readouterr().err == f"stopping after {said}; SIGTERM again ends the run at once\n"
        signals._handle(signal.SIGTERM, first)  # an echo
        signals._at -= 1
        signals._handle(signal.SIGTERM, save)
        signals._at -= 1
        with pytest.raises(StopNow) as stop:
            signals._handle(signal.SIGTERM, compiler)
        assert (stop.value.number, stop.value.waits, capfd.readouterr().err) == (signal.SIGTERM, False, "")
    signals = Signals()
    signals()
    with pytest.raises(StopNow) as stop:
        signals._handle(signal.SIGINT, data)
    assert stop.value.waits is True
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    signals = Signals()
    signals._handle(signal.SIGINT, data)  # the ranks agree in their next step
    assert signals() is True
    assert capfd.readouterr().err == f"{TOLD}Ctrl-C again quits\n"


def test_sigterm_is_an_error_of_ailab_and_ctrl_c_a_keyboard_interrupt() -> None:
    """A script that calls `fit` gets `Preempted` for the one and `KeyboardInterrupt` for the other, and its handlers back."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for by, error in ((signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)):
        with pytest.raises(error, match=f"stopped at once by {by.name}"), Signals():
            os.kill(os.getpid(), by)
            time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
