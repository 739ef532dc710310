"""File paths from annotations, checked to be inside the root folder of their dataset."""

from __future__ import annotations

import os
from pathlib import Path

from ailab.errors import DataError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def path_inside(root: str | Path, name: object, where: str, *, allow_outside_root: bool = False) -> str:
    """The path of the file `name` in the folder `root`, checked to be inside it.

    The check uses the text of the path only. Symbolic links are followed.

    Args:
        root: Folder that relative names start from.
        name: Relative or absolute path, from an annotation file.
        where: The file and the line of the name, for messages.
        allow_outside_root: Whether to accept a path outside `root`.

    Raises:
        DataError: `name` is not a text, is empty, or leads out of `root`.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip() or "\0" in str(name):  # pyright: ignore[reportUnknownArgumentType]
        raise DataError(f"{where}: expected the path of a file, got {name!r:.80}.")
    base, text = os.path.abspath(root), str(name)  # pyright: ignore[reportUnknownArgumentType]
    if ".." not in text and not os.path.isabs(text):  # the common case; saves seconds for a million names
        return os.path.join(base, text)
    path = os.path.normpath(os.path.join(base, text))
    if not allow_outside_root and path != base and not path.startswith(base.rstrip(os.sep) + os.sep):
        raise DataError(
            f"{where}: {text!r:.200} leads out of the dataset's root {base}.\n"
            "  Set another root=..., or accept such paths with allow_outside_root=True."
        )
    return path


def sorted_entries(folder: str | Path, what: str) -> list[os.DirEntry[str]]:
    """The entries of a folder without hidden ones, sorted by name. The order of a directory differs between machines.

    Args:
        folder: The folder to list.
        what: What the folder should be, for messages.

    Raises:
        DataError: The folder does not exist or cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: expected {what}: {error.strerror or error}.") from error
