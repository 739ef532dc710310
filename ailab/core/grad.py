"""The bare gradients: one type, three cores that agree. Only here is anything differentiated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ailab import dist, tree
from ailab.core.loss import tensors_held, while_tracing
from ailab.core.reduce import control_message, reduced
from ailab.errors import ConfigError
from ailab.optim.derivative import refuse_derivative
from ailab.rng import drawn_by_rank
from ailab.types import LOSS_SCALE, Aux, Batch, Buffers, Grad, Loss, Params, TrainState

# torch.autograd.grad traced by Dynamo is right for custom autograd.Functions and custom operators on every supported version;
# torch.func.grad inside torch.compile is not on 2.11 and 2.13 (it can skip a custom backward). See tests/core/test_grad.py.
_REQUIRES_GRAD_TRACES = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 14)
_ROOM = 16  # numbers: gradients that lie behind the message in a bucket keep their alignment, which is worth 2 % of a step
_ANCHORS: dict[tuple[torch.device, torch.dtype], Tensor] = {}


@while_tracing
def _anchor(device: torch.device, dtype: torch.dtype) -> Tensor:
    """A zero that requires grad, a constant of the graph: made on the device, so that no step copies it there."""
    return _ANCHORS.setdefault((device, dtype), torch.zeros((), dtype=dtype, device=device, requires_grad=True))


def _leaf(param: Tensor) -> Tensor:
    """`param` as something that can be differentiated with respect to."""
    if param.requires_grad:
        return param
    if torch.compiler.is_compiling() and not _REQUIRES_GRAD_TRACES:
        return param.detach() + _anchor(param.device, param.dtype)  # adds 0; fuses with what made `param`
    return param.detach().requires_grad_()


def reciprocal(weight: Tensor) -> Tensor:
    """`1 / weight`, and something finite where the weight is 0: a batch in which nothing counts has a zero total."""
    return weight.clamp(min=1e-12).reciprocal()


def _cotangent(total: Tensor, aux: Aux, batch: Batch, nominal: float | None = None) -> Tensor:
    """What the total is differentiated times: so is it divided by its weight, and scaled, at no cost."""
    factor = reciprocal(aux.weight) if nominal is None else torch.full_like(aux.weight, 1 / nominal)
    return (factor * batch[LOSS_SCALE] if LOSS_SCALE in batch else factor).to(total.dtype)


def _scaled(grads: Params, batch: Batch) -> Params:
    return tree.scaled(grads, batch[LOSS_SCALE]) if LOSS_SCALE in batch else grads


def _unscaled(grads: Params, batch: Batch) -> Params:
    return tree.scaled(grads, batch[LOSS_SCALE].reciprocal()) if LOSS_SCALE in batch else grads


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


def local_grad(loss: Loss, trainable: Collection[str] | None = None, nominal: float | None = None) -> Grad:
    """The gradient of `total / weight` in one process; traces into one graph with whatever wraps it.

    Args:
        loss: a pure loss.
        trainable: names of the parameters to differentiate; all of them by default.
        nominal: divide by this number and not by the weight: gradients of parts of a batch then simply add up.

    Returns:
        `grad(state, batch) -> (gradients by name, Aux)`. A parameter that the loss does not use has no entry.
    """

    def grad(state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        refuse_derivative(state.params, {}, "local_grad")
        names = [n for n in state.params if trainable is None or n in trainable]
        with torch.enable_grad(), tensors_held():
            leaves = {n: _leaf(state.params[n]) for n in names}
            fixed = {n: p.detach() for n, p in state.params.items() if n not in leaves}
            total, aux = loss({**fixed, **leaves}, state.buffers, batch)
            found = _gradients(total, list(leaves.values()), _cotangent(total, aux, batch, nominal))
        return _unscaled({n: g for n, g in zip(leaves, found, strict=True) if g is not None}, batch), aux

    return grad


def accumulated(
    grad: Grad, state: TrainState, parts: Sequence[Batch], *, divided: bool = True
) -> tuple[Params, Aux, list[dict[str, Any]]]:
    """The gradient of several batches as that of one, their sums, and the model outputs of each.

    Buffers and slots pass from one batch to the next. `divided` says whether `grad` divides by the weight of each part. Gradients
    of halves are summed in float32.
    """

    def summand(found: Params, aux: Aux) -> Params:
        found = {k: tree.widened(g) for k, g in found.items()}
        return tree.scaled(found, aux.weight) if divided else found

    grads, total = grad(state, parts[0])
    outputs = [total.outputs]
    if len(parts) == 1:
        return grads, total, outputs
    grads = summand(grads, total)
    for part in parts[1:]:
        more, aux = grad(passed_on(state, total), part)
        more = summand(more, aux)
        # A parameter that a micro-batch does not use has no gradient there.
        grads = {k: grads[k] + more[k] if k in grads and k in more else {**grads, **more}[k] for k in {**grads, **more}}
        total = added(total, aux)
        outputs.append(aux.outputs)
    grads = tree.scaled(grads, reciprocal(total.weight)) if divided else grads
    return {k: g.to(state.params[k].dtype) for k, g in grads.items()}, total, outputs


def passed_on(state: TrainState, aux: Aux) -> TrainState:
    """The state for the next micro-batch: the buffers and slots are those after the last."""
    return state.replace(buffers=aux.buffers, slots={**state.slots, **aux.slots})


def added(a: Aux, b: Aux) -> Aux:
    """The sums of two micro-batches; their buffers and slots are those after the second."""
    logs = {n: a.logs[n] + m for n, m in b.logs.items()}
    return replace(b, weight=a.weight + b.weight, logs=logs, slots={**a.slots, **b.slots})


@dataclass(frozen=True)
class Core:
    """The gradient of a run: `core(state, batch)`, or `core.many(state, micro_batches)` with one division and one reduction.

    A hook around it is a plain function, so whoever finds `many` knows that nothing between needs the gradient of each part.
    """

    many: Callable[[TrainState, Sequence[Batch]], tuple[Params, Aux, list[dict[str, Any]]]]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[Params, Aux]:
        """The gradient of the global batch."""
        grads, aux, _ = self.many(state, [batch])
        return grads, aux


def core_over_ranks(many: Callable[..., tuple[Params, Aux, list[dict[str, Any]]]]) -> Core:
    """The core of a gradient over all ranks: what it draws (dropout) is this rank's own, what hooks around it draw is not."""
    return Core(drawn_by_rank(many, dist.rank()) if dist.world_size() > 1 else many)


def local_core(loss: Loss, trainable: Collection[str] | None = None, *, nominal: float = 1.0) -> Core:
    """`local_grad`; of several micro-batches in the scale of the whole batch, so that they round as it and as several ranks do.

    `nominal` is about the weight of a batch: the backwards divide by it, and the true weight comes in once, at the end.
    """
    whole, part = local_grad(loss, trainable), local_grad(loss, trainable, nominal)

    def many(state: TrainState, parts: Sequence[Batch]) -> tuple[Params, Aux, list[dict[str, Any]]]:
        if len(parts) == 1:
            grads, aux = whole(state, parts[0])
            return grads, aux, [aux.outputs]
        grads, aux, outputs = accumulated(part, state, parts, divided=False)
        return tree.scaled(grads, nominal * reciprocal(aux.weight)), aux, outputs

    return Core(many)


class _Owner(nn.Module):
    """Owns the trainable parameters, so that DistributedDataParallel can hook them, and calls the same pure loss.

    The control message of a step is the gradient of one more parameter. It travels in a bucket with other gradients and needs no
    reduction of its own, except where gradients are sent in another dtype than they have.
    """

    def __init__(self, loss: Loss, params: Params, numbers: int, compress: torch.dtype | None):
        super().__init__()
        self.loss = loss
        self.keys = list(params)
        self.own = nn.ParameterList([nn.Parameter(p.detach().clone()) for p in params.values()])
        device, dtype = self.own[0].device, _message_dtype({p.dtype for p in self.own}, compress)
        self.message = nn.Parameter(torch.zeros(-(-numbers // _ROOM) * _ROOM, dtype=dtype, device=device))

    def forward(self, fixed: Params, buffers: Buffers, batch: Batch, before: Aux | None) -> tuple[Tensor, Aux, Tensor]:
        total, aux = self.loss({**fixed, **dict(zip(self.keys, self.own, strict=True))}, buffers, batch)
        aux = aux if before is None else added(before, aux)
        mine = control_message(aux, batch, self.message.dtype)
        spare = self.message.numel() - mine.numel()
        if spare < 0:
            raise ConfigError(
                f"ddp_grad: the loss has {len(aux.logs)} logs; give it numbers={mine.numel()}, room for all of them."
            )
        return total, aux, self.message.dot(nn.functional.pad(mine, (0, spare)))  # its gradient is `mine`

    def expect(self, grads: Params) -> None:
        """Before a backward: what it shall add to; gradients handed out earlier stay as they were."""
        for n, p in zip(self.keys, self.own, strict=True):
            p.grad = grads.get(n)
        self.message.grad = None

    def found(self) -> tuple[Params, Tensor]:
        """After it: the gradients of the parameters that took part, and the sum of the control messages."""
        assert self.message.grad is not None
        return {n: p.grad for n, p in zip(self.keys, self.own, strict=True) if p.grad is not None}, self.message.grad


def _message_dtype(dtypes: Collection[torch.dtype], compress: torch.dtype | None) -> torch.dtype:
    """Of gradients that it can travel with; where they are compressed, or narrower than float32, one of its own."""
    fit = [d for d in (torch.float64, torch.float32) if (d in dtypes) == (compress is None)]
    return fit[0] if fit else torch.float64


def ddp_grad(
    loss: Loss,
    state: TrainState,
    trainable: Collection[str] | None = None,
    *,
    nominal: float = 1.0,
    compress: torch.dtype | None = None,
    gradient_as_bucket_view: bool = False,
    sample: tuple[Loss, Batch] | None = None,
    through: Loss | None = None,
    numbers: int = 64,
    **ddp: Any,
) -> Core:
    """The gradient over all processes through `DistributedDataParallel`: `.backward()` reduces buckets as they fill.

    Runs on the host: only `.backward()` reaches DDP's reducer (`torch.autograd.grad` through a DDP module gives local
    gradients and no error), so `loss` and the update are compiled apart. Of several micro-batches the last one alone goes
    through DDP, on top of what the others added up.

    Args:
        loss: a pure loss; compiled or not.
        state: gives names and shapes; rank 0's values are sent to all.
        trainable: names of the parameters to differentiate; all of them by default.
        nominal: about the weight of a global batch. The backward divides by this, on every rank alike, so that what reaches
            other ranks on its way (SyncBatchNormHook) adds up like with like; the weight itself is known after the exchange.
        compress: dtype in which buckets travel and are summed.
        gradient_as_bucket_view: hand out the buckets themselves: no copy, and valid until the next gradient is computed.
        sample: the loss, uncompiled, and a batch for two gradients that are thrown away. DDP reduces its first gradient as one
            bucket and orders its buckets by it; a sum over three ranks or more depends on the bucket in its last bits. So are a
            resumed run and one that was never stopped alike in every bit.
        through: the loss as it runs inside DDP, if that is another: one compiled in pieces.
        numbers: room for the control message: two for each log of the loss, and two.
        **ddp: further arguments of DistributedDataParallel (`bucket_cap_mb`, `static_graph`, ...).
    """
    mine = {n: p for n, p in state.params.items() if trainable is None or n in trainable}
    owner, local = _Owner(through or loss, mine, numbers, compress), local_grad(loss, mine, nominal)
    with dist.as_peer_error("the comparison of the models of all ranks"):
        wrapped = DistributedDataParallel(owner, gradient_as_bucket_view=gradient_as_bucket_view, **ddp)
    own: list[Tensor] = list(owner.own)

    def send(buffer: Tensor) -> Any:
        return dist.begin_all_reduce_bucket(buffer, None if buffer.dtype == owner.message.dtype else compress)

    wrapped.register_comm_hook(None, lambda _, bucket: send(bucket.buffer()))  # DDP refuses annotations that are strings

    def many(state: TrainState, parts: Sequence[Batch]) -> tuple[Params, Aux, list[dict[str, Any]]]:
        with torch.no_grad():
            torch._foreach_copy_(own, [state.params[n] for n in owner.keys])
        fixed = {n: p.detach() for n, p in state.params.items() if n not in mine}
        state = state.replace(params={**state.params, **dict(zip(owner.keys, own, strict=True))})
        *first, last = parts
        grads, before, outputs = accumulated(local, state, first, divided=False) if first else ({}, None, [])
        grads = _scaled(grads, last)
        with torch.enable_grad(), tensors_held():
            total, aux, control = wrapped(fixed, state.buffers if before is None else before.buffers, last, before)
            buffers = dist.begin_broadcast_tensors(aux.buffers)
            owner.expect(grads)
            torch.autograd.backward((total, control), (_cotangent(total, aux, last, nominal), torch.ones_like(control)))
        found, sums = owner.found()
        aux = reduced(aux, last, sums, buffers())
        torch._foreach_mul_(list(found.values()), nominal * reciprocal(aux.weight) / last.get(LOSS_SCALE, 1.0))
        return found, aux, [*outputs, aux.outputs]

    if sample is not None:
        owner.loss, batch = sample
        for _ in range(2):
            many(state, [batch])
        owner.loss = through or loss
    return core_over_ranks(many)


def graph_grad(
    loss: Loss,
    trainable: Collection[str] | None = None,
    *,
    nominal: float = 1.0,
    bucket_cap_mb: float = 25.0,
    compress: torch.dtype | None = None,
) -> Core:
    """The gradient over all processes with its reductions traced into the graph: one per bucket of at most `bucket_cap_mb`.

    Buckets hold gradients of one dtype in the reverse order of the parameters, as a backward makes them; the first of float32 or
    float64 carries the control message. `nominal` and `compress` are those of `ddp_grad`.
    """
    local = local_grad(loss, trainable, nominal)

    def many(state: TrainState, parts: Sequence[Batch]) -> tuple[Params, Aux, list[dict[str, Any]]]:
        grads, aux, outputs = accumulated(local, state, parts, divided=False)
        buffers, buckets = dist.begin_broadcast_tensors(aux.buffers), _bucketed(grads, bucket_cap_mb)
        flat = [torch.cat([grads[n].reshape(-1) for n in names]) for names in buckets]
        mine = control_message(aux, parts[-1], _message_dtype([part.dtype for part in flat], compress))
        if compress is not None:
            flat = [part.to(compress) for part in flat]
        carrier = next((i for i, part in enumerate(flat) if part.dtype == mine.dtype), len(flat))
        flat[carrier : carrier + 1] = [torch.cat([*flat[carrier : carrier + 1], mine])]  # behind a bucket, or one of its own
        begun = [dist.begin_all_reduce(part, in_place=True) for part in flat]
        sums = [result() for result in begun]
        aux = reduced(aux, parts[-1], sums[carrier][-mine.numel() :], buffers())
        summed: Params = {}
        for names, total in zip(buckets, sums, strict=False):  # a message of its own is the last of the sums
            sizes = [grads[n].numel() for n in names]
            values = total.to(grads[names[0]].dtype)[: sum(sizes)].split(sizes)
            summed.update({n: tree.shaped(p, grads[n]) for n, p in zip(names, values, strict=True)})
        return tree.scaled({n: summed[n] for n in grads}, nominal * reciprocal(aux.weight)), aux, outputs

    return core_over_ranks(many)


def _bucketed(grads: Params, cap_mb: float) -> list[list[str]]:
    """The names of the gradients that travel together: of one dtype, last first, at most `cap_mb` MiB but for a larger single."""
    buckets: list[list[str]] = []
    for dtype in {g.dtype: None for g in grads.values()}:
        size = float("inf")
        for n in reversed([n for n in grads if grads[n].dtype == dtype]):
            nbytes = grads[n].numel() * grads[n].element_size()
            if size + nbytes > cap_mb * 2**20:
                buckets.append([])
                size = 0
            buckets[-1].append(n)
            size += nbytes
    return buckets
