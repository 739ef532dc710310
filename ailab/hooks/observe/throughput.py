"""ThroughputHook: samples per second, the time of a step, peak memory, and model FLOP utilisation."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch

from ailab.errors import ConfigError
from ailab.hooks.observe.log import RATE
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

# Dense bfloat16 tensor-core rates in FLOP/s, from NVIDIA's data sheets (half of the rates "with sparsity"). For devices
# without bfloat16: float16. All words must be in the name of the device. The first row that matches is used.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("B200",), 2250e12),
    (("H200",), 989.4e12),
    (("H100", "NVL"), 835e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989.4e12),
    (("A100",), 312e12),
    (("A10",), 125e12),
    (("L40S",), 362e12),
    (("L4",), 121e12),
    (("RTX", "4090"), 165.2e12),
    (("V100",), 125e12),
    (("T4",), 65e12),
)
Clock = Callable[[], float]


@HOOKS.register_module()
def ThroughputHook(
    interval: int = 50, peak_flops: float | None = None, *, run: RunInfo, name: str = "throughput"
) -> list[Middleware[Any]]:
    """Measure the speed of each phase, as wall-clock values in the logs.

    - "samples_per_s": samples per second, over all processes.
    - "step_ms": milliseconds per step. "data_ms" is the time waiting for the batch, and "compute_ms" is the rest.
    - "peak_memory_mib": peak memory in MiB, of the device, or of the process on a CPU.
    - "mfu", in training: the model FLOP utilisation. It is the FLOPs per sample, times samples per second, divided by the peak
      of all devices. The FLOPs are those of matrix products, convolutions and attention, counted on a step with a small batch.
      Recomputed operations count.

    Loggers listed after this hook show the running values in training. All loggers show the values of an epoch. The first step,
    which compiles, is not measured. The values differ from run to run. So metrics.jsonl has them under names that start with
    "wall_", and checkpoints do not have them. On a GPU the host runs ahead of the device: "data_ms" is the time that the host
    waited, and the device may have waited less.

    Args:
        interval: optimizer steps in one running value, at least 1.
        peak_flops: peak of one device in FLOP/s. By default the dense bfloat16 rate of the NVIDIA devices known by name. Without
            a peak (other devices, a CPU) there is no "mfu".

    Raises:
        ConfigError: for an interval below 1, or a peak that is not positive.

    Source: "mfu" as in Chowdhery et al. 2022 (PaLM), appendix B.
    """
    if interval < 1 or (peak_flops is not None and not peak_flops > 0):
        raise ConfigError(f"cfg.hooks.{name}: interval={interval}, peak_flops={peak_flops}; both must be positive.")
    if run.rank != 0:
        return []  # rank 0 measures for all
    peak = peak_flops or (_peak(torch.cuda.get_device_name(run.device)) if run.device.type == "cuda" else None)
    meters = {phase: _Meter(phase, peak, run) for phase in run.phase_steps}
    hooks = [
        hook
        for phase, meter in meters.items()
        for hook in (
            Middleware(name, meter.around_steps(interval), "host", phases=(phase,), core={"flops": phase == "train" and peak}),
            Middleware(name, meter.around_epochs, "epoch", phases=(phase,)),
        )
    ]
    return list(hooks)


def _peak(device: str) -> float | None:
    words = re.split(r"[ \-_]", device)
    return next((peak for needed, peak in PEAKS if all(n in words for n in needed)), None)


class _Span:
    """The steps since a moment, and the seconds spent waiting for their batches."""

    def __init__(self, now: float):
        self.began, self.steps, self.waited = now, 0, 0.0


class _Meter:
    """The measurements of one phase."""

    def __init__(self, phase: str, peak: float | None, run: RunInfo, clock: Clock = time.perf_counter):
        self.phase, self.peak, self.run, self.clock = phase, peak, run, clock
        self.warm = False  # True after the first step, which may have compiled
        self.window, self.epoch = _Span(0.0), _Span(0.0)
        self.newest: Mapping[str, float] = {}

    def around_steps(self, interval: int) -> Callable[[Step], Step]:
        """Count steps, and measure after every `interval` steps."""

        def wrap(step: Step) -> Step:
            def counted(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
                state, logs = step(state, batch)
                if not self.warm:
                    self.warm = True
                    self._start()
                    return state, logs
                self.window.steps += 1
                self.epoch.steps += 1
                if self.phase == "train" and state.at % interval == 0:
                    self.newest, self.window = self._measured(self.window), _Span(self.clock())
                return state, logs.with_wall(self.newest) if self.newest and isinstance(logs, Logs) else logs

            return counted

        return wrap

    def around_epochs(self, epoch: Epoch) -> Epoch:
        """Measure the time waiting for batches, and add the values of the epoch to its logs."""

        def timed(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            self.newest = {}
            self._start()
            state, logs = epoch(state, self._timed_batches(batches))
            return state, logs.with_wall(self._measured(self.epoch))

        return timed

    def _start(self) -> None:
        now = self.clock()
        self.window, self.epoch = _Span(now), _Span(now)

    def _timed_batches(self, batches: Any) -> Generator[Batch]:
        source = iter(batches)
        try:
            while True:
                began = self.clock()
                try:
                    batch = next(source)
                except StopIteration:
                    return
                waited = self.clock() - began
                self.window.waited += waited
                self.epoch.waited += waited
                yield batch
        finally:
            if hasattr(source, "close"):
                source.close()

    def _measured(self, span: _Span) -> dict[str, float]:
        """The values of a span; empty without a step."""
        took, steps = self.clock() - span.began, span.steps
        if not steps or took <= 0:
            return {}
        rate = steps / took * self.run.phase_samples[self.phase] / self.run.phase_steps[self.phase]
        each, waited = took / steps * 1e3, span.waited / steps * 1e3
        found = {RATE: rate, "step_ms": each, "data_ms": waited, "compute_ms": each - waited}
        found["peak_memory_mib"] = _peak_memory(self.run.device)
        if self.peak and self.phase in self.run.flops:
            found["mfu"] = self.run.flops[self.phase] * rate / (self.peak * self.run.world_size)
        return found


def _peak_memory(device: torch.device) -> float:
    """Peak memory in MiB: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
