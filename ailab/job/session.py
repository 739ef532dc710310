"""A session: from a cfg to a checked cfg, a device and a process group; and what an error says and exits with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ailab import dist
from ailab.config import check
from ailab.datasets.files.cache import little_memory, memory_held
from ailab.dist import fingerprint, launcher
from ailab.errors import AilabError, ConfigError, PeerError, Preempted, StopNow
from ailab.heap import keep_freed

_HEAR_RANK_0_S = 1.0  # how long the other ranks leave it to rank 0 to tell of a peer that is gone
_KEPT = 1 << 30  # bytes of freed memory that the process holds on to
_QUIT = 130  # the exit code of a process that Ctrl-C ended


@contextmanager
def started(load: Callable[[], Mapping[str, Any]]) -> Generator[tuple[dict[str, Any], torch.device, list[str]]]:
    """The completed cfg, the device and the process group; nothing is built before the cfg is checked, on every rank alike."""
    keep_freed(_KEPT)
    launcher.set_torchrun_variables(os.environ)
    with _ended_by_launcher():
        full, device, problem = None, torch.device("cpu"), None
        try:
            cfg = load()
            check.check(cfg)
            full = check.complete(cfg)
            device = dist.pick_device()
        except Exception as e:
            problem = e
        settings: Mapping[str, Any] = full["dist"] if full else {}
        dist.connect(settings.get("init_method", "env://"), float(settings.get("timeout_s", 600)))
        problem = problem or dist.device_problem(device)
        dist.compare(fingerprint.of_cfg(full) if full and dist.launched() else {}, problem)
        assert full is not None
        warnings = [dist.start(full["dist"], device), little_memory(full["data"]["cache"])]
    try:
        with memory_held(full["data"]["cache"], Path(full["work_dir"])):
            yield full, device, [w for w in warnings if w]
    except BaseException as e:
        if (rendezvous := dist.current_rendezvous()) is not None and not isinstance(e, (PeerError, Preempted)):
            rendezvous.report_failure(e)
        raise
    finally:
        dist.stop()


@contextmanager
def _ended_by_launcher() -> Generator[None]:
    """SIGTERM before the group stands as a `PeerError`: the launcher sends it when another rank has ended."""

    def ended(number: int, frame: Any) -> None:
        raise PeerError("the launcher ended this run before all ranks had met: see what another rank printed, if it printed.")

    if not dist.launched() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report_error(e: AilabError | KeyboardInterrupt) -> int:
    """Print an error once, however many ranks make it, and return its exit code."""
    if isinstance(e, KeyboardInterrupt):
        if os.environ.get("RANK", "0") == "0":
            print(e if isinstance(e, StopNow) else "stopped at once by SIGINT.", file=sys.stderr, flush=True)
        return _QUIT
    rank, rendezvous, text = int(os.environ.get("RANK", "0")), dist.current_rendezvous(), f"{type(e).__name__}: {e}"
    if isinstance(e, PeerError) and not e.on_all_ranks and rendezvous is not None:
        if first := rendezvous.first_failure():
            text = f"{text}\n  {first}"
        elif rank:
            time.sleep(_HEAR_RANK_0_S)  # it is its console that people watch
        mine = rendezvous.is_first_to_report("PeerError", ever=False)
    elif rendezvous is None:
        mine = rank == 0 or not isinstance(e, (ConfigError, Preempted))
    else:
        # A mistake that a restart makes again is told the first time.
        mine = (rank == 0 or not e.on_all_ranks) and rendezvous.is_first_to_report(text, ever=isinstance(e, ConfigError))
    if mine:
        print(text, file=sys.stderr, flush=True)
    return e.exit_code
