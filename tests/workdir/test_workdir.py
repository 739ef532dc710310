"""A work_dir is locked by one run, and its log has whole lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ailab.errors import CheckpointError, WorkDirError
from ailab.workdir.durable import to_json
from ailab.workdir.folder import Lines, lock


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def holder(work_dir: Path, then: Callable[[], object] = lambda: None) -> Generator[int, None, None]:
    """A forked process that holds the lock until it is killed; `then` runs in it once it does."""
    ready, locked = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child computes nothing
        pid = os.fork()
    if pid == 0:
        try:
            with lock(work_dir):
                then()
                os.write(locked, b"x")
                time.sleep(60)
        finally:
            os._exit(70)
    os.close(locked)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_run_is_refused_and_changes_no_byte(tmp_path: Path) -> None:
    """The second run gets a WorkDirError with pid and host of the first, and changes nothing."""
    with holder(tmp_path / "run") as pid:
        before = files_of(tmp_path)
        with pytest.raises(WorkDirError, match=f"process {pid} on {os.uname().nodename}"), lock(tmp_path / "run"):
            pass
        assert files_of(tmp_path) == before and set(before) == {"run/.lock"}
        assert stat.S_IMODE((tmp_path / "run" / ".lock").stat().st_mode) == 0o600
    assert WorkDirError.exit_code == 6


def test_a_forged_owner_cannot_break_the_message(tmp_path: Path) -> None:
    """The content of the lock file is printed only if it is a pid and a host name."""
    with holder(tmp_path):
        (tmp_path / ".lock").write_text("1 \x1b[2J\nrm\n")
        with pytest.raises(WorkDirError, match="in use by another process"), lock(tmp_path):
            pass


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    """After a SIGKILL the lock is free at once, even while a child of the killed process lives on."""
    script = f"import time; open({str(tmp_path / 'alive')!r}, 'w').close(); time.sleep(60)"
    children: list[int] = []

    def orphan() -> None:
        (tmp_path / "orphan").write_text(str(subprocess.Popen([sys.executable, "-c", script], close_fds=False).pid))

    with holder(tmp_path, orphan):
        children.append(int((tmp_path / "orphan").read_text()))
    try:
        os.kill(children[0], 0)
        with lock(tmp_path):
            pass
    finally:
        os.kill(children[0], signal.SIGKILL)


def test_a_finished_run_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """Taking and giving back the lock changes no content, so a complete run can be started again without a trace."""
    with lock(tmp_path / "run") as work_dir:
        assert work_dir == tmp_path / "run"
        assert (work_dir / ".lock").read_text() == f"{os.getpid()} {os.uname().nodename}\n"
        assert set(files_of(work_dir)) == {".lock"}
    before = files_of(tmp_path)
    with pytest.raises(KeyError), lock(tmp_path / "run"):
        raise KeyError
    assert files_of(tmp_path) == before == {"run/.lock": b""}


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_its_place(tmp_path: Path, place: str) -> None:
    """A work_dir that is a file, or below one, is a CheckpointError in one sentence."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be used as a work_dir: [^\n]+\.$"), lock(tmp_path / place):
        pass


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_the_probe_finds_a_bad_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A disk that cannot write, sync or rename is found before the run, and the lock is free again."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(CheckpointError, match="No space left"), lock(tmp_path):
            pass
    (tmp_path / ".probe").touch()  # of a process that was killed in its probe
    with lock(tmp_path):
        assert set(files_of(tmp_path)) == {".lock"}


def test_lines_are_strict_json(tmp_path: Path) -> None:
    """Each record is one line of JSON; non-finite numbers are strings, and control characters cannot break a line."""
    record = {
        "step": 1,
        "loss": float("nan"),
        "all": [float("inf"), -float("inf"), {"x": 0.1}],
        "path": "a\nb\r\x1b[2J\u2028\x85\x00\ud800",
    }
    with Lines(tmp_path / "metrics.jsonl") as lines:
        lines.append(record)
        lines.append({"step": 2})
    raw = (tmp_path / "metrics.jsonl").read_bytes()
    assert raw.isascii() and raw.count(b"\n") == 2 and not any(byte < 32 and byte != 10 for byte in raw)
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in raw.splitlines())
    assert first == {**record, "loss": "nan", "all": ["inf", "-inf", {"x": 0.1}]} and second == {"step": 2}


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda n: st.lists(n) | st.dictionaries(st.text(), n),
    )
)
def test_any_record_is_one_line(value: Any) -> None:
    """to_json gives one line that reads back; finite values are unchanged."""
    text = to_json(value)
    back = json.loads(text, parse_constant=pytest.fail)
    assert text.isascii() and "\n" not in text and to_json(back) == text


def test_a_tensor_is_no_value_for_a_line(tmp_path: Path) -> None:
    """What JSON cannot hold raises and writes nothing."""
    with Lines(tmp_path / "m") as lines, pytest.raises(TypeError):
        lines.append({"x": object()})
    assert (tmp_path / "m").read_bytes() == b""


def test_rewind(tmp_path: Path) -> None:
    """rewind keeps the lines that hold, byte for byte, drops a torn last one, and later lines follow without a gap."""
    path = tmp_path / "metrics.jsonl"
    rows = [b'{"step": 1, "loss": 0.10}\n', b'{"step":2}\n', b"null\n", b"\xff\n", b'{"step":3}\n', b'{"step":4}']
    path.write_bytes(b"".join(rows))
    with Lines(path) as lines:
        lines.rewind(lambda row: row["step"] <= 2)
        lines.append({"step": 3})
        assert path.read_bytes() == rows[0] + rows[1] + b'{"step":3}\n'
        inode = path.stat().st_ino
        lines.rewind(lambda row: True)
        assert path.stat().st_ino == inode
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_an_interrupted_rewind_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure at any call of a rewind leaves the old file or the new one, and the next rewind works."""
    path, old, new = tmp_path / "m", b'{"step":1}\n{"step":2}\n', b'{"step":1}\n'

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    for call in ("write", "fsync", "replace"):
        path.write_bytes(old)
        with Lines(path) as lines:
            with monkeypatch.context() as patch, pytest.raises(OSError):
                patch.setattr(os, call, failing)
                lines.rewind(lambda row: row["step"] == 1)
            assert path.read_bytes() == old
            lines.rewind(lambda row: row["step"] == 1)
            assert path.read_bytes() == new and os.listdir(tmp_path) == ["m"]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of a line raises OSError and leaves whole lines, also for those that follow."""
    real = os.write
    with Lines(tmp_path / "m") as lines:
        lines.append({"step": 1})
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, "write", lambda fd, data: real(fd, data[:4]))
            lines.append({"step": 2})
        lines.append({"step": 3})
    assert (tmp_path / "m").read_bytes() == b'{"step":1}\n{"step":3}\n'
