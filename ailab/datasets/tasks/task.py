"""The base class of tasks: load the fields of a raw record, and transform them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.transforms.pipeline import Pipeline, Sample, apply_transform
from ailab.errors import nearest
from ailab.signature import name_list

_DRAWS = 8  # samples to try if a transform needs a further sample and some are bad


class Task(LabBaseDataset):
    """The base class of tasks. A task makes a sample, which is a dict of fields, of a raw record.

    These attributes are set in `__init__` or in the class:

    - transform: The result of `build_transform`. It gets all fields, see `apply_transform`.
    - renamed: {field: its name in the sample}.
    - classes: The class names. With them a label may be a name; an unknown name is an error.
    """

    input_field: str | None = None  # the field that a model is given, and that is there without a label; for `ailab.predict`
    kinds: Mapping[str, str] = {}  # {field: its kind for a transform}, see `apply_transform`
    renamed: Mapping[str, str] = {}
    transform: Pipeline | None = None
    classes: Sequence[str] | None = None

    def load(self, raw: Any) -> Sample:
        """The fields of one sample before the transform."""
        raise NotImplementedError(f"{type(self).__name__} inherits no task; define load.")

    def after_transform(self, sample: Sample) -> Sample:
        """The fields after the transform. A task overrides this to clean up, e.g. to drop objects that were cut away."""
        return sample

    def _get_sample(self, raw: Any) -> Any:
        sample = self.load(raw)
        if self.transform is not None:
            sample = self.after_transform(apply_transform(self.transform, sample, self.kinds, self._random_sample))
        return {self.renamed.get(name, name): value for name, value in self.output(sample).items()}

    def output(self, sample: Sample) -> Sample:
        """The fields in their final format. A task overrides this, e.g. to convert boxes to `box_format`."""
        return sample

    def _random_sample(self) -> Sample:
        """A random sample before the transform. It is drawn with the generator of the current sample. Bad samples are skipped."""
        for _ in range(_DRAWS - 1):
            try:
                return self.load(self._get_raw(int(torch.randint(len(self), ()))))
            except Exception:  # it is reported when it is loaded itself
                continue
        return self.load(self._get_raw(int(torch.randint(len(self), ()))))


def tensor_of(value: Any, what: str) -> Tensor:
    """Convert a value to a tensor. A PIL image becomes (C, H, W) uint8. float64 becomes float32.

    Args:
        value: A tensor, an array, a PIL image, a number, or a nested list of numbers.
        what: What the value is, for messages.

    Raises:
        TypeError: `value` is none of these.
    """
    if isinstance(value, Tensor):
        found = value
    elif hasattr(value, "getbands") and hasattr(value, "tobytes"):
        found = image_tensor(value)
    elif hasattr(value, "__array__"):
        import numpy as np

        array: Any = np.asarray(value)
        found = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    elif isinstance(value, (bool, int, float, list, tuple)):
        found = torch.tensor(value)
    else:
        raise TypeError(f"{what}: expected a tensor, an array, an image or numbers, got {type(value).__name__}")
    return found.float() if found.dtype == torch.float64 else found


def image_tensor(image: Any) -> Tensor:
    """Convert a PIL image to (C, H, W) uint8: one channel for the modes "L" and "1", otherwise RGB."""
    grey = image.mode in ("L", "1")
    rows: Any = image.convert("L" if grey else "RGB")
    shape = (image.height, image.width, 1 if grey else 3)
    return torch.frombuffer(bytearray(rows.tobytes()), dtype=torch.uint8).view(shape).permute(2, 0, 1).contiguous()


def class_index(label: Any, classes: Sequence[str] | None) -> int:
    """The class index of a label.

    Args:
        label: A class index or a class name.
        classes: The class names; None accepts any index and no name.

    Raises:
        ValueError: The class is unknown, or `label` is a name and `classes` is None.
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
        raise ValueError(f"expected a class index, got {type(label).__name__} {label!r:.60}{need}")
    if label < 0 or (classes is not None and label >= len(classes)):
        known = f"there are {len(classes)}" if classes is not None else "they start at 0"
        raise ValueError(f"there is no class {label}; {known}")
    return int(label)


def target_of(label: Any, classes: Sequence[str] | None, multi: bool) -> Tensor:
    """Convert a label to a target: () int64, or with `multi` (classes,) float32 of 0 and 1.

    Args:
        label: A class index or a class name; with `multi` a list of them.
        classes: The class names. `multi` needs them.
        multi: Whether a sample has several labels.

    Raises:
        ValueError: A class is unknown, `label` is a list without `multi` or no list with it, or `multi` has no `classes`.
    """
    if not multi:
        return torch.tensor(class_index(label, classes))
    if classes is None:
        raise ValueError("multi_label needs `classes`: their number is the length of the target")
    labels = cast("Sequence[Any]", label.tolist() if isinstance(label, Tensor) else label)
    if isinstance(labels, (str, int)):
        raise ValueError(f"expected a list of labels, got {type(labels).__name__} {labels!r:.60}")
    target = torch.zeros(len(classes))
    target[[class_index(one, classes) for one in labels]] = 1.0
    return target
