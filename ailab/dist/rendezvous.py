"""The rendezvous of a launch: short texts that ranks exchange through the launcher's store; no process group is needed."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ailab import errors
from ailab.errors import AilabError, PeerError

_POLL_S = 0.02
_SLICE = timedelta(seconds=1)  # a wait is cut in slices, so that a signal is handled in between


class Rendezvous:
    """Messages between ranks before, during and after the life of the process group.

    Args:
        store: of torch.distributed; it may hold what earlier attempts of the launcher left there.
        rank: this process's number.
        world_size: how many there are.
        limit: seconds to wait for another rank.

    Raises:
        PeerError: when a rank does not come.
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float):
        self.store, self.rank, self.world_size, self.limit = store, rank, world_size, limit
        self._stage = self._group = 0
        self.attempt = self._invited() if rank else self._inviting()

    # All ranks find one number for this attempt. The launcher's count of restarts will not do: each node has its own. So every
    # rank shows a word that was never used, and rank 0 answers to words, not to ranks.

    def _invited(self) -> str:
        word = uuid.uuid4().hex
        self.store.set(f"word/{self.rank}", word)
        attempt = self._read(f"invited/{word}", "rank 0")
        self.store.set(f"{attempt}/here/{self.rank}", "1")
        return attempt

    def _inviting(self) -> str:
        attempt = f"attempt{self.store.add('attempts', 1)}"
        missing, known, until = list(range(1, self.world_size)), dict[int, str](), time.monotonic() + self.limit
        while missing:
            for rank in missing:
                word = self.store.get(f"word/{rank}").decode() if self.store.check([f"word/{rank}"]) else None
                if word is not None and word != known.get(rank):
                    known[rank] = word
                    self.store.set(f"invited/{word}", attempt)
            missing = [r for r in missing if not self.store.check([f"{attempt}/here/{r}"])]
            if missing and time.monotonic() >= until:
                raise self._absent(_ranks(missing))
            time.sleep(_POLL_S if missing else 0)
        return attempt

    def compare(self, fingerprint: Mapping[str, str], problem: Exception | None = None) -> None:
        """Meet all ranks; every one of them must ask. Goes on where all have the same fingerprint and none has a problem.

        Raises:
            AilabError: the same one on every rank. Its class is that of the problem. It is a `PeerError` where fingerprints differ
                or a rank did not come.
        """
        self._stage += 1
        place = f"{self.attempt}/stage{self._stage}"
        kind = type(problem).__name__ if isinstance(problem, AilabError) else "PeerError"
        text = "" if problem is None else str(problem) if isinstance(problem, AilabError) else _named(problem)
        mine = {"fingerprint": dict(fingerprint)} if problem is None else {"kind": kind, "text": text}
        self.store.set(f"{place}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            reports = [json.loads(self._read(f"{place}/{r}", f"rank {r}")) for r in range(self.world_size)]
            self.store.set(f"{place}/verdict", json.dumps(common_error(reports)))
        kind, text = json.loads(self._read(f"{place}/verdict", "rank 0"))
        if kind:
            error: AilabError = getattr(errors, kind)(text)
            error.on_all_ranks = True
            raise error from problem

    def _read(self, key: str, who: str) -> str:
        until = time.monotonic() + self.limit
        while True:
            try:
                self.store.wait([key], _SLICE)
                return self.store.get(key).decode()
            except RuntimeError as e:
                if time.monotonic() >= until or self._lost():
                    raise self._absent(who) from e

    def _absent(self, who: str) -> PeerError:
        return PeerError(
            f"rank {self.rank}: {who} of {self.world_size} did not come within {self.limit:g} s, or ended.\n"
            "  Look at what it printed; under SLURM start every rank with srun."
        )

    def next_group(self) -> int:
        """A number for each process group of this attempt, the same on every rank."""
        self._group += 1
        return self._group

    def _lost(self) -> bool:
        """Whether the store itself is gone."""
        try:
            self.store.check(["any"])
        except RuntimeError:
            return True
        return False

    def report_failure(self, problem: BaseException) -> None:
        """Leave what ended this rank, for those that will see no more than a broken connection."""
        self._first(f"{self.attempt}/failed", json.dumps([self.rank, socket.gethostname(), _named(problem)]))

    def first_failure(self) -> str | None:
        """What ended the first rank that ended by itself, if it was another one: all of it, if that was on another machine."""
        try:
            if not self.store.check([f"{self.attempt}/failed"]):
                return None
            rank, host, text = json.loads(self.store.get(f"{self.attempt}/failed").decode())
        except RuntimeError:
            return None
        if rank == self.rank:
            return None
        return f"rank {rank} failed first; " + (
            "its message is here too." if host == socket.gethostname() else f"{host}: {text}"
        )

    def is_first_to_report(self, text: str, *, ever: bool) -> bool:
        """Whether no other rank reported the same in this attempt of the launcher, or `ever`."""
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._first(f"reported/{key}" if ever else f"{self.attempt}/reported/{key}", str(self.rank))

    def set_flag(self, name: str) -> None:
        """Leave a mark that outlives the launcher's restarts."""
        self._first(f"note/{name}", "1")

    def has_flag(self, name: str) -> bool:
        """Whether a mark was left, before this restart or after."""
        try:
            return bool(self.store.check([f"note/{name}"]))
        except RuntimeError:
            return False

    def _first(self, key: str, value: str) -> bool:
        try:
            first = int(self.store.add(f"{key}/count", 1)) == 1
            if first:
                self.store.set(key, value)
            return first
        except RuntimeError:  # the store is gone, and so is rank 0 if it kept it
            return self.rank <= 1


def common_error(reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The kind and text of the error that all ranks raise, ("", "") for none, from the report of each."""
    failed = {rank: (str(t["kind"]), str(t["text"])) for rank, t in enumerate(reports) if "kind" in t}
    if failed:
        kind, text = next(iter(failed.values()))
        same = [r for r, what in failed.items() if what == (kind, text)]
        return kind, text if len(same) == len(reports) else f"on {_ranks(same)} of {len(reports)}: {text}"
    lines: list[str] = []
    for name in dict.fromkeys(n for t in reports for n in t["fingerprint"]):
        values = [t["fingerprint"].get(name, "missing") for t in reports]
        usual = max(dict.fromkeys(values), key=values.count)  # the first of those that are as frequent
        lines += [
            f"{name}: {value} on {_ranks([r for r, v in enumerate(values) if v == value])}, {usual} on the others"
            for value in dict.fromkeys(values)
            if value != usual
        ]
    if not lines:
        return "", ""
    more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
    return "PeerError", "\n  ".join(["the ranks do not run the same:", *lines[:8], *more])


def _ranks(some: Sequence[int]) -> str:
    shown = ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")
    return f"rank {shown}" if len(some) == 1 else f"ranks {shown}"


def _named(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"
