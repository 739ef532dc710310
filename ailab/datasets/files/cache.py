"""A cache of decoded images in shared memory or on disk. All workers and ranks of a machine share it.

Each image is one file. It is written under a temporary name and then renamed, so readers never see half a file. An entry is valid
if the size and the modification time of its source file are unchanged and its checksum is right. There is no index, so entries need
no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Magic, size and mtime of the source, channels, height, width, memory order, checksum; 64 bytes.
_HEAD = struct.Struct("<8sQQIIIIQ16x")
_MAGIC = b"ailab 2\n"
_FREE_SHARE = 0.1  # of the file system, left free: batches of workers are in shared memory too
_FREE_BYTES = 256 << 20  # left free at least
_LOCK = "lock"  # name of the lock file in the cache folder of a run
_LITTLE_MEMORY = 1 << 30  # bytes of shared memory; with less, little_memory warns
_MAPPED = 1 << 15  # entries that a process keeps mapped; Linux allows 65,530 maps per process
SHARED = Path("/dev/shm")  # shared memory as a file system


class _MappedImages(dict[tuple[str, str], tuple[int, int, Tensor]]):
    """(path, variant) -> (size and mtime of the source, memory-mapped image). Pickling gives an empty one."""

    def __reduce__(self) -> tuple[type[_MappedImages], tuple[()]]:
        return _MappedImages, ()


@dataclass(frozen=True)
class Cache:
    """A folder of decoded images. `read_image` calls it instead of the decoder.

    Args:
        folder: The folder. It is created when needed, readable by this user only.
        verify: Whether to check the checksum at each read, which takes a quarter of the time of a read. Shared memory does not
            need it.
    """

    folder: Path
    verify: bool = True
    _maps: _MappedImages = field(default_factory=_MappedImages, init=False, repr=False, compare=False)

    def __call__(self, path: str, variant: str, decode: Callable[[], tuple[Tensor, bool]], borrow: bool = False) -> Tensor:
        """The decoded image of a file: (C, H, W) uint8. It comes from the cache, or is decoded and stored.

        Args:
            path: Path of the image file.
            variant: All settings that the decoded image depends on, as a text. It is part of the key.
            decode: Decodes the file. It returns the image and whether the cache may store it.
            borrow: Whether the result may be memory of the cache. The caller must not write to it.
        """
        try:
            about = os.stat(path)
        except (OSError, ValueError):
            return decode()[0]  # it raises the right error
        if (
            borrow
            and (mapped := self._maps.get((path, variant))) is not None
            and mapped[:2] == (about.st_size, about.st_mtime_ns)
        ):
            return mapped[2]
        name = hashlib.blake2b(
            f"{os.path.abspath(path)}\n{variant}".encode(errors="surrogateescape"), digest_size=16
        ).hexdigest()
        place = os.path.join(self.folder, name[:2], name)
        # Only shared memory is mapped: a disk error under a map kills the process, after a failed read the image is decoded.
        if borrow and not self.verify and len(self._maps) < _MAPPED and (found := _mapped(place, about)) is not None:
            self._maps[path, variant] = (about.st_size, about.st_mtime_ns, found)
            return found
        found = _read(place, about, self.verify)
        if found is None:
            found, keep = decode()
            if keep:  # a damaged image is not stored, so that it is reported each time
                self._write(Path(place), about, found)
        return found

    def clear(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, place: Path, about: os.stat_result, image: Tensor) -> None:
        """Store an image if there is space. A failure is ignored: the image is decoded again the next time."""
        if image.dtype != torch.uint8 or image.dim() != 3:
            return
        planes = image.is_contiguous()  # CHW order; otherwise HWC, the order of decoders
        rows = (image if planes else image.permute(1, 2, 0).contiguous()).numpy().tobytes()
        about_it = (_MAGIC, about.st_size, about.st_mtime_ns, *image.shape, planes)
        head = _HEAD.pack(*about_it, _checksum(about_it, np.frombuffer(rows, np.uint8)))
        partial = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.stat(self.folder, follow_symlinks=False).st_uid != os.getuid():
                return
            disk = os.statvfs(self.folder)
            if disk.f_bavail * disk.f_frsize - len(rows) < max(_FREE_SHARE * disk.f_blocks * disk.f_frsize, _FREE_BYTES):
                return
            place.parent.mkdir(mode=0o700, exist_ok=True)
            partial.write_bytes(head + rows)
            os.replace(partial, place)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def _read(place: str, source: os.stat_result, verify: bool) -> Tensor | None:
    """A copy of the image stored at `place`; None if the entry is damaged or stale."""
    try:
        file = os.open(place, os.O_RDONLY | os.O_CLOEXEC)  # a file object takes a tenth of the time of a read
        try:
            about = os.fstat(file)
            content = torch.empty(about.st_size, dtype=torch.uint8)  # not zeroed first, as a bytearray is
            held: Any = content.numpy()
            if about.st_uid != os.getuid() or os.readv(file, [held]) != about.st_size:
                return None
        finally:
            os.close(file)
    except OSError:
        return None
    return _image(content, source, verify)


def _mapped(place: str, source: os.stat_result) -> Tensor | None:
    """The image stored at `place`, memory-mapped; None if the entry is stale."""
    try:
        about = os.stat(place)
        if about.st_uid != os.getuid():
            return None
        return _image(torch.from_file(place, shared=False, size=about.st_size, dtype=torch.uint8), source, verify=False)
    except (OSError, RuntimeError):  # it does not exist, or was replaced meanwhile
        return None


def _image(content: Tensor, source: os.stat_result, verify: bool) -> Tensor | None:
    """The image in the bytes of an entry, as a view; None if the entry is damaged or stale."""
    size = content.numel()
    if size < _HEAD.size:
        return None
    held: Any = content.numpy()
    *about_it, checksum = _HEAD.unpack_from(held)
    magic, length, changed, c, h, w, planes = about_it
    if (magic, length, changed) != (_MAGIC, source.st_size, source.st_mtime_ns) or size != _HEAD.size + c * h * w:
        return None
    if verify and _checksum(about_it, held[_HEAD.size :]) != checksum:
        return None
    values = content[_HEAD.size :]
    return values.view(c, h, w) if planes else values.view(h, w, c).permute(2, 0, 1)


def _checksum(about_it: Iterable[Any], content: Any) -> int:
    """The checksum of a header and of bytes, (N,) uint8. Five times as fast as a CRC.

    It changes with any single word and with the order of the 4 KiB blocks.
    """
    whole = len(content) // 4096 * 4096
    blocks = content[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    places = 2 * np.arange(len(blocks), dtype=np.uint64) + np.uint64(1)  # odd: no change of a block is lost
    return int((blocks * places).sum()) ^ zlib.crc32(content[whole:], zlib.crc32(_HEAD.pack(*about_it, 0)))


def little_memory(kind: str | None) -> str | None:
    """The warning if there is little shared memory for a "ram" cache, as is usual in a container; None if there is enough.

    Args:
        kind: `cfg.data.cache`: "ram", "disk" or None. Only "ram" can give a warning.
    """
    try:
        about = os.statvfs(SHARED) if kind == "ram" else None
    except OSError:
        return (
            f"data.cache='ram' keeps images in {SHARED}, which does not exist here. No image is cached.\n"
            "  Use data.cache='disk'."
        )
    if about is None or about.f_blocks * about.f_frsize >= _LITTLE_MEMORY:
        return None
    mib = about.f_blocks * about.f_frsize >> 20
    return (
        f"data.cache='ram' keeps images in {SHARED}, which has only {mib} MiB. Few images will be cached.\n"
        "  Start a container with --shm-size=16g, or use data.cache='disk'."
    )


@contextmanager
def memory_held(kind: str | None, work_dir: Path) -> Generator[None]:
    """Own the "ram" cache of a run inside the block, and delete it at the end. Caches of killed runs are deleted at the start.

    A process that still reads decodes an image again if its entry is gone.

    Args:
        kind: `cfg.data.cache`: "ram", "disk" or None. Only "ram" does anything.
        work_dir: The work_dir of the run.
    """
    cache = run_cache(kind, work_dir) if kind == "ram" else None
    if cache is None or not SHARED.is_dir():
        yield
        return
    for other in SHARED.glob(f"ailab-{os.getuid()}-*"):
        if other != cache.folder and (lock := _lock_folder(other, fcntl.LOCK_EX, make=False)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = _lock_folder(cache.folder, fcntl.LOCK_SH, make=True)
    try:
        yield
    finally:
        cache.clear()
        if lock is not None:
            os.close(lock)


def _lock_folder(folder: Path, how: int, make: bool) -> int | None:
    """Lock a cache folder, and return the file descriptor of the lock; None if that fails.

    The process and its forked workers hold the lock. The kernel releases it when they have ended, also when they are killed.
    """
    try:
        if make:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.stat(folder, follow_symlinks=False).st_uid != os.getuid():
            return None
        file = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if make else 0), 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(file, how | (0 if make else fcntl.LOCK_NB))
    except OSError:
        os.close(file)
        return None
    return file


def run_cache(kind: str | None, work_dir: Path) -> Cache | None:
    """The image cache of a run, shared by all its processes on this machine.

    Args:
        kind: "ram" for shared memory, "disk" for a folder in the work_dir, None for no cache.
        work_dir: The work_dir of the run.
    """
    if kind != "ram":
        return Cache(work_dir / "cache") if kind else None
    key = hashlib.blake2b(os.path.abspath(work_dir).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return Cache(SHARED / f"ailab-{os.getuid()}-{key}", verify=False)
