"""The collectives that the rest of ailab uses, and their errors.

With one process a tensor comes back as it is, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as td
from torch import Tensor

from ailab import tree
from ailab.dist import group
from ailab.dist.group import active, first_line, rank, world_size
from ailab.errors import AilabError, ConfigError, PeerError

_gathers = 0


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in a new tensor. A compiler traces it into the graph.

    Args:
        tensor: of the same shape and dtype on every rank.

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    return begin_all_reduce(tensor)()


def begin_all_reduce(tensor: Tensor, *, in_place: bool = False) -> Callable[[], Tensor]:
    """Begin an all-reduce (sum) and return a function that waits for the result. Compute something else in between.

    Args:
        tensor: of the same shape and dtype on every rank.
        in_place: write the result into `tensor`, which must be contiguous. Nothing else may use that memory.

    Raises:
        PeerError: another rank ended, or did not answer in time. The returned function raises it too.
    """
    if world_size() == 1:
        return lambda: tensor
    # Ranks add up what lies at the same place in memory, so it must lie in the same order on each.
    summed = tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_compiling():
        td.all_reduce(summed)  # the compiler moves the wait to where the sum is used
        return lambda: summed
    with as_peer_error("an all-reduce"):
        work: Any = td.all_reduce(summed, async_op=True)

    def finished() -> Tensor:
        with as_peer_error("an all-reduce"):
            work.wait()
        return summed

    return finished


class _AllReduce(torch.autograd.Function):
    """Every rank uses the sum, so the gradient of one rank's part is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        summed = all_reduce(tensor)
        # Where a traced forward returns the very tensor that was written to, torch 2.11 leaves out the backward, in silence.
        return summed.clone() if torch.compiler.is_compiling() else summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0])


def all_reduce_differentiable(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, with a gradient.

    Every rank must use the result in its loss. If there are several, their order must be the same on every rank.

    Args:
        tensor: of the same shape and dtype on every rank.

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    return tensor if world_size() == 1 else cast("Tensor", _AllReduce.apply(tensor))


def begin_all_reduce_bucket(bucket: Tensor, dtype: torch.dtype | None) -> Any:
    """Begin the all-reduce (sum) of a bucket of DistributedDataParallel; returns its future, as a communication hook must.

    Args:
        bucket: the flat gradients. The sum takes their place.
        dtype: the dtype in which the bucket is sent; None for its own.
    """
    sent = bucket if dtype is None else bucket.to(dtype)
    future: Any = cast(Any, td.all_reduce(sent, async_op=True)).get_future()

    def arrived(done: Any) -> Tensor:
        try:
            summed = done.value()[0]  # raises the error of the all-reduce, which nothing else shows
        except RuntimeError as e:
            group.record_error(e)  # `backward` will only say that a callback failed
            raise
        return bucket if dtype is None else bucket.copy_(summed)

    return future.then(arrived)


def begin_broadcast_tensors(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to broadcast the tensors of rank 0, and return a function that waits for them. A compiler traces it into the graph.

    There is one message per dtype.

    Args:
        tensors: by name. Names, shapes and dtypes must be the same on every rank; the values of other ranks are ignored. The
            results have the memory layout of this rank's tensors.

    Raises:
        PeerError: another rank ended, or did not answer in time. The returned function raises it too.
    """
    if world_size() == 1 or not tensors:
        return lambda: tensors
    begun: list[tuple[list[str], Callable[[], Tensor]]] = []
    for dtype in {t.dtype: None for t in tensors.values()}:
        names = [n for n, t in tensors.items() if t.dtype == dtype]
        flat = torch.cat([tensors[n].detach().reshape(-1) for n in names])
        # An all-reduce to which the other ranks add zeros, because Dynamo does not trace a broadcast.
        begun.append((names, begin_all_reduce(flat if rank() == 0 else torch.zeros_like(flat), in_place=True)))

    def finished() -> dict[str, Tensor]:
        out = dict(tensors)
        for names, result in begun:
            parts = result().split([tensors[n].numel() for n in names])
            out.update({n: tree.shaped(part, tensors[n]) for n, part in zip(names, parts, strict=True)})
        return out

    return finished


def broadcast_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of rank 0, on every rank; see `begin_broadcast_tensors`."""
    return begin_broadcast_tensors(tensors)()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds on any rank. Every rank must call it. It reads from the device.

    Args:
        flag: of this rank.
        device: where the collective runs.

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    if world_size() == 1:
        return flag
    return bool(all_reduce(torch.tensor(float(flag), device=device)).item())


def barrier() -> None:
    """Wait until every rank is here.

    Raises:
        PeerError: another rank ended, or did not come in time.
    """
    if active():
        with as_peer_error("a barrier"):
            td.barrier()


def all_gather(tensor: Tensor, *, differentiable: bool = False) -> Tensor:
    """The tensors of all ranks, concatenated along dimension 0 in the order of the ranks.

    For a loss that compares each sample with those of the global batch (InfoNCE): gather what the other ranks have, compute the
    losses of this rank's own samples, and return them per sample. `rank_offset` says where this rank's rows begin.

    Args:
        tensor: of shape (n, ...); n may differ between ranks, dtype and the other dimensions may not.
        differentiable: whether gradients flow back to the ranks that the rows came from. Then every rank has to use the result
            in its loss, and the loss cannot be compiled.

    Raises:
        PeerError: another rank ended, or did not answer in time.
        ConfigError: differentiable, in a compiled loss.
    """
    global _gathers
    if world_size() == 1:
        return tensor
    if not differentiable:
        return torch.cat(_gathered(tensor))
    _gathers += 1
    if torch.compiler.is_compiling():
        raise ConfigError(
            "dist.all_gather(differentiable=True) cannot be compiled: ranks may have batches of different sizes. Use compile=False."
        )
    return cast("Tensor", _AllGather.apply(tensor))


def gathers() -> int:
    """How often this process has called `all_gather(..., differentiable=True)`: whether a loss does so shows in the probe."""
    return _gathers


def rank_offset(rows: int, device: torch.device | str = "cpu") -> int:
    """How many rows the ranks below this one have, if this one has `rows`. Every rank has to ask."""
    if world_size() == 1:
        return 0
    return int(all_gather(torch.tensor([rows], device=device))[: rank()].sum())


class _AllGather(torch.autograd.Function):
    """An all-gather. The gradient of a rank's rows is the sum of the gradients that all ranks have for them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = _gathered(tensor)
        ctx.start = sum(len(part) for part in parts[: rank()])
        ctx.rows = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce(grads[0].contiguous())[ctx.start : ctx.start + ctx.rows]


def _gathered(tensor: Tensor) -> list[Tensor]:
    length = torch.tensor([tensor.shape[0]], device=tensor.device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    with as_peer_error("an all-gather"):
        td.all_gather(lengths, length)
        sizes = [int(n) for n in lengths]
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in sizes]
        td.all_gather(parts, padded)
    return [p[:n] for p, n in zip(parts, sizes, strict=True)]


def broadcast_bytes(data: bytes, device: torch.device) -> bytes:
    """The bytes of rank 0, on every rank. They travel as a uint8 tensor, so nothing is unpickled. It needs a process group.

    Args:
        data: used on rank 0 alone. The length may differ between ranks.
        device: where the collective runs.

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    length = torch.tensor([len(data)], device=device)
    with as_peer_error("a broadcast"):
        td.broadcast(length, 0)
        content = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if rank() == 0:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else content)
        td.broadcast(content, 0)
    return bytes(content.tolist())


@contextmanager
def as_peer_error(operation: str) -> Generator[None]:
    """A context that turns each RuntimeError of torch into a `PeerError`. Only collectives may run in it.

    Args:
        operation: what runs, for the message, such as "an all-reduce".

    Raises:
        PeerError: torch raised a RuntimeError, other than out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # gloo has no error class of its own
        raise _peer_error(operation, e) from e


@contextmanager
def peer_error_at(where: Callable[[], str]) -> Generator[None]:
    """A context that adds the place to a `PeerError`, and turns a RuntimeError into one if the process group is broken.

    Any code may run in it, so it asks the group before it calls an error a `PeerError`.

    Args:
        where: called when an error comes; returns the place, such as "step 5".

    Raises:
        PeerError: another rank ended, or did not answer in time.
    """
    try:
        yield
    except PeerError as e:
        error = PeerError(f"{where()}: {e}")
        error.on_all_ranks = e.on_all_ranks
        raise error from e.__cause__
    except (AilabError, torch.OutOfMemoryError):
        raise
    except RuntimeError as e:
        if (cause := group.cause(e)) is None:
            raise
        raise PeerError(f"{where()}: {_peer_error('the all-reduce of gradients', cause)}") from e


def _peer_error(operation: str, e: RuntimeError) -> PeerError:
    return PeerError(f"rank {rank()}: {operation} failed: another process ended or did not answer in time.\n  {first_line(e)}")
