"""A wrapper that gives named fields and transforms to a dataset of torch, torchvision or Hugging Face, or to a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ailab.binding import wrap_sample
from ailab.datasets.ready.split import DatasetSpec
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.tasks.task import Task, image_tensor, tensor_of
from ailab.datasets.transforms.pipeline import Sample, TransformSpec, build_transform
from ailab.errors import DataError, nearest
from ailab.registry import DATASETS
from ailab.signature import name_list


@DATASETS.register_module()
class WrappedDataset(ListDataset, Task):
    """The samples of another dataset as dicts of tensors.

    A PIL image becomes (C, H, W) uint8. Arrays and numbers become tensors. Text stays text.

    Args:
        dataset: A dataset with `__len__` and `__getitem__`, or `dict(type=...)` of one. Its samples are dicts (as rows of Hugging
            Face), tuples `(input, target, field2, ...)`, or single tensors.
        fields: {new field name: field name in `dataset`}. Default: all fields with their own names.
        transform: Transforms of a sample, see `build_transform`. They get all fields.
        kinds: {new field name: "image" | "video" | "mask" | "boxes" | "keypoints"}, so that the transform treats the field
            accordingly. PIL images, "input" and "image" are images by default.

    Raises:
        DataError: The dataset is empty, or its first sample lacks a field.
    """

    def __init__(
        self,
        dataset: DatasetSpec,
        *,
        fields: Mapping[str, str] | None = None,
        transform: TransformSpec = None,
        kinds: Mapping[str, str] | None = None,
    ):
        super().__init__(DATASETS.build(dataset, "dataset") if isinstance(dataset, Mapping) else dataset)
        self.fields, self.transform = fields, build_transform(transform)
        self.classes = _names(self.items)
        first = _first(self.items)
        chosen = {n: n for n in first} if fields is None else dict(fields)
        for name in chosen.values():
            if first and name not in first:
                hint = f"{nearest(name, first)} They have: {name_list(first)}."
                raise DataError(f"WrappedDataset: the samples have no field {name!r}.{hint}")
        images = {new: "image" for new, old in chosen.items() if hasattr(first.get(old), "getbands")}
        self.kinds = {"input": "image", "image": "image", **images, **(kinds or {})}

    def load(self, raw: Any) -> Sample:
        """The selected fields."""
        found = wrap_sample(raw)
        chosen = {new: found[old] for new, old in self.fields.items()} if self.fields is not None else found
        return {name: _value(value, name) for name, value in chosen.items()}


def _first(items: Any) -> dict[str, Any]:
    """The fields of the first sample; empty if it cannot be read, which `Stream` reports later."""
    try:
        return wrap_sample(items[0])
    except Exception:  # any class: it is the user's code that reads the user's files
        return {}


def _names(dataset: Any) -> Sequence[str] | None:
    """The class names, from the attribute `classes` as torchvision's datasets have it."""
    classes = getattr(dataset, "classes", None)
    return [str(c) for c in classes] if isinstance(classes, (list, tuple)) else None


def _value(value: Any, name: str) -> Any:
    """The value as a tensor. Text stays text. A dict is converted field by field."""
    if isinstance(value, Mapping):
        return {str(k): _value(v, f"{name}.{k}") for k, v in value.items()}
    if hasattr(value, "getbands"):
        return image_tensor(value)
    if isinstance(value, (bool, int, float)) or hasattr(value, "__array__"):
        return tensor_of(value, name)
    return _rows(value, name)


def _rows(value: Any, name: str) -> Any:
    """A nested list of numbers as a tensor. Any other value unchanged."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        return tensor_of(value, name)
    except (TypeError, ValueError, RuntimeError):
        return value
