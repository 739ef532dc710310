"""`bad_samples.jsonl`: a JSON object for each bad sample, once, whichever rank or earlier run of the work_dir found it."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ailab.datasets.files.bad_file import BadSample
from ailab.workdir import durable

BAD_SAMPLES = "bad_samples.jsonl"  # in the work_dir
_MOST = 1000  # lines of one kind


class BadSampleLog:
    """Appends bad samples to a file that several processes write; made when the first one comes.

    A lock on the file keeps its lines whole and apart. What others wrote is read before each line, so that none is there twice.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: set[tuple[str, int]] = set()
        self._count: dict[str, int] = {}
        self._read = 0  # bytes of the file that were looked at

    def __call__(self, split: str, bad: BadSample, kept: bool) -> bool:
        """Write one down; whether it was news. A disk that is full costs the line and not the run."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError:
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX)
            self._catch_up(fd)
            if (split, bad.sample) in self._known:
                return False
            if self._count.get(bad.kind, 0) < _MOST:
                record = {"split": split, "sample": bad.sample, "path": bad.path, "kind": bad.kind, "error": bad.message}
                os.write(fd, (durable.to_json({**record, "kept": kept}) + "\n").encode("ascii"))
                self._catch_up(fd)
            return True
        except OSError:
            return True
        finally:
            os.close(fd)  # and gives the lock back

    def _catch_up(self, fd: int) -> None:
        """Read what was added since the last look; a torn last line, of a process that was killed, is ended here."""
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            size += os.write(fd, b"\n")
        for line in os.pread(fd, size - self._read, self._read).splitlines():
            try:
                row: Any = json.loads(line)
                self._known.add((str(row["split"]), int(row["sample"])))
                self._count[str(row["kind"])] = self._count.get(str(row["kind"]), 0) + 1
            except (ValueError, TypeError, KeyError):
                continue
        self._read = size
