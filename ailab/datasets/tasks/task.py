"""The base of all tasks: fields out of a raw record, transformed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.transforms.pipeline import Pipeline, Sample, transformed
from ailab.errors import nearest
from ailab.signature import name_list

_DRAWS = 8  # other samples tried, where a transform asks for one and some are bad


class Task(LabBaseDataset):
    """A sample is a dict of fields; a subclass says which, and how each is loaded from a raw record.

    Set in `__init__`, or in the class:
        transform: what `build_transform` makes of a cfg; it is given all fields, see `transformed`.
        renamed: {field: its name in the sample}.
        classes: the names of the classes; then a label may be a name, and one that is not there is an error.
    """

    kinds: Mapping[str, str] = {}  # what a field is to a transform, see `transformed`
    renamed: Mapping[str, str] = {}
    transform: Pipeline | None = None
    classes: Sequence[str] | None = None

    def load(self, raw: Any) -> Sample:
        """The fields of one sample, untransformed, by their own names."""
        raise NotImplementedError(f"{type(self).__name__} inherits no task; define load.")

    def finished(self, sample: Sample) -> Sample:
        """The fields after the transform; a task puts right here what a transform left."""
        return sample

    def _get_sample(self, raw: Any) -> Any:
        sample = self.load(raw)
        if self.transform is not None:
            sample = self.finished(transformed(self.transform, sample, self.kinds, self._another))
        return {self.renamed.get(name, name): value for name, value in self.delivered(sample).items()}

    def delivered(self, sample: Sample) -> Sample:
        """The fields in the form that was asked for."""
        return sample

    def _another(self) -> Sample:
        """Another sample, untransformed, drawn by the generator of the sample at hand; a bad one is passed over."""
        for _ in range(_DRAWS - 1):
            try:
                return self.load(self._get_raw(int(torch.randint(len(self), ()))))
            except Exception:  # it is reported when its own turn comes
                continue
        return self.load(self._get_raw(int(torch.randint(len(self), ()))))


def tensor_of(value: Any, what: str) -> Tensor:
    """A tensor of a tensor, an array, a PIL picture (as (C, H, W) uint8), a number or nested lists of them; float64 as float32.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, Tensor):
        found = value
    elif hasattr(value, "getbands") and hasattr(value, "tobytes"):
        found = picture_tensor(value)
    elif hasattr(value, "__array__"):
        import numpy as np

        array: Any = np.asarray(value)
        found = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    elif isinstance(value, (bool, int, float, list, tuple)):
        found = torch.tensor(value)
    else:
        raise TypeError(f"{what}: expected a tensor, an array, a picture or numbers, got {type(value).__name__}")
    return found.float() if found.dtype == torch.float64 else found


def picture_tensor(picture: Any) -> Tensor:
    """A PIL picture as (C, H, W) uint8: one channel for "L" and "1", else RGB."""
    gray = picture.mode in ("L", "1")
    rows: Any = picture.convert("L" if gray else "RGB")
    shape = (picture.height, picture.width, 1 if gray else 3)
    return torch.frombuffer(bytearray(rows.tobytes()), dtype=torch.uint8).view(shape).permute(2, 0, 1).contiguous()


def class_index(label: Any, classes: Sequence[str] | None) -> int:
    """The index of a class by its name or its index.

    Raises:
        ValueError: there is no such class, or names are given and `classes` is not known.
    """
    if isinstance(label, Tensor) or hasattr(label, "item"):
        label = label.item()
    if isinstance(label, str) and classes is not None:
        if label in classes:
            return classes.index(label)
        raise ValueError(f"unknown class {label!r:.60}.{nearest(label, classes)} Classes: {name_list(classes)}")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, int):
        need = " (for names, set `classes`)" if isinstance(label, str) else ""
        raise ValueError(f"expected the index of a class, got {type(label).__name__} {label!r:.60}{need}")
    if label < 0 or (classes is not None and label >= len(classes)):
        known = f"there are {len(classes)}" if classes is not None else "they start at 0"
        raise ValueError(f"there is no class {label}; {known}")
    return int(label)


def target_of(label: Any, classes: Sequence[str] | None, multi: bool) -> Tensor:
    """A label as the target of a loss: () int64; or for several labels of one sample, a list, (classes,) float32 of 0 and 1.

    Raises:
        ValueError: an unknown class, or several labels where one is expected or the number of classes is not known.
    """
    if not multi:
        return torch.tensor(class_index(label, classes))
    if classes is None:
        raise ValueError("several labels for one sample: set `classes`, whose number is the length of the target")
    labels = cast("Sequence[Any]", label.tolist() if isinstance(label, Tensor) else label)
    if isinstance(labels, (str, int)):
        raise ValueError(f"expected a list of labels, got {type(labels).__name__} {labels!r:.60}")
    target = torch.zeros(len(classes))
    target[[class_index(one, classes) for one in labels]] = 1.0
    return target
