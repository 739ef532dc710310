"""The process group: rank, world size and device of this process, start and stop."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td

from ailab.dist import launcher
from ailab.dist.rendezvous import Rendezvous
from ailab.errors import ConfigError, PeerError

_ATTEMPT_S = 2.0  # one attempt to reach the store
_PROBE_S = 1.0  # a broken connection fails at once; a peer that is alive but busy does not answer within this time
_store: Any = None  # the launcher's
_rendezvous: Rendezvous | None = None
_collective_error: RuntimeError | None = None  # see `record_error`
_probe_group: Any = None  # a gloo group of its own for one purpose: to find out whether a peer is gone


def active() -> bool:
    """Whether the process group exists."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """The number of this process, 0 .. world_size - 1; 0 without a process group."""
    return td.get_rank() if active() else 0


def world_size() -> int:
    """The number of processes that train together; 1 without a process group."""
    return td.get_world_size() if active() else 1


def launched() -> bool:
    """Whether torchrun, or another launcher that sets torchrun's variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def pick_device() -> torch.device:
    """The GPU of this local rank; the CPU where there is no GPU. The GPU becomes the current CUDA device.

    A process that sees one GPU takes it: its launcher has given it a GPU of its own (`srun --gpus-per-task=1`, or
    CUDA_VISIBLE_DEVICES). That no other process has the same one is checked by `device_problem`.

    Raises:
        ConfigError: this process sees fewer GPUs than there are local ranks, and more than one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    started = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if 1 < found < started:  # checked on every rank, because one rank reports it for all
        raise ConfigError(
            f"{started} processes were started on this machine, and they see {found} GPUs. Start one process per GPU, or let\n"
            "  each see one GPU (CUDA_VISIBLE_DEVICES, srun --gpus-per-task=1)."
        )
    local = local if found > 1 else 0
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def device_problem(device: torch.device) -> ConfigError | None:
    """An error if another rank uses the same GPU. Each rank calls it after `connect`, and gives the result to `compare`."""
    if _rendezvous is None or device.type != "cuda":
        return None
    # The same number means different GPUs where a launcher gives each task its own. Parts of one GPU (MIG) may share a uuid.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", os.getpid())
    name = f"{socket.gethostname()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {uuid}"
    if (other := _rendezvous.claim(name)) is None:
        return None
    return ConfigError(f"this rank would use the same GPU as rank {other}: {device} ({uuid}). Start one process per GPU.")


def connect(init_method: str = "env://", timeout_s: float = 600) -> None:
    """Connect to the other ranks through the launcher's store: the rendezvous.

    `compare` needs it, and `start` calls it. With one process, or when called again, it does nothing.

    Args:
        init_method: "env://", "tcp://host:port" of rank 0, or another URL that torch.distributed knows.
        timeout_s: seconds to wait for the other ranks.

    Raises:
        ConfigError: `init_method` has no host or no port.
        PeerError: a rank does not come in time, or the store cannot be opened.
    """
    global _store, _rendezvous
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or _rendezvous is not None:
        return
    me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = launcher.store_address(init_method, os.environ)
    try:
        _store = _tcp_store(*address, me == 0, timeout_s) if address else next(td.rendezvous(init_method, me, world))[0]
        _rendezvous = Rendezvous(td.PrefixStore("ailab", _store), me, world, timeout_s)
    except (RuntimeError, ValueError) as e:
        why = launcher.port_problem(address[1]) if address and me == 0 else ""
        raise PeerError(
            f"rank {me} of {world} could not connect to the other ranks at {init_method}: {why or first_line(e)}"
        ) from e


def _tcp_store(host: str, port: int, is_rank_0: bool, timeout_s: float) -> Any:
    """The launcher's store, or one that rank 0 opens. Attempts are short, because a signal is handled only in between."""
    opens = is_rank_0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
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
    """Check that all ranks have the same fingerprint and none has a problem. Every rank must call it.

    Args:
        fingerprint: {name: short text}, what must be the same on every rank.
        problem: the error that this rank has met, if any.

    Raises:
        AilabError: the same on every rank; see `Rendezvous.compare`. With one process, `problem` itself is raised.
    """
    if _rendezvous is not None:
        _rendezvous.compare(fingerprint, problem)
    elif problem is not None:
        raise problem


def current_rendezvous() -> Rendezvous | None:
    """The rendezvous that `connect` made; None with one process. It outlives the process group."""
    return _rendezvous


def start(cfg: Mapping[str, Any], device: torch.device) -> str | None:
    """Join the process group, if a launcher started several processes.

    Args:
        cfg: the section `dist` of the cfg: "backend", "init_method" and "timeout_s" (seconds).
        device: the device of this rank.

    Returns:
        A one-line warning if another backend than the one in the cfg is used, else None.

    Raises:
        ConfigError: this torch does not have the backend.
        PeerError: the group does not form within `cfg["timeout_s"]` seconds.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or active():
        return None
    backend, warning = _backend(cfg.get("backend"), device)
    connect(cfg["init_method"], float(cfg["timeout_s"]))
    assert _rendezvous is not None
    me, world, limit = _rendezvous.rank, _rendezvous.world_size, timedelta(seconds=float(cfg["timeout_s"]))
    options: dict[str, Any] = {"device_id": device} if backend == "nccl" else {}
    try:
        # Keys of this attempt alone: after a restart by torchrun the store still has the addresses of the attempt before.
        store = td.PrefixStore(f"ailab/{_rendezvous.attempt}/group{_rendezvous.next_group()}", _store)
        td.init_process_group(backend, store=store, rank=me, world_size=world, timeout=limit, **options)
        global _probe_group
        _probe_group = (
            td.new_group(backend="gloo", timeout=limit) if backend == "gloo" else None
        )  # NCCL has its own error class
    except (RuntimeError, ValueError) as e:
        raise PeerError(f"rank {me} of {world} could not join the process group ({backend}): {first_line(e)}") from e
    return warning


def _backend(asked: str | None, device: torch.device) -> tuple[str, str | None]:
    """The backend, and a warning if it is not the one in the cfg."""
    backend, warning = asked or ("nccl" if device.type == "cuda" else "gloo"), None
    if backend == "nccl" and device.type != "cuda":
        backend, warning = "gloo", "dist.backend is 'nccl', but there is no CUDA device here: using gloo."
    if not td.is_backend_available(backend):
        other = [b for b in ("nccl", "gloo") if td.is_backend_available(b)]
        raise ConfigError(f"cfg.dist.backend: this torch has no {backend!r}; it has: {', '.join(other) or 'none'}.")
    return backend, warning


def stop() -> None:
    """Leave the process group, if there is one."""
    global _probe_group, _collective_error
    _probe_group = _collective_error = None
    if active():
        td.destroy_process_group()


def record_error(error: RuntimeError) -> None:
    """Keep the error of a collective that torch would hide; see `cause`."""
    global _collective_error
    _collective_error = error


def cause(error: RuntimeError) -> RuntimeError | None:
    """The error that broke the process group: a recorded one, or `error` itself. None if the group is not broken."""
    if world_size() == 1:
        return None
    if _collective_error is not None:
        return _collective_error
    return error if isinstance(error, td.DistError) or _is_broken() else None


def _is_broken() -> bool:
    """Whether a tiny collective in the probe group fails at once. It does when a peer is gone."""
    if _probe_group is None:
        return False
    try:
        work: Any = td.all_reduce(torch.zeros(1), group=_probe_group, async_op=True)
        until = time.monotonic() + _PROBE_S
        while not work.is_completed() and time.monotonic() < until:
            time.sleep(0.01)
        if not work.is_completed():  # freeing the group would wait for this work, maybe for ever: so it is never freed
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(_probe_group))
        return bool(work.is_completed() and not work.is_success())
    except RuntimeError:
        return True


def first_line(e: Exception) -> str:
    """The first line of a message; the name of the class where there is no message."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
