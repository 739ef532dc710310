"""Durable files: write, sync and compare; strict JSON in one line."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast


def to_json(value: Any) -> str:
    """A value as one line of ASCII JSON.

    Control characters are escaped. Non-finite numbers become the strings "nan", "inf" and "-inf".

    Raises:
        TypeError: the value has something that JSON cannot hold, such as a tensor.
    """
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _finite(child) for key, child in cast("Mapping[Any, Any]", node).items()}
    if isinstance(node, (list, tuple)):
        return [_finite(child) for child in cast("list[Any]", node)]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a new file, and return once its content is on the disk.

    Raises:
        OSError: the file cannot be written, or `path` exists.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Make the entries of a folder durable: new files and renamed files.

    Raises:
        OSError: the folder cannot be synced.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems have no fsync of a folder
            raise
    finally:
        os.close(fd)


def has_content(path: Path, data: bytes | memoryview) -> bool:
    """Whether a file has exactly these bytes. It is read in chunks of 1 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    view, at = memoryview(data), 0
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while chunk := os.read(fd, 1 << 20):
            if bytes(view[at : at + len(chunk)]) != chunk:
                return False
            at += len(chunk)
    finally:
        os.close(fd)
    return at == len(view)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Replace the content of a file by an atomic rename: a reader finds the old content or the new one, also after a kill.

    Raises:
        OSError: the file cannot be written, synced or renamed.
    """
    partial = path.with_name(f".{path.name}.tmp")
    partial.unlink(missing_ok=True)
    write(partial, data)
    os.replace(partial, path)
    sync_directory(path.parent)
