"""Transforms of a sample: built by name, applied to all of its fields at once, so that boxes and masks move with the picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from ailab.datasets.transforms.image_only import Step, crops_bytes, image_only_steps
from ailab.errors import ConfigError
from ailab.registry import TRANSFORMS
from ailab.signature import CheckedBy

Sample = dict[str, Any]
Another = Callable[[], Sample]  # gives a random other sample of the data set, untransformed
_NESTED = ("transform", "transforms")  # arguments of transforms that are transforms themselves


@dataclass(frozen=True)
class Pipeline:
    """Transforms one after the other. One with an attribute `others = n` is given n other samples: `step(sample, [...])`."""

    steps: tuple[Callable[..., Any], ...]

    def __call__(self, sample: Sample, another: Another | None = None) -> Sample:
        """The sample after all steps."""
        for step in self.steps:
            if count := getattr(step, "others", 0):
                if another is None:
                    raise TypeError(f"{type(step).__name__} mixes samples, and this data set gives it no other one.")
                sample = step(sample, [another() for _ in range(count)])
            else:
                sample = step(sample)
            if not isinstance(sample, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"the transform {type(step).__name__} gave {type(sample).__name__} for a dict of fields")
        return sample

    @cached_property
    def alone(self) -> tuple[Step, ...] | None:
        """The steps for a picture that comes alone; None where they need the dict that it is in."""
        return image_only_steps(self.steps)

    @property
    def copies(self) -> bool:
        """Whether a picture alone, uint8 RGB, is only read, and what follows the first step gets new memory."""
        return bool(self.alone) and crops_bytes(self.steps[0])


def build_transform(spec: Any, path: str = "transform") -> Pipeline | None:
    """A pipeline out of a cfg.

    Args:
        spec: None; `dict(type=..., **arguments)` with a registered name or one of torchvision.transforms.v2; a callable that is
            given the sample, a dict of fields; or a list of these. Arguments called `transforms` are built in the same way.
        path: of `spec`, for messages.

    Raises:
        ConfigError: there is no such transform, or it does not take the arguments.
    """
    if spec is None:
        return None
    if isinstance(spec, Pipeline):
        return spec
    several = isinstance(spec, Sequence) and not isinstance(spec, str)
    steps = [_step(s, f"{path}.{i}") for i, s in enumerate(cast("Sequence[Any]", spec))] if several else [_step(spec, path)]
    return Pipeline(tuple(steps)) if steps else None


def check_transform(spec: Any, path: str) -> list[str]:
    """The problems of `build_transform(spec, path)`, without building."""
    if isinstance(spec, (list, tuple)):
        return [p for i, s in enumerate(cast("Sequence[Any]", spec)) for p in check_transform(s, f"{path}.{i}")]
    if not isinstance(spec, Mapping):
        what = f"{path}: expected dict(type=...), a callable or a list of these, got {type(spec).__name__} {spec!r:.60}."
        return [] if spec is None or callable(spec) else [what]
    entry = cast("Mapping[str, Any]", spec)
    nested = [p for k in _NESTED if k in entry for p in check_transform(entry[k], f"{path}.{k}")]
    return [*TRANSFORMS.check(entry, path), *nested]


TransformSpec = Annotated[Any, CheckedBy(check_transform)]  # of an argument that `build_transform` is given


def _step(spec: Any, path: str) -> Callable[..., Any]:
    if isinstance(spec, Mapping):
        entry = cast("Mapping[str, Any]", spec)
        return TRANSFORMS.build({k: _argument(v, f"{path}.{k}") if k in _NESTED else v for k, v in entry.items()}, path)
    if callable(spec):
        return spec
    raise ConfigError(
        f"{path}: expected dict(type=...), a callable or a list of these, got {type(spec).__name__} {spec!r:.60}."
    )


def _argument(value: Any, path: str) -> Any:
    """The transforms that a transform takes."""
    if isinstance(value, (list, tuple)):
        return [_step(v, f"{path}.{i}") for i, v in enumerate(cast("Sequence[Any]", value))]
    return _step(value, path) if isinstance(value, Mapping) else value


def transformed(pipeline: Pipeline, sample: Sample, kinds: Mapping[str, str], another: Another | None = None) -> Sample:
    """A sample after a pipeline: its fields go in as the tv_tensors that they are, and come out as plain tensors.

    Args:
        pipeline: what to apply.
        sample: plain tensors and other values.
        kinds: {field: "image" | "video" | "mask" | "boxes" | "keypoints"}; boxes are xyxy, both in pixels of the image. Other
            fields stay as they are.
        another: gives one more sample, as `sample` is.
    """
    if pipeline.alone is not None and (name := _lone_picture(sample, kinds)) is not None:
        value = sample[name]
        for step in pipeline.alone:
            value = step(value)
        return {**sample, name: _plain(value)}
    wrapped = pipeline(_wrapped(sample, kinds), another and (lambda: _wrapped(another(), kinds)))
    return {name: _plain(value) for name, value in wrapped.items()}


def _lone_picture(sample: Sample, kinds: Mapping[str, str]) -> str | None:
    """The name of the one picture, where there is nothing else that a transform would move: a third of the time is saved."""
    found = [n for n, v in sample.items() if isinstance(v, Tensor) and (n in kinds or v.dim() > 1)]
    return found[0] if len(found) == 1 and kinds.get(found[0]) == "image" and sample[found[0]].dim() == 3 else None


def _wrapped(sample: Sample, kinds: Mapping[str, str]) -> Sample:
    from torchvision import tv_tensors

    pictures = (v for n, v in sample.items() if kinds.get(n) in ("image", "video") and isinstance(v, Tensor) and v.dim() >= 3)
    canvas = next(((v.shape[-2], v.shape[-1]) for v in pictures), None)
    if canvas is None:
        return sample
    make: dict[str, Callable[[Any], Any]] = {
        "image": tv_tensors.Image,
        "video": tv_tensors.Video,
        "mask": tv_tensors.Mask,
        "boxes": lambda v: tv_tensors.BoundingBoxes(v, format="XYXY", canvas_size=canvas),  # pyright: ignore[reportCallIssue, reportArgumentType]
        "keypoints": lambda v: tv_tensors.KeyPoints(v, canvas_size=canvas),  # pyright: ignore[reportCallIssue]
    }
    return {n: make[kinds[n]](v) if n in kinds and isinstance(v, Tensor) else v for n, v in sample.items()}


def _plain(value: Any) -> Any:
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    if isinstance(value, tv_tensors.BoundingBoxes):
        value = functional.convert_bounding_box_format(value, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    return value.as_subclass(torch.Tensor) if isinstance(value, tv_tensors.TVTensor) else value
