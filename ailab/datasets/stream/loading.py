"""Loading of one batch from a map-style dataset: seeded samples, replacement of bad samples, collation."""

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
from ailab.datasets.files.bad_file import BadFile, BadSample
from ailab.datasets.files.image import ImageSettings, image_settings
from ailab.datasets.stream.collate import Allocate, new_tensor, stack_field
from ailab.errors import DataError
from ailab.rng import mix
from ailab.types import WEIGHT, Batch

_TRIES = 16  # samples to try: for a replacement if the whole batch is bad, and for the reference signature
_RETRIES, _RETRY_PAUSE_S = 2, 0.05  # after a transient I/O error
_TRANSIENT_ERRNOS = {errno.EIO, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET, errno.EREMOTEIO}

_CAN_BE_NAN = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)


class BatchKey(NamedTuple):
    """The key of one batch. It determines the batch completely."""

    epoch: int
    ids: list[int]  # sample indices of this rank
    spare: int  # a sample of the same global batch, for a rank without samples
    iteration: int = 0  # number of the main process's pass over the data, for `BatchSender`


class LoadedBatch(NamedTuple):
    """The result of loading one batch."""

    batch: Any  # a Batch; a BatchMessage between processes; None if it failed
    asked: int  # number of samples of the key
    bad: list[BadSample]  # replaced
    damaged: list[BadSample] = []  # noqa: RUF012 # used although damaged; the default is never written to
    failure: str = ""  # why `batch` is None


@dataclass(frozen=True)
class SampleSettings:
    """The settings for reading samples."""

    seed: int
    collate_fn: Callable[[list[Any]], Any] | None = None
    nan_is_bad: bool = True  # whether a sample with a NaN is bad
    images: ImageSettings = field(default_factory=ImageSettings)  # for `read_image`
    double: bool = False  # whether float64 stays float64


def narrow(x: torch.Tensor) -> torch.Tensor:
    """Convert float64 to float32. Any other dtype is unchanged."""
    return x.float() if x.dtype == torch.float64 else x


@contextmanager
def _generators_restored() -> Generator[None]:
    """Restore the global random generators at the end: without workers, samples are loaded in the main process."""
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
    """Seed the global generators of torch, random and numpy. `torch.manual_seed` is slower: it visits the CUDA devices too."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed & 0xFFFFFFFF)


def _bad_sample(index: int, error: Exception, kind: str = "") -> BadSample:
    """The record of a failed sample. The message has the line of code that raised, is short and printable."""
    if isinstance(error, BadFile):
        return BadSample(index, error.kind, _printable(str(error)), _printable(error.path))
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({Path(frame.filename).name}:{frame.lineno})" if frame and not kind else ""
    path = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else ""
    return BadSample(index, kind or type(error).__name__, _printable(f"{error}{where}"), _printable(path))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:500])


def _is_transient(error: BaseException | None) -> bool:
    """Whether an error is an I/O error that may not occur again."""
    return error is not None and (getattr(error, "errno", None) in _TRANSIENT_ERRNOS or _is_transient(error.__cause__))


class _InvalidSample(Exception):
    """A sample with a NaN, or with other fields, types or shapes than the other samples."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Fetcher(torch.utils.data.Dataset[LoadedBatch]):
    """A dataset whose items are whole batches: `fetcher[key]` loads the samples of a `BatchKey` and collates them.

    Each sample is loaded with its own seed, from (seed, epoch, index). A sample is bad if it raises, has a NaN, or has other
    fields, types or shapes than the first good sample of the dataset. A bad sample is replaced by a good sample of the batch.

    Args:
        dataset: The map-style dataset.
        settings: How samples are read.
        size: Number of slots of every batch. The batch then has the field `_weight`, which is 0 for replaced samples and for
            padding. None: as many slots as samples; a batch without samples gets one slot with `_weight` 0.
        batch_size: Samples of a global batch. With 1 the shapes of samples may differ.
    """

    def __init__(self, dataset: Any, settings: SampleSettings, size: int | None, batch_size: int):
        self.dataset = dataset
        self.settings = settings
        self.size = size
        self.same_shapes = batch_size > 1
        self.allocate: Allocate = new_tensor  # for collated tensors
        self._reference: dict[str, Any] | None = None  # signature of the first good sample

    def __getitem__(self, index: Any) -> LoadedBatch:
        key = BatchKey(*index)
        with _generators_restored():
            samples, bad, damaged = self._read(key.epoch, key.ids)
            good = [s for s in samples if s is not None] or self._replacements(key, bad)
            if not good:
                why = f"no sample of this batch can be read, and none of the next {_TRIES}"
                return LoadedBatch(None, len(key.ids), bad, damaged, why)
            # For random numbers of a collate function: the same seed on every rank.
            _seed_generators(mix(self.settings.seed, key.epoch, key.spare, 1))
            try:
                return LoadedBatch(self._collate(samples, good), len(key.ids), bad, damaged)
            except Exception as error:  # user code can raise any class
                why = f"samples {key.ids[:8]} do not collate: {_bad_sample(0, error).message}"
                return LoadedBatch(None, len(key.ids), bad, damaged, why)

    def _read(self, epoch: int, ids: Sequence[int]) -> tuple[list[Any], list[BadSample], list[BadSample]]:
        """The samples (None for a bad one), the records of bad samples, and the records of damaged samples that are used."""
        samples: list[Any] = []
        bad: list[BadSample] = []
        damaged: list[BadSample] = []
        with self._image_settings() as images:
            for index in ids:
                try:
                    sample, notes = self._sample(epoch, index, images), [*images.notes]
                    samples.append(self._checked(sample))
                    damaged += [BadSample(index, "truncated", _printable(f"{p}: {text}"), _printable(p)) for p, text in notes]
                except _InvalidSample as error:
                    samples.append(None)
                    bad.append(_bad_sample(index, error, error.kind))
                except Exception as error:  # user code can raise any class
                    samples.append(None)
                    bad.append(_bad_sample(index, error))
        return samples, bad, damaged

    def _image_settings(self) -> AbstractContextManager[ImageSettings]:
        return image_settings(replace(self.settings.images, notes=[]))

    def _sample(self, epoch: int, index: int, images: ImageSettings) -> Any:
        """Load one sample, again after a transient error. `images.notes` then has the notes about its images."""
        for left in range(_RETRIES, -1, -1):
            images.notes.clear()
            try:
                _seed_generators(mix(self.settings.seed, epoch, index))
                return self.dataset[index]
            except Exception as error:  # user code can raise any class
                if not left or not _is_transient(error):
                    raise
                time.sleep(_RETRY_PAUSE_S)
        raise AssertionError

    def _checked(self, sample: Any) -> Any:
        """The sample as a dict of fields; unchanged if the user has a collate function.

        Raises:
            _InvalidSample: It has a NaN, or its signature is not that of the first good sample.
        """
        if self.settings.collate_fn is None:
            try:
                sample = wrap_sample(sample)
            except DataError as error:
                raise _InvalidSample("wrong_type", str(error).splitlines()[0]) from error
        values = list(tree.items(sample))
        if self.settings.nan_is_bad and (hole := next((p for p, v in values if _has_nan(v)), None)) is not None:
            raise _InvalidSample("not_a_number", f"there is a NaN in {hole or 'it'!r}")
        if self.settings.collate_fn is None:
            self._compare(_signature_of(values, self.same_shapes))
        return sample

    def _compare(self, signature: dict[str, Any]) -> None:
        reference = self._reference or self._reference_signature()
        if reference is None or signature == reference:
            return
        field = next(n for n in [*reference, *signature] if reference.get(n) != signature.get(n))
        have, wanted = signature.get(field, "missing"), reference.get(field, "missing")
        same_type = isinstance(have, tuple) and isinstance(wanted, tuple) and have[0] == wanted[0]
        raise _InvalidSample(
            "wrong_shape" if same_type else "wrong_type",
            f"does not collate: {field!r} is {_describe(have)}, and {_describe(wanted)} in the first good sample",
        )

    def _reference_signature(self) -> dict[str, Any] | None:
        """The signature of the first good sample of the dataset. It is the same in each worker."""
        for index in range(min(_TRIES, len(self.dataset))):
            try:
                with self._image_settings() as images:
                    sample = wrap_sample(self._sample(0, index, images))
                self._reference = _signature_of(tree.items(sample), self.same_shapes)
            except Exception:  # it is reported when its batch is loaded
                continue
            return self._reference
        return None

    def _replacements(self, key: BatchKey, bad: list[BadSample]) -> list[Any]:
        """A list with the first good sample after those of the batch; empty if all of the next ones are bad."""
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
        if collate := self.settings.collate_fn:
            joined = wrap_sample(collate(filled))
        else:
            joined = {n: stack_field([s[n] for s in filled], self.allocate) for n in filled[0]}
        batch: Batch = joined if self.settings.double else tree.map(narrow, joined)
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
    # The sum first: one pass without extra memory. It is NaN for a NaN, and for infinities of both signs.
    return bool(value.sum().isnan()) and bool(value.isnan().any())


def _signature_of(values: Iterable[tuple[str, Any]], shapes: bool) -> dict[str, Any]:
    """The signature of a sample: type, dtype and (with `shapes`) shape of each field, by dotted name."""
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
