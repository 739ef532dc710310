"""The work_dir of a run: its lock, and a log of JSON lines."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from ailab.errors import CheckpointError, WorkDirError
from ailab.workdir import durable

CHECKPOINTS = "checkpoints"  # the folder of them in a work_dir
_OWNER = re.compile(rb"([0-9]{1,10}) ([A-Za-z0-9._-]{1,255})\n")


@contextlib.contextmanager
def lock(work_dir: Path) -> Generator[Path, None, None]:
    """Lock a work_dir for this process. The folder is created if it is missing.

    It also checks that files can be written, synced and renamed there. The lock is released when the process ends, also by a
    kill; child processes do not hold it. It is a POSIX lock: do not open and close `.lock` elsewhere in this process, because
    that releases it.

    Raises:
        WorkDirError: another process holds the lock; it is named. Nothing was changed.
        CheckpointError: the folder cannot be used.
    """
    with _unusable(work_dir):
        work_dir.mkdir(parents=True, exist_ok=True)
        # lockf and not flock: a data worker that lives longer than its killed parent would keep an flock.
        fd = os.open(work_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with _unusable(work_dir):
            if not _acquired(fd):
                raise WorkDirError(f"{work_dir} is in use by {_owner(fd)}. Wait for it, stop it, or use another work_dir.")
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()} {socket.gethostname()}\n".encode())
            _probe(work_dir)
        try:
            yield work_dir
        finally:
            os.ftruncate(fd, 0)  # so that a finished run that is started again does not change the folder
    finally:
        os.close(fd)


def is_run(folder: Path) -> bool:
    """Whether a folder is the work_dir of some run, or was."""
    return (folder / ".lock").is_file()


class Lines:
    """A file of JSON objects, one per line. Every line is whole; after a kill the last one may be cut."""

    def __init__(self, path: Path):
        self._path = path
        self._fd = self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line, in one system call.

        Raises:
            OSError: the disk is full. The part of the line that was written is removed.
            TypeError: the record has something that JSON cannot hold.
        """
        line = (durable.to_json(record) + "\n").encode("ascii")
        written = os.write(self._fd, line)
        if written < len(line):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Remove the lines for which `keep` is false, and lines that are no JSON objects, such as a cut last one.

        The other lines keep their bytes. The file is replaced by an atomic rename.
        """
        old = self._path.read_bytes()
        kept = b"".join(line for line in old.splitlines(keepends=True) if (row := _parsed(line)) is not None and keep(row))
        if kept == old:
            return
        durable.replace(self._path, kept)
        os.close(self._fd)
        self._fd = self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", row) if isinstance(row, dict) else None


def _acquired(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # which of the two depends on the system
            return False
        raise
    return True


def _owner(fd: int) -> str:
    match = _OWNER.fullmatch(os.pread(fd, 300, 0))  # the pattern keeps control characters out of the message
    return f"process {match[1].decode()} on {match[2].decode()}" if match else "another process"


def _probe(work_dir: Path) -> None:
    """Try what a checkpoint needs from the file system, before hours of training depend on it."""
    probe, renamed = work_dir / ".probe", work_dir / ".probe.renamed"
    probe.unlink(missing_ok=True)
    durable.write(probe, b"ailab\n")
    os.replace(probe, renamed)
    durable.sync_directory(work_dir)
    renamed.unlink()


@contextlib.contextmanager
def _unusable(work_dir: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{work_dir} cannot be used as a work_dir: {error.strerror or error}.") from error
