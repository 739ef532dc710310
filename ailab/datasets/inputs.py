"""Inputs without labels, read and transformed as a dataset of ailab reads and transforms its own: for prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image import read_image
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.tasks.task import Task, tensor_of
from ailab.datasets.transforms.pipeline import Sample, TransformSpec, apply_transform, build_transform
from ailab.errors import ConfigError
from ailab.signature import check_arguments, parameters

ARRAYS = (".npy", ".pt", ".pth")  # files of an array or a tensor
SIZE = "original_size"  # field: (2,) int64, height and width of the input before the transform; -1 where it is no image


class InputDataset(ListDataset, Task):
    """Inputs of one field: `{field: tensor, "original_size": (2,) int64}`.

    Args:
        items: Paths of images or of arrays (.npy, .pt), or tensors and arrays themselves.
        field: Name of the field.
        image: Whether a path is read as an image, (3, H, W) uint8, and a transform gets an image. Otherwise only arrays are read.
        transform: Transforms of a sample, see `build_transform`.
        resize: As for `ClassificationImageDataset`.
        size_hint: As for `ClassificationImageDataset`.
        dtype: Name of the dtype that arrays are converted to. None: they stay, but for float64.

    Raises:
        BadFile: While reading: a file is damaged, missing, or of a kind that is not read here.
    """

    def __init__(
        self,
        items: Sequence[Any],
        field: str,
        *,
        image: bool = False,
        transform: TransformSpec = None,
        resize: int | Sequence[int] | None = None,
        size_hint: Sequence[int] | None = None,
        dtype: str | None = None,
    ):
        super().__init__(items)
        self.field, self.image = field, image
        self.kinds: Mapping[str, str] = {field: "image"} if image else {}
        self.transform = build_transform(transform)
        self.resize = (resize[0], resize[1]) if isinstance(resize, Sequence) else resize
        self.size_hint = (size_hint[0], size_hint[1]) if size_hint is not None else None
        self.dtype = getattr(torch, dtype) if dtype else None

    def load(self, raw: Any) -> Sample:
        """The field before the transform."""
        path = str(raw) if isinstance(raw, (str, Path)) else None
        if path is None or path.lower().endswith(ARRAYS):
            value = read_array(path) if path else tensor_of(raw, "the input")
            return {self.field: value if self.dtype is None else value.to(self.dtype)}
        if not self.image:
            raise BadFile("not_an_array", "the model was not trained on image files: give arrays, .npy or .pt", path)
        return {self.field: read_image(path, size_hint=self.size_hint, resize=self.resize)}

    def _get_sample(self, raw: Any) -> Any:
        sample = self.load(raw)
        value = sample[self.field]
        size = torch.tensor(value.shape[-2:]) if self.image and value.dim() >= 2 else torch.tensor([-1, -1])
        if self.transform is not None:
            sample = apply_transform(self.transform, sample, self.kinds)
        return {**sample, SIZE: size}


def read_array(path: str) -> Tensor:
    """The array of a .npy file or the tensor of a .pt file. Nothing in the file is executed.

    Raises:
        BadFile: The file cannot be read, holds another object, or is of objects.
    """
    import numpy as np

    try:
        if path.lower().endswith(".npy"):
            return tensor_of(np.load(path, allow_pickle=False), path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadFile("missing", "there is no such file", path) from error
    except Exception as error:  # unknown bytes may raise anything
        raise BadFile("corrupt", f"no array can be read: {type(error).__name__}", path) from error
    if not isinstance(found, Tensor):
        raise BadFile("not_an_array", f"the file holds {type(found).__name__}, and no tensor", path)
    return found.float() if found.dtype == torch.float64 else found


def check_reading(reading: Mapping[str, Any], path: str) -> None:
    """Raise `ConfigError` where `reading` does not fit the arguments of `InputDataset`, but its items."""
    takes = parameters(InputDataset).without(("items",))
    if problems := check_arguments(takes, reading, path, "the preprocessing"):
        raise ConfigError("\n".join(problems))
