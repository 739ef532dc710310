"""Decoded pictures kept in shared memory or on a disk: one file each, so that any number of workers and ranks share them.

A file appears whole (written beside, then renamed), and is used only while its source has the size and the time of change that it
had, and its own checksum fits. There is no index, and so nothing to lock, to lose or to get out of step.
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

# Magic, size and time of change of the source, channels, height, width, order of the memory, checksum; 64 bytes.
_HEAD = struct.Struct("<8sQQIIIIQ16x")
_MAGIC = b"ailab 2\n"
_SPARE, _LEAST = 0.1, 256 << 20  # of the file system, and bytes, that are left free: batches of workers lie in memory too
_LOCK = "lock"  # in the folder of a run
_SMALL = 1 << 30  # bytes of memory for files that are hardly worth a cache
_MAPPED = 1 << 15  # entries that a process keeps mapped; Linux allows it 65,530 maps in all
SHARED = Path("/dev/shm")  # memory that looks like files


class _Maps(dict[tuple[str, str], tuple[int, int, Tensor]]):
    """By path and form: size and time of change of the source, and its picture, mapped as long as this process lives.

    Another process begins with none.
    """

    def __reduce__(self) -> tuple[type[_Maps], tuple[()]]:
        return _Maps, ()


@dataclass(frozen=True)
class Cache:
    """A folder of decoded pictures; called by `read_image` in place of decoding.

    Args:
        folder: made if need be, for this user alone.
        verify: compare the checksum each time; a quarter of the time of a read. Memory needs none.
    """

    folder: Path
    verify: bool = True
    _maps: _Maps = field(default_factory=_Maps, init=False, repr=False, compare=False)

    def __call__(self, path: str, form: str, make: Callable[[], tuple[Tensor, bool]], borrow: bool = False) -> Tensor:
        """The picture of a file in one form, (C, H, W) uint8: kept, or made and kept now.

        Args:
            path: of the file.
            form: what else the picture depends on.
            make: decodes it; the picture, and whether it may be kept.
            borrow: the picture may be memory of the cache, which must not be written to.
        """
        try:
            about = os.stat(path)
        except (OSError, ValueError):
            return make()[0]  # which says what is wrong with it
        if borrow and (mapped := self._maps.get((path, form))) is not None and mapped[:2] == (about.st_size, about.st_mtime_ns):
            return mapped[2]
        name = hashlib.blake2b(f"{os.path.abspath(path)}\n{form}".encode(errors="surrogateescape"), digest_size=16).hexdigest()
        place = os.path.join(self.folder, name[:2], name)
        # Not from a disk: one that fails would end the process, where a read only costs the time to decode again.
        if borrow and not self.verify and len(self._maps) < _MAPPED and (found := _mapped(place, about)) is not None:
            self._maps[path, form] = (about.st_size, about.st_mtime_ns, found)
            return found
        found = _read(place, about, self.verify)
        if found is None:
            found, keep = make()
            if keep:  # what was damaged is told each time
                self._write(Path(place), about, found)
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
            if room.f_bavail * room.f_frsize - len(rows) < max(_SPARE * room.f_blocks * room.f_frsize, _LEAST):
                return
            place.parent.mkdir(mode=0o700, exist_ok=True)
            partial.write_bytes(head + rows)
            os.replace(partial, place)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()


def _read(place: str, source: os.stat_result, verify: bool) -> Tensor | None:
    """The picture kept at `place`, if it is whole and of this source, in memory of its own."""
    try:
        file = os.open(place, os.O_RDONLY | os.O_CLOEXEC)  # a file object would take a tenth of the time of a read
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
    return _picture(content, source, verify)


def _mapped(place: str, source: os.stat_result) -> Tensor | None:
    """The picture kept at `place`, if it is of this source, in the memory that the file is."""
    try:
        about = os.stat(place)
        if about.st_uid != os.getuid():
            return None
        return _picture(torch.from_file(place, shared=False, size=about.st_size, dtype=torch.uint8), source, verify=False)
    except (OSError, RuntimeError):  # it is not there, or was replaced meanwhile
        return None


def _picture(content: Tensor, source: os.stat_result, verify: bool) -> Tensor | None:
    """The picture in the bytes of an entry, a view, if they are whole and of this source."""
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
    """Of a header and bytes, (N,) uint8: changes with any one word and where blocks of 4 KiB lie; five times as fast as a CRC."""
    whole = len(content) // 4096 * 4096
    blocks = content[:whole].view(np.uint64).reshape(-1, 512).sum(1)
    places = 2 * np.arange(len(blocks), dtype=np.uint64) + np.uint64(1)  # odd: no change of a block is lost
    return int((blocks * places).sum()) ^ zlib.crc32(content[whole:], zlib.crc32(_HEAD.pack(*about_it, 0)))


def little_memory(kind: str | None) -> str | None:
    """What to tell about a "ram" cache that has hardly a place, as in a container that nobody gave one; None if all is well."""
    try:
        about = os.statvfs(SHARED) if kind == "ram" else None
    except OSError:
        return f"data.cache='ram' keeps pictures in {SHARED}, and there is none here: nothing is kept. data.cache='disk' would."
    if about is None or about.f_blocks * about.f_frsize >= _SMALL:
        return None
    held = about.f_blocks * about.f_frsize >> 20
    return (
        f"data.cache='ram' keeps pictures in {SHARED}, which holds {held} MiB: few or none will be kept.\n"
        "  A container is given more by --shm-size=16g, say; or use data.cache='disk'."
    )


@contextmanager
def memory_held(kind: str | None, work_dir: Path) -> Generator[None]:
    """For as long as a run is: its "ram" cache is its own, and is gone after it, as are those of runs that were killed.

    A process that is not done yet decodes again what it misses.
    """
    cache = run_cache(kind, work_dir) if kind == "ram" else None
    if cache is None or not SHARED.is_dir():
        yield
        return
    for other in SHARED.glob(f"ailab-{os.getuid()}-*"):
        if other != cache.folder and (lock := _locked(other, fcntl.LOCK_EX, make=False)) is not None:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    lock = _locked(cache.folder, fcntl.LOCK_SH, make=True)
    try:
        yield
    finally:
        cache.clear()
        if lock is not None:
            os.close(lock)


def _locked(folder: Path, how: int, make: bool) -> int | None:
    """The descriptor of a folder's lock, which a process and the workers that it forks hold until they are gone; None: no lock.

    `flock` takes it from a killed process.
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
    """The cache of a run, one for all its processes on this machine: "ram", "disk" (in the work_dir) or None."""
    if kind != "ram":
        return Cache(work_dir / "cache") if kind else None
    key = hashlib.blake2b(os.path.abspath(work_dir).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return Cache(SHARED / f"ailab-{os.getuid()}-{key}", verify=False)
