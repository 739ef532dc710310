"""`init` and `update` of the torch.optim classes as pure functions, with torch's own functional forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ailab.errors import ConfigError
from ailab.optim.adafactor import adafactor
from ailab.optim.derivative import refuse_derivative
from ailab.optim.optimizer import Group, Optimizer, OptState
from ailab.optim.rows import ROWS, Row, arguments, cpu_kernel, functional
from ailab.types import Params

# The list forms cost one call for all tensors; torch 2.11 has no list form of clone.
_foreach_clone: Callable[[list[Tensor]], Sequence[Tensor]] = getattr(
    torch, "_foreach_clone", lambda tensors: [t.clone() for t in tensors]
)
_foreach_copy_: Callable[[list[Tensor], list[Tensor]], None] = getattr(torch, "_foreach_copy_")  # noqa: B009
_STRIDE = Tensor.stride
_TAKE_SPARSE = ("SGD", "Adagrad")
_UNADJUSTED = "none"  # of torch's Muon: any word that is no adjustment leaves the learning rate as it is


@dataclass(frozen=True)
class _Plan:
    """One parameter group, with the choices that are made before the first step."""

    optimizer: str  # name of the class
    names: tuple[str, ...]
    keys: tuple[str, ...]  # of the per-parameter lists, in the order of the functional form
    row: Row
    call: Callable[..., None]  # (params, grads, *lists, **kwargs, lr=...): eager
    traced_call: Callable[..., None]
    kwargs: dict[str, Any]  # arguments of `call`: hyper-parameters and the choice of implementation
    traced_kwargs: dict[str, Any]
    columns: tuple[str, ...]  # every list argument after the gradients, also those that this group leaves empty
    scratch: list[Tensor]  # eager: the step counts for the functional form; not part of the state
    step_as: str | None  # the argument with the step count: a list of them, one, or None
    kernel: bool  # `call` is the fused kernel itself
    fused: bool  # eager: `call` ends in a fused kernel
    takes_lr: bool
    lr_as_float: bool  # eager; on a CPU this is not a device read
    lr_dtype: torch.dtype  # as a tensor: float32 for a GPU kernel beside float32 parameters; on a CPU the digits are free
    on_cpu: bool


def _choose(row: Row, name: str, asked: dict[str, Any], params: Sequence[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The implementation to run eagerly, and the one to trace. The choice of the user comes first.

    Eager: the fused kernel if there is one, else a form without device reads. Traced on a CPU: one tensor at a time, because the
    scalars of all parameters are then equal subgraphs that the compiler computes once. Traced on a GPU: few kernels.
    A fused kernel walks through memory, so it is for parameters that fill theirs: not for a view of every other column.
    """
    device = params[0].device.type
    # Adagrad's fused kernel is younger than the oldest torch served on a GPU.
    kernel = row.fused and (device == "cpu" or (device == "cuda" and name != "Adagrad"))
    free = asked.get("fused") is None and asked.get("foreach") is None and all(p.is_floating_point() for p in params)
    dense = all(torch.empty_like(p).stride() == p.stride() for p in params)
    fused = dense and (bool(asked.get("fused")) or (kernel and free))
    many = asked.get("foreach") if asked.get("foreach") is not None else device != "cpu"
    eager = {"fused": fused, "foreach": many and not fused, "capturable": device != "cpu" and not fused}
    return eager, {"fused": False, "foreach": many, "capturable": True}


def _plan(name: str, group: Group, params: Params) -> _Plan:
    row, tensors, fn = ROWS[name], [params[n] for n in group.names], functional(name)
    takes = inspect.signature(fn).parameters
    hyper = arguments(row, fn, group.hyper, any(p.is_complex() for p in tensors))
    # Muon's form takes `foreach` and its class does not.
    eager, traced = ({k: v for k, v in how.items() if k in takes and (k != "foreach" or k in group.hyper)}
                     for how in _choose(row, name, group.hyper, tensors))  # fmt: skip
    held = tuple(k for k, slot in row.slots.items() if row.padded or slot(tensors[0], group.hyper) is not None)
    damped = name == "SGD" and bool(held) and group.hyper["dampening"] != 0
    on_cpu = tensors[0].device.type == "cpu"
    call = _undamped_first_step(fn) if damped else fn
    divides = name in ("Adam", "AdamW") and not traced["foreach"]
    if name == "Adafactor":
        traced_call = adafactor
    elif name == "Muon":
        traced_call = _with_lr_unrounded(call)
    else:
        traced_call = _unchanged_at_zero_lr(call) if divides else call
    kernel = cpu_kernel(name, group.hyper) if eager.get("fused") and len({p.dtype for p in tensors}) == 1 else None
    wide = on_cpu or tensors[0].dtype == torch.float64
    return _Plan(
        optimizer=name,
        names=group.names,
        keys=held,
        row=row,
        call=(kernel or call) if on_cpu else traced_call,
        traced_call=traced_call,
        kwargs=hyper | eager,
        traced_kwargs=hyper | traced,
        scratch=[torch.zeros((), dtype=torch.float32, device=tensors[0].device) for _ in tensors],
        columns=(*row.slots, *row.scalars),
        step_as="state_steps" if row.counts else "step" if damped else None,
        kernel=kernel is not None and on_cpu,
        fused=bool(eager.get("fused")),
        takes_lr="lr" in takes,
        # Without capturable or a fused kernel the functional form reads a tensor lr anyway.
        lr_as_float=on_cpu or not (eager.get("fused") or "capturable" in takes or name == "Adafactor"),
        lr_dtype=torch.float64 if wide else torch.float32,
        on_cpu=on_cpu,
    )


def _undamped_first_step(sgd: Callable[..., None]) -> Callable[..., None]:
    """SGD whose first momentum is the gradient without dampening, as in torch."""

    def stepped(params: list[Tensor], grads: list[Tensor], buffers: list[Any], *, step: Tensor, **kwargs: Any) -> None:
        first = step == 0
        if not torch.compiler.is_compiling() and step.device.type == "cpu":
            if first:
                buffers[:] = [None] * len(buffers)
            sgd(params, grads, buffers, **kwargs)
            return
        fresh_params, fresh = [p.clone() for p in params], cast("list[Any]", [None] * len(buffers))
        sgd(fresh_params, grads, fresh, **kwargs)
        sgd(params, grads, buffers, **kwargs)
        params[:] = [torch.where(first, a, b) for a, b in zip(fresh_params, params, strict=True)]
        buffers[:] = [torch.where(first, a, b) for a, b in zip(fresh, buffers, strict=True)]

    return stepped


def _unchanged_at_zero_lr(adam: Callable[..., None]) -> Callable[..., None]:
    """Adam that does not change parameters at lr 0.

    In a graph torch's single-tensor form divides by lr before it adds eps. At lr 0 that is NaN where the gradient is 0.
    """

    def stepped(params: list[Tensor], *lists: list[Tensor], lr: Tensor, **kwargs: Any) -> None:
        still, before = lr == 0, [p.clone() for p in params]
        adam(params, *lists, lr=torch.where(still, 1.0, lr), **kwargs)
        params[:] = [torch.where(still, b, p) for b, p in zip(before, params, strict=True)]

    return stepped


def _with_lr_unrounded(muon: Callable[..., None]) -> Callable[..., None]:
    """Muon whose bfloat16 direction is multiplied by a learning rate at the precision of the parameters.

    torch's form multiplies it by a tensor lr in bfloat16, which is 0.1 % off; torch 2.11 does so with a number, too. So it is
    given 1, and the learning rate comes after it.
    """

    def stepped(
        params: list[Tensor], *lists: list[Tensor], lr: Tensor, weight_decay: float, adjust_lr_fn: Any, **kwargs: Any
    ) -> None:
        steps = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        muon(steps, *lists, lr=-1.0, weight_decay=0.0, adjust_lr_fn=_UNADJUSTED, **kwargs)
        rates = [lr * _muon_ratio(adjust_lr_fn, p.shape) for p in params]
        moved = zip(params, rates, steps, strict=True)
        params[:] = [(p * (1 - lr * weight_decay) - rate * s).to(p.dtype) for p, rate, s in moved]

    return stepped


def _muon_ratio(adjust: str | None, shape: torch.Size) -> float:
    """What torch's Muon multiplies the learning rate of a parameter by; a private name of torch."""
    from torch.optim import _muon

    return _muon._adjust_lr(1.0, adjust, shape)


def _for_sparse(plan: _Plan, grads: Params) -> _Plan:
    """The plan for gradients of which some are sparse (`nn.Embedding(sparse=True)`): torch's plain form, as no kernel takes them.

    Raises:
        ConfigError: for a class that refuses them in torch, too.
    """
    if plan.optimizer not in _TAKE_SPARSE:
        name = next(n for n in plan.names if n in grads and grads[n].is_sparse)
        raise ConfigError(
            f"cfg.optimizer: {plan.optimizer} does not support sparse gradients, and that of {name!r} is sparse.\n"
            f"  {', '.join(_TAKE_SPARSE)} and SparseAdam do; or nn.Embedding(sparse=False)."
        )
    how = {"fused": False, "foreach": False, "has_sparse_grad": True}
    return replace(plan, call=plan.traced_call, kernel=False, fused=False, kwargs=plan.kwargs | how)


def _copies(columns: list[list[Any]], slow: bool) -> list[list[Any]]:
    """Copies of columns of equal length. `slow` allows None, and is better for tracing: the compiler removes the copies."""
    if slow:
        return [[None if t is None else t.clone() for t in column] for column in columns]
    flat, n = [t for column in columns for t in column], len(columns[0])
    new = list(_foreach_clone(flat))
    return [new[i : i + n] for i in range(0, len(new), n)]


def _in_layout_of(values: list[Tensor], columns: list[list[Any]]) -> tuple[list[list[Any]], bool]:
    """The columns with the strides of `values`, and whether any had others and is a copy.

    A fused kernel takes what lies at the same place in memory for the same element. A gradient or a state may lie in another
    order: of a transposed weight, after a hook, after a checkpoint.
    """
    strides = list(map(_STRIDE, values))
    other = [list(map(_STRIDE, column)) != strides for column in columns]
    if not any(other):
        return columns, False
    return [
        [torch.empty_like(v, dtype=t.dtype).copy_(t) for v, t in zip(values, column, strict=True)] if differs else column
        for column, differs in zip(columns, other, strict=True)
    ], True


def _init_with_lr(lr: Tensor, first: Tensor, column: list[Tensor]) -> list[Tensor]:
    """State that is initialised with the learning rate of the first update."""
    begin = [(torch.complex(lr, lr) if t.is_complex() else lr).to(t.dtype) for t in column]
    return [torch.where(first, b, t) for b, t in zip(begin, column, strict=True)]


def _steps(plan: _Plan, step: Tensor, count: int, traced: bool) -> list[Tensor]:
    """A copy of the step count for each parameter. The functional form increments them."""
    if traced:
        # Copies, because they are written to. In float32, as on a GPU and in torch, 1 - 0.999**step has 4 digits left.
        return [step.to(torch.float64) if plan.on_cpu else step.clone() for _ in range(count)]
    steps = plan.scratch[:count]
    _foreach_copy_(steps, [step] * count)
    return steps


def _call(
    plan: _Plan, traced: bool, values: list[Tensor], grads: list[Tensor], columns: list[list[Any]], step: Tensor, lr: Tensor
) -> None:
    """Update `values` and `columns` in place with the functional form."""
    call, kwargs = (plan.traced_call, plan.traced_kwargs.copy()) if traced else (plan.call, plan.kwargs.copy())
    if plan.takes_lr:
        kwargs["lr"] = lr.item() if plan.lr_as_float and not traced else lr.to(plan.lr_dtype)
    if plan.step_as == "state_steps" and (traced or not plan.kernel):
        # By position, behind the lists: given by name on a GPU, torch 2.11 refuses to trace it.
        columns = [*columns, _steps(plan, step, len(values), traced)]
    elif plan.step_as is not None:
        kwargs["step"] = step
    call(values, grads, *columns, **kwargs)


def _update_group(
    plan: _Plan, at: int, grads: Params, old: OptState, params: Params, new: OptState, out: Params, copy: bool
) -> bool:
    """Write the group's new parameters to `out` and its new state to `new`; False when it has no gradient."""
    names = [n for n in plan.names if n in grads]
    if not names:
        return False
    row, keys, lr, step = plan.row, plan.keys, old["lr"][at], old["step"]
    traced = torch.compiler.is_compiling()
    if not traced and any([grads[n].is_sparse for n in names]):  # noqa: C419 - a generator costs time in every step
        plan = _for_sparse(plan, grads)
    columns = [[params[n] for n in names]] + [[old[key].get(n) for n in names] for key in keys]
    values, *columns = _copies(columns, slow=row.padded or traced) if copy else columns
    given, moved = [grads[n] for n in names], False
    if plan.fused and not traced:
        (given, *columns), moved = _in_layout_of(values, [given, *columns])
    lists: dict[str, list[Any]] = dict(zip(keys, columns, strict=True))
    for key in row.scalars:
        lists[key] = [old[key][at].clone() for _ in names]
    for key in row.from_lr:
        lists[key] = _init_with_lr(lr, step == 0, lists[key])
    _call(plan, traced, values, given, [lists.get(key, []) for key in plan.columns], step, lr)
    if plan.kernel and not copy and not traced and not moved:
        return True  # already written in place
    out.update(zip(names, values))  # noqa: B905 - strict costs time in every step
    for key in keys:
        filled = zip(names, lists[key])  # noqa: B905
        new[key].update((pair for pair in filled if pair[1] is not None) if row.padded else filled)
    for key in row.scalars:
        new[key][at] = lists[key][0]
    return True


def _init(row: Row, groups: Sequence[Group], params: Params) -> OptState:
    """The state before the first step: step 0, the base learning rates, torch's initial values."""
    device = params[groups[0].names[0]].device
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "lr": torch.tensor([g.hyper["lr"] for g in groups], dtype=torch.float64, device=device),
    }
    for key, slot in row.slots.items():
        made = {n: slot(params[n].detach(), g.hyper) for g in groups for n in g.names}
        held = {n: t for n, t in made.items() if t is not None}
        if held or row.padded:
            state[key] = held
    for key, start in row.scalars.items():
        starts = [g.hyper["lr"] if key in row.from_lr else start for g in groups]
        state[key] = [torch.full((), s, dtype=torch.float32, device=device) for s in starts]
    return state


def traced_optimizer(name: str, groups: tuple[Group, ...], params: Params) -> Optimizer:
    """The torch.optim class `name` as pure functions; `groups` are complete and checked."""
    row, plans = ROWS[name], tuple(_plan(name, group, params) for group in groups)

    def init(params: Params) -> OptState:
        return _init(row, groups, params)

    def run(grads: Params, opt_state: OptState, params: Params, copy: bool) -> tuple[Params, OptState]:
        out = dict(params)
        new: dict[str, Any] = {k: v.copy() if isinstance(v, (dict, list)) else v for k, v in opt_state.items()}
        touched = [_update_group(plan, i, grads, opt_state, params, new, out, copy) for i, plan in enumerate(plans)]
        if any(touched):
            new["step"] = opt_state["step"] + 1
        return out, new

    def update(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        refuse_derivative(params, opt_state, f"the update of {name}")
        return run(grads, opt_state, params, True)

    def update_(grads: Params, opt_state: OptState, params: Params) -> tuple[Params, OptState]:
        return run(grads, opt_state, params, False)

    return Optimizer(name, groups, init, update, traced=True, update_=update_)
