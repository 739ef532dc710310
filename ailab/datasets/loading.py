"""One batch out of a map-style dataset, in a worker or on the host: seeded samples, stand-ins for bad ones, collation."""

from __future__ import annotations

import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate  # pyright: ignore[reportUnknownVariableType]

from ailab import tree
from ailab.binding import wrap_sample
from ailab.datasets.bad import Bad
from ailab.rng import mix
from ailab.types import WEIGHT, Batch

_SHIELDED = (signal.SIGINT, signal.SIGTERM)
_TRIES = 16  # samples looked at for a stand-in when a whole batch is bad


class Key(NamedTuple):
    """What a worker needs to know to make one batch."""

    epoch: int
    ids: list[int]  # the samples of this rank
    spare: int  # a sample of the same global batch, for a rank that has none


class Loaded(NamedTuple):
    """What comes back from a worker."""

    batch: Batch | None  # None: `failure` says why
    asked: int  # samples of the key
    bad: list[Bad]
    failure: str = ""


def narrow(x: torch.Tensor) -> torch.Tensor:
    """float64 as float32; any other dtype as it is."""
    return x.float() if x.dtype == torch.float64 else x


@contextmanager
def signals_held() -> Generator[None]:
    """Hold SIGINT and SIGTERM back while workers start: one that came before `start_worker` would kill them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Leave SIGINT and SIGTERM to the host, which ends its workers itself once the state is saved."""
    for number in _SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)
    if then is not None:
        then(worker)


def reap(workers: Sequence[BaseProcess]) -> None:
    """Kill workers that outlive their iterator: they ignore SIGTERM, so at exit the interpreter would wait for them forever."""
    alive = [w for w in workers if w.is_alive()]
    if not alive:
        return
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if on_main else None  # torch's own would report a death
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join()
    if on_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


@contextmanager
def _generators_kept() -> Generator[None]:
    """Put the global generators back as they were; without workers the samples are drawn in the host's process."""
    numpy = sys.modules.get("numpy")
    kept = torch.default_generator.get_state(), random.getstate(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(kept[0])
        random.setstate(kept[1])
        if numpy:
            numpy.random.set_state(kept[2])


def _seed_generators(seed: int) -> None:
    """Seed what user code draws from. Not `torch.manual_seed`, which walks the CUDA devices each time."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & 0xFFFFFFFF)


def _described(index: int, error: Exception) -> Bad:
    """The error with the line of user code that raised it; short, and safe to print."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{error} ({Path(frame.filename).name}:{frame.lineno})"[:500]
    return Bad(
        index, type(error).__name__, "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


class Fetcher(torch.utils.data.Dataset[Loaded]):
    """A dataset of batches: `fetcher[key]` reads the samples of `key`, each under a seed of (seed, epoch, index).

    A sample that raises is replaced by a good one of the batch. With `size` every batch has that many slots and the
    field `_weight`, which is 0 for such a stand-in and for padding; without it a batch has as many slots as samples, and for no
    samples one that weighs 0.
    """

    def __init__(self, dataset: Any, seed: int, size: int | None, collate_fn: Callable[[list[Any]], Any] | None):
        self.dataset = dataset
        self.seed = seed
        self.size = size
        self.collate_fn = collate_fn

    def __getitem__(self, index: Any) -> Loaded:
        key = Key(*index)
        with _generators_kept():
            samples, bad = self._read(key.epoch, key.ids)
            good = [s for s in samples if s is not None] or self._stand_in(key, bad)
            if not good:
                return Loaded(None, len(key.ids), bad, f"no sample of this batch can be read, nor any of the {_TRIES} after it")
            _seed_generators(mix(self.seed, key.epoch, key.spare, 1))  # for what a collate function draws: alike on every rank
            try:
                return Loaded(self._collate(samples, good), len(key.ids), bad)
            except Exception as error:  # user data: any class can come
                return Loaded(None, len(key.ids), bad, f"samples {key.ids[:8]} do not collate: {_described(0, error).message}")

    def _read(self, epoch: int, ids: Sequence[int]) -> tuple[list[Any], list[Bad]]:
        samples: list[Any] = []
        bad: list[Bad] = []
        for index in ids:
            try:
                _seed_generators(mix(self.seed, epoch, index))
                sample = self.dataset[index]
                samples.append(sample if self.collate_fn else wrap_sample(sample))
            except Exception as error:  # user data: any class can come
                samples.append(None)
                bad.append(_described(index, error))
        return samples, bad

    def _stand_in(self, key: Key, bad: list[Bad]) -> list[Any]:
        """The first sample after those of the batch that can be read; none if all of the next ones are bad."""
        for offset in range(len(key.ids), len(key.ids) + _TRIES):
            samples, more = self._read(key.epoch, [(key.spare + offset) % len(self.dataset)])
            if samples[0] is not None:
                return samples
            bad += more
        return []

    def _collate(self, samples: list[Any], good: list[Any]) -> Batch:
        slots = max(self.size or len(samples), 1)
        turns = cycle(good)
        filled = [next(turns) if s is None else s for s in [*samples, *[None] * (slots - len(samples))]]
        joined = wrap_sample(self.collate_fn(filled)) if self.collate_fn else default_collate(filled)
        batch: Batch = tree.map(narrow, joined)
        if self.size is not None or not samples:
            real = [float(s is not None) for s in samples]
            return {**batch, WEIGHT: torch.tensor(real + [0.0] * (slots - len(real)))}
        return batch
