"""The bad samples of one phase: each listed and reported once, and an end to it when there are too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ailab.datasets.files.bad_file import Bad
from ailab.errors import DataError

_FIRST = 16  # samples that all fail the same way: a programming error, not bad data
_SHOWN = 10  # of a kind, one by one


class BadSamples:
    """What could not be read so far.

    Args:
        name: the split, for messages.
        size: samples of the dataset.
        max_bad_frac: the share of them that may be bad, rounded up to whole samples; over several ranks, of what this one has
            been asked for.
        report: called with a line about each bad sample, once; of a kind that comes often only with its count, per epoch.
        share: the part of the dataset that this rank reads in an epoch.
    """

    def __init__(self, name: str, size: int, max_bad_frac: float, report: Callable[[str], None], share: float = 1.0):
        self.name, self.size, self.report = name, size, report
        self.record: Callable[[str, Bad, bool], bool] | None = None  # (split, sample, kept) -> whether it is new
        self.found: dict[int, Bad] = {}
        self.kept: dict[int, Bad] = {}  # damaged, and good enough
        self._frac, self._share = max_bad_frac, share
        self._asked = self._failed = self._reported = 0

    @property
    def allowed(self) -> int:
        """How many samples may be bad by now."""
        return math.ceil(self._frac * min(self.size, max(self._asked, self._share * self.size)))

    def add(self, bad: Sequence[Bad], asked: int, kept: Sequence[Bad] = ()) -> None:
        """Take note of the bad ones among the next `asked` samples.

        Raises:
            DataError: more than the allowed share is bad, or all of the first samples failed in the same way.
        """
        for sample in bad:
            self._note(self.found, sample, "is bad and was replaced")
        for sample in kept:
            self._note(self.kept, sample, "is damaged and was used")
        self._asked += asked
        self._failed += min(len(bad), asked)  # what was tried beyond those as a stand-in does not count
        kinds = {sample.kind for sample in self.found.values()}
        if self._failed >= max(self._asked, min(_FIRST, self.size)) and len(kinds) == 1:
            raise self.error("every sample so far failed in the same way")
        if len(self.found) > self.allowed:
            raise self.error(f"more than {self.allowed} of {self.size} samples are bad")

    def end_epoch(self) -> None:
        """Report the counts, where there are more than at the last one."""
        if len(self.found) + len(self.kept) > self._reported:
            self._reported = len(self.found) + len(self.kept)
            used = f"; {len(self.kept)} damaged ones were used" if self.kept else ""
            self.report(f"{self.name}: {len(self.found)} of {self.size} samples were bad so far ({self._counts()}){used}.")

    def error(self, why: str) -> DataError:
        """The error that ends the run, with the counts by kind and the first ones."""
        lines = [f"{self.name}: {why}."]
        if self.found:
            first = next(iter(self.found.values()))
            lines.append(f"  Bad so far: {self._counts()}; samples {list(self.found)[:10]}.")
            lines.append(f"  First: {first.kind}: {first.message}")
            if first.kind == "wrong_shape":
                lines.append(
                    "  Samples that may differ need a collate_fn that pads them, or a transform that makes them equal."
                )
        return DataError("\n".join(lines))

    def _note(self, known: dict[int, Bad], sample: Bad, what: str) -> None:
        if sample.sample in known:
            return
        known[sample.sample] = sample
        new = self.record is None or self.record(self.name, sample, known is self.kept)
        if new and sum(s.kind == sample.kind for s in known.values()) <= _SHOWN:
            self.report(f"{self.name}: sample {sample.sample} {what}: {sample.kind}: {sample.message}")

    def _counts(self) -> str:
        kinds = [sample.kind for sample in self.found.values()]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
