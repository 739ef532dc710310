"""The headers of JPEG and PNG files, read and checked before anything is decoded."""

from __future__ import annotations

import struct
import zlib
from typing import Any, NamedTuple

from ailab.datasets.files.bad_file import BadFile

PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of the file
JPEG = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Check the number of pixels that a header announces.

    Raises:
        BadFile: "bomb" for more than `max_pixels`, "corrupt" for 0.
    """
    if height * width > max_pixels:
        raise BadFile("bomb", f"the header says {width}x{height} pixels, more than {max_pixels}")
    if not height * width:
        raise BadFile("corrupt", f"the header says {width}x{height} pixels")


class Header(NamedTuple):
    """The frame header of a JPEG."""

    height: int
    width: int
    progressive: bool
    plain: bool  # 8 bits of grey or of three colours, Huffman coded


def jpeg_header(data: bytes) -> Header:
    """Read the frame header of a JPEG.

    Raises:
        BadFile: "corrupt" or "truncated", if there is no frame header.
    """
    at = 2
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            raise BadFile("corrupt", f"there is no JPEG marker at byte {at}")
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
        elif marker in (0x01, *range(0xD0, 0xD9)):
            at += 2
        elif marker in (0xD9, 0xDA):
            raise BadFile("corrupt", "the JPEG has no frame header")
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, parts = struct.unpack_from(">BHHB", data, at + 4)
            plain = bits == 8 and parts in (1, 3) and marker in (0xC0, 0xC1, 0xC2)
            return Header(height, width, marker not in (0xC0, 0xC1), plain)
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise BadFile("truncated", f"the JPEG ends inside its header, at byte {len(data)}")


def jpeg_ends(data: bytes) -> bool:
    """Whether a JPEG has its end marker. Some writers put more data behind it."""
    return data.rfind(JPEG_END) > data.rfind(b"\xff\xda")


def check_png(data: bytes, max_pixels: int) -> None:
    """Check a PNG: its size, the checksums of its chunks, its end, and that no row is missing.

    Pillow does not check the checksums of the pixel data. In small files it fills missing rows with black without an error.

    Raises:
        BadFile: "bomb", "truncated" or "corrupt".
    """
    at, last = len(PNG), b""
    stream, rest = zlib.decompressobj(), 0  # bytes that the rows still lack
    while last != b"IEND":
        length, last = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (len(data), b"")
        end = at + 12 + length
        if end > len(data):
            raise BadFile("truncated", f"the PNG ends early, at byte {len(data)}")
        if last[0] & 0x20 == 0 and zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise BadFile("corrupt", f"the PNG chunk {last!r} at byte {at} has a wrong checksum")
        if at == len(PNG):
            rest = _png_header(last, data[at + 8 : end - 4], max_pixels)
        elif last == b"IDAT":
            rest -= _inflated(stream, data[at + 8 : end - 4])
        at = end
    if rest > 0:
        raise BadFile("corrupt", f"{rest} bytes of the rows of the PNG are missing")


def _png_header(name: bytes, content: bytes, max_pixels: int) -> int:
    """The number of bytes of all rows, each with one byte for its filter."""
    parts = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
    if name != b"IHDR" or len(content) != 13 or content[9] not in parts:
        raise BadFile("corrupt", "the PNG does not begin with its header")
    width, height, depth, colour, *_, interlace = struct.unpack(">IIBBBBB", content)
    check_size(height, width, max_pixels)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # of Adam7
    total = 0
    for top, left, down, right in passes if interlace else [(0, 0, 1, 1)]:
        rows, columns = -((top - height) // down), -((left - width) // right)
        total += rows * (1 + (columns * depth * parts[colour] + 7) // 8) if rows > 0 and columns > 0 else 0
    return total


def _inflated(stream: Any, content: bytes) -> int:
    """The number of bytes that a part of a zlib stream decompresses to. The bytes are not kept."""
    total = 0
    try:
        while content:
            total += len(stream.decompress(content, 1 << 20))
            content = stream.unconsumed_tail
    except zlib.error as error:
        raise BadFile("corrupt", f"the rows of the PNG cannot be decompressed: {error}") from error
    return total
