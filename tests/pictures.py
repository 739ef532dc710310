"""Picture files for tests: good ones, and damaged ones of 24 kinds."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def photo(seed: int, size: tuple[int, int] = (60, 80), grain: float = 6.0) -> np.ndarray:
    """Something like a photograph, (H, W, 3) uint8: smooth shapes of all sizes, and grain."""
    rng = np.random.default_rng(seed)
    h, w = size
    total = np.zeros((h, w, 3))
    for cells in (3, 6, 12, 25, 50, 100):
        coarse = rng.normal(size=(cells, cells, 3)).astype("float32")
        planes = [np.asarray(Image.fromarray(coarse[..., c]).resize((w, h), Image.Resampling.BICUBIC)) for c in range(3)]
        total += np.stack(planes, -1) / cells**0.7
    total = (total - total.min()) / np.ptp(total) * 235 + 10 + rng.normal(size=total.shape) * grain
    return total.clip(0, 255).astype("uint8")


def encoded(pixels: np.ndarray, kind: str, **settings: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **settings)
    return out.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, content: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG whose checksums are right, whatever is in it."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@cache
def png_bomb(width: int, height: int) -> bytes:
    """A small file of very many black pixels."""
    squeeze = zlib.compressobj(9)
    rows = b"".join(squeeze.compress(bytes((width + 7) // 8 + 1)) for _ in range(height))
    return png(width, height, rows + squeeze.flush(), bits=1, colour=0)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


def _sized(data: bytes, height: int, width: int) -> bytes:
    """A JPEG that claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def _half(kind: str, **settings: Any) -> Callable[[np.ndarray], bytes]:
    def cut(pixels: np.ndarray) -> bytes:
        data = encoded(pixels, kind, **settings)
        return data[: len(data) * 6 // 10]

    return cut


# name -> (what makes the bytes, the kind that has to be reported)
DAMAGED: dict[str, tuple[Callable[[np.ndarray], bytes], str]] = {
    "empty": (lambda p: b"", "empty"),
    "text": (lambda p: b"404 not found", "not_an_image"),
    "html": (lambda p: b"<!DOCTYPE html><html></html>", "not_an_image"),
    "zeros": (lambda p: bytes(2000), "not_an_image"),
    "random": (lambda p: b"\x00" + bytes(p.ravel()[:2000]), "not_an_image"),
    "postscript": (lambda p: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    "jpeg_cut": (_half("JPEG", quality=90), "truncated"),
    "jpeg_progressive_cut": (_half("JPEG", quality=90, progressive=True), "truncated"),
    "jpeg_header_cut": (lambda p: encoded(p, "JPEG")[:100], "truncated"),
    "jpeg_second_half_zeros": (lambda p: (d := encoded(p, "JPEG"))[: len(d) // 2] + bytes(len(d) // 2), "truncated"),
    "jpeg_no_frame": (lambda p: (d := encoded(p, "JPEG"))[:20] + d[d.index(b"\xff\xda") :], "corrupt"),
    "jpeg_no_size": (lambda p: _sized(encoded(p, "JPEG"), 0, 0), "corrupt"),
    "jpeg_bomb": (lambda p: _sized(encoded(p, "JPEG"), 65500, 65500), "bomb"),
    "png_cut": (_half("PNG"), "truncated"),
    "png_header_cut": (lambda p: encoded(p, "PNG")[:20], "truncated"),
    "png_checksum": (lambda p: _flipped(encoded(p, "PNG"), encoded(p, "PNG").index(b"IEND") - 6), "corrupt"),
    "png_pixel_bit": (lambda p: _flipped(encoded(p, "PNG"), 400), "corrupt"),
    "png_stream": (lambda p: png(80, 60, b"garbage" * 99), "corrupt"),
    "png_few_rows": (lambda p: png(80, 60, zlib.compress(bytes(30 * 241))), "corrupt"),
    "png_bomb": (lambda p: png_bomb(10_000, 10_000), "bomb"),
    "png_large_bomb": (lambda p: png_bomb(20_000, 10_000), "bomb"),
    "gif_cut": (_half("GIF"), "truncated"),
    "webp_cut": (_half("WEBP"), "truncated"),
    "bmp_cut": (_half("BMP"), "truncated"),
    "tiff_cut": (_half("TIFF"), "truncated"),
}
LINKS = {"missing": "missing", "folder": "unreadable", "pipe": "unreadable", "dangling": "missing", "loop": "missing"}


def damage(path: Path, name: str, seed: int = 0) -> str:
    """Make a damaged file of one kind, or what stands in the place of one, at `path`; the kind that has to be reported."""
    if name in DAMAGED:
        make, kind = DAMAGED[name]
        path.write_bytes(make(photo(seed)))
        return kind
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif name == "loop":
        path.symlink_to(path)
    return LINKS[name]
