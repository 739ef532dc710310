"""The files that annotations name, kept inside the root of their data set."""

from __future__ import annotations

import os
from pathlib import Path

from ailab.errors import DataError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def inside(root: str | Path, name: object, where: str, *, allow_outside_root: bool = False) -> str:
    """The path of the file `name` of a data set, absolute names as they are.

    `..` and absolute names are judged by the text alone: a symbolic link in the root is its owner's, and is followed.

    Args:
        root: the folder that names are relative to.
        name: out of an annotation file.
        where: the file and row of the name, for messages.
        allow_outside_root: accept a path that leads elsewhere.

    Raises:
        DataError: the name is no text, is empty, or leads out of the root.
    """
    if not isinstance(name, (str, os.PathLike)) or not str(name).strip() or "\0" in str(name):  # pyright: ignore[reportUnknownArgumentType]
        raise DataError(f"{where}: expected the path of a file, got {name!r:.80}.")
    base, text = os.path.abspath(root), str(name)  # pyright: ignore[reportUnknownArgumentType]
    if ".." not in text and not os.path.isabs(text):  # most are; a million of them take seconds less
        return os.path.join(base, text)
    path = os.path.normpath(os.path.join(base, text))
    if not allow_outside_root and path != base and not path.startswith(base.rstrip(os.sep) + os.sep):
        raise DataError(
            f"{where}: {text!r:.200} leads out of the data set's root {base}.\n"
            "  Name another root=..., or accept such paths with allow_outside_root=True."
        )
    return path


def listing(folder: str | Path, what: str) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted by name and without hidden entries: the order of a directory differs between machines.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise DataError(f"{folder}: expected {what}: {error.strerror or error}.") from error
