"""The process group: who we are, how it is made, and the collectives that the rest of ailab uses."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as td
from torch import Tensor

from ailab.dist import launcher
from ailab.dist.rendezvous import Rendezvous
from ailab.errors import AilabError, ConfigError, PeerError

_ATTEMPT_S = 2.0
_PROBE_S = 1.0  # a broken connection answers at once; a peer that is alive and elsewhere does not answer within this
_store: Any = None  # the launcher's
_rendezvous: Rendezvous | None = None
_lost: RuntimeError | None = None  # what broke the sum of a bucket
_probe: Any = None  # a gloo group on which nothing is ever sent but the probe for a peer that is gone


def active() -> bool:
    """Whether a process group exists."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process's number, 0 .. world_size - 1."""
    return td.get_rank() if active() else 0


def world_size() -> int:
    """How many processes train together."""
    return td.get_world_size() if active() else 1


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def pick_device() -> torch.device:
    """The accelerator of this local rank, else the CPU.

    Raises:
        ConfigError: when there are fewer GPUs than local ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    started = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if started > found:  # on every rank, for one of them is the one that says so
        raise ConfigError(
            f"torchrun started {started} processes on this machine, which has {found} GPUs; one GPU serves one process."
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def connect(init_method: str = "env://", timeout_s: float = 600) -> None:
    """Find the other ranks of this launch, where a launcher started several: what `compare` needs, and the first half of `start`.

    Raises:
        PeerError: when one does not come within `timeout_s` seconds, or the store cannot be made.
    """
    global _store, _rendezvous
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or _rendezvous is not None:
        return
    me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    home = launcher.store_address(init_method, os.environ)
    try:
        _store = _tcp_store(*home, me == 0, timeout_s) if home else next(td.rendezvous(init_method, me, world))[0]
        _rendezvous = Rendezvous(td.PrefixStore("ailab", _store), me, world, timeout_s)
    except (RuntimeError, ValueError) as e:
        why = launcher.port_problem(home[1]) if home and me == 0 else ""
        raise PeerError(f"rank {me} of {world} could not meet the others at {init_method}: {why or _first_line(e)}") from e


def _tcp_store(host: str, port: int, first: bool, timeout_s: float) -> Any:
    """The launcher's store, or one that rank 0 opens; reached in short attempts, for a signal is handled only in between."""
    opens = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    until = time.monotonic() + timeout_s
    while True:
        try:
            wait = timedelta(seconds=timeout_s if opens else _ATTEMPT_S)
            store = td.TCPStore(host, port, None, opens, wait, wait_for_workers=False, multi_tenant=True)
            store.set_timeout(timedelta(seconds=timeout_s))
            return store
        except RuntimeError:
            if opens or time.monotonic() >= until:
                raise


def compare(fingerprint: Mapping[str, str], problem: Exception | None = None) -> None:
    """Hold that all ranks have the same fingerprint and no problem; every rank must ask. With one process: raise the problem.

    Raises:
        AilabError: the same on every rank; see `Rendezvous.compare`.
    """
    if _rendezvous is not None:
        _rendezvous.compare(fingerprint, problem)
    elif problem is not None:
        raise problem


def current_rendezvous() -> Rendezvous | None:
    """Where ranks leave texts for each other, before and after the life of the process group; None with one process."""
    return _rendezvous


def start(cfg: Mapping[str, Any], device: torch.device) -> str | None:
    """Join the process group when a launcher started several of us.

    Its keys in the store are those of this attempt: a group that torchrun restarts would else read its predecessor's addresses.

    Returns:
        A one-line warning where something else than asked for was used, else None.

    Raises:
        ConfigError: for a backend that this torch does not have.
        PeerError: when the group does not form within `cfg["timeout_s"]` seconds.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or active():
        return None
    backend, warning = _backend(cfg.get("backend"), device)
    connect(cfg["init_method"], float(cfg["timeout_s"]))
    assert _rendezvous is not None
    me, world, limit = _rendezvous.rank, _rendezvous.world_size, timedelta(seconds=float(cfg["timeout_s"]))
    home: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
    try:
        mine = td.PrefixStore(f"ailab/{_rendezvous.attempt}/group{_rendezvous.next_group()}", _store)
        td.init_process_group(backend, store=mine, rank=me, world_size=world, timeout=limit, **home)
        global _probe
        _probe = td.new_group(backend="gloo", timeout=limit) if backend == "gloo" else None  # NCCL's errors say what they are
    except (RuntimeError, ValueError) as e:
        raise PeerError(f"rank {me} of {world} could not join the process group ({backend}): {_first_line(e)}") from e
    return warning


def _backend(asked: str | None, device: torch.device) -> tuple[str, str | None]:
    """The backend, and a warning where it is another than the one asked for."""
    backend, warning = asked or ("nccl" if device.type == "cuda" else "gloo"), None
    if backend == "nccl" and device.type != "cuda":
        backend, warning = "gloo", "dist.backend is 'nccl', but there is no CUDA device here: using gloo."
    if not td.is_backend_available(backend):
        other = [b for b in ("nccl", "gloo") if td.is_backend_available(b)]
        raise ConfigError(f"cfg.dist.backend: this torch has no {backend!r}; it has: {', '.join(other) or 'none'}.")
    return backend, warning


def stop() -> None:
    """Leave the process group, if there is one."""
    global _probe, _lost
    _probe = _lost = None
    if active():
        td.destroy_process_group()


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in a new tensor; traced into the graph when compiled."""
    return begin_all_reduce(tensor)()


def begin_all_reduce(tensor: Tensor, *, in_place: bool = False) -> Callable[[], Tensor]:
    """Begin the sum over all ranks; call what comes back for the result. What is computed in between hides it.

    Args:
        tensor: this rank's part.
        in_place: nobody else has it, so that the result may take its place.
    """
    if world_size() == 1:
        return lambda: tensor
    summed = tensor if in_place else tensor.clone()
    if torch.compiler.is_compiling():
        td.all_reduce(summed)  # the compiler moves the wait to where the sum is used
        return lambda: summed
    with as_peer_error("a sum over all ranks"):
        work: Any = td.all_reduce(summed, async_op=True)

    def finished() -> Tensor:
        with as_peer_error("a sum over all ranks"):
            work.wait()
        return summed

    return finished


class _Summed(torch.autograd.Function):
    """A sum over all ranks that each of them uses: the gradient of an addend is the sum of the gradients of all uses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].contiguous())


def all_reduce_differentiable(tensor: Tensor) -> Tensor:
    """The sum over all ranks, differentiable; every rank has to use it in its loss, and in the same order as the others."""
    return tensor if world_size() == 1 else cast("Tensor", _Summed.apply(tensor))


def begin_all_reduce_bucket(bucket: Tensor, dtype: torch.dtype | None) -> Any:
    """The future of a bucket of DDP, summed over the ranks; it travels as `dtype`."""
    sent = bucket if dtype is None else bucket.to(dtype)
    future: Any = cast(Any, td.all_reduce(sent, async_op=True)).get_future()

    def arrived(done: Any) -> Tensor:
        global _lost
        try:
            summed = done.value()[0]  # raises what broke the sum; a future that is not asked keeps it to itself
        except RuntimeError as e:
            _lost = e  # what `backward` raises of it says only that a callback failed
            raise
        return bucket if dtype is None else bucket.copy_(summed)

    return future.then(arrived)


def begin_broadcast_tensors(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to bring rank 0's tensors to every rank: one reduction per dtype; traced into the graph when compiled."""
    if world_size() == 1 or not tensors:
        return lambda: tensors
    begun: list[tuple[list[str], Callable[[], Tensor]]] = []
    for dtype in {t.dtype: None for t in tensors.values()}:
        names = [n for n, t in tensors.items() if t.dtype == dtype]
        flat = torch.cat([tensors[n].detach().reshape(-1) for n in names])
        # A sum to which the others add zeros: Dynamo does not trace a broadcast.
        begun.append((names, begin_all_reduce(flat if rank() == 0 else torch.zeros_like(flat), in_place=True)))

    def finished() -> dict[str, Tensor]:
        out = dict(tensors)
        for names, result in begun:
            parts = result().split([tensors[n].numel() for n in names])
            out.update({n: part.view_as(tensors[n]) for n, part in zip(names, parts, strict=True)})
        return out

    return finished


def broadcast_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank."""
    return begin_broadcast_tensors(tensors)()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; every rank must ask."""
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor(float(flag), device=device)).item())


def barrier() -> None:
    """Wait for every rank."""
    if active():
        with as_peer_error("a barrier"):
            td.barrier()


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks one after the other along dimension 0, which may differ in length."""
    if world_size() == 1:
        return tensor
    length = torch.tensor([tensor.shape[0]], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    with as_peer_error("a gathering of samples"):
        td.all_gather(lengths, length)
        sizes = [int(n) for n in lengths]
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        td.all_gather(parts, padded)
    return torch.cat([p[:n] for p, n in zip(parts, sizes, strict=True)])


def broadcast_bytes(data: bytes, device: torch.device) -> bytes:
    """Rank 0's bytes on every rank. Tensors only: nothing is unpickled."""
    length = torch.tensor([len(data)], device=device)
    with as_peer_error("a message of rank 0"):
        td.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if rank() == 0:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content)
        td.broadcast(content, 0)
    return bytes(content.tolist())


@contextmanager
def as_peer_error(what: str) -> Generator[None]:
    """What torch raises inside, where nothing but collectives runs, as a `PeerError` that says what failed."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo has no class of its own for it
        raise _peer_error(what, e) from e


@contextmanager
def peer_error_at(what: Callable[[], str]) -> Generator[None]:
    """A `PeerError` raised inside with `what()` in front; and one for what torch raises there if the group is broken."""
    try:
        yield
    except PeerError as e:
        raise PeerError(f"{what()}: {e}") from e.__cause__
    except (AilabError, torch.OutOfMemoryError):
        raise
    except RuntimeError as e:
        if world_size() == 1 or not (_lost or isinstance(e, td.DistError) or _broken()):
            raise
        raise PeerError(f"{what()}: {_peer_error('the exchange of gradients', _lost or e)}") from e


def _peer_error(what: str, e: RuntimeError) -> PeerError:
    return PeerError(f"rank {rank()}: {what} failed: another process ended or did not answer in time.\n  {_first_line(e)}")


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def _broken() -> bool:
    """Whether a tiny collective in a group of its own fails at once, as it does when a peer is gone."""
    if _probe is None:
        return False
    try:
        work: Any = td.all_reduce(torch.zeros(1), group=_probe, async_op=True)
        until = time.monotonic() + _PROBE_S
        while not work.is_completed() and time.monotonic() < until:
            time.sleep(0.01)
        if not work.is_completed():  # the group would wait for its end before it goes: it never goes
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(_probe))
        return bool(work.is_completed() and not work.is_success())
    except RuntimeError:
        return True
