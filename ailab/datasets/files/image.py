"""Decoding of image files to uint8 tensors.

The format is detected from the content. The size is checked before anything is decoded. Damage always raises `BadFile`.

Pillow decodes, without its formats that start other programs. Ordinary JPEGs are decoded by torchvision's operator if it is
installed. It uses the same libjpeg-turbo and gives the same pixels in three quarters of the time. Three parts of torchvision
are not used. Its PNG decoder ends the process on a bad checksum (0.29). Its Python functions are deprecated. Its nvJPEG decoder
writes into memory that kernels on the caller's stream still read (pytorch/vision#9606, closed without a fix), fails for a whole
batch when one file is damaged, and gives other pixels.
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
_MAX_BYTES = 1 << 29  # size of a file
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
_FILL_ROWS = 0.5  # share of the rows that a truncated image needs to be used
_ORIENTATION = 0x0112  # EXIF tag


@dataclass
class ImageSettings:
    """The defaults of `read_image` inside `image_settings`, and the notes about damaged images that were used."""

    truncated: Truncated = "skip"
    # `Cache.__call__`: (path, variant, decode, borrow) -> image
    cache: Callable[[str, str, Callable[[], tuple[Tensor, bool]], bool], Tensor] | None = None
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (path, note) of damaged images that were used


_CURRENT_SETTINGS: ContextVar[ImageSettings | None] = ContextVar("image_settings", default=None)


@contextmanager
def image_settings(settings: ImageSettings) -> Generator[ImageSettings]:
    """Use these settings for every `read_image` inside the block. The data loader wraps `dataset[index]` in it."""
    token = _CURRENT_SETTINGS.set(settings)
    try:
        yield settings
    finally:
        _CURRENT_SETTINGS.reset(token)


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
    """Read an image file: (C, H, W) uint8, rotated as its EXIF orientation says. An animation gives its first frame.

    Alpha is dropped unless `mode` is "RGBA". 16-bit, 32-bit and float images are scaled to 0..255. The factor is 1/257 for 16-bit
    images and 255 for floats in [0, 1]. Any other range is scaled by its own minimum and maximum.

    Args:
        path: Path of the file. The format is detected from the content, not from the extension.
        size_hint: (H, W) in pixels that is enough. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the result is still at
            least twice this size.
        resize: (H, W) of the result in pixels, or the length of its shorter side; bilinear, antialiased. The cache stores the
            resized image.
        max_pixels: The largest number of pixels. A larger image is refused before it is decoded.
        truncated: What to do with a truncated JPEG. "skip" raises. "fill" uses a baseline (not progressive) JPEG that has at
            least half of its rows, and fills the missing rows with their mean colour. None: `cfg.data.truncated` in a run,
            otherwise "skip".
        mode: "RGB", "L" (grey) or "RGBA".
        borrow: Whether the result may be memory of `data.cache`, which saves a copy. The caller must not write to the image or
            to a view of it.

    Raises:
        BadFile: The file cannot be decoded; `kind` is the kind of damage.
    """
    now = _CURRENT_SETTINGS.get() or ImageSettings()
    cut = truncated or now.truncated
    name = os.fspath(path)

    def make() -> tuple[Tensor, bool]:
        try:
            found = _decoded(_content(name), resize if resize is not None else size_hint, max_pixels, cut, mode)
        except BadFile as error:
            raise BadFile(error.kind, error.message, name) from error.__cause__
        if found.note:
            now.notes.append((name, found.note))
        return found.image if resize is None else resized(found.image, resize), not found.note

    if now.cache is None:
        return make()[0]
    return now.cache(name, f"{size_hint} {resize} {max_pixels} {cut} {mode}", make, borrow)


def resized(image: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize an image (C, H, W) uint8: bilinear, antialiased. The result is a contiguous copy.

    Args:
        image: (C, H, W) uint8.
        size: (H, W) of the result in pixels, or the length of its shorter side.
    """
    h, w = image.shape[-2:]
    if isinstance(size, int):
        size = (size, max(1, size * w // h)) if h <= w else (max(1, size * h // w), size)
    pixels: Any = pixels_resized(image, size).numpy()
    return torch.from_numpy(pixels.copy(order="C"))  # half the time of Tensor.contiguous


def pixels_resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """As `resized` for (H, W), but the result keeps the memory order of `image`, which saves the time to convert HWC to CHW."""
    if size == tuple(image.shape[-2:]):
        return image.clone()
    last = image[None].contiguous(memory_format=torch.channels_last)  # three times as fast
    return torch.nn.functional.interpolate(last, size, mode="bilinear", antialias=True, align_corners=False)[0]


class _Decoded(NamedTuple):
    image: Tensor
    note: str = ""


def _content(path: str) -> bytes:
    """The bytes of a regular file. Raises `BadFile` if it cannot be read."""
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


def _decoded(data: bytes, hint: int | tuple[int, int] | None, max_pixels: int, cut: Truncated, mode: Mode) -> _Decoded:
    shrink = 1
    if data.startswith(JPEG):
        header = jpeg_header(data)
        check_size(header.height, header.width, max_pixels)
        if cut == "fill" and not jpeg_ends(data):
            return _fill_missing_rows(data, header, mode)
        shrink = _shrink(header.height, header.width, hint)
        if header.plain and shrink == 1 and mode != "RGBA" and (image := _by_torchvision(data, mode)) is not None:
            return _Decoded(image)
    elif data.startswith(PNG):
        check_png(data, max_pixels)
    return _Decoded(_by_pillow(data, shrink, max_pixels, mode))


def _shrink(height: int, width: int, hint: int | tuple[int, int] | None) -> int:
    """The factor by which libjpeg may divide the size: 1, 2, 4 or 8. It is safe for both orientations of the image."""
    if hint is None:
        return 1
    low, high = (hint, hint) if isinstance(hint, int) else sorted(hint)
    ratio = min(min(height, width) // max(2 * low, 1), max(height, width) // max(2 * high, 1))
    return next((n for n in (8, 4, 2) if ratio >= n), 1)


def _fill_missing_rows(data: bytes, header: Header, mode: Mode) -> _Decoded:
    """Decode a truncated baseline JPEG. The missing rows get the mean colour of the others.

    A decoder does not say where the data ended. So the file is completed in two ways and decoded twice. The rows above the first
    difference were in the file.
    """
    if header.progressive:
        raise BadFile("truncated", f"the progressive JPEG ends early, at byte {len(data)}; no part of it is known to be whole")
    data = data.rstrip(b"\0")
    noise = bytes((i * 73 + 41) % 251 for i in range(4096))  # has no 0xff, which would be a marker
    try:
        ways = [_open(data + more + JPEG_END) for more in (b"", noise)]
        one, other = (_eight_bit_tensor(way, mode) for way in ways)
    except Exception as error:  # Pillow's decoders let any class through
        raise BadFile("truncated", f"the JPEG ends early, at byte {len(data)}, and cannot be continued") from error
    differs = (one != other).any(0).any(1)
    # 16 rows are decoded together, and the colour of the last of them was mixed with what comes below.
    rows = int(differs.to(torch.int8).argmax()) // 16 * 16 - 16 if bool(differs.any()) else header.height
    if rows < _FILL_ROWS * header.height:
        raise BadFile("truncated", f"the JPEG ends early: {max(rows, 0)} of {header.height} rows are there, less than half")
    if rows < header.height:
        one[:, rows:] = one[:, :rows].float().mean((1, 2)).round().to(torch.uint8)[:, None, None]
    upright = _upright(one, _orientation(ways[0]))
    return _Decoded(upright, f"truncated and kept: {rows} of {header.height} rows are there, the rest has their mean colour")


def _open(data: bytes) -> Any:
    """Open the file with Pillow. Nothing is decoded yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadFile("bomb", str(error)) from error
    except UnidentifiedImageError as error:
        if kind := _format_of(data):
            raise BadFile(_damage_kind(data, kind), f"it begins as {kind}, and its header cannot be read") from error
        raise BadFile("not_an_image", f"it begins with {data[:8]!r}, which is no known image format") from error
    except Exception as error:  # Pillow's plugins let any class through
        raise BadFile(_damage_kind(data, _format_of(data)), f"its header cannot be read: {error}") from error


def _format_of(data: bytes) -> str:
    """The format by the first bytes; empty if unknown."""
    first = {JPEG: "JPEG", PNG: "PNG", b"GIF8": "GIF", b"RIFF": "WEBP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP"}
    found = next((kind for magic, kind in first.items() if data.startswith(magic)), "")
    return "AVIF" if data[4:8] == b"ftyp" else found


@cache
def _jpeg_operator() -> Any:
    """torchvision's (bytes, 1 for grey or 3 for RGB, apply EXIF orientation) -> image; None if it is not available."""
    try:
        importlib.import_module("torchvision.io")  # loads the operators
        return torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None


def _by_torchvision(data: bytes, mode: Mode) -> Tensor | None:
    """Decode an ordinary JPEG; None if that fails. Pillow then decodes it or gives the error."""
    decode = _jpeg_operator()
    try:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return _upright(decode(content, 1 if mode == "L" else 3, True), 1) if decode else None
    except RuntimeError:
        return None


def _by_pillow(data: bytes, shrink: int, max_pixels: int, mode: Mode) -> Tensor:
    image = _open(data)
    check_size(image.height, image.width, max_pixels)
    try:
        if shrink > 1:
            # Pillow rounds the divisor down to a power of two of its own.
            image.draft("RGB", (image.width // shrink, image.height // shrink))
        image.load()
        turn = _orientation(image)  # after load: it loads a PNG, and a second load of a damaged PNG gives black
        plain = _eight_bit_tensor(image, mode)
    except MemoryError as error:
        raise BadFile("bomb", "there is not enough memory to decode it") from error
    except BadFile:
        raise
    except Exception as error:  # Pillow's decoders let any class through
        raise BadFile(_damage_kind(data, image.format), f"the {image.format} cannot be decoded: {error}") from error
    return _upright(plain, turn)


def _damage_kind(data: bytes, kind: str | None) -> str:
    """The kind of damage of a file that cannot be decoded: "truncated" if its end is missing, otherwise "corrupt"."""
    if kind == "JPEG":
        return "corrupt" if jpeg_ends(data) else "truncated"
    if kind == "GIF":
        return "corrupt" if data.rstrip(b"\0").endswith(b";") else "truncated"
    if kind == "WEBP":
        return "truncated" if int.from_bytes(data[4:8], "little") + 8 > len(data) else "corrupt"
    if kind == "BMP":
        return "truncated" if int.from_bytes(data[2:6], "little") > len(data) else "corrupt"
    return "truncated" if kind in ("TIFF", "AVIF") else "corrupt"


def _eight_bit_tensor(image: Any, mode: Mode) -> Tensor:
    """A loaded Pillow image as (C, H, W) uint8."""
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        image = _eight_bits(image)
    elif image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("1", "L", "LA", "La", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        raise BadFile("unsupported_mode", f"images of Pillow's mode {image.mode!r} are not supported")
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode != mode:
        image = image.convert("RGB").convert(mode) if image.mode == "LAB" else image.convert(mode)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, len(mode) if mode != "L" else 1).permute(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """Convert a 16-bit, 32-bit or float image to 8-bit grey, scaled as `read_image` says."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype("float64")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise BadFile("corrupt", "it has NaN or infinite values")
    if image.mode == "F":
        base, scale = (0.0, 255.0) if low >= 0 and high <= 1 else (low, 255.0 / max(high - low, 1e-30))
    else:
        base, scale = (0.0, 1 / 257) if low >= 0 and high <= 65535 else (low, 255.0 / max(high - low, 1.0))
    return Image.fromarray(((values - base) * scale).round().astype("uint8"))


def _orientation(image: Any) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) if it is missing or cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the image bad
        return 1
    return found if found in range(1, 9) else 1


def _upright(image: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation. (C, H, W), with HWC memory order as decoders give it."""
    if orientation >= 5:
        image = image.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation, [])
    image = image.flip(flips) if flips else image
    return image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
