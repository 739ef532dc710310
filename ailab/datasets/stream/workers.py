"""Worker processes that load batches. A worker that died or hangs is replaced. All workers end with the main process."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ailab import tree
from ailab.datasets.stream.loading import BatchKey, Fetcher, LoadedBatch
from ailab.datasets.stream.order import Order
from ailab.datasets.stream.transport import BatchMessage, BatchReceiver, BatchSender
from ailab.errors import DataError
from ailab.heap import keep_freed

_KEPT_BYTES = 256 << 20  # freed memory that a worker keeps for reuse
_BLOCKED = (signal.SIGINT, signal.SIGTERM)
_POLL_S = 1.0  # seconds between two checks that the workers are alive
_MAX_REPLACEMENTS = 3  # per epoch


class Workers:
    """Loads the batches of a fetcher in order, in `num_workers` processes, or in the main process if that is 0.

    A batch is a pure function of its key. So workers that died, or gave no batch for `timeout` seconds, are replaced at the same
    position, and the batches stay the same.

    Args:
        fetcher: Makes the batches.
        order: The order of the samples.
        name: Name of the split, for messages.
        report: Called with one line when workers are replaced.
        num_workers: Number of worker processes.
        pin_memory: Whether batches are in pinned memory.
        timeout: Seconds to wait for a batch. 0 waits without limit.
        worker_init_fn: Called in each worker with the number of the worker.
        **settings: Further arguments of `torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        order: Order,
        name: str,
        report: Callable[[str], None],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        timeout: float = 300.0,
        worker_init_fn: Callable[[int], None] | None = None,
        **settings: Any,
    ):
        self.order, self.name, self.report, self.timeout = order, name, report, timeout
        self._keys = _KeySampler(order)
        self._processes, self._pin = num_workers, pin_memory
        self._sources = WeakSet[Any]()  # the iterators with workers, as long as they live
        self._make_loader = partial(
            _PatientLoader,
            timeout,
            _SendingFetcher(fetcher) if num_workers else fetcher,
            batch_size=None,
            sampler=self._keys,  # pyright: ignore[reportArgumentType]  # it has no length
            collate_fn=_identity,
            generator=torch.Generator(),  # otherwise each epoch would draw from the global generator
            worker_init_fn=partial(init_worker, worker_init_fn),
            num_workers=num_workers,
            **settings,
        )
        self._loader, self._receiver = self._make_loader(), BatchReceiver(pin_memory)

    def batches(self, epoch: int, start: int) -> Iterator[LoadedBatch]:
        """The batches of one epoch, from step `start` on.

        Raises:
            DataError: Workers failed more than three times in the epoch.
        """
        lost: list[str] = []
        while True:
            source, receiver = None, self._receiver if self._loader.persistent_workers else BatchReceiver(self._pin)
            try:
                source = self._start(epoch, start)
                while (loaded := source if isinstance(source, str) else self._next(source)) is not None:
                    if isinstance(loaded, str):
                        break
                    yield self._unpacked(loaded, receiver)
                    start += 1
                else:
                    return
            except KeyboardInterrupt:  # the run ends: its workers need not finish a sample that may take minutes
                self.close()
                raise
            except GeneratorExit:  # the epoch is broken off, at a step boundary say: nor need those that are not kept
                if not self._loader.persistent_workers:
                    kill_workers(getattr(source, "_workers", ()))
                raise
            lost.append(loaded)
            self._discard(source)
            del source, receiver
            gc.collect()  # otherwise the new workers inherit the old iterator, and its cleanup fails in them
            place = f"{self.name}: {loaded}, at or after step {start} of epoch {epoch}"
            if len(lost) > _MAX_REPLACEMENTS:
                ids = self.order.indices(epoch, start).tolist()[:8]
                raise DataError(
                    f"{place}, after {_MAX_REPLACEMENTS} times before in this epoch.\n"
                    f"  The samples of that step: {ids}. Most often a worker is killed because the memory is full. Then set fewer\n"
                    f"  num_workers, a smaller prefetch_factor or batch_size. For a timeout: {self.name}_dataloader.timeout."
                )
            self.report(f"{place}. The workers are replaced.")

    def _unpacked(self, loaded: LoadedBatch, receiver: BatchReceiver) -> LoadedBatch:
        """The loaded batch in memory of this process, pinned if requested."""
        if isinstance(loaded.batch, BatchMessage):
            return loaded._replace(batch=receiver.unpack(loaded.batch))
        return loaded._replace(batch=tree.map(torch.Tensor.pin_memory, loaded.batch)) if self._pin else loaded

    def close(self) -> None:
        """Kill all workers."""
        for source in list(self._sources):
            kill_workers(source._workers)

    def _start(self, epoch: int, start: int) -> Iterator[LoadedBatch] | str:
        """An iterator over the batches from step `start` on, or a text about what happened to persistent workers meanwhile."""
        self._keys.epoch, self._keys.start = epoch, start
        with signals_blocked(), _sigchld_restored():
            if (source := getattr(self._loader, "_iterator", None)) is None:
                source = iter(self._loader)
                if workers := getattr(source, "_workers", ()):
                    self._sources.add(source)
                    Finalize(source, kill_workers, (workers,), exitpriority=100)  # before multiprocessing joins the rest
                return source
        try:
            return iter(self._loader)  # it waits until each worker has ended its last pass
        except Exception as error:  # a dying worker can raise any class
            return self._failure(source, error)

    def _next(self, source: Iterator[LoadedBatch]) -> LoadedBatch | str | None:
        """The next batch, None at the end, or a text about what happened to the workers."""
        try:
            return next(source)
        except StopIteration:
            return None
        except Exception as error:  # a dying worker can raise any class
            if not self._processes:
                raise
            return self._failure(source, error)

    def _failure(self, source: Iterator[LoadedBatch], error: Exception) -> str:
        """What happened to the workers, from the error that their iterator raised."""
        if isinstance(error, _SlowWorkers):
            return f"no data worker gave a batch for {self.timeout:g} s"
        workers: Sequence[BaseProcess] = getattr(source, "_workers", ())
        gone = wait([w.sentinel for w in workers], timeout=_POLL_S)  # the pipe may break before its process has ended
        _ = [w.join() for w in workers if w.sentinel in gone]
        if dead := [w for w in workers if not w.is_alive()]:
            return _exit_reason(dead[0])
        return f"a data worker failed ({type(error).__name__}: {(str(error).strip()[-200:].splitlines() or [''])[-1]})"

    def _discard(self, source: Any) -> None:
        """Kill the remaining workers of an iterator, and prepare new ones."""
        for iterator in (source, getattr(self._loader, "_iterator", None)):
            kill_workers(getattr(iterator, "_workers", ()))
        self._loader, self._receiver = self._make_loader(), BatchReceiver(self._pin)


class _SlowWorkers(Exception):
    """No worker gave anything within the user's limit."""


class _PatientIterator(_MultiProcessingDataLoaderIter):
    """Waits for the workers up to the user's limit, and looks every second whether they are alive.

    torch waits for one timeout: either a dead worker is noticed late, or a slow one ends the run. The latter also between two
    passes, where persistent workers have to answer.
    """

    def __init__(self, loader: Any, limit: float):
        self.limit = limit
        super().__init__(loader)

    def _get_data(self) -> Any:
        began = time.monotonic()
        while True:
            arrived, data = self._try_get_data(min(_POLL_S, self.limit or _POLL_S))
            if arrived:
                return data
            if self.limit and time.monotonic() - began >= self.limit:
                raise _SlowWorkers


class _PatientLoader(DataLoader[LoadedBatch]):
    """A DataLoader whose workers may be silent for `limit` seconds; 0: for ever."""

    def __init__(self, limit: float, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.limit = limit

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        self.check_worker_number_rationality()
        return _PatientIterator(self, self.limit)


class _KeySampler:
    """The sampler of the DataLoader. It gives the key of each batch of one pass."""

    def __init__(self, order: Order):
        self.order = order
        self.epoch = self.start = 0  # of the next pass
        self.iteration = 0

    def __iter__(self) -> Iterator[BatchKey]:
        self.iteration += 1
        batches = self.order.batches(self.epoch, self.start)
        epoch, iteration = self.epoch, self.iteration  # local copies: another pass may start before this one ends
        return (BatchKey(epoch, mine.tolist(), int(ids[0]), iteration) for ids, mine in batches)


class _SendingFetcher(torch.utils.data.Dataset[LoadedBatch]):
    """A fetcher in a worker. It gives its batches as messages for the main process."""

    def __init__(self, fetcher: Fetcher):
        self.fetcher, self.sender = copy(fetcher), BatchSender()
        self.fetcher.allocate = self.sender.allocate

    def __getitem__(self, index: Any) -> Any:
        self.sender.start(BatchKey(*index).iteration)
        loaded = self.fetcher[index]
        return loaded if loaded.batch is None else loaded._replace(batch=self.sender.pack(loaded.batch))


def _identity(loaded: Any) -> Any:
    """The collate function of the DataLoader; `Fetcher` collates already. Module-level, so that spawned workers can import it."""
    return loaded


def _exit_reason(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"data worker {worker.pid} {how}"


@contextmanager
def signals_blocked() -> Generator[None]:
    """Block SIGINT and SIGTERM while workers start. A signal before `init_worker` would kill them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _sigchld_restored() -> Generator[None]:
    """Remove the SIGCHLD handler that a DataLoader sets. It would raise anywhere in the main process, also inside a step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if str(getattr(before, "__module__", "")).startswith("torch."):
            before = signal.SIG_DFL
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def init_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a worker. It ignores SIGINT and SIGTERM: the main process ends its workers after it has saved the state."""
    for number in _BLOCKED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
    keep_freed(_KEPT_BYTES)
    if then is not None:
        then(worker)


def kill_workers(workers: Sequence[BaseProcess]) -> None:
    """Kill the workers that are still alive. They ignore SIGTERM, so at exit the interpreter would wait for them forever."""
    alive = [w for w in workers if w.is_alive()]
    if not alive:
        return
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if on_main else None  # torch's handler would raise
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join()
    if on_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
