"""WandbHook: every scalar of every phase to Weights & Biases, from a thread of rank 0 that nobody waits for."""

from __future__ import annotations

import hashlib
import importlib
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ailab.config.load import snapshot
from ailab.errors import ConfigError
from ailab.hooks.observe.pictures import Shown, show_samples
from ailab.hooks.observe.scalars import Report, Strikes, guarded, observe
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Run, RunInfo, TrainState

_INIT_S = 6  # to reach the service: less than `wait_s`, so that a short run can still be recorded offline
_ROWS = 10_000  # that wait for a service that does not answer; more are dropped


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
    """Log running means as "train/<name>" every `interval` steps and results as "epoch/<phase>/<name>" over `trainer/step`.

    The run id is derived from the work_dir, so a resumed run continues the same W&B run. Training only hands its numbers over; a
    thread talks to W&B. Where it cannot be reached the run is recorded offline, and where it hangs, the end of the run waits
    `wait_s` for it and goes on. An observer: its failures never end training.

    Args:
        init_args: of `wandb.init` (`project`, `name`, `mode`, ...).
        interval: in optimizer steps.
        images: how many samples of the first evaluation batch are shown each epoch with target and prediction; 0 for none.
        wait_s: seconds that the end of the run waits for what is not yet handed over.
        run: given by the framework.
        name: of this hook.

    Raises:
        ConfigError: for a negative `images` or `wait_s`, or `images` of an input that is no picture.
    """
    if images < 0 or not wait_s >= 0:
        raise ConfigError(f"cfg.hooks.{name}: images={images}, wait_s={wait_s}; neither can be negative.")
    remote = _Remote(name, dict(init_args or {}), run)
    hooks = observe(name, remote.scalars, run, every=interval, begin=remote.begin, strikes=remote.strikes)
    hooks += show_samples(name, images, remote.pictures, run, remote.strikes)

    def wrap(run_all: Run) -> Run:
        def finished(state: TrainState) -> TrainState:
            code = 1
            try:
                state = run_all(state)
                code = 0
                return state
            finally:
                remote.finish(code, wait_s)

        return finished

    return [*hooks, Middleware(name, wrap, "run")]


class _Remote:
    """A W&B run in a thread: calls are queued, made in order, and never waited for."""

    def __init__(self, name: str, args: dict[str, Any], run: RunInfo):
        self.name, self.args, self.run = name, args, run
        self.live: Any = None
        self.strikes = Strikes()
        self.calls: queue.Queue[Callable[[], None] | None] = queue.Queue(_ROWS)
        self.thread: threading.Thread | None = None

    def begin(self, state: TrainState) -> None:
        """Start the thread and, in it, the run."""
        self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self.thread.start()
        self.calls.put_nowait(self._start)

    def scalars(self, report: Report) -> None:
        """One row; raises `queue.Full` where thousands wait already."""
        prefix = f"epoch/{report.phase}" if report.final else report.phase
        row: dict[str, Any] = {f"{prefix}/{k}": v for k, v in report.means.items()}
        row |= {f"wall/{prefix}/{k}": v for k, v in report.wall.items()}
        row |= {f"lr/{i}": lr for i, lr in enumerate(report.lrs)}
        row |= {"trainer/step": report.step, "trainer/epoch": report.epoch}
        self.calls.put_nowait(lambda: self._log(row))

    def pictures(self, shown: Shown) -> None:
        """The samples of a phase, each with its caption."""
        self.calls.put_nowait(lambda: self._log_pictures(shown))

    def finish(self, code: int, wait_s: float) -> None:
        """End the run with what is queued; after `wait_s` seconds without waiting for it."""
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

    def _work(self) -> None:
        def made(call: Callable[[], None]) -> None:
            call()

        safe = guarded(made, self.name, self.run, self.strikes)
        while (call := self.calls.get()) is not None:
            safe(call)

    def _start(self) -> None:
        self.live = _started(self.args, self.run)

    def _log(self, row: dict[str, Any]) -> None:
        if self.live is not None:
            self.live.log(row)

    def _log_pictures(self, shown: Shown) -> None:
        if self.live is None:
            return
        image = importlib.import_module("wandb").Image
        sheets = [image(p.image.permute(1, 2, 0).numpy(), caption=p.caption or None) for p in shown.pictures]
        self.live.log({f"samples/{shown.phase}": sheets, "trainer/step": shown.step})

    def _end(self, code: int) -> None:
        if self.live is not None:
            self.live.finish(exit_code=code)


def _started(args: dict[str, Any], run: RunInfo) -> Any:
    wandb: Any = importlib.import_module("wandb")

    settings = wandb.Settings(init_timeout=_INIT_S, console="off", disable_git=True, save_code=False)
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
    except wandb.errors.Error as e:  # unreachable, not logged in, refused
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        run.say(f"warning: W&B cannot be reached ({said}); recording offline")
        wandb.teardown()  # its service holds the id of the run that did not begin
        common.pop("resume", None)
        started = wandb.init(**{**common, **args, "mode": "offline"})
    started.define_metric("*", step_metric="trainer/step")
    return started
