"""Storages of Python objects: a list, or an iterable that is read forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ailab.datasets.base import LabBaseDataset
from ailab.errors import DataError

_ALLOWED_RESTARTS = 8  # without a check for random access


@contextmanager
def _hidden_worker_info() -> Generator[None]:
    """Make `torch.utils.data.get_worker_info` return None inside. It sets a private name of torch."""
    from torch.utils.data._utils import worker

    kept, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = kept


class ListDataset(LabBaseDataset):
    """Storage of a list. A raw record is one item.

    Args:
        items: The records: a list, or any object with `__len__` and `__getitem__`.

    Raises:
        DataError: `items` has no `__len__` or no `__getitem__`, or is empty.
    """

    def __init__(self, items: Sequence[Any]):
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise DataError(f"ListDataset: expected a list, got {type(items).__name__}. StreamDataset reads an iterable.")
        if not len(items):
            raise DataError("ListDataset: the split is empty: the list has no item.")
        self.items = items

    def _len(self) -> int:
        return len(self.items)

    def _get_raw(self, index: int) -> Any:
        return self.items[index]


class StreamDataset(LabBaseDataset):
    """Storage of an iterable. The raw record of index i is its i-th item. It must give the same items each time.

    The iterable is read forward, so set `shuffle=False`. For a shuffled dataset put the items in a file or a list. Each worker
    reads the whole iterable and uses its own share. `get_worker_info` of torch returns None inside, so that a source does not
    divide itself among the workers. A resumed run skips the items before its position.

    Args:
        source: A function that returns a new iterator, or an object that can be iterated more than once, such as a torch
            `IterableDataset`.
        size: Number of items. Default: all items are read once and counted.
        buffer_size: Number of the last items that are kept, so that they can be read again.

    Raises:
        DataError: The source is empty or can be read only once. While reading: it ends before `size`, or it is read in random
            order.
    """

    def __init__(
        self, source: Callable[[], Iterable[Any]] | Iterable[Any], size: int | None = None, *, buffer_size: int = 1024
    ):
        if isinstance(source, Iterator):
            raise DataError("StreamDataset: an iterator can be read only once. Give a function that returns one, or a list.")
        self.source, self.buffer_size = source, buffer_size
        self.size = sum(1 for _ in self._open()) if size is None else size
        if self.size < 1:
            raise DataError("StreamDataset: the split is empty: the source gives no item.")
        self._rewind()
        self._reads = self._restarts = 0

    def __getstate__(self) -> dict[str, Any]:
        """The state without the iterator, which cannot be pickled."""
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
            with _hidden_worker_info():  # a generator may ask for it when it gives its first item
                if self._iterator is None:
                    self._iterator = iter(self._open())
                item = next(self._iterator)
        except StopIteration:
            self._rewind()
            raise DataError(
                f"StreamDataset: the source ended before its item {self.size}. Set size=... to its length."
            ) from None
        self._kept[self._next] = item
        self._next += 1
        if len(self._kept) > self.buffer_size:
            self._kept.popitem(last=False)

    def _restart(self) -> None:
        self._restarts += 1
        if self._restarts > _ALLOWED_RESTARTS and self._reads < self._restarts * min(self.size, 64):
            raise DataError("StreamDataset: it is read in random order, and restarts each time. Set shuffle=False.")
        self._rewind()

    def _rewind(self) -> None:
        self._iterator: Iterator[Any] | None = None
        self._next = 0  # index of the next item of the iterator
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def _open(self) -> Iterable[Any]:
        return self.source() if callable(self.source) else self.source
