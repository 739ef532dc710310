"""Decoded pictures kept in shared memory or on a disk: one file each, so that any number of workers and ranks share them.

A file appears whole (written beside, then renamed), and is used only while its source has the size and the time of change that it
had, and its own checksum fits. There is no index, and so nothing to lock, to lose or to get out of step.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Magic, size and time of change of the source, channels, height, width, order of the memory, checksum; 64 bytes.
_HEAD = struct.Struct("<8sQQIIIIQ16x")
_MAGIC = b"ailab 2\n"
_SPARE = 0.1  # of the file system that is left free
SHARED = Path("/dev/shm")  # memory that looks like files


@dataclass(frozen=True)
class Cache:
    """A folder of decoded pictures; called by `read_image` in place of decoding.

    Args:
        folder: made if need be, for this user alone.
        verify: compare the checksum each time; a quarter of the time of a read. Memory needs none.
    """

    folder: Path
    verify: bool = True

    def __call__(self, path: str, form: str, make: Callable[[], tuple[Tensor, bool]]) -> Tensor:
        """The picture of a file in one form, (C, H, W) uint8: kept, or made and kept now."""
        try:
            about = os.stat(path)
        except (OSError, ValueError):
            return make()[0]  # which says what is wrong with it
        name = hashlib.blake2b(f"{os.path.abspath(path)}\n{form}".encode(errors="surrogateescape"), digest_size=16).hexdigest()
        place = self.folder / name[:2] / name
        found = _read(place, about, self.verify)
        if found is None:
            found, keep = make()
            if keep:  # what was damaged is told each time
                self._write(place, about, found)
        return found

    def clear(self) -> None:
        """Delete it all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, place: Path, about: os.stat_result, picture: Tensor) -> None:
        """Keep a picture, where there is room; a failure costs nothing but the time to decode it again."""
        if picture.dtype != torch.uint8 or picture.dim() != 3:
            return
        planes = picture.is_contiguous()  # else pixels, the order in which decoders give them
        rows = (picture if planes else picture.permute(1, 2, 0).contiguous()).numpy().tobytes()
        about_it = (_MAGIC, about.st_size, about.st_mtime_ns, *picture.shape, planes)
        head = _HEAD.pack(*about_it, _checksum(about_it, np.frombuffer(rows, np.uint8)))
        partial = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if os.stat(self.folder, follow_symlinks=False).st_uid != os.getuid():
                return
            room = os.statvfs(self.folder)
            if room.f_bavail * room.f_frsize - len(rows) < _SPARE * room.f_blocks * room.f_frsize:
                return
            place.parent.mkdir(mode=0o700, exist_ok=True)
            partial.write_bytes(head + rows)
            os.replace(partial, place)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def _read(place: Path, source: os.stat_result, verify: bool) -> Tensor | None:
    """The picture kept at `place`, if it is whole and of this source."""
    try:
        with open(place, "rb", buffering=0) as file:
            about = os.fstat(file.fileno())
            size = about.st_size
            content = torch.empty(size, dtype=torch.uint8)  # not zeroed first, as a bytearray is
            held: Any = content.numpy()
            if about.st_uid != os.getuid() or file.readinto(held) != size or size < _HEAD.size:
                return None
    except OSError:
        return None
    *about_it, checksum = _HEAD.unpack_from(held)
    magic, length, changed, c, h, w, planes = about_it
    if (magic, length, changed) != (_MAGIC, source.st_size, source.st_mtime_ns) or size != _HEAD.size + c * h * w:
        return None
    if verify and _checksum(about_it, held[_HEAD.size :]) != checksum:
        return None
    values = content[_HEAD.size :]
    return values.view(c, h, w) if planes else values.view(h, w, c).permute(2, 0, 1)


def _checksum(about_it: Iterable[Any], content: Any) -> int:
    """Of a header and bytes, (N,) uint8: changes with any one word and where blocks of 4 KiB lie; five times as fast as a CRC."""
    whole = len(content) // 4096 * 4096
    blocks = content[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    places = 2 * np.arange(len(blocks), dtype=np.uint64) + np.uint64(1)  # odd: no change of a block is lost
    return int((blocks * places).sum()) ^ zlib.crc32(content[whole:], zlib.crc32(_HEAD.pack(*about_it, 0)))


def run_cache(kind: str | None, work_dir: Path) -> Cache | None:
    """The cache of a run, one for all its processes on this machine: "ram", "disk" (in the work_dir) or None."""
    if kind != "ram":
        return Cache(work_dir / "cache") if kind else None
    key = hashlib.blake2b(os.path.abspath(work_dir).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return Cache(SHARED / f"ailab-{os.getuid()}-{key}", verify=False)
