"""The rendezvous of a launch: ranks exchange short texts through the launcher's store. No process group is needed."""

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
_LET_READ_S = 10.0  # a rank that has sent its report reads the answer at once, unless it has ended
_WAIT = timedelta(seconds=1)  # a long wait is cut into short ones, because a signal is handled only in between


class Rendezvous:
    """Messages between ranks before, during and after the life of the process group.

    Every rank must create one; the constructor returns when all ranks have joined.

    Args:
        store: a store of torch.distributed. It may hold keys of earlier attempts of the launcher.
        rank: the number of this process, 0 .. world_size - 1.
        world_size: the number of processes.
        timeout_s: seconds to wait for another rank.

    Raises:
        PeerError: a rank does not join in time.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float):
        self.store, self.rank, self.world_size, self.timeout_s = store, rank, world_size, timeout_s
        self._comparisons = self._groups = 0
        self.attempt = self._join_attempt() if rank else self._open_attempt()

    # All ranks must use the same key prefix for this attempt. The launcher's restart count does not serve: each node has its
    # own. So every rank writes a new random token, and rank 0 answers each token with the prefix. A token of a rank that has
    # ended may get an answer too; nobody reads it.

    def _join_attempt(self) -> str:
        token = uuid.uuid4().hex
        self.store.set(f"token/{self.rank}", token)
        attempt = self._read(f"attempt/{token}", "rank 0")
        self.store.set(f"{attempt}/joined/{self.rank}", "1")
        return attempt

    def _open_attempt(self) -> str:
        attempt = f"attempt{self.store.add('attempts', 1)}"
        missing, known, until = list(range(1, self.world_size)), dict[int, str](), time.monotonic() + self.timeout_s
        while missing:
            for rank in missing:
                token = self.store.get(f"token/{rank}").decode() if self.store.check([f"token/{rank}"]) else None
                if token is not None and token != known.get(rank):
                    known[rank] = token
                    self.store.set(f"attempt/{token}", attempt)
            missing = [r for r in missing if not self.store.check([f"{attempt}/joined/{r}"])]
            if missing and time.monotonic() >= until:
                raise self._timeout_error(_ranks(missing))
            time.sleep(_POLL_S if missing else 0)
        return attempt

    def compare(self, fingerprint: Mapping[str, str], problem: Exception | None = None) -> None:
        """Wait for all ranks, and check that all have the same fingerprint and none has a problem. Every rank must call it.

        Args:
            fingerprint: {name: short text}, what must be the same on every rank.
            problem: the error that this rank has met, if any. Its fingerprint is then ignored.

        Raises:
            AilabError: the same on every rank. It has the class of the first problem, and names the ranks that have it.
            PeerError: the fingerprints differ, a problem is no `AilabError`, or a rank does not come in time.
        """
        self._comparisons += 1
        prefix = f"{self.attempt}/comparison{self._comparisons}"
        kind = type(problem).__name__ if isinstance(problem, AilabError) else "PeerError"
        text = "" if problem is None else str(problem) if isinstance(problem, AilabError) else _one_line(problem)
        report = {"fingerprint": dict(fingerprint)} if problem is None else {"kind": kind, "text": text}
        self.store.set(f"{prefix}/{self.rank}", json.dumps(report))
        if self.rank == 0:
            reports = [json.loads(self._read(f"{prefix}/{r}", f"rank {r}")) for r in range(self.world_size)]
            self.store.set(f"{prefix}/error", json.dumps(common_error(reports)))
        kind, text = json.loads(self._read(f"{prefix}/error", "rank 0"))
        if kind:
            self._let_all_read(prefix)
            error: AilabError = getattr(errors, kind)(text)
            error.on_all_ranks = True
            raise error from problem

    def _let_all_read(self, prefix: str) -> None:
        """Let rank 0 wait until the others have read the error: it may hold the store, and is about to end."""
        if self.rank:
            self._set_once(f"{prefix}/read/{self.rank}", "1")
            return
        missing, until = list(range(1, self.world_size)), time.monotonic() + min(self.timeout_s, _LET_READ_S)
        while missing and time.monotonic() < until:
            missing = [r for r in missing if not self.store.check([f"{prefix}/read/{r}"])]
            time.sleep(_POLL_S if missing else 0)

    def claim(self, name: str) -> int | None:
        """Claim something that one rank alone may use. None if no other rank has claimed it before, else that rank."""
        key = f"{self.attempt}/claim/{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        if self._set_once(key, str(self.rank)):
            return None
        return int(self._read(key, "a rank"))

    def _read(self, key: str, who: str) -> str:
        """The text under a key, as soon as `who` has written it."""
        until = time.monotonic() + self.timeout_s
        while True:
            try:
                self.store.wait([key], _WAIT)
                return self.store.get(key).decode()
            except RuntimeError as e:
                if time.monotonic() >= until or self._store_is_gone():
                    raise self._timeout_error(who) from e

    def _timeout_error(self, who: str) -> PeerError:
        return PeerError(
            f"rank {self.rank}: {who} of {self.world_size} did not come within {self.timeout_s:g} s, or ended.\n"
            "  Look at what that rank printed. Under SLURM start every rank with srun."
        )

    def _store_is_gone(self) -> bool:
        try:
            self.store.check(["any"])
        except RuntimeError:
            return True
        return False

    def next_group(self) -> int:
        """The number of the next process group of this attempt: 1, 2, ... It is the same on every rank."""
        self._groups += 1
        return self._groups

    def report_failure(self, problem: BaseException) -> None:
        """Store the error that ended this rank. The first report counts: other ranks see only a broken connection."""
        self._set_once(f"{self.attempt}/failed", json.dumps([self.rank, socket.gethostname(), _one_line(problem)]))

    def first_failure(self) -> str | None:
        """A sentence about the first rank that reported a failure. None if there is none, or if it is this rank.

        The error itself is included only if that rank ran on another machine.
        """
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
        """Whether no other rank has reported `text` before: in this attempt of the launcher, or `ever`, in any attempt."""
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._set_once(f"reported/{key}" if ever else f"{self.attempt}/reported/{key}", str(self.rank))

    def set_flag(self, name: str) -> None:
        """Set a flag that stays set when the launcher restarts the ranks."""
        self._set_once(f"flag/{name}", "1")

    def has_flag(self, name: str) -> bool:
        """Whether any rank has set this flag, in this attempt or in an earlier one."""
        try:
            return bool(self.store.check([f"flag/{name}"]))
        except RuntimeError:
            return False

    def _set_once(self, key: str, value: str) -> bool:
        """Set a key unless another rank has; whether this rank was first."""
        try:
            first = int(self.store.add(f"{key}/count", 1)) == 1
            if first:
                self.store.set(key, value)
            return first
        except RuntimeError:  # the store is gone, and so is rank 0 if it kept it
            return self.rank <= 1


def common_error(reports: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The class name and the message of the error that all ranks raise; ("", "") for no error.

    Args:
        reports: one per rank, {"fingerprint": {name: text}} or {"kind": class name, "text": message} of its problem.
    """
    failed = {rank: (str(t["kind"]), str(t["text"])) for rank, t in enumerate(reports) if "kind" in t}
    if failed:
        kind, text = next(iter(failed.values()))
        same = [r for r, what in failed.items() if what == (kind, text)]
        return kind, text if len(same) == len(reports) else f"on {_ranks(same)} of {len(reports)}: {text}"
    lines: list[str] = []
    for name in dict.fromkeys(n for t in reports for n in t["fingerprint"]):
        values = [t["fingerprint"].get(name, "missing") for t in reports]
        usual = max(dict.fromkeys(values), key=values.count)  # the most frequent one; the first of several
        lines += [
            f"{name}: {value} on {_ranks([r for r, v in enumerate(values) if v == value])}, {usual} on the others"
            for value in dict.fromkeys(values)
            if value != usual
        ]
    if not lines:
        return "", ""
    more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
    return "PeerError", "\n  ".join(["the ranks differ:", *lines[:8], *more])


def _ranks(some: Sequence[int]) -> str:
    shown = ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")
    return f"rank {shown}" if len(some) == 1 else f"ranks {shown}"


def _one_line(problem: BaseException) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0]}"
