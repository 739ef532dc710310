"""Picture files to uint8 tensors: the format by content, the size checked before anything is decoded, damage never silent.

Pillow decodes, without its formats that run other programs. Ordinary JPEGs go through torchvision's operator where there is one:
the same libjpeg-turbo and the same pixels in three quarters of the time. Not its PNG decoder, which ends the process on a bad
checksum (0.29); nor its functions, which are deprecated; nor nvJPEG through it: it writes into memory that kernels on the caller's
stream still read (pytorch/vision#9606, closed as it was), gives nothing of a batch in which one file is damaged, and other pixels.
"""

from __future__ import annotations

import errno
import importlib
import os
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.datasets.files.image_header import JPEG, JPEG_END, PNG, Header, check_png, check_size, jpeg_ends, jpeg_header

Mode = Literal["RGB", "L", "RGBA"]
Truncated = Literal["skip", "fill"]
_MAX_BYTES = 1 << 29  # of a file
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
_FILL_ROWS = 0.5  # the share of the rows that a truncated picture must have to be kept
_ORIENTATION = 0x0112  # tag of EXIF


@dataclass
class Reading:
    """How the files of a sample are to be read, where the call does not say, and what is to be told about them."""

    truncated: Truncated = "skip"
    # (path, form, make, borrow) -> what make() gives, or gave: a picture, and whether it may be kept
    cached: Callable[[str, str, Callable[[], tuple[Tensor, bool]], bool], Tensor] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (path, text) of files kept though damaged


_CURRENT: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(how: Reading) -> Generator[Reading]:
    """Read pictures in this way inside; for the loader, around `dataset[index]`."""
    token = _CURRENT.set(how)
    try:
        yield how
    finally:
        _CURRENT.reset(token)


def read_image(
    path: str | Path,
    *,
    size_hint: tuple[int, int] | None = None,
    resize: int | tuple[int, int] | None = None,
    max_pixels: int = 64_000_000,
    truncated: Truncated | None = None,
    mode: Mode = "RGB",
    borrow: bool = False,
) -> Tensor:
    """A picture file as (C, H, W) uint8, turned upright as its EXIF says; the first frame of an animation.

    Alpha is dropped unless `mode` is "RGBA". 16-bit, 32-bit and float pictures are scaled to 0..255 and never cut off: 16-bit by
    1/257, floats in [0, 1] by 255, any other range by its own minimum and maximum.

    Args:
        path: of the file; its ending says nothing.
        size_hint: (height, width) that will do: a JPEG is decoded at a half, a quarter or an eighth of its size where that leaves
            twice the hint or more.
        resize: (height, width) of the result, or the length of its shorter side; bilinear, antialiased. Done here it is done
            before `data.cache`, so once.
        max_pixels: refuse a larger one, by its header.
        truncated: "fill" keeps a JPEG (not a progressive one) of which at least half of the rows are there, and paints the rest
            in their mean colour. None: what `cfg.data.truncated` says, else "skip".
        mode: "RGB", "L" (grey) or "RGBA".
        borrow: the caller writes neither to the picture nor to a view of it, so it may be memory of `data.cache`.

    Raises:
        BadFile: with the kind of damage.
    """
    now = _CURRENT.get() or Reading()
    cut = truncated or now.truncated
    name = os.fspath(path)

    def make() -> tuple[Tensor, bool]:
        try:
            found = _decoded(_content(name), resize if resize is not None else size_hint, max_pixels, cut, mode)
        except BadFile as error:
            raise BadFile(error.kind, error.message, name) from error.__cause__
        if found.note:
            now.notes.append((name, found.note))
        return found.picture if resize is None else resized(found.picture, resize), not found.note

    if now.cached is None:
        return make()[0]
    return now.cached(name, f"{size_hint} {resize} {max_pixels} {cut} {mode}", make, borrow)


def resized(picture: Tensor, size: int | tuple[int, int]) -> Tensor:
    """(C, H, W) uint8 at another size, or with its shorter side of that length; bilinear, antialiased; contiguous, and a copy."""
    h, w = picture.shape[-2:]
    if isinstance(size, int):
        size = (size, max(1, size * w // h)) if h <= w else (max(1, size * h // w), size)
    pixels: Any = pixels_resized(picture, size).numpy()
    return torch.from_numpy(pixels.copy(order="C"))  # half the time of Tensor.contiguous


def pixels_resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """`resized`, and its memory in the order of pixels, if the picture's is: no time is spent on planes."""
    if size == tuple(picture.shape[-2:]):
        return picture.clone()
    last = picture[None].contiguous(memory_format=torch.channels_last)  # three times as fast
    return torch.nn.functional.interpolate(last, size, mode="bilinear", antialias=True, align_corners=False)[0]


class _Found(NamedTuple):
    picture: Tensor
    note: str = ""


def _content(path: str) -> bytes:
    """The bytes of a regular file."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # a pipe must not block
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise BadFile("unreadable", "it is no regular file")
            if about.st_size > _MAX_BYTES:
                raise BadFile("bomb", f"the file has {about.st_size} bytes, more than {_MAX_BYTES}")
            data = file.read()
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        raise BadFile("missing" if missing else "unreadable", error.strerror or str(error)) from error
    except ValueError as error:  # a NUL in the path
        raise BadFile("missing", str(error)) from error
    if not data:
        raise BadFile("empty", "the file has no bytes")
    return data


def _decoded(data: bytes, hint: int | tuple[int, int] | None, max_pixels: int, cut: Truncated, mode: Mode) -> _Found:
    shrink = 1
    if data.startswith(JPEG):
        header = jpeg_header(data)
        check_size(header.height, header.width, max_pixels)
        if cut == "fill" and not jpeg_ends(data):
            return _filled(data, header, mode)
        shrink = _shrink(header.height, header.width, hint)
        if header.plain and shrink == 1 and mode != "RGBA" and (picture := _by_torchvision(data, mode)) is not None:
            return _Found(picture)
    elif data.startswith(PNG):
        check_png(data, max_pixels)
    return _Found(_by_pillow(data, shrink, max_pixels, mode))


def _shrink(height: int, width: int, hint: int | tuple[int, int] | None) -> int:
    """By how much libjpeg may divide the size: 1, 2, 4 or 8, whatever way the picture is turned."""
    if hint is None:
        return 1
    low, high = (hint, hint) if isinstance(hint, int) else sorted(hint)
    ratio = min(min(height, width) // max(2 * low, 1), max(height, width) // max(2 * high, 1))
    return next((n for n in (8, 4, 2) if ratio >= n), 1)


def _filled(data: bytes, header: Header, mode: Mode) -> _Found:
    """A truncated baseline JPEG: the rows that are there, and their mean colour for the rest.

    A decoder does not say where the data ended. Continued in two ways, the file gives two pictures; the rows above the first
    difference are those that were in it.
    """
    if header.progressive:
        raise BadFile("truncated", f"the progressive JPEG ends early, at byte {len(data)}; no part of it is known to be whole")
    data = data.rstrip(b"\0")
    noise = bytes((i * 73 + 41) % 251 for i in range(4096))  # has no 0xff, which would be a marker
    try:
        ways = [_opened(data + more + JPEG_END) for more in (b"", noise)]
        one, other = (_plain(way, mode) for way in ways)
    except Exception as error:  # Pillow's decoders let any class through
        raise BadFile("truncated", f"the JPEG ends early, at byte {len(data)}, and cannot be continued") from error
    differs = (one != other).any(0).any(1)
    # 16 rows are decoded together, and the colour of the last of them was mixed with what comes below.
    rows = int(differs.to(torch.int8).argmax()) // 16 * 16 - 16 if bool(differs.any()) else header.height
    if rows < _FILL_ROWS * header.height:
        raise BadFile("truncated", f"the JPEG ends early: {max(rows, 0)} of {header.height} rows are there, less than half")
    if rows < header.height:
        one[:, rows:] = one[:, :rows].float().mean((1, 2)).round().to(torch.uint8)[:, None, None]
    upright = _turned(one, _orientation(ways[0]))
    return _Found(upright, f"truncated and kept: {rows} of {header.height} rows are there, the rest has their mean colour")


def _opened(data: bytes) -> Any:
    """The file as Pillow sees it; nothing is decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFile("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        if kind := _begins_as(data):
            raise BadFile(_damage(data, kind), f"it begins as {kind}, and its header cannot be read") from error
        raise BadFile("not_an_image", f"it begins with {data[:8]!r}, which is no known picture format") from error
    except Exception as error:  # Pillow's plugins let any class through
        raise BadFile(_damage(data, _begins_as(data)), f"its header cannot be read: {error}") from error


def _begins_as(data: bytes) -> str:
    """The format that the first bytes announce; empty for none that is known."""
    first = {JPEG: "JPEG", PNG: "PNG", b"GIF8": "GIF", b"RIFF": "WEBP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
    found = next((kind for magic, kind in first.items() if data.startswith(magic)), "")
    return "AVIF" if data[4:8] == b"ftyp" else found


@cache
def _jpeg_operator() -> Any:
    """(bytes, 1 for grey or 3 for RGB, turn upright) -> picture; None without torchvision, or when it has it no more."""
    try:
        importlib.import_module("torchvision.io")  # loads the operators
        return torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None


def _by_torchvision(data: bytes, mode: Mode) -> Tensor | None:
    """An ordinary JPEG; None for one that has to be looked at by Pillow, which says what is wrong."""
    decode = _jpeg_operator()
    try:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _turned(decode(content, 1 if mode == "L" else 3, True), 1) if decode else None
    except RuntimeError:
        return None


def _by_pillow(data: bytes, shrink: int, max_pixels: int, mode: Mode) -> Tensor:
    picture = _opened(data)
    check_size(picture.height, picture.width, max_pixels)
    try:
        if shrink > 1:
            # Pillow rounds the divisor down to a power of two of its own.
            picture.draft("RGB", (picture.width // shrink, picture.height // shrink))
        picture.load()
        turn = _orientation(picture)  # not before: a PNG is loaded for it, and a second attempt at a bad one gives black
        plain = _plain(picture, mode)
    except MemoryError as error:
        raise BadFile("bomb", "it takes more memory than there is") from error
    except BadFile:
        raise
    except Exception as error:  # Pillow's decoders let any class through
        raise BadFile(_damage(data, picture.format), f"the {picture.format} cannot be decoded: {error}") from error
    return _turned(plain, turn)


def _damage(data: bytes, kind: str | None) -> str:
    """Whether a file that cannot be decoded lacks its end; for formats that say where that is."""
    if kind == "JPEG":
        return "corrupt" if jpeg_ends(data) else "truncated"
    if kind == "GIF":
        return "corrupt" if data.rstrip(b"\0").endswith(b";") else "truncated"
    if kind == "WEBP":
        return "truncated" if int.from_bytes(data[4:8], "little") + 8 > len(data) else "corrupt"
    if kind == "BMP":
        return "truncated" if int.from_bytes(data[2:6], "little") > len(data) else "corrupt"
    return "truncated" if kind in ("TIFF", "AVIF") else "corrupt"


def _plain(picture: Any, mode: Mode) -> Tensor:
    """A loaded picture in 8 bits, (C, H, W)."""
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        picture = _eight_bits(picture)
    elif picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode not in ("1", "L", "LA", "La", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        raise BadFile("unsupported_mode", f"pictures of Pillow's mode {picture.mode!r} are not known")
    if picture.mode in ("RGBa", "La"):
        picture = picture.convert("RGBA" if picture.mode == "RGBa" else "LA")
    if picture.mode != mode:
        picture = picture.convert("RGB").convert(mode) if picture.mode == "LAB" else picture.convert(mode)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, len(mode) if mode != "L" else 1).permute(2, 0, 1)


def _eight_bits(picture: Any) -> Any:
    """A picture of 16 or 32 bits or of floats, in grey of 8 bits, scaled as `read_image` says."""
    import numpy as np
    from PIL import Image

    values = np.asarray(picture).astype("float64")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadFile("corrupt", "it has NaN or infinite values")
    if picture.mode == "F":
        base, scale = (0.0, 255.0) if low >= 0 and high <= 1 else (low, 255.0 / max(high - low, 1e-30))
    else:
        base, scale = (0.0, 1 / 257) if low >= 0 and high <= 65535 else (low, 255.0 / max(high - low, 1.0))
    return Image.fromarray(((values - base) * scale).round().astype("uint8"))


def _orientation(picture: Any) -> int:
    """1 to 8, as EXIF counts; 1, which is upright, where the file says nothing that can be read."""
    try:
        found = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF is no broken picture
        return 1
    return found if found in range(1, 9) else 1


def _turned(picture: Tensor, orientation: int) -> Tensor:
    """(C, H, W) upright, memory in HWC order as decoders leave it."""
    if orientation >= 5:
        picture = picture.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    picture = picture.flip(flips) if flips else picture
    return picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)
