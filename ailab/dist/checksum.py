"""The checksum of a state. The state of a run is one value on all ranks, and this is how they find out when it is not."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ailab import tree
from ailab.dist.collectives import all_gather
from ailab.dist.group import world_size
from ailab.errors import PeerError

_CHUNKS = {"cpu": 1 << 17}  # elements at a time: what the cache holds
_CHUNK = 1 << 22  # elsewhere: few kernels, and little memory
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


def checksum(tensor: Tensor) -> Tensor:
    """A number, () int64, that depends on each bit of the values and on their order. The memory layout does not count."""
    values = tensor.detach()
    values = (torch.view_as_real(values.resolve_conj()) if values.is_complex() else values).reshape(-1)
    bits = values.view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    # Odd factors: no change of a single element is lost when the sum overflows.
    size = _CHUNKS.get(tensor.device.type, _CHUNK)
    factors = 2 * torch.arange(min(bits.numel(), size), device=tensor.device) + 1
    for part in bits.split(size):
        total = total * 31 + (part * factors[: part.numel()]).sum()
    return total


def check_same_state(state: Any, device: torch.device) -> None:
    """Compare the values of a state on all ranks, bit for bit. Every rank must call it. One collective, one device read.

    All of a state counts: parameters, buffers, optimizer state, and the slots of all hooks. No slot may belong to one rank,
    because a checkpoint holds those of rank 0.

    Args:
        state: a tree.
        device: where the collective runs.

    Raises:
        PeerError: the states differ. The same on every rank; it names the first value that differs, and the ranks.
    """
    if world_size() == 1:
        return
    items = list(tree.items(state))
    names = ["the structure of the state", *(f"state.{path}" for path, _ in items)]
    sums = [torch.tensor(zlib.crc32(repr(names).encode()), device=device)]
    for _, leaf in items:
        is_tensor = isinstance(leaf, Tensor)
        sums.append(checksum(leaf).to(device) if is_tensor else torch.tensor(zlib.crc32(repr(leaf).encode()), device=device))
    rows = all_gather(torch.stack(sums)).cpu()
    ranks = world_size()
    same_length = rows.numel() == ranks * len(sums)
    rows = rows.view(ranks, -1) if same_length else torch.arange(ranks).view(-1, 1)
    differs = (rows != rows[0]).any(0)
    if not differs.any():
        return
    first = int(differs.nonzero()[0])
    others = [rank for rank in range(ranks) if rows[rank, first] != rows[0, first]]
    error = PeerError(
        f"{names[first]} is not the same on all ranks: {_ranks(others)} not as rank 0. {int(differs.sum())} of {len(sums) - 1} "
        "values differ.\n"
        "  A hook may have used the rank, a clock, or random numbers of Python or NumPy; or the processors are of several kinds."
    )
    error.on_all_ranks = True
    raise error


def _ranks(some: list[int]) -> str:
    shown = ", ".join(map(str, some[:8])) + (", ..." if len(some) > 8 else "")
    return f"rank {shown} is" if len(some) == 1 else f"ranks {shown} are"
