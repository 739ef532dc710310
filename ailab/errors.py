"""The errors of ailab, each with the exit code of the process.

An `AilabError` is for users. Its message has at most a few lines: where it is, what was found, what would be right. `assert`
is for ailab's own invariants only.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class AilabError(Exception):
    """Base class of the errors that end a run with a message and without a traceback."""

    exit_code = 1
    on_all_ranks = False  # whether every rank raises this same error


class ConfigError(AilabError, ValueError):
    """The cfg has something that does not exist or does not fit. Nothing was built."""

    exit_code = 2


class DataError(AilabError):
    """A dataset is empty, cannot be read, or does not have what the cfg says."""

    exit_code = 3


class NonFiniteError(AilabError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 4


class SpikeError(AilabError):
    """The loss is far from its recent values, and the cfg says that this ends the run."""

    exit_code = 4


class CheckpointError(AilabError):
    """A checkpoint cannot be written, or there is none that is valid and fits this run."""

    exit_code = 5


class WorkDirError(AilabError):
    """Another run has locked this work_dir."""

    exit_code = 6


class PeerError(AilabError):
    """Another rank failed or did not answer in time, or the ranks differ."""

    exit_code = 7


class Preempted(AilabError):
    """A signal stopped the run. With a CheckpointHook the state was saved first."""

    exit_code = 143


class StopNow(KeyboardInterrupt):
    """A signal ends what is going on. It is no `Exception`, so that user code does not take it for an error of its own."""

    def __init__(self, number: int, *, waits: bool = False):
        super().__init__(f"stopped at once by {signal.Signals(number).name}; checkpoints that were saved are whole.")
        self.number = number
        self.waits = waits  # whether it came while a batch was awaited, so that no step is in flight


class DonatedError(AilabError, RuntimeError):
    """A `TrainState` was read after a compiled step had reused its memory."""


class Together:
    """Collects the errors of parts that do not depend on each other, to raise them as one.

    together = Together()
    model, loss = together(build_model), together(build_loss)  # None for one that failed
    together.raise_errors()
    """

    def __init__(self) -> None:
        self.errors: list[ConfigError | DataError] = []

    def __call__(self, make: Callable[[], T]) -> T | None:
        """The result of `make`, or None if it raises a ConfigError or DataError."""
        try:
            return make()
        except (ConfigError, DataError) as e:
            self.errors.append(e)
            return None

    def raise_errors(self) -> None:
        """Raise what was collected: a lone error as it is, several as one ConfigError, or DataError if all are."""
        if len(self.errors) > 1:
            kind = DataError if all(isinstance(e, DataError) for e in self.errors) else ConfigError
            raise kind("\n".join(dict.fromkeys(map(str, self.errors)))) from self.errors[0]
        if self.errors:
            raise self.errors[0]


def nearest(name: str, offered: Iterable[str]) -> str:
    """A hint for a message, `" Did you mean 'x'?"`, with the closest of the offered names; `""` if none is close."""
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
