"""What can go wrong, each with the exit code that a shell sees.

A user's mistake is an `AilabError` with a message of at most a few lines: where, what came, what would do. `assert` is for
our own invariants only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AilabError(Exception):
    """Base of every error that ends a run with one clear message instead of a traceback."""

    exit_code = 1
    shared = False  # whether every rank of several raises the same


class ConfigError(AilabError, ValueError):
    """The cfg asks for something that does not exist or does not fit; nothing was built."""

    exit_code = 2


class DataError(AilabError):
    """A dataset is empty, unreadable or does not deliver what the cfg says."""

    exit_code = 3


class NonFiniteError(AilabError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 4


class SpikeError(AilabError):
    """The loss left the range of its recent past, and the cfg says that this ends the run."""

    exit_code = 4


class CheckpointError(AilabError):
    """A checkpoint cannot be written, or none that is valid and fits can be read."""

    exit_code = 5


class WorkDirError(AilabError):
    """Another run holds this work_dir."""

    exit_code = 6


class PeerError(AilabError):
    """Another process of the group failed or did not answer in time."""

    exit_code = 7


class Preempted(AilabError):
    """A signal asked the run to end; the state was saved first."""

    exit_code = 143


class DonatedError(AilabError, RuntimeError):
    """A `TrainState` was read after a compiled step had reused its memory."""


def nearest(name: str, offered: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `offered`, or `""` when nothing is close."""
    names = [str(o) for o in offered]
    lower = {n.lower(): n for n in names}
    match = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.6)
    return f" Did you mean {lower[match[0]]!r}?" if match else ""


def more(topic: str | None) -> str:
    """The last line of a message that lists what is on offer: the command that shows it; `""` where none does.

    Args:
        topic: what `ailab.help` is asked about: a name, a path such as "cfg.data", or "" for all names. None: it does not know it.
    """
    return "" if topic is None else f"\n  More: python -m ailab.help {topic}".rstrip()
