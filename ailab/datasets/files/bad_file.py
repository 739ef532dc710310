"""A sample that could not be read, and why."""

from __future__ import annotations

from typing import NamedTuple

from ailab.errors import DataError

KINDS = ("missing", "unreadable", "empty", "not_an_image", "truncated", "corrupt", "bomb", "unsupported_mode")  # of a BadFile


class BadFile(DataError):
    """A file that gives no picture.

    Args:
        kind: one of `KINDS`.
        message: what is wrong with it, without the path.
        path: of the file.
    """

    def __init__(self, kind: str, message: str, path: str = ""):
        assert kind in KINDS
        super().__init__(kind, message, path)
        self.kind, self.message, self.path = kind, message, path

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class Bad(NamedTuple):
    """A sample that could not be read."""

    sample: int  # its index
    kind: str  # of a `BadFile`, "wrong_type", "wrong_shape" or "not_a_number"; else the class of the exception
    message: str
    path: str = ""  # of the file, where the exception says which
