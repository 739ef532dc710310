"""The bad samples of one phase: each is reported once, and too many of them are an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ailab.datasets.files.bad_file import BadSample
from ailab.errors import DataError

_FIRST = 16  # if so many first samples all fail in the same way, the code is wrong, not the data
_SHOWN = 10  # samples of one kind that are reported one by one


class BadSampleTracker:
    """Collects the bad samples of one phase.

    Args:
        name: Name of the split, for messages.
        size: Number of samples of the dataset.
        max_bad_frac: Fraction of the samples that may be bad, rounded up to whole samples. With several ranks: of the samples
            that this rank has loaded.
        report: Called with one line per bad sample, once. After 10 samples of one kind only their number is reported, after each
            epoch.
        share: Fraction of the dataset that this rank loads in one epoch.
    """

    def __init__(self, name: str, size: int, max_bad_frac: float, report: Callable[[str], None], share: float = 1.0):
        self.name, self.size, self.report = name, size, report
        self.record: Callable[[str, BadSample, bool], bool] | None = None  # (split, sample, kept) -> whether it is new
        self.found: dict[int, BadSample] = {}
        self.damaged: dict[int, BadSample] = {}  # damaged but used
        self._frac, self._share = max_bad_frac, share
        self._asked = self._failed = self._reported = 0

    @property
    def allowed(self) -> int:
        """Number of samples that may be bad up to now."""
        return math.ceil(self._frac * min(self.size, max(self._asked, self._share * self.size)))

    def add(self, bad: Sequence[BadSample], asked: int, damaged: Sequence[BadSample] = ()) -> None:
        """Add the bad samples of one batch.

        Args:
            bad: Samples that were replaced.
            asked: Number of samples of the batch.
            damaged: Samples that are damaged but were used.

        Raises:
            DataError: Too many samples are bad, or all of the first samples failed in the same way.
        """
        for sample in bad:
            self._note(self.found, sample, "is bad and was replaced")
        for sample in damaged:
            self._note(self.damaged, sample, "is damaged and was used")
        self._asked += asked
        self._failed += min(len(bad), asked)  # samples that were tried as a replacement do not count
        kinds = {sample.kind for sample in self.found.values()}
        if self._failed >= max(self._asked, min(_FIRST, self.size)) and len(kinds) == 1:
            raise self.error("every sample so far failed in the same way")
        if len(self.found) > self.allowed:
            raise self.error(f"more than {self.allowed} of {self.size} samples are bad")

    def end_epoch(self) -> None:
        """Report the numbers of bad samples, if they have grown since the last epoch."""
        if len(self.found) + len(self.damaged) > self._reported:
            self._reported = len(self.found) + len(self.damaged)
            used = f"; {len(self.damaged)} damaged ones were used" if self.damaged else ""
            self.report(f"{self.name}: {len(self.found)} of {self.size} samples were bad so far ({self._counts()}){used}.")

    def error(self, why: str) -> DataError:
        """The error that ends the run, with the numbers per kind and the first bad samples."""
        lines = [f"{self.name}: {why}."]
        if self.found:
            first = next(iter(self.found.values()))
            lines.append(f"  Bad so far: {self._counts()}; samples {list(self.found)[:10]}.")
            lines.append(f"  First: {first.kind}: {first.message}")
            if first.kind == "wrong_shape":
                lines.append("  For samples of different sizes set a collate_fn that pads them, or a transform to one size.")
        return DataError("\n".join(lines))

    def _note(self, known: dict[int, BadSample], sample: BadSample, what: str) -> None:
        if sample.sample in known:
            return
        known[sample.sample] = sample
        new = self.record is None or self.record(self.name, sample, known is self.damaged)
        if new and sum(s.kind == sample.kind for s in known.values()) <= _SHOWN:
            self.report(f"{self.name}: sample {sample.sample} {what}: {sample.kind}: {sample.message}")

    def _counts(self) -> str:
        kinds = [sample.kind for sample in self.found.values()]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"
