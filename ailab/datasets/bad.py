"""The bad samples of one phase: each listed and reported once, and an end to it when there are too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ailab.errors import DataError

_FIRST = 16  # samples that all fail the same way: a programming error, not bad data


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
    kind: str  # class of the exception
    message: str


class BadSamples:
    """What could not be read so far.

    Args:
        name: the split, for messages.
        size: samples of the dataset.
        max_bad_frac: the share of them that may be bad, rounded up to whole samples.
        report: called with one line about each bad sample, once.
    """

    def __init__(self, name: str, size: int, max_bad_frac: float, report: Callable[[str], None]):
        self.name, self.size, self.report = name, size, report
        self.allowed = math.ceil(max_bad_frac * size)
        self.found: dict[int, Bad] = {}
        self._asked = self._failed = 0

    def add(self, bad: Sequence[Bad], asked: int) -> None:
        """Take note of the bad ones among the next `asked` samples.

        Raises:
            DataError: more than the allowed share is bad, or all of the first samples failed in the same way.
        """
        for sample in bad:
            if sample.sample not in self.found:
                self.found[sample.sample] = sample
                self.report(f"{self.name}: sample {sample.sample} is bad and was replaced: {sample.kind}: {sample.message}")
        self._asked += asked
        self._failed += min(len(bad), asked)  # what was tried beyond those as a stand-in does not count
        kinds = {sample.kind for sample in self.found.values()}
        if self._failed >= max(self._asked, min(_FIRST, self.size)) and len(kinds) == 1:
            raise self.error("every sample so far failed in the same way")
        if len(self.found) > self.allowed:
            raise self.error(f"more than {self.allowed} of {self.size} samples are bad")

    def error(self, why: str) -> DataError:
        """The error that ends the run, with the counts by kind and the first ones."""
        kinds = [sample.kind for sample in self.found.values()]
        lines = [f"{self.name}: {why}."]
        if kinds:
            counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
            first = next(iter(self.found.values()))
            lines.append(f"  Bad so far: {counts}; samples {list(self.found)[:10]}.")
            lines.append(f"  First: {first.kind}: {first.message}")
        return DataError("\n".join(lines))
