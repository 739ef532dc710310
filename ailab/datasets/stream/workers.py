"""The processes that make batches: started without losing a signal, replaced where one died or hangs, ended with the host."""

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

import torch
from torch.utils.data import DataLoader

from ailab import tree
from ailab.datasets.stream.loading import Fetcher, Key, Loaded
from ailab.datasets.stream.order import Order
from ailab.datasets.stream.transport import Inbox, Outbox, Parcel
from ailab.errors import DataError
from ailab.heap import keep_freed

_KEPT = 256 << 20  # bytes of freed memory that a worker holds on to
_SHIELDED = (signal.SIGINT, signal.SIGTERM)
_LOOK_S = 1.0  # seconds between two looks at whether the workers are alive
_REPLACED = 3  # times in an epoch


class Workers:
    """The batches of a fetcher in their order, made by `num_workers` processes, or by this one when there are none.

    A batch is a pure function of its key, so processes that are gone, or give nothing for `timeout` seconds, are replaced at the
    same position and nothing else changes.

    Args:
        fetcher: makes the batches.
        order: of the samples.
        name: the split, for messages.
        report: called with one line when workers are replaced.
        num_workers: processes.
        pin_memory: whether batches come in pinned memory.
        timeout: seconds to wait for a batch; 0 waits for ever.
        worker_init_fn: called in each worker with its number.
        settings: the rest goes to `torch.utils.data.DataLoader`.
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
        self._keys = _Keys(order)
        self._processes, self._pin = num_workers, pin_memory
        self._make = partial(
            DataLoader[Loaded],
            _Sender(fetcher) if num_workers else fetcher,
            batch_size=None,
            sampler=self._keys,  # pyright: ignore[reportArgumentType]  # it has an order and no length
            collate_fn=_same,
            generator=torch.Generator(),  # else each epoch would draw from the global one
            worker_init_fn=partial(start_worker, worker_init_fn),
            num_workers=num_workers,
            # One that came to its end is told from one that waits, and is asked again, so this is no limit of ours.
            timeout=min(_LOOK_S, timeout or _LOOK_S) if num_workers else 0,
            **settings,
        )
        self._loader, self._inbox = self._make(), Inbox(pin_memory)

    def batches(self, epoch: int, start: int) -> Iterator[Loaded]:
        """From step `start` on.

        Raises:
            DataError: workers were lost more than three times.
        """
        lost: list[str] = []
        while True:
            source, inbox = self._begin(epoch, start)
            while (loaded := self._next(source)) is not None:
                if isinstance(loaded, str):
                    break
                yield self._received(loaded, inbox)
                start += 1
            else:
                return
            lost.append(loaded)
            self._end(source)
            del source, inbox
            gc.collect()  # else new workers inherit the old iterator, find it, and complain of processes that are not theirs
            place = f"{self.name}: {loaded}, at or after step {start} of epoch {epoch}"
            if len(lost) > _REPLACED:
                ids = self.order.indices(epoch, start).tolist()[:8]
                raise DataError(
                    f"{place}, after {_REPLACED} times before in this epoch.\n"
                    f"  The samples of that step: {ids}. A worker that is killed most often had no memory left: fewer\n"
                    f"  num_workers, a smaller prefetch_factor or batch_size help. {self.name}_dataloader.timeout is the limit."
                )
            self.report(f"{place}; the workers are replaced.")

    def _received(self, loaded: Loaded, inbox: Inbox) -> Loaded:
        """With its batch in memory of this process, pinned if asked for."""
        if isinstance(loaded.batch, Parcel):
            return loaded._replace(batch=inbox.open(loaded.batch))
        return loaded._replace(batch=tree.map(torch.Tensor.pin_memory, loaded.batch)) if self._pin else loaded

    def _begin(self, epoch: int, start: int) -> tuple[Iterator[Loaded], Inbox]:
        self._keys.epoch, self._keys.start = epoch, start
        with signals_held(), _without_alarm():
            source = iter(self._loader)
        if workers := getattr(source, "_workers", ()):
            Finalize(source, reap, (workers,), exitpriority=100)  # before multiprocessing joins what is left
        return source, self._inbox if self._loader.persistent_workers else Inbox(self._pin)  # it holds on to shared memory

    def _next(self, source: Iterator[Loaded]) -> Loaded | str | None:
        """The next batch, None at the end, or what happened to the workers."""
        began = time.monotonic()
        while True:
            asked = time.monotonic()
            try:
                return next(source)
            except StopIteration:
                return None
            except Exception as error:  # of any class, by chance, when a worker dies
                if not self._processes:
                    raise
                now, workers = time.monotonic(), getattr(source, "_workers", ())
                early = now - asked < 0.5 * min(_LOOK_S, self.timeout or _LOOK_S)
                if early:  # a pipe may break before the process behind it is gone
                    gone = wait([w.sentinel for w in workers], timeout=_LOOK_S)
                    _ = [w.join() for w in workers if w.sentinel in gone]
                if dead := [w for w in workers if not w.is_alive()]:
                    return _cause(dead[0])
                if early:
                    return (
                        f"a data worker failed ({type(error).__name__}: {(str(error).strip()[-200:].splitlines() or [''])[-1]})"
                    )
                if self.timeout and now - began >= self.timeout:
                    return f"no data worker gave a batch for {self.timeout:g} s"

    def _end(self, source: Iterator[Loaded]) -> None:
        """Kill what is left of the workers; others will start in their place."""
        reap(getattr(source, "_workers", ()))
        self._loader, self._inbox = self._make(), Inbox(self._pin)


class _Keys:
    """The sampler of the DataLoader: the keys of one pass."""

    def __init__(self, order: Order):
        self.order = order
        self.epoch = self.start = 0  # of the next pass
        self.lap = 0

    def __iter__(self) -> Iterator[Key]:
        self.lap += 1
        batches = self.order.batches(self.epoch, self.start)
        epoch, lap = self.epoch, self.lap  # of this pass: another may begin before it ends
        return (Key(epoch, mine.tolist(), int(ids[0]), lap) for ids, mine in batches)


class _Sender(torch.utils.data.Dataset[Loaded]):
    """A fetcher whose batches go to another process."""

    def __init__(self, fetcher: Fetcher):
        self.fetcher, self.outbox = copy(fetcher), Outbox()
        self.fetcher.room = self.outbox.room

    def __getitem__(self, index: Any) -> Any:
        self.outbox.begin(Key(*index).lap)
        loaded = self.fetcher[index]
        return loaded if loaded.batch is None else loaded._replace(batch=self.outbox.pack(loaded.batch))


def _same(loaded: Any) -> Any:
    """The collation of the DataLoader: a `Fetcher` has done it. A function of the module, so that it can be spawned."""
    return loaded


def _cause(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"data worker {worker.pid} {how}"


@contextmanager
def signals_held() -> Generator[None]:
    """Hold SIGINT and SIGTERM back while workers start: one that came before `start_worker` would kill them."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


@contextmanager
def _without_alarm() -> Generator[None]:
    """Take back the SIGCHLD handler that a DataLoader sets: it raises wherever the host is, in the middle of a step too."""
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


def start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Leave SIGINT and SIGTERM to the host, which ends its workers itself once the state is saved."""
    for number in _SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHIELDED)
    keep_freed(_KEPT)
    if then is not None:
        then(worker)


def reap(workers: Sequence[BaseProcess]) -> None:
    """Kill workers that outlive their iterator: they ignore SIGTERM, so at exit the interpreter would wait for them forever."""
    alive = [w for w in workers if w.is_alive()]
    if not alive:
        return
    on_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if on_main else None  # one of torch's own would report a death
    for worker in alive:
        worker.kill()
    for worker in alive:
        worker.join()
    if on_main:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
