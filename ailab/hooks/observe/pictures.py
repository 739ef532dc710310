"""Pictures of a few samples with their target and prediction, for the observers that can show pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ailab.errors import ConfigError
from ailab.hooks.observe.scalars import Strikes, guarded
from ailab.pictures.samples import Picture, pictures_of
from ailab.stack import Middleware, unchanged
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

_PHASES = ("val", "test")


@dataclass(frozen=True)
class Shown:
    """What an observer is told."""

    step: int
    phase: str
    pictures: Sequence[Picture]


def show_samples(name: str, count: int, emit: Callable[[Shown], None], run: RunInfo, strikes: Strikes) -> list[Middleware[Any]]:
    """Hand on the first `count` samples of the first evaluation batch of each epoch, once the phase has ended.

    The fields are "input" (B, 1 or 3, H, W), "target" where there is one, and the model's first output.

    Raises:
        ConfigError: before the first step, where the input is no picture.
    """
    phases = tuple(p for p in _PHASES if p in run.phase_steps)
    if count < 1 or not phases:
        return []
    output, safe = run.cfg["model"]["output_keys"][0], guarded(emit, name, run, strikes)
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
                    safe(Shown(state.at, phase, pictures_of(first[0])))
                return state, logs

            return shown

        return wrap

    host = Middleware(name, keep if run.rank == 0 else unchanged, "host", phases=phases, core={"outputs": (output,)})
    if run.rank != 0:
        return [host]  # every rank compiles the same graph
    return [host, *(Middleware(name, show(p), "epoch", phases=(p,), reports=_checker(name)) for p in phases)]


def _checker(name: str) -> Callable[[Batch, str], tuple[str, ...]]:
    def check(sample: Batch, phase: str) -> tuple[str, ...]:
        picture: Any = sample.get("input")
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else None
        if shape is None or len(shape) != 4 or shape[1] not in (1, 3):
            came = f"has the shape {shape}" if shape else "is no tensor"
            raise ConfigError(f"cfg.hooks.{name}.images: the field 'input' {came}; a batch of pictures is (B, 1 or 3, H, W).")
        return ()

    return check
