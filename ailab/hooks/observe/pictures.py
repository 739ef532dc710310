"""Pictures of a few samples with their target and prediction, for the observers that can show pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ailab.errors import ConfigError
from ailab.hooks.observe.scalars import Strikes, guarded
from ailab.stack import Middleware, unchanged
from ailab.types import Batch, Epoch, Logs, Mean, RunInfo, Step, TrainState

_PHASES = ("val", "test")
_SIDE = 96  # pixels: what is smaller is enlarged
_PALETTE = torch.tensor(
    [[0, 0, 0], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48], [145, 30, 180], [70, 240, 240]]
    + [[240, 50, 230], [210, 245, 60], [250, 190, 212], [0, 128, 128], [220, 190, 255], [170, 110, 40], [128, 0, 0]],
    dtype=torch.uint8,
)  # one colour a class, in turn


@dataclass(frozen=True)
class Picture:
    """A sample as something to look at."""

    image: Tensor  # (3, H, W) uint8; target and prediction stand beside the input where they are pictures or maps
    caption: str  # "target 3, predicted 5"


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


def pictures_of(fields: Mapping[str, Tensor]) -> list[Picture]:
    """Samples as pictures; one read of the device."""
    host = {n: v.detach().float().cpu() if v.is_floating_point() else v.detach().cpu() for n, v in fields.items()}
    return [_picture({n: v[i] for n, v in host.items()}) for i in range(len(host["input"]))]


def _picture(sample: Mapping[str, Tensor]) -> Picture:
    size, words = sample["input"].shape[-2:], list[str]()
    panels = [_grey_to_colour(_stretched(sample["input"]))]
    target = sample.get("target")
    classes = target is not None and not target.is_floating_point()
    for name, word in (("target", "target"), ("output", "predicted")):
        value = sample.get(name)
        if value is None:
            continue
        if value.shape[-2:] != size or value.dim() < 2:
            words.append(f"{word} {_in_words(value)}")
        elif value.dim() == 3 and value.shape[0] in (1, 3) and not classes:
            panels.append(_grey_to_colour(_stretched(value)))
        else:
            panels.append(_coloured(value.argmax(0) if value.dim() == 3 else value))
    times = max(1, -(-_SIDE // min(size)))
    wide = torch.cat(panels, 2).repeat_interleave(times, 1).repeat_interleave(times, 2)
    return Picture(wide, ", ".join(words))


def _stretched(image: Tensor) -> Tensor:
    """(C, H, W) of any range to uint8, its smallest value black and its largest white."""
    low, high = image.min(), image.max()
    return ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)


def _grey_to_colour(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1)


def _coloured(labels: Tensor) -> Tensor:
    """(H, W) class indices to (3, H, W)."""
    return _PALETTE[labels.long() % len(_PALETTE)].permute(2, 0, 1)


def _in_words(value: Tensor) -> str:
    """A class, of scores the highest; a number; or the shape of what is neither."""
    if value.dim() == 1 and len(value) > 1:
        return str(int(value.argmax()))
    if value.numel() == 1:
        return f"{float(value):.3g}" if value.is_floating_point() else str(int(value))
    return f"of shape {tuple(value.shape)}"
