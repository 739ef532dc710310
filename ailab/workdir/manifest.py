"""What a checkpoint folder holds, and how it is read: nothing is trusted before its hash was compared.

    step_00001234/{manifest.json, state.pt}

The manifest ends with the hash of its own text and holds size and hash of the state, so no flipped bit goes unseen. Hashes
prove integrity, not origin.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ailab.errors import CheckpointError
from ailab.workdir.durable import to_json

FORMAT = 1  # a reader refuses a higher one
MANIFEST, STATE = "manifest.json", "state.pt"
_LIMIT = 16 << 20  # bytes of a manifest
_FIELDS = {
    "format": int,
    "step": int,
    "epoch": int,
    "tree": list,  # [[path, dtype, shape], ...] of the state
    "fingerprint": dict,
    "metrics": dict,
    "torch": str,
    "files": dict,  # {name: [bytes, sha256]}
}
_CHECKSUM = b',"sha256":"%s"}\n'  # the same in every format, so that a newer one is told from a damaged one
# What a broken folder answers; any other errno blames the system.
_DAMAGE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class DamagedError(CheckpointError):
    """The bytes on disk are not those that were committed."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder; `epoch` and `step` count what had been completed."""

    path: Path
    step: int
    epoch: int
    manifest: dict[str, Any]


def sha256(data: bytes | memoryview) -> str:
    """The hash in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode_manifest(head: Mapping[str, Any], size: int, digest: str) -> bytes:
    """The bytes of manifest.json for a state of `size` bytes; raises OSError if they are too many to be read again."""
    body = to_json({"format": FORMAT, **head, "files": {STATE: [size, digest]}})[:-1].encode("ascii")
    data = body + _CHECKSUM % sha256(body).encode("ascii")
    if len(data) > _LIMIT:
        raise OSError(errno.EFBIG, f"its manifest takes {len(data)} bytes, the limit is {_LIMIT}")
    return data


def read_checkpoint(path: Path) -> tuple[Checkpoint, bytes]:
    """A checkpoint and the bytes of its state, verified.

    Raises `DamagedError` where they are not what was committed, `CheckpointError` where they cannot be read or are newer.
    """
    with open_folder(path) as folder:
        checkpoint = read_manifest(path, folder)
        size, digest = checkpoint.manifest["files"][STATE]
        data = _bytes(folder, STATE, size)
    if sha256(data) != digest:
        raise DamagedError(f"{path}: {STATE} does not match its sha256.")
    return checkpoint, data


def read_manifest(path: Path, folder: int) -> Checkpoint:
    """The checkpoint in an open folder by its names, its manifest and the size of its state, whose bytes are not read."""
    names = sorted(os.listdir(folder))
    if names != [MANIFEST, STATE]:
        raise DamagedError(f"{path}: it should hold {MANIFEST} and {STATE}, and has {len(names)} files.")
    manifest = _decode_manifest(path, _bytes(folder, MANIFEST, _LIMIT))
    state, size = os.stat(STATE, dir_fd=folder, follow_symlinks=False), manifest["files"][STATE][0]
    if not stat.S_ISREG(state.st_mode) or state.st_size != size:
        raise DamagedError(f"{path}: {STATE} has {state.st_size} bytes instead of {size}, or is no plain file.")
    return Checkpoint(path, manifest["step"], manifest["epoch"], manifest)


@contextlib.contextmanager
def open_folder(path: Path) -> Generator[int, None, None]:
    """A descriptor of the folder itself, never of what a symlink points to; an OSError inside becomes the error it means."""
    with as_checkpoint_error(str(path)):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)


@contextlib.contextmanager
def as_checkpoint_error(where: str) -> Generator[None, None, None]:
    """Turn an OSError into `DamagedError` or `CheckpointError`."""
    try:
        yield
    except OSError as error:
        kind = DamagedError if error.errno in _DAMAGE else CheckpointError
        raise kind(f"{where}: {error.strerror or error}.") from error


def _bytes(folder: int, name: str, limit: int) -> bytes:
    """At most `limit` bytes of a file in an open folder; does not wait for a pipe in its place."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(fd, "rb") as file:
        return file.read(limit)


def _decode_manifest(path: Path, data: bytes) -> dict[str, Any]:
    body = data[: -len(_CHECKSUM % (b"0" * 64))]
    if data != body + _CHECKSUM % sha256(body).encode("ascii"):
        raise DamagedError(f"{path}: {MANIFEST} does not match its sha256.")
    try:
        manifest: Any = json.loads(body + b"}", object_pairs_hook=_unique, parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: {MANIFEST} cannot be parsed ({type(error).__name__}).") from error
    manifest = cast("dict[str, Any]", manifest) if isinstance(manifest, dict) else {}
    version = manifest.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"{path}: its format {version} is newer than {FORMAT}, the newest known here. Update ailab.")
    if version != FORMAT or not _fits_schema(manifest):
        raise DamagedError(f"{path}: {MANIFEST} does not fit the schema of format {FORMAT}.")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _refused(constant: str) -> Any:
    raise ValueError(constant)


def _types(values: Any) -> list[type] | None:
    return [type(value) for value in cast("list[Any]", values)] if isinstance(values, list) else None


def _fits_schema(m: dict[str, Any]) -> bool:
    if (
        {key: type(value) for key, value in m.items()} != _FIELDS
        or min(m["step"], m["epoch"]) < 0
        or set(m["files"]) != {STATE}
    ):
        return False
    entry = m["files"][STATE]
    sized = _types(entry) == [int, str] and entry[0] >= 0
    rows = all(_types(row) == [str, str, list] for row in m["tree"])
    return sized and rows and all(type(v) in (int, float) or v in ("nan", "inf", "-inf") for v in m["metrics"].values())
