"""The console of a run: lines above a progress bar, kept for the log file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from ailab import dist


class Console:
    """Prints lines above a progress bar, which is there on a terminal. Silent on all ranks but 0. Callable: one line.

    A logger gets every line with `log_to`, those before it too: what a run says at its start stands in its log.
    """

    def __init__(self) -> None:
        self._first = dist.rank() == 0
        disable = None if self._first else True
        self.bar: Any = tqdm(total=0, unit="step", disable=disable, dynamic_ncols=True, smoothing=0.05)
        self._early: list[str] = []
        self._logs: dict[Path, Callable[[str], None]] = {}
        self._writing = False

    def __call__(self, line: str) -> None:
        """Print a line, and write it to the logs."""
        if not self._first:
            return
        tqdm.write(line)
        sys.stdout.flush()
        if not self._logs:
            self._early.append(line)
        if self._writing:  # it is the warning of a log that cannot be written
            return
        self._writing = True
        try:
            for write in self._logs.values():
                write(line)
        finally:
            self._writing = False

    def log_to(self, file: Path, write: Callable[[str], None]) -> bool:
        """Give all lines, from the first on, to `write`, which appends them to a file. Returns True: they will come."""
        if self._first and file not in self._logs:
            self._logs[file] = write
            for line in self._early:
                write(line)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
