"""Files that survive: written, synced and read back; JSON that no string can break."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast


def to_json(value: Any) -> str:
    """One line of ASCII JSON; control characters are escaped, and non-finite numbers become "nan", "inf" and "-inf".

    Raises TypeError for what JSON cannot hold, a tensor for one.
    """
    return json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _finite(child) for key, child in cast("Mapping[Any, Any]", node).items()}
    if isinstance(node, (list, tuple)):
        return [_finite(child) for child in cast("list[Any]", node)]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


def write(path: Path, data: bytes | memoryview) -> None:
    """Write a new file and return once its content is on the disk; raises OSError, also where `path` exists."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    """Make the names in a folder durable: those of new and of renamed files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems know no fsync of a folder
            raise
    finally:
        os.close(fd)


def has_content(path: Path, data: bytes | memoryview) -> bool:
    """Whether a file has exactly these bytes; without a second copy of them in memory."""
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
    """Put `data` in the place of a file in one piece: a reader, or a kill, finds the old content or the new."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.unlink(missing_ok=True)
    write(partial, data)
    os.replace(partial, path)
    sync_directory(path.parent)
