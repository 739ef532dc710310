"""Any indexable data set, with named fields and transforms: of torch, torchvision, Hugging Face, or a plain list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ailab.binding import wrap_sample
from ailab.datasets.ready.split import DatasetSpec
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.tasks.task import Task, picture_tensor, tensor_of
from ailab.datasets.transforms.pipeline import Sample, TransformSpec, build_transform
from ailab.errors import DataError, nearest
from ailab.registry import DATASETS
from ailab.signature import name_list


@DATASETS.register_module()
class WrappedDataset(ListDataset, Task):
    """The samples of another data set as dicts of tensors: pictures of PIL as (C, H, W) uint8, arrays and numbers as tensors.

    Args:
        dataset: anything with a length and an index, or `dict(type=...)` of one. Its samples are dicts (a Hugging Face row), tuples
            `(input, target, field2, ...)`, or one tensor.
        fields: {field of the sample: field of the other data set}; all of them by their own names when left out.
        transform: see `build_transform`.
        kinds: {field of the sample: "image" | "video" | "mask" | "boxes" | "keypoints"}, for a transform; pictures of PIL and
            "input", "image" with three dimensions are images without saying.

    Raises:
        DataError: the data set is empty, or its first sample lacks a field.
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
                raise DataError(f"WrappedDataset: samples have no field {name!r}.{hint}")
        pictures = {new: "image" for new, old in chosen.items() if hasattr(first.get(old), "getbands")}
        self.kinds = {"input": "image", "image": "image", **pictures, **(kinds or {})}

    def load(self, raw: Any) -> Sample:
        """The chosen fields."""
        found = wrap_sample(raw)
        chosen = {new: found[old] for new, old in self.fields.items()} if self.fields is not None else found
        return {name: _value(value, name) for name, value in chosen.items()}


def _first(items: Any) -> dict[str, Any]:
    """The fields of the first sample; none where it cannot be read, which is reported when its turn comes."""
    try:
        return wrap_sample(items[0])
    except Exception:  # any class: it is the user's code that reads the user's files
        return {}


def _names(dataset: Any) -> Sequence[str] | None:
    """The names of the classes, as torchvision's data sets have them."""
    classes = getattr(dataset, "classes", None)
    return [str(c) for c in classes] if isinstance(classes, (list, tuple)) else None


def _value(value: Any, name: str) -> Any:
    """A tensor where that is what the value is; text and nested fields stay."""
    if isinstance(value, Mapping):
        return {str(k): _value(v, f"{name}.{k}") for k, v in value.items()}
    if hasattr(value, "getbands"):
        return picture_tensor(value)
    if isinstance(value, (bool, int, float)) or hasattr(value, "__array__"):
        return tensor_of(value, name)
    return _rows(value, name)


def _rows(value: Any, name: str) -> Any:
    """A list of numbers (of lists of them) as a tensor; any other list as it is."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        return tensor_of(value, name)
    except (TypeError, ValueError, RuntimeError):
        return value
