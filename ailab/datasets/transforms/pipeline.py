"""Transforms of a sample: built by name, and applied to all fields together, so that boxes and masks match the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, cast

import torch
from torch import Tensor

from ailab.datasets.transforms.image_only import Step, image_only_steps, is_uint8_crop
from ailab.errors import ConfigError
from ailab.registry import TRANSFORMS
from ailab.signature import CheckedBy

Sample = dict[str, Any]
DrawSample = Callable[[], Sample]  # gives a random sample of the dataset, before its transform
_NESTED = ("transform", "transforms")  # names of arguments that are transforms themselves


@dataclass(frozen=True)
class Pipeline:
    """A list of transforms, applied one after the other.

    A transform with an attribute `others = n` needs n further samples. It is called as `step(sample, [sample1, ...])`.
    """

    steps: tuple[Callable[..., Any], ...]

    def __call__(self, sample: Sample, draw: DrawSample | None = None) -> Sample:
        """The sample after all transforms. `draw` gives the further samples."""
        for step in self.steps:
            if count := getattr(step, "others", 0):
                if draw is None:
                    raise TypeError(f"{type(step).__name__} mixes samples, and this dataset cannot give further samples.")
                sample = step(sample, [draw() for _ in range(count)])
            else:
                sample = step(sample)
            if not isinstance(sample, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(
                    f"the transform {type(step).__name__} returned {type(sample).__name__}; expected a dict of fields"
                )
        return sample

    @cached_property
    def image_steps(self) -> tuple[Step, ...] | None:
        """The transforms as functions of an image tensor (C, H, W); None if they need the whole sample."""
        return image_only_steps(self.steps)

    @property
    def copies_image(self) -> bool:
        """Whether the transforms never write to a uint8 RGB image: the first one copies it."""
        return bool(self.image_steps) and is_uint8_crop(self.steps[0])


def build_transform(spec: Any, path: str = "transform") -> Pipeline | None:
    """Build the transforms of a sample from a cfg.

    Args:
        spec: None, one transform, or a list of transforms. A transform is `dict(type=..., **arguments)` with a registered name or
            a name of torchvision.transforms.v2, or a callable sample -> sample on a dict of fields. Arguments called `transform`
            or `transforms` are built in the same way.
        path: Path of `spec` in the cfg, for messages.

    Raises:
        ConfigError: The name is unknown, or the transform does not accept the arguments.
    """
    if spec is None:
        return None
    if isinstance(spec, Pipeline):
        return spec
    several = isinstance(spec, Sequence) and not isinstance(spec, str)
    steps = [_step(s, f"{path}.{i}") for i, s in enumerate(cast("Sequence[Any]", spec))] if several else [_step(spec, path)]
    return Pipeline(tuple(steps)) if steps else None


def check_transform(spec: Any, path: str) -> list[str]:
    """The problems that `build_transform(spec, path)` would raise. Nothing is built."""
    if isinstance(spec, (list, tuple)):
        return [p for i, s in enumerate(cast("Sequence[Any]", spec)) for p in check_transform(s, f"{path}.{i}")]
    if not isinstance(spec, Mapping):
        what = f"{path}: expected dict(type=...), a callable or a list of these, got {type(spec).__name__} {spec!r:.60}."
        return [] if spec is None or callable(spec) else [what]
    entry = cast("Mapping[str, Any]", spec)
    nested = [p for k in _NESTED if k in entry for p in check_transform(entry[k], f"{path}.{k}")]
    return [*TRANSFORMS.check(entry, path), *nested]


TransformSpec = Annotated[Any, CheckedBy(check_transform)]  # the type of an argument for `build_transform`


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
    """Build the transforms in an argument of a transform."""
    if isinstance(value, (list, tuple)):
        return [_step(v, f"{path}.{i}") for i, v in enumerate(cast("Sequence[Any]", value))]
    return _step(value, path) if isinstance(value, Mapping) else value


def apply_transform(pipeline: Pipeline, sample: Sample, kinds: Mapping[str, str], draw: DrawSample | None = None) -> Sample:
    """Apply transforms to a sample. Inside the transforms the fields are tv_tensors; the result has plain tensors.

    Args:
        pipeline: The transforms.
        sample: Fields of plain tensors and other values.
        kinds: {field: "image" | "video" | "mask" | "boxes" | "keypoints"}. Boxes are xyxy. Boxes and keypoints are in pixels of the
            image. Other fields are passed as they are.
        draw: Gives a further sample, in the form of `sample`.
    """
    if pipeline.image_steps is not None and (name := _only_image(sample, kinds)) is not None:
        value = sample[name]
        for step in pipeline.image_steps:
            value = step(value)
        return {**sample, name: _plain(value)}
    wrapped = pipeline(_wrapped(sample, kinds), draw and (lambda: _wrapped(draw(), kinds)))
    return {name: _plain(value) for name, value in wrapped.items()}


def _only_image(sample: Sample, kinds: Mapping[str, str]) -> str | None:
    """The name of the image field if no other field would be transformed. The fast path then saves a third of the time."""
    found = [n for n, v in sample.items() if isinstance(v, Tensor) and (n in kinds or v.dim() > 1)]
    return found[0] if len(found) == 1 and kinds.get(found[0]) == "image" and sample[found[0]].dim() == 3 else None


def _wrapped(sample: Sample, kinds: Mapping[str, str]) -> Sample:
    from torchvision import tv_tensors

    images = (v for n, v in sample.items() if kinds.get(n) in ("image", "video") and isinstance(v, Tensor) and v.dim() >= 3)
    canvas = next(((v.shape[-2], v.shape[-1]) for v in images), None)
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
