"""Images of a few samples with target and prediction, for the observers that can log images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ailab.errors import ConfigError
from ailab.hooks.observe.scalars import Failures, guarded
from ailab.pictures.samples import Picture, pictures_of
from ailab.stack import Middleware, unchanged
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

_PHASES = ("val", "test")


@dataclass(frozen=True)
class SamplePictures:
    """Images of some samples of a phase."""

    step: int
    phase: str
    pictures: Sequence[Picture]


def show_samples(
    name: str, count: int, emit: Callable[[SamplePictures], None], run: RunInfo, failures: Failures
) -> list[Middleware[Any]]:
    """Call `emit` with the first `count` samples of the first evaluation batch of each epoch, when the phase has ended.

    The fields are "input" (B, 1 or 3, H, W), "target" if there is one, and the first output of the model.

    Raises:
        ConfigError: before the first step, when "input" is not a batch of images.
    """
    phases = tuple(p for p in _PHASES if p in run.phase_steps)
    if count < 1 or not phases:
        return []
    output, safe = run.cfg["model"]["output_keys"][0], guarded(emit, name, run, failures)
    first: list[Mapping[str, Tensor]] = []

    def keep(step: Step) -> Step:
        def watched(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if not first and isinstance(logs, Logs):
                fields = {"input": batch.get("input"), "target": batch.get("target"), "output": logs.outputs.get(output)}
                first.append({n: v[:count] for n, v in fields.items() if isinstance(v, Tensor) and v.dim()})
            return state, logs

        return watched

    def show(phase: str) -> Callable[[Epoch], Epoch]:
        def wrap(epoch: Epoch) -> Epoch:
            def shown(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
                first.clear()
                state, logs = epoch(state, batches)
                if first:
                    safe(SamplePictures(state.at, phase, pictures_of(first[0])))
                return state, logs

            return shown

        return wrap

    host = Middleware(name, keep if run.rank == 0 else unchanged, "host", phases=phases, core={"outputs": (output,)})
    if run.rank != 0:
        return [host]  # every rank must compile the same graph
    return [host, *(Middleware(name, show(p), "epoch", phases=(p,), reports=_input_check(name)) for p in phases)]


def _input_check(name: str) -> Callable[[Batch, str], tuple[str, ...]]:
    def check(sample: Batch, phase: str) -> tuple[str, ...]:
        picture: Any = sample.get("input")
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else None
        if shape is None or len(shape) != 4 or shape[1] not in (1, 3):
            came = f"has the shape {shape}" if shape else "is not a tensor"
            raise ConfigError(f"cfg.hooks.{name}.images: the field 'input' {came}; a batch of images is (B, 1 or 3, H, W).")
        return ()

    return check
