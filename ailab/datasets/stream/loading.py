"""One batch out of a map-style dataset, in a worker or on the host: seeded samples, stand-ins for bad ones, collation."""

from __future__ import annotations

import errno
import math
import random
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ailab import tree
from ailab.binding import wrap_sample
from ailab.datasets.files.bad_file import Bad, BadFile
from ailab.datasets.files.image import Reading, reading
from ailab.datasets.stream.collate import Room, column, new_room
from ailab.errors import DataError
from ailab.rng import mix
from ailab.types import WEIGHT, Batch

_TRIES = 16  # samples looked at for a stand-in when a whole batch is bad, or for one that says how a sample looks
_RETRIES, _PAUSE_S = 2, 0.05  # of a read that failed for a reason that may pass
_PASSING = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EREMOTEIO}

_CAN_BE_NAN = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


class Key(NamedTuple):
    """What a worker needs to know to make one batch."""

    epoch: int
    ids: list[int]  # the samples of this rank
    spare: int  # a sample of the same global batch, for a rank that has none
    lap: int = 0  # of the host through its data


class Loaded(NamedTuple):
    """What comes back from a worker."""

    batch: Any  # a Batch, or on its way a Parcel; None: `failure` says why
    asked: int  # samples of the key
    bad: list[Bad]
    kept: list[Bad] = []  # noqa: RUF012 # never written to
    failure: str = ""


@dataclass(frozen=True)
class Reader:
    """How samples are read."""

    seed: int
    collate_fn: Callable[[list[Any]], Any] | None = None
    nan_is_bad: bool = True  # a NaN in any number of a sample
    files: Reading = field(default_factory=Reading)  # how the files in them are


def narrow(x: torch.Tensor) -> torch.Tensor:
    """float64 as float32; any other dtype as it is."""
    return x.float() if x.dtype == torch.float64 else x


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


def _described(index: int, error: Exception, kind: str = "") -> Bad:
    """The error with the line of user code that raised it; short, and safe to print."""
    if isinstance(error, BadFile):
        return Bad(index, error.kind, _printable(str(error)), _printable(error.path))
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(frame.filename).name}:{frame.lineno})" if frame and not kind else ""
    path = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else ""
    return Bad(index, kind or type(error).__name__, _printable(f"{error}{where}"), _printable(path))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:500])


def _may_pass(error: BaseException | None) -> bool:
    """Whether a failure comes from storage that may answer the next time."""
    return error is not None and (getattr(error, "errno", None) in _PASSING or _may_pass(error.__cause__))


class _Misfit(Exception):
    """A sample that is not what the others are."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Fetcher(torch.utils.data.Dataset[Loaded]):
    """A dataset of batches: `fetcher[key]` reads the samples of `key`, each under a seed of (seed, epoch, index).

    A sample that raises, holds a NaN, or has other fields, types or shapes than the first good one of the dataset is replaced by
    a good one of the batch. With `size` every batch has that many slots and the field `_weight`, which is 0 for such a stand-in
    and for padding; without it a batch has as many slots as samples, and for no samples one that weighs 0.
    """

    def __init__(self, dataset: Any, reader: Reader, size: int | None, batch_size: int):
        self.dataset = dataset
        self.reader = reader
        self.size = size
        self.same_shapes = batch_size > 1
        self.room: Room = new_room  # for what is joined
        self._like: dict[str, Any] | None = None  # what the fields of a good sample are

    def __getitem__(self, index: Any) -> Loaded:
        key = Key(*index)
        with _generators_kept():
            samples, bad, kept = self._read(key.epoch, key.ids)
            good = [s for s in samples if s is not None] or self._stand_in(key, bad)
            if not good:
                why = f"no sample of this batch can be read, nor any of the {_TRIES} after it"
                return Loaded(None, len(key.ids), bad, kept, why)
            _seed_generators(
                mix(self.reader.seed, key.epoch, key.spare, 1)
            )  # for what a collate function draws: alike on every rank
            try:
                return Loaded(self._collate(samples, good), len(key.ids), bad, kept)
            except Exception as error:  # user data: any class can come
                why = f"samples {key.ids[:8]} do not collate: {_described(0, error).message}"
                return Loaded(None, len(key.ids), bad, kept, why)

    def _read(self, epoch: int, ids: Sequence[int]) -> tuple[list[Any], list[Bad], list[Bad]]:
        """The samples, None for bad ones; the bad ones; and those that are good enough."""
        samples: list[Any] = []
        bad: list[Bad] = []
        kept: list[Bad] = []
        with self._reading() as files:
            for index in ids:
                try:
                    sample, notes = self._sample(epoch, index, files), [*files.notes]
                    samples.append(self._checked(sample))
                    kept += [Bad(index, "truncated", _printable(f"{p}: {text}"), _printable(p)) for p, text in notes]
                except _Misfit as error:
                    samples.append(None)
                    bad.append(_described(index, error, error.kind))
                except Exception as error:  # user data: any class can come
                    samples.append(None)
                    bad.append(_described(index, error))
        return samples, bad, kept

    def _reading(self) -> AbstractContextManager[Reading]:
        return reading(replace(self.reader.files, notes=[]))

    def _sample(self, epoch: int, index: int, files: Reading) -> Any:
        """One sample; `files`, by which it is read, then has the notes about it."""
        for left in range(_RETRIES, -1, -1):
            files.notes.clear()
            try:
                _seed_generators(mix(self.reader.seed, epoch, index))
                return self.dataset[index]
            except Exception as error:  # user data: any class can come
                if not left or not _may_pass(error):
                    raise
                time.sleep(_PAUSE_S)
        raise AssertionError

    def _checked(self, sample: Any) -> Any:
        """The sample by named fields, or as it is where the user collates.

        Raises:
            _Misfit: it holds a NaN, or does not look as the first good one.
        """
        if self.reader.collate_fn is None:
            try:
                sample = wrap_sample(sample)
            except DataError as error:
                raise _Misfit("wrong_type", str(error).splitlines()[0]) from error
        values = list(tree.items(sample))
        if self.reader.nan_is_bad and (hole := next((p for p, v in values if _has_nan(v)), None)) is not None:
            raise _Misfit("not_a_number", f"there is a NaN in {hole or 'it'!r}")
        if self.reader.collate_fn is None:
            self._compare(_look(values, self.same_shapes))
        return sample

    def _compare(self, look: dict[str, Any]) -> None:
        like = self._like or self._first_look()
        if like is None or look == like:
            return
        field = next(n for n in [*like, *look] if like.get(n) != look.get(n))
        have, wanted = look.get(field, "missing"), like.get(field, "missing")
        same_type = isinstance(have, tuple) and isinstance(wanted, tuple) and have[0] == wanted[0]
        raise _Misfit(
            "wrong_shape" if same_type else "wrong_type",
            f"does not collate: {field!r} is {_describe(have)}, and {_describe(wanted)} in the first good sample",
        )

    def _first_look(self) -> dict[str, Any] | None:
        """How the first good sample of the dataset looks; the same in each worker."""
        for index in range(min(_TRIES, len(self.dataset))):
            try:
                with self._reading() as files:
                    sample = wrap_sample(self._sample(0, index, files))
                self._like = _look(tree.items(sample), self.same_shapes)
            except Exception:  # it is reported when its turn comes
                continue
            return self._like
        return None

    def _stand_in(self, key: Key, bad: list[Bad]) -> list[Any]:
        """The first sample after those of the batch that can be read; none if all of the next ones are bad."""
        for offset in range(len(key.ids), len(key.ids) + _TRIES):
            samples, more, _ = self._read(key.epoch, [(key.spare + offset) % len(self.dataset)])
            if samples[0] is not None:
                return samples
            bad += more
        return []

    def _collate(self, samples: list[Any], good: list[Any]) -> Batch:
        slots = max(self.size or len(samples), 1)
        turns = cycle(good)
        filled = [next(turns) if s is None else s for s in [*samples, *[None] * (slots - len(samples))]]
        collate = self.reader.collate_fn
        joined = wrap_sample(collate(filled)) if collate else {n: column([s[n] for s in filled], self.room) for n in filled[0]}
        batch: Batch = tree.map(narrow, joined)
        if self.size is not None or not samples:
            real = [float(s is not None) for s in samples]
            return {**batch, WEIGHT: torch.tensor(real + [0.0] * (slots - len(real)))}
        return batch


def _has_nan(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    if type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "kind", "") in "fc":
        value = torch.as_tensor(value)
    if not isinstance(value, Tensor) or value.dtype not in _CAN_BE_NAN or value.layout is not torch.strided:
        return False
    # The sum first, which is one pass without memory of its own: it is NaN for a NaN, and for infinities of both signs.
    return bool(value.sum().isnan()) and bool(value.isnan().any())


def _look(values: Iterable[tuple[str, Any]], shapes: bool) -> dict[str, Any]:
    """What collation sees of each field, by dotted name: its kind, and its shape."""
    return {path: _kind(value, shapes) for path, value in values}


def _kind(value: Any, shapes: bool) -> Any:
    if isinstance(value, (bool, int, float)):
        return "a number"
    if isinstance(value, (str, bytes)):
        return "text"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return type(value).__name__
    name = str(dtype).removeprefix("torch.")
    return ("float32" if name == "float64" else name, tuple(shape) if shapes else ())


def _describe(kind: Any) -> str:
    return f"{kind[0]} {kind[1]}" if isinstance(kind, tuple) else str(kind)
