"""The bare gradients: one type, three cores that agree. Only here is anything differentiated."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ailab import dist
from ailab.types import LOSS_SCALE, Aux, Batch, Grad, Loss, Mean, Params, TrainState

# torch.autograd.grad traced by Dynamo is right for custom autograd.Functions and custom operators on every supported version;
# torch.func.grad inside torch.compile is not on 2.11 and 2.13 (it can skip a custom backward). See tests/test_grad.py.
_REQUIRES_GRAD_TRACES = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 14)
_ANCHOR = torch.zeros((), requires_grad=True)


def _leaf(param: Tensor) -> Tensor:
    """`param` as something that can be differentiated with respect to."""
    if param.requires_grad:
        return param
    if torch.compiler.is_compiling() and not _REQUIRES_GRAD_TRACES:
        return param.detach() + _ANCHOR.to(param.device, param.dtype)  # adds 0; fuses with what made `param`
    return param.detach().requires_grad_()


def reciprocal(weight: Tensor) -> Tensor:
    """`1 / weight`, and something finite where the weight is 0: a batch in which nothing counts has a zero total."""
    return weight.clamp(min=1e-12).reciprocal()


def _cotangent(total: Tensor, aux: Aux, batch: Batch, ranks: int = 1) -> Tensor:
    """What the total is differentiated times: so is it divided by its weight, and scaled, at no cost."""
    scale = reciprocal(aux.weight)
    if ranks > 1:
        scale = scale * ranks
    if LOSS_SCALE in batch:
        scale = scale * batch[LOSS_SCALE]
    return scale.to(total.dtype)


def _unscaled(grads: Params, batch: Batch) -> Params:
    if LOSS_SCALE not in batch:
        return grads
    inverse = batch[LOSS_SCALE].reciprocal()
    return {n: g * inverse.to(g.dtype) for n, g in grads.items()}


def _gradients(total: Tensor, leaves: list[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of a scalar; None for a leaf that took no part.

    Eager mode calls the engine that it ends in, a private name, without the 35 us of Python before it: 6 % of a small step.
    """
    if torch.compiler.is_compiling():
        found: Any = torch.autograd.grad(total, leaves, cotangent, allow_unused=True)
        return found
    engine: Any = torch.autograd.Variable._execution_engine
    return engine.run_backward(
        (total,), (cotangent,), False, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
    )


def local_grad(loss: Loss, trainable: Collection[str] | None = None, ranks: int = 1) -> Grad:
    """The gradient of `total / weight` in one process; traces into one graph with whatever wraps it.

    Args:
        loss: a pure loss.
        trainable: names of the parameters to differentiate; all of them by default.
        ranks: over how many processes the weight and the logs are summed; the gradient is this one's part, times `ranks`.

    Returns:
        `grad(state, batch) -> (gradients by name, Aux)`. A parameter that the loss does not use has no entry.
    """

    def grad(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        names = [n for n in state.params if trainable is None or n in trainable]
        with torch.enable_grad():
            leaves = {n: _leaf(state.params[n]) for n in names}
            fixed = {n: p.detach() for n, p in state.params.items() if n not in leaves}
            total, aux = loss({**fixed, **leaves}, state.buffers, batch)
            aux = reduce_aux(aux) if ranks > 1 else aux
            found = _gradients(total, list(leaves.values()), _cotangent(total, aux, batch, ranks))
        return _unscaled({n: g for n, g in zip(leaves, found, strict=True) if g is not None}, batch), aux

    return grad


class _Owner(nn.Module):
    """Owns the trainable parameters, so that DistributedDataParallel can hook them, and calls the same pure loss."""

    def __init__(self, loss: Loss, params: Params):
        super().__init__()
        self.loss = loss
        self.keys = list(params)
        self.own = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in params.values()])

    def forward(self, fixed: Params, buffers: Params, batch: Batch) -> tuple[Tensor, Aux]:
        return self.loss({**fixed, **dict(zip(self.keys, self.own, strict=True))}, buffers, batch)


def ddp_grad(loss: Loss, state: TrainState, trainable: Collection[str] | None = None, **ddp: Any) -> Grad:
    """The gradient over all processes through `DistributedDataParallel`: `.backward()` reduces buckets as they fill.

    Runs on the host: only `.backward()` reaches DDP's reducer (`torch.autograd.grad` through a DDP module gives local
    gradients and no error), so `loss` and the update are compiled apart.

    Args:
        loss: a pure loss; compiled or not.
        state: gives names and shapes; rank 0's values are sent to all.
        trainable: names of the parameters to differentiate; all of them by default.
        **ddp: arguments of DistributedDataParallel (`bucket_cap_mb`, `static_graph`, ...).
    """
    mine = {n: p for n, p in state.params.items() if trainable is None or n in trainable}
    owner = _Owner(loss, mine)
    with dist.peers("the comparison of the models of all ranks"):
        wrapped = DistributedDataParallel(owner, **ddp)
    own: list[Tensor] = list(owner.own)

    def grad(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        with torch.no_grad():
            torch._foreach_copy_(own, [state.params[n] for n in owner.keys])
        fixed = {n: p.detach() for n, p in state.params.items() if n not in mine}
        for p in own:
            p.grad = None  # a fresh one each time: gradients handed out earlier stay as they were
        with torch.enable_grad():
            total, aux = wrapped(fixed, state.buffers, batch)
            aux = reduce_aux(aux)
            total.backward(_cotangent(total, aux, batch, dist.world_size()))  # DDP divides by the number of ranks
        return _unscaled({n: p.grad for n, p in zip(owner.keys, own, strict=True) if p.grad is not None}, batch), aux

    return grad


def graph_grad(loss: Loss, trainable: Collection[str] | None = None) -> Grad:
    """The gradient over all processes with one all-reduce per dtype traced into the graph, bucketed."""
    # The global weight divides, as under DDP: a backward that reaches other ranks (SyncBatchNormHook) adds up like with like.
    ranks = dist.world_size()
    local = local_grad(loss, trainable, ranks)

    def grad(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        grads, aux = local(state, batch)
        names = list(grads)
        for dtype in {grads[n].dtype: None for n in names}:
            bucket = [n for n in names if grads[n].dtype == dtype]
            flat = torch.cat([grads[n].reshape(-1) for n in bucket]) * (1 / ranks)
            parts = dist.all_reduce(flat).split([grads[n].numel() for n in bucket])
            grads = {**grads, **{n: p.view_as(grads[n]) for n, p in zip(bucket, parts, strict=True)}}
        return grads, aux

    return grad


def reduce_aux(aux: Aux) -> Aux:
    """Weight and logs summed over all ranks in one reduction, so that everything above sees the global batch.

    Buffers (BatchNorm's running statistics) are rank 0's on every rank, as under DDP's `broadcast_buffers`.
    """
    if dist.world_size() == 1:
        return aux
    names = list(aux.logs)
    parts = [aux.weight] + [t for n in names for t in (aux.logs[n].total, aux.logs[n].weight)]
    summed = dist.all_reduce(torch.stack([t.detach().to(torch.float64) for t in parts])).unbind()
    dtype = aux.weight.dtype
    logs = {n: Mean(summed[1 + 2 * i].to(dtype), summed[2 + 2 * i].to(dtype)) for i, n in enumerate(names)}
    return replace(aux, weight=summed[0].to(dtype), logs=logs, buffers=dist.from_first(aux.buffers))


def has_custom_backward(total: Tensor) -> bool:
    """Whether a custom `autograd.Function` (or a custom operator's `register_autograd`) took part in `total`."""
    todo, seen = [total.grad_fn], set[Any]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        seen.add(node)
        todo.extend(n for n, _ in node.next_functions)
    return False
