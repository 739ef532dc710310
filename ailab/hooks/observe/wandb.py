"""WandbHook: every scalar of every phase to Weights & Biases, from a background thread of rank 0."""

from __future__ import annotations

import hashlib
import importlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ailab.config.load import snapshot
from ailab.errors import ConfigError
from ailab.hooks.observe.pictures import SamplePictures, show_samples
from ailab.hooks.observe.scalars import Failures, Report, guarded, observe
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Run, RunInfo, TrainState

_INIT_TIMEOUT_S = 6  # less than the default of `wait_s`, so that a short run can still be recorded offline
_MAX_QUEUED = 10_000  # calls that wait for a service that does not answer; more are dropped


@HOOKS.register_module()
def WandbHook(
    init_args: Mapping[str, Any] | None = None,
    interval: int = 50,
    images: int = 0,
    wait_s: float = 10.0,
    *,
    run: RunInfo,
    name: str = "wandb",
) -> list[Middleware[Any]]:
    """Log every scalar of every phase to Weights & Biases over `trainer/step`.

    Running means of the training phase are "train/<name>", every `interval` steps. Results of a phase are
    "epoch/<phase>/<name>". The run id is derived from the work_dir, so a resumed run continues the same W&B run. A background
    thread talks to W&B, so training does not wait for the network. If W&B cannot be reached, the run is recorded offline. If it
    does not answer, the end of the run waits at most `wait_s` seconds for it. The hook is an observer: its failures do not end
    the run.

    Args:
        init_args: arguments of `wandb.init` (`project`, `name`, `mode`, ...).
        interval: optimizer steps between two points of a running mean, at least 1.
        images: samples of the first evaluation batch to show each epoch, with target and prediction. 0: no images.
        wait_s: seconds that the end of the run waits until everything is sent.

    Raises:
        ConfigError: for a negative `images` or `wait_s`, or when `images` is set and the input is not a batch of images.
    """
    if images < 0 or not wait_s >= 0:
        raise ConfigError(f"cfg.hooks.{name}: images={images}, wait_s={wait_s}; both must be at least 0.")
    background = _BackgroundRun(name, dict(init_args or {}), run)
    hooks = observe(name, background.scalars, run, every=interval, begin=background.begin, failures=background.failures)
    hooks += show_samples(name, images, background.pictures, run, background.failures)

    def wrap(run_all: Run) -> Run:
        def finished(state: TrainState) -> TrainState:
            code = 1
            try:
                state = run_all(state)
                code = 0
                return state
            finally:
                background.finish(code, wait_s)

        return finished

    return [*hooks, Middleware(name, wrap, "run")]


class _BackgroundRun:
    """A W&B run in a background thread. Calls are queued and made in order; the caller does not wait for them."""

    def __init__(self, name: str, args: dict[str, Any], run: RunInfo):
        self.name, self.args, self.run = name, args, run
        self.wandb_run: Any = None
        self.failures = Failures()
        self.calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_MAX_QUEUED)
        self.thread: threading.Thread | None = None

    def begin(self, state: TrainState) -> None:
        """Start the thread, and the W&B run in it."""
        self.thread = threading.Thread(target=self._make_calls, name="wandb", daemon=True)
        self.thread.start()
        self.calls.put_nowait(self._start)

    def scalars(self, report: Report) -> None:
        """Queue one row. Raises `queue.Full` when `_MAX_QUEUED` calls wait already."""
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        row: dict[str, Any] = {f"{prefix}/{k}": v for k, v in report.means.items()}
        row |= {f"wall/{prefix}/{k}": v for k, v in report.wall.items()}
        row |= {f"lr/{i}": lr for i, lr in enumerate(report.lrs)}
        row |= {"trainer/step": report.step, "trainer/epoch": report.epoch}
        self.calls.put_nowait(lambda: self._log(row))

    def pictures(self, samples: SamplePictures) -> None:
        """Queue the samples of a phase, each with its caption."""
        self.calls.put_nowait(lambda: self._log_pictures(samples))

    def finish(self, code: int, wait_s: float) -> None:
        """Send what is queued and end the W&B run. Return after `wait_s` seconds at the latest."""
        if self.thread is None:
            return
        try:
            self.calls.put_nowait(lambda: self._end(code))
            self.calls.put_nowait(None)
            self.thread.join(wait_s)
        except queue.Full:
            pass
        if self.thread.is_alive():
            self.run.say(f"warning: W&B did not take everything within {wait_s:g} s; `wandb sync` sends what it has on disk")

    def _make_calls(self) -> None:
        def make(call: Callable[[], None]) -> None:
            call()

        safe = guarded(make, self.name, self.run, self.failures)
        while (call := self.calls.get()) is not None:
            safe(call)

    def _start(self) -> None:
        self.wandb_run = _init_run(self.args, self.run)

    def _log(self, row: dict[str, Any]) -> None:
        if self.wandb_run is not None:
            self.wandb_run.log(row)

    def _log_pictures(self, samples: SamplePictures) -> None:
        if self.wandb_run is None:
            return
        image = importlib.import_module("wandb").Image
        images = [image(p.image.permute(1, 2, 0).numpy(), caption=p.caption or None) for p in samples.pictures]
        self.wandb_run.log({f"samples/{samples.phase}": images, "trainer/step": samples.step})

    def _end(self, code: int) -> None:
        if self.wandb_run is not None:
            self.wandb_run.finish(exit_code=code)


def _init_run(args: dict[str, Any], run: RunInfo) -> Any:
    wandb: Any = importlib.import_module("wandb")

    settings = wandb.Settings(init_timeout=_INIT_TIMEOUT_S, console="off", disable_git=True, save_code=False)
    identity = hashlib.sha256(str(run.work_dir.resolve()).encode()).hexdigest()[:16]
    common: dict[str, Any] = {
        "id": identity,
        "resume": "allow",
        "dir": str(run.work_dir),
        "config": snapshot(run.cfg),
        "settings": settings,
    }
    if args.get("mode") == "offline":
        common.pop("resume")  # ignored offline, with a warning
    try:
        started = wandb.init(**{**common, **args})
    except wandb.errors.Error as e:  # not reachable, not logged in, refused
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        run.say(f"warning: W&B cannot be reached ({said}); recording offline")
        wandb.teardown()  # its service still holds the id of the run that did not start
        common.pop("resume", None)
        started = wandb.init(**{**common, **args, "mode": "offline"})
    started.define_metric("*", step_metric="trainer/step")
    return started
