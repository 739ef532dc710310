"""`bad_samples.jsonl`: one JSON object per bad sample. Each sample is written once, by any rank or run of the work_dir."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ailab.datasets.files.bad_file import BadSample
from ailab.workdir import durable

BAD_SAMPLES = "bad_samples.jsonl"  # in the work_dir
_MAX_LINES = 1000  # of one kind


class BadSampleLog:
    """Appends bad samples to a file that several processes share. The file is created with the first line.

    A file lock keeps the lines of different processes apart. The lines of other processes are read before a line is written,
    so that no sample is there twice.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: set[tuple[str, int]] = set()
        self._count: dict[str, int] = {}
        self._read = 0  # bytes of the file that have been read

    def __call__(self, split: str, bad: BadSample, kept: bool) -> bool:
        """Append one bad sample, and return whether it is new. An OSError, such as a full disk, is ignored.

        Args:
            split: the data set, such as "train".
            bad: what is wrong with the sample.
            kept: whether the sample is used all the same.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError:
            return True
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX)
            self._read_new_lines(fd)
            if (split, bad.sample) in self._known:
                return False
            if self._count.get(bad.kind, 0) < _MAX_LINES:
                record = {"split": split, "sample": bad.sample, "path": bad.path, "kind": bad.kind, "error": bad.message}
                os.write(fd, (durable.to_json({**record, "kept": kept}) + "\n").encode("ascii"))
                self._read_new_lines(fd)
            return True
        except OSError:
            return True
        finally:
            os.close(fd)  # releases the lock too

    def _read_new_lines(self, fd: int) -> None:
        """Read the lines that were added since the last call. A killed process may have left half a line: it is ended here."""
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
