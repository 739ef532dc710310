"""The storage of a folder with one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.paths import IMAGE_EXTENSIONS, sorted_entries
from ailab.datasets.storages.shared_list import SharedList
from ailab.errors import DataError, nearest
from ailab.signature import name_list


class FolderPerClassDataset(LabBaseDataset):
    """Storage of a folder with one sub-folder per class. A raw record is `(path, class index)`.

    Classes and files are sorted by name. Folders inside a class folder are searched too.

    Args:
        root_dir: The folder with the class folders.
        classes: Class names in the order of their indices, e.g. the classes of the train split. Default: the folder names,
            sorted.
        extensions: File extensions to accept, in lower case. () accepts every file.
        folders: Whether a sample is a sub-folder of the class folder (e.g. the frames of a video) instead of a file.

    Raises:
        DataError: The folder does not exist or has no class folder, a class folder is empty or not in `classes`, or two class
            names differ only in upper and lower case. Some file systems do not distinguish these.
    """

    def __init__(
        self,
        root_dir: str | Path,
        classes: Sequence[str] | None = None,
        *,
        extensions: Sequence[str] = IMAGE_EXTENSIONS,
        folders: bool = False,
    ):
        self.root = Path(root_dir)
        found = [e.name for e in sorted_entries(self.root, "a folder with one folder per class") if e.is_dir()]
        self.classes = list(classes) if classes is not None else found
        _check_classes(self.root, found, self.classes)
        index = {name: i for i, name in enumerate(self.classes)}
        found_files: list[tuple[str, int]] = []
        for name in found:
            paths = _sub_folders(self.root / name) if folders else _files(self.root / name, tuple(extensions))
            if not paths:
                kinds = "sub-folder" if folders else f"file ending in {name_list(extensions)}" if extensions else "file"
                raise DataError(f"{self.root / name}: the class has no {kinds}. Remove the folder, or set extensions=....")
            found_files += [(path, index[name]) for path in paths]
        self.samples: Sequence[Any] = SharedList(found_files)
        self.targets = torch.tensor([label for _, label in found_files])  # of all samples: (N,) int64

    def _len(self) -> int:
        return len(self.samples)

    def _get_raw(self, index: int) -> Any:
        path, label = self.samples[index]
        return Path(path), label


def _check_classes(root: Path, found: list[str], classes: list[str]) -> None:
    if not found:
        raise DataError(f"{root}: the split is empty: expected one folder per class, and there is no folder.")
    lower: dict[str, str] = {}
    for name in found:
        if name.casefold() in lower:
            raise DataError(
                f"{root}: the classes {lower[name.casefold()]!r} and {name!r} differ only in case. Merge or rename them."
            )
        lower[name.casefold()] = name
    for name in found:
        if name not in classes:
            raise DataError(f"{root / name}: unknown class.{nearest(name, classes)} Classes: {name_list(classes)}.")


def _sub_folders(folder: Path) -> list[str]:
    return [e.path for e in sorted_entries(folder, "a folder") if e.is_dir()]


def _files(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """The files of a folder and of the folders in it, in the same order on every machine."""
    paths: list[str] = []
    for place, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        kept = (n for n in sorted(names) if not n.startswith("."))
        paths += [os.path.join(place, n) for n in kept if not extensions or n.lower().endswith(extensions)]
    return paths
