"""The manifest of a checkpoint, and how a checkpoint is read: each file is used only after its checksum was compared.

    step_00001234/{manifest.json, model.json, state.pt}

`model.json` says what the model is, see `ailab.job.recipe`; a checkpoint that a script saved may be without it. The manifest has
the size and the SHA-256 of each of the other files, and ends with the SHA-256 of its own text. So a flipped bit is always
found. A checksum proves that the bytes are unchanged, not who wrote them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from ailab.errors import CheckpointError
from ailab.workdir.durable import to_json

FORMAT = 3  # a reader refuses a higher one
_READ = (2, 3)  # in format 2 there is no model.json
MANIFEST, STATE, MODEL = "manifest.json", "state.pt", "model.json"
_LIMIT = 16 << 20  # bytes of a manifest, and of a model.json
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
_CHECKSUM = b',"sha256":"%s"}\n'  # the same in every format: a newer manifest must not look like a damaged one
# These mean that the checkpoint is damaged; any other errno is a problem of the system.
_DAMAGE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class DamagedError(CheckpointError):
    """The files of a checkpoint are not as they were committed."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, the steps and epochs completed, and its manifest."""

    path: Path
    step: int
    epoch: int
    manifest: dict[str, Any]
    model: bytes | None = None  # the content of model.json, where it was read


def sha256(data: bytes | memoryview) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def encode_manifest(head: Mapping[str, Any], size: int, digest: str, model: bytes | None = None) -> bytes:
    """The bytes of manifest.json.

    Args:
        head: the manifest without format and files.
        size: bytes of the state.
        digest: SHA-256 of the state, in hexadecimal.
        model: the bytes of model.json, if there is one.

    Raises:
        OSError: the manifest would have more than 16 MiB, which a reader refuses.
    """
    files = {STATE: [size, digest]} | ({} if model is None else {MODEL: [len(model), sha256(model)]})
    body = to_json({"format": FORMAT, **head, "files": files})[:-1].encode("ascii")
    data = body + _CHECKSUM % sha256(body).encode("ascii")
    if len(data) > _LIMIT:
        raise OSError(errno.EFBIG, f"its manifest takes {len(data)} bytes, the limit is {_LIMIT}")
    return data


def read_checkpoint(path: Path) -> tuple[Checkpoint, bytes]:
    """Read and verify a checkpoint, and return it with the bytes of its state.

    Raises:
        DamagedError: the files are not as they were committed.
        CheckpointError: the files cannot be read, or have a newer format.
    """
    with open_folder(path) as folder:
        checkpoint = read_manifest(path, folder)
        size, digest = checkpoint.manifest["files"][STATE]
        data = _bytes(folder, STATE, size)
        checkpoint = replace(checkpoint, model=_model_bytes(checkpoint, folder))
    if sha256(data) != digest:
        raise DamagedError(f"{path}: {STATE} does not match its sha256.")
    return checkpoint, data


def _model_bytes(checkpoint: Checkpoint, folder: int) -> bytes | None:
    """The verified bytes of model.json, or None for a checkpoint without it."""
    if MODEL not in checkpoint.manifest["files"]:
        return None
    size, digest = checkpoint.manifest["files"][MODEL]
    data = _bytes(folder, MODEL, min(size, _LIMIT))
    if sha256(data) != digest:
        raise DamagedError(f"{checkpoint.path}: {MODEL} does not match its sha256.")
    return data


def read_manifest(path: Path, folder: int) -> Checkpoint:
    """Verify the manifest of a checkpoint, the names and the sizes of its files. These are not read.

    Args:
        path: the folder, for messages.
        folder: a descriptor of it, from `open_folder`.

    Raises:
        DamagedError: the files are not as they were committed.
        CheckpointError: the manifest has a newer format.
    """
    names = sorted(os.listdir(folder))
    if names not in ([MANIFEST, STATE], [MANIFEST, MODEL, STATE]):
        raise DamagedError(
            f"{path}: it should have the files {MANIFEST}, {STATE} and {MODEL} alone; it has {len(names)} files or others."
        )
    manifest = _decode_manifest(path, _bytes(folder, MANIFEST, _LIMIT))
    if names != sorted([MANIFEST, *manifest["files"]]):
        raise DamagedError(f"{path}: its files are not those of its {MANIFEST}.")
    for name, (size, _) in manifest["files"].items():
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise DamagedError(f"{path}: {name} has {found.st_size} bytes instead of {size}, or is no regular file.")
    return Checkpoint(path, manifest["step"], manifest["epoch"], manifest)


@contextlib.contextmanager
def open_folder(path: Path) -> Generator[int, None, None]:
    """A context with a descriptor of a folder. A symlink is refused. An OSError inside is turned as `as_checkpoint_error` does."""
    with as_checkpoint_error(str(path)):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield folder
        finally:
            os.close(folder)


@contextlib.contextmanager
def as_checkpoint_error(where: str) -> Generator[None, None, None]:
    """A context that turns an OSError into an error about the checkpoint.

    Args:
        where: the path, for the message.

    Raises:
        DamagedError: the OSError says that a file is missing, is of another kind, or cannot be read from the disk.
        CheckpointError: any other OSError, such as a lack of rights.
    """
    try:
        yield
    except OSError as error:
        kind = DamagedError if error.errno in _DAMAGE else CheckpointError
        raise kind(f"{where}: {error.strerror or error}.") from error


def _bytes(folder: int, name: str, limit: int) -> bytes:
    """At most `limit` bytes of a file in an open folder. If it is a pipe, the call does not wait."""
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
    if type(version) is int and 0 < version < min(_READ):
        raise CheckpointError(
            f"{path}: its format is {version}, of an earlier ailab; this one reads formats {min(_READ)} to {FORMAT}.\n"
            "  It does not say at which step its epoch began. The ailab that wrote it goes on with it; `model_state` can be loaded."
        )
    if version not in _READ or not _fits_schema(manifest):
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
        or set(m["files"]) not in ({STATE}, {STATE, MODEL})
    ):
        return False
    sized = all(_types(entry) == [int, str] and entry[0] >= 0 for entry in m["files"].values())
    rows = all(_types(row) == [str, str, list] for row in m["tree"])
    return sized and rows and all(type(v) in (int, float) or v in ("nan", "inf", "-inf") for v in m["metrics"].values())
