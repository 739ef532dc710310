"""ProfilerHook: a window of steps under torch.profiler, as a trace file for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ailab.errors import ConfigError
from ailab.hooks.observe.scalars import Strikes, guarded
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Mean, Run, RunInfo, Step, TrainState


@HOOKS.register_module()
def ProfilerHook(
    wait: int = 10,
    warmup: int = 2,
    active: int = 3,
    shapes: bool = False,
    memory: bool = False,
    stacks: bool = False,
    *,
    run: RunInfo,
    name: str = "profiler",
) -> list[Middleware[Any]]:
    """Trace `active` training steps once, `wait + warmup` steps after this process began, on every rank.

    The file is `work_dir/profile/rank<rank>_step<last step>.json`. An observer: it changes no number, and its failures end no
    run. After the window it costs nothing.

    Args:
        wait: steps that are left alone; the first one is in any case.
        warmup: steps under the profiler whose trace is thrown away, for its own start distorts them; at least 1.
        active: steps that are traced, at least 1.
        shapes: record the shapes of the inputs of each operator.
        memory: record allocations.
        stacks: record the Python stack of each operator.
        run: given by the framework.
        name: of this hook.

    Raises:
        ConfigError: for a negative `wait`, or `warmup` or `active` below 1.
    """
    if wait < 0 or warmup < 1 or active < 1:
        raise ConfigError(
            f"cfg.hooks.{name}: wait={wait}, warmup={warmup}, active={active}; wait is at least 0, the others at least 1."
        )
    if not run.steps_per_epoch:
        return []
    window = _Window(wait, warmup, active, {"record_shapes": shapes, "profile_memory": memory, "with_stack": stacks}, run)
    strikes = Strikes()
    watch, close = guarded(window.after_step, name, run, strikes), guarded(window.close, name, run, strikes)

    def wrap(step: Step) -> Step:
        def profiled(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            if window.over:
                return step(state, batch)
            state, logs = step(state, batch)
            watch(state.at)
            return state, logs

        return profiled

    def wrap_run(run_all: Run) -> Run:
        def closed(state: TrainState) -> TrainState:
            try:
                return run_all(state)
            finally:
                close(None)

        return closed

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_run, "run")]


class _Window:
    """A profiler that is started after `wait` steps and gone after `warmup + active` more."""

    def __init__(self, wait: int, warmup: int, active: int, settings: Mapping[str, Any], run: RunInfo):
        self.wait, self.warmup, self.active = wait, warmup, active
        self.settings, self.run = settings, run
        self.seen = 0
        self.profiler: Any = None
        self.over = False

    def after_step(self, at: int) -> None:
        """Start, go on or stop, between two steps."""
        self.seen += 1
        if self.profiler is None:
            if self.seen >= self.wait:
                self._start()
            return
        self.profiler.step()
        if self.seen - max(self.wait, 1) >= self.warmup + self.active:
            self._write(at)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        cuda = [ProfilerActivity.CUDA] if self.run.device.type == "cuda" else []
        plan = schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1)
        profiler = profile(activities=[ProfilerActivity.CPU, *cuda], schedule=plan, **self.settings)
        profiler.start()
        self.profiler = profiler

    def _write(self, at: int) -> None:
        profiler, self.profiler, self.over = self.profiler, None, True
        profiler.stop()
        folder = Path(self.run.work_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank{self.run.rank}_step{at:08d}.json"
        profiler.export_chrome_trace(str(file))
        self.run.say(f"profile of the {self.active} steps up to {at}: {file}")

    def close(self, _: None) -> None:
        """Stop a profiler whose window the run did not fill."""
        if self.over or not self.seen:
            return
        profiler, self.profiler, self.over = self.profiler, None, True
        if profiler is not None:
            profiler.stop()
        needed = max(self.wait, 1) + self.warmup + self.active
        self.run.say(f"warning: the run ended before the profile was complete: that takes {needed} steps")
