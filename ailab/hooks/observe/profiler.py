"""ProfilerHook: some steps under torch.profiler, as a trace file for chrome://tracing or Perfetto."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ailab.errors import ConfigError
from ailab.hooks.observe.scalars import Failures, guarded
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
    """Profile `active` training steps once, after the first `wait + warmup` steps of this process, on every rank.

    The trace file is `work_dir/profile/rank<rank>_step<last step>.json`. The hook is an observer: it changes no result, and its
    failures do not end the run. After the profiled steps it costs nothing.

    Args:
        wait: steps before the profiler starts, at least 0. The first step is never profiled.
        warmup: steps under the profiler whose trace is dropped, because starting the profiler slows them down. At least 1.
        active: steps that are traced, at least 1.
        shapes: record the input shapes of each operator.
        memory: record memory allocations.
        stacks: record the Python stack of each operator.

    Raises:
        ConfigError: for a negative `wait`, or `warmup` or `active` below 1.
    """
    if wait < 0 or warmup < 1 or active < 1:
        raise ConfigError(
            f"cfg.hooks.{name}: wait={wait}, warmup={warmup}, active={active}; wait must be at least 0, the others at least 1."
        )
    if not run.steps_per_epoch:
        return []
    window = _Window(wait, warmup, active, {"record_shapes": shapes, "profile_memory": memory, "with_stack": stacks}, run)
    failures = Failures()
    watch, close = guarded(window.after_step, name, run, failures), guarded(window.close, name, run, failures)

    def wrap(step: Step) -> Step:
        def profiled(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            if window.done:
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
    """A profiler that starts after `wait` steps and stops after `warmup + active` more."""

    def __init__(self, wait: int, warmup: int, active: int, settings: Mapping[str, Any], run: RunInfo):
        self.wait, self.warmup, self.active = wait, warmup, active
        self.settings, self.run = settings, run
        self.steps = 0
        self.profiler: Any = None
        self.done = False

    def after_step(self, at: int) -> None:
        """Start, continue or stop the profiler, between two steps."""
        self.steps += 1
        if self.profiler is None:
            if self.steps >= self.wait:
                self._start()
            return
        self.profiler.step()
        if self.steps - max(self.wait, 1) >= self.warmup + self.active:
            self._write(at)

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        cuda = [ProfilerActivity.CUDA] if self.run.device.type == "cuda" else []
        plan = schedule(wait=0, warmup=self.warmup, active=self.active, repeat=1)
        # acc_events: there is one cycle, and torch 2.11 warns without it.
        profiler = profile(activities=[ProfilerActivity.CPU, *cuda], schedule=plan, acc_events=True, **self.settings)
        profiler.start()
        self.profiler = profiler

    def _write(self, at: int) -> None:
        profiler, self.profiler, self.done = self.profiler, None, True
        profiler.stop()
        folder = Path(self.run.work_dir) / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank{self.run.rank}_step{at:08d}.json"
        profiler.export_chrome_trace(str(file))
        self.run.say(f"profile of the {self.active} steps up to {at}: {file}")

    def close(self, _: None) -> None:
        """Stop the profiler when the run ended before all steps were traced."""
        if self.done or not self.steps:
            return
        profiler, self.profiler, self.done = self.profiler, None, True
        if profiler is not None:
            profiler.stop()
        needed = max(self.wait, 1) + self.warmup + self.active
        self.run.say(f"warning: the run ended before the profile was complete. It needs {needed} steps")
