"""A file or a sample that could not be read, and the reason."""

from __future__ import annotations

from typing import NamedTuple

from ailab.errors import DataError

KINDS = (
    *("missing", "unreadable", "empty", "not_an_image", "not_an_array", "truncated", "corrupt", "bomb", "unsupported_mode"),
)  # of a BadFile


class BadFile(DataError):
    """A file that cannot be decoded.

    Args:
        kind: The kind of damage, one of `KINDS`.
        message: What is wrong with the file, without its path.
        path: Path of the file.
    """

    def __init__(self, kind: str, message: str, path: str = ""):
        assert kind in KINDS
        super().__init__(kind, message, path)
        self.kind, self.message, self.path = kind, message, path

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class BadSample(NamedTuple):
    """A sample that could not be read."""

    sample: int  # index in the dataset
    kind: str  # kind of a `BadFile`, "wrong_type", "wrong_shape", "not_a_number", or the class of the exception
    message: str
    path: str = ""  # of the file; empty if the exception does not say it
