"""Storages of records that Python already has: a list, or a stream that is read forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ailab.datasets.base import LabBaseDataset
from ailab.errors import DataError

_BEHIND = 8  # restarts that are no sign of trouble


@contextmanager
def _no_worker() -> Generator[None]:
    """Let `torch.utils.data.get_worker_info` say that this is no data worker; a private name of torch."""
    from torch.utils.data._utils import worker

    kept, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = kept


class ListDataset(LabBaseDataset):
    """The storage: its raw record is an item of a list, or of anything with a length and an index.

    Args:
        items: the records.

    Raises:
        DataError: it has no length or no index, or is empty.
    """

    def __init__(self, items: Sequence[Any]):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"ListDataset: expected a list, got {type(items).__name__}; StreamDataset reads an iterable.")
        if not len(items):
            raise DataError("ListDataset: the split is empty: the list has no item.")
        self.items = items

    def _len(self) -> int:
        return len(self.items)

    def _get_raw(self, index: int) -> Any:
        return self.items[index]


class StreamDataset(LabBaseDataset):
    """The storage: its raw record is the i-th item of an iterable that gives the same items each time.

    It is read forward, so read it with `shuffle=False`; each worker reads the whole stream and keeps its share, and a source that
    divides itself by torch's `get_worker_info` is told that there are no workers. A resumed run skips to its place. Put what is
    shuffled in a file or a list.

    Args:
        source: gives a new iterator each time it is called, or is iterable more than once (a torch `IterableDataset`).
        size: number of items; counted once, by reading all, when left out.
        behind: items kept for a look back.

    Raises:
        DataError: the source is empty or cannot be read twice. While reading: it ends before `size`, or is read in random order.
    """

    def __init__(self, source: Callable[[], Iterable[Any]] | Iterable[Any], size: int | None = None, *, behind: int = 1024):
        if isinstance(source, Iterator):
            raise DataError("StreamDataset: an iterator can be read once; give a function that makes one, or a list.")
        self.source, self.behind = source, behind
        self.size = sum(1 for _ in self._opened()) if size is None else size
        if self.size < 1:
            raise DataError("StreamDataset: the split is empty: the source gives no item.")
        self._rewind()
        self._reads = self._restarts = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without the iterator, which no process can send to another."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_iterator", "_next", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._rewind()

    def _len(self) -> int:
        return self.size

    def _get_raw(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of a stream of {self.size}")
        self._reads += 1
        if index < self._next and index not in self._kept:
            self._restart()
        while index not in self._kept:
            self._advance()
        return self._kept[index]

    def _advance(self) -> None:
        try:
            with _no_worker():  # a generator may ask in its first item
                if self._iterator is None:
                    self._iterator = iter(self._opened())
                item = next(self._iterator)
        except StopIteration:
            self._rewind()
            raise DataError(f"StreamDataset: the source ended before its item {self.size}; say size=... as it is.") from None
        self._kept[self._next] = item
        self._next += 1
        if len(self._kept) > self.behind:
            self._kept.popitem(last=False)

    def _restart(self) -> None:
        self._restarts += 1
        if self._restarts > _BEHIND and self._reads < self._restarts * min(self.size, 64):
            raise DataError("StreamDataset: it is read in random order, each time from its start; set shuffle=False.")
        self._rewind()

    def _rewind(self) -> None:
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # index of the item that the iterator gives next
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def _opened(self) -> Iterable[Any]:
        return self.source() if callable(self.source) else self.source
