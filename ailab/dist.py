"""The process group: who we are, how it is made, and the collectives that the rest of ailab uses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from ailab.errors import ConfigError, PeerError


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
    if local >= found:
        raise ConfigError(f"local rank {local} has no GPU: torchrun started more processes than the {found} GPUs here.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def start(cfg: Mapping[str, Any], device: torch.device) -> str | None:
    """Join the process group when a launcher started several of us.

    The store is prefixed with the restart count: a group that torchrun restarts would else read its predecessor's addresses.

    Returns:
        A one-line warning where something else than asked for was used, else None.

    Raises:
        PeerError: when the group does not form within `cfg["timeout_s"]` seconds.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1 or active():
        return None
    backend = cfg.get("backend") or ("nccl" if device.type == "cuda" else "gloo")
    warning = None
    if backend == "nccl" and device.type != "cuda":
        backend, warning = "gloo", "dist.backend is 'nccl', but there is no CUDA device here: using gloo."
    limit = timedelta(seconds=float(cfg["timeout_s"]))
    me, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, _, _ = next(td.rendezvous(cfg["init_method"], me, world, timeout=limit))
        prefixed = td.PrefixStore(f"ailab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        td.init_process_group(backend, store=prefixed, rank=me, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as e:
        raise PeerError(f"rank {me} of {world} could not join the process group ({backend}): {e}") from e
    return warning


def stop() -> None:
    """Leave the process group, if there is one."""
    if active():
        td.destroy_process_group()


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in a new tensor; traced into the graph when compiled."""
    if world_size() == 1:
        return tensor
    summed = tensor.clone()
    td.all_reduce(summed)
    return summed


def broadcast_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank: one broadcast per dtype."""
    if world_size() == 1 or not tensors:
        return tensors
    out = dict(tensors)
    for dtype in {t.dtype: None for t in tensors.values()}:
        names = [n for n, t in tensors.items() if t.dtype == dtype]
        flat = torch.cat([tensors[n].reshape(-1) for n in names])
        td.broadcast(flat, 0)
        for n, part in zip(names, flat.split([tensors[n].numel() for n in names]), strict=True):
            out[n] = part.view_as(tensors[n])
    return out


def agree(flag: bool, device: torch.device) -> bool:
    """Whether any rank says yes; every rank must ask."""
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor(float(flag), device=device)).item())


def barrier() -> None:
    """Wait for every rank."""
    if active():
        td.barrier()


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks one after the other along dimension 0, which may differ in length."""
    if world_size() == 1:
        return tensor
    length = torch.tensor([tensor.shape[0]], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
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
    td.broadcast(length, 0)
    content = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if rank() == 0:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content)
    td.broadcast(content, 0)
    return bytes(content.tolist())
