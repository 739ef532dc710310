"""SIGTERM and SIGINT: what a signal does, by where it comes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from ailab import dist
from ailab.errors import Preempted, StopNow

_ECHO_S = 0.5  # a launcher passes on what the terminal or the scheduler has sent to its ranks already
_COMPILES = ("torch._dynamo", "torch._inductor")
_READS_DATA = ("ailab.datasets.stream",)
_SAVES = ("ailab.workdir",)


class Signals:
    """Whether SIGTERM or SIGINT came. In general the run ends at the next step boundary, which asks for it.

    The handler raises `StopNow` where no step of this process can be lost: before its first step, and while it waits for data. With
    several ranks it does not, for they have to agree: the flag travels in their next step. A second SIGINT raises anywhere. A
    second SIGTERM does too, but not while a checkpoint is written. Otherwise the handler sets one flag, for it may fire inside
    autograd.
    """

    def __init__(self) -> None:
        self.came = self._stepped = False
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __call__(self) -> bool:
        """Whether a signal came to this process; asked after each step of a single process, before it by several ranks."""
        self._stepped = True
        return self.came

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, StopNow) and error.number == signal.SIGTERM:
            raise Preempted(str(error)) from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, now, alone = self.came, time.monotonic(), dist.world_size() == 1
        if again and now - self._at < _ECHO_S and (number == signal.SIGTERM or dist.launched()):
            return
        self.came, self._at = True, now
        if again:
            if number == signal.SIGINT or not _inside(frame, _SAVES):
                raise StopNow(number)
            return
        waits = _inside(frame, _READS_DATA)
        if alone and (waits or not self._stepped):
            raise StopNow(number, waits=waits)
        if dist.rank() == 0:
            _tell(number, "this compilation and the step after it" if _inside(frame, _COMPILES) else "this step")


def _inside(frame: FrameType | None, modules: tuple[str, ...]) -> bool:
    """Whether a function of these modules is running, by the stack of the main thread."""
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(modules):
            return True
        frame = frame.f_back
    return False


def _tell(number: int, what: str) -> None:
    """One line, past the buffers of Python: a handler may have interrupted a print."""
    again = "Ctrl-C again quits" if number == signal.SIGINT else "SIGTERM again ends the run at once"
    line = f"stopping after {what}; {again}"
    try:
        os.write(2, ("\n" * sys.stderr.isatty() + line + "\n").encode())
    except (OSError, ValueError):  # nobody reads it
        return
