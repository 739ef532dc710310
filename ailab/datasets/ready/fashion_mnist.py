"""The Fashion-MNIST dataset, from its four IDX files."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.errors import DataError
from ailab.registry import DATASETS

ENVIRONMENT = "AILAB_FASHION_MNIST"  # environment variable with the folder of the files
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts the files
_PREFIX = {"train": "train", "test": "t10k"}


@DATASETS.register_module()
class FashionMNIST(LabBaseDataset):
    """Images of clothes, 28x28 pixels: `{"input": (1, 28, 28) uint8 in 0..255, "target": () int64 in 0..9}`.

    Source: Xiao, Rasul and Vollgraf, arXiv:1708.07747; MIT licence.

    Args:
        root: Folder of the four `*-ubyte.gz` files. Default, in this order: the folder in the environment variable
            AILAB_FASHION_MNIST, Debian's package dataset-fashion-mnist, a download by torchvision into the user's cache.
        split: "train" (60,000 samples) or "test" (10,000 samples).

    Raises:
        DataError: `split` is neither of the two, a file is missing or damaged, or the download fails.
    """

    classes = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

    def __init__(self, root: str | Path | None = None, split: Literal["train", "test"] = "train"):
        if split not in _PREFIX:
            raise DataError(f"FashionMNIST: split={split!r}; there are 'train' and 'test'.")
        folder = Path(root) if root is not None else _found()
        images = read_idx(folder / f"{_PREFIX[split]}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{_PREFIX[split]}-labels-idx1-ubyte.gz")
        if images.dim() != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"{folder}: the images {tuple(images.shape)} and labels {tuple(labels.shape)} do not match.")
        self._fields = {"input": images.unsqueeze(1), "target": labels.long()}

    def tensors(self) -> dict[str, Tensor]:
        """All samples, stacked."""
        return self._fields

    def _len(self) -> int:
        return len(self._fields["target"])

    def _get_raw(self, index: int) -> Any:
        return {name: values[index] for name, values in self._fields.items()}

    def _get_sample(self, raw: Any) -> Any:
        return raw


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes: uint8, with the shape in its header.

    Source: the format at the end of yann.lecun.com/exdb/mnist: two zero bytes, type, rank, then big-endian sizes.

    Raises:
        DataError: The file is missing, is no IDX file of bytes, or its length does not match its header.
    """
    try:
        with gzip.open(path, "rb") as file:
            content = bytearray(file.read())
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if len(content) < 4 or bytes(content[:3]) != b"\x00\x00\x08":
        raise DataError(f"{path}: no IDX file of bytes; it starts with {bytes(content[:4])!r}.")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if math.prod(shape) != len(content) - start:
        raise DataError(f"{path}: damaged: the header says {shape}, but {len(content) - start} bytes follow it.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)


def _found() -> Path:
    """The folder with the files. They are downloaded if needed."""
    if ENVIRONMENT in os.environ:
        return Path(os.environ[ENVIRONMENT])
    return DEBIAN if DEBIAN.is_dir() else _downloaded()


def _downloaded() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ailab"
    try:
        from torchvision.datasets import FashionMNIST as Download

        Download(cache, download=True)
    except Exception as error:  # no torchvision, no network, no space: torchvision raises many classes
        raise DataError(
            f"FashionMNIST: not on this machine, and the download failed: {type(error).__name__}: {error}\n"
            f"  Run `apt-get install dataset-fashion-mnist`. Or put the four .gz files in a folder and set root=... or\n"
            f"  the environment variable {ENVIRONMENT}."
        ) from error
    return cache / "FashionMNIST" / "raw"
