"""Functions on trees: nested dicts, lists, tuples and dataclasses whose leaves are tensors or plain values.

Leaves come in the order of insertion, so two trees that were built alike have their leaves in the same order. It is plain
Python: `torch.compile` can trace it, and no private pytree API is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

T = TypeVar("T")
_foreach_norm: Callable[..., Sequence[Tensor]] = getattr(torch, "_foreach_norm")  # noqa: B009 - one call for all; no public name
_HALVES = (torch.bfloat16, torch.float16)


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """The named children of a node, or None for a leaf."""
    if isinstance(tree, dict):
        return [(str(k), v) for k, v in tree.items()]
    if isinstance(tree, (list, tuple)):
        return [(str(i), v) for i, v in enumerate(tree)]
    if tree is None:  # torch 2.11 cannot trace the question whether it is a dataclass
        return None
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None


def _rebuild(tree: Any, values: list[Any]) -> Any:
    """A node like `tree` with other children."""
    if isinstance(tree, dict):
        return dict(zip(tree, values, strict=True))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*values)
    if isinstance(tree, (list, tuple)):
        return type(tree)(values)
    return type(tree)(**{f.name: v for f, v in zip(dataclasses.fields(tree), values, strict=True)})


def leaves(tree: Any) -> list[Any]:
    """All leaves in order, tensors and plain values."""
    nodes = _children(tree)
    return [tree] if nodes is None else [leaf for _, child in nodes for leaf in leaves(child)]


def items(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted path, leaf)` for every leaf, in order."""
    nodes = _children(tree)
    if nodes is None:
        yield prefix, tree
    else:
        for name, child in nodes:
            yield from items(child, f"{prefix}.{name}" if prefix else name)


def unflatten(like: Any, new: Sequence[Any]) -> Any:
    """A tree like `like` with the leaves `new`, in order. There must be as many as `like` has."""
    return _filled(like, iter(new))


def _filled(node: Any, rest: Iterator[Any]) -> Any:
    # No closure that calls itself: such a cycle would keep the leaves until the garbage collector runs.
    nodes = _children(node)
    return next(rest) if nodes is None else _rebuild(node, [_filled(child, rest) for _, child in nodes])


def map(fn: Callable[..., Any], tree: T, *others: Any) -> T:
    """Apply `fn` to each tensor of `tree`, and of other trees of the same structure. Other leaves stay as they are."""
    columns = zip(leaves(tree), *(leaves(o) for o in others), strict=True)
    return unflatten(tree, [fn(*column) if isinstance(column[0], Tensor) else column[0] for column in columns])


def clone(tree: T) -> T:
    """A copy that shares no memory with `tree`."""
    return map(lambda t: t.detach().clone(), tree)


def to(tree: T, device: torch.device) -> T:
    """The tree with every tensor on `device`. The copies are `non_blocking`: from pinned memory the host does not wait."""
    return map(lambda t: t.to(device, non_blocking=True), tree)


def widened(values: Tensor) -> Tensor:
    """`values`, halves as float32: bfloat16 cannot count past 256, and float16 cannot add past 65504."""
    return values.float() if values.dtype in _HALVES else values


def scaled(tensors: dict[str, Tensor], factor: Tensor) -> dict[str, Tensor]:
    """Each tensor times the factor, (), in its own dtype; halves are multiplied in float32, where the factor has its digits."""
    return {
        n: (t.float() * factor.float()).to(t.dtype) if t.dtype in _HALVES else t * factor.to(t.dtype)
        for n, t in tensors.items()
    }


def shaped(flat: Tensor, like: Tensor) -> Tensor:
    """The values of `flat`, (n,), in the shape and the memory layout of `like`; a view where `like` is contiguous."""
    values = flat.view(like.shape)
    return values if like.is_contiguous() else torch.empty_like(like, dtype=flat.dtype).copy_(values)


def lerp(start: dict[str, Tensor], end: dict[str, Tensor], weight: Tensor | float) -> dict[str, Tensor]:
    """`start + weight * (end - start)` for each leaf, in the dtype of `start`. Integer leaves (counters) are those of `end`."""
    return {
        k: torch.lerp(s, end[k].to(s.dtype), weight.to(s.dtype) if isinstance(weight, Tensor) else weight)
        if s.is_floating_point() or s.is_complex()
        else end[k]
        for k, s in start.items()
    }


def where(condition: Tensor, a: T, b: T) -> T:
    """`a` if the condition, () bool, holds, else `b`. The device is read only if they differ in more than tensor values."""
    return _chosen(condition, a, b)


def _chosen(condition: Tensor, a: Any, b: Any) -> Any:
    """For tensors the choice is an operation on the device. For a plain value or another structure it is made on the host."""
    ours, theirs = _children(a), _children(b)
    if ours is not None and theirs is not None and type(a) is type(b) and [n for n, _ in ours] == [n for n, _ in theirs]:
        return _rebuild(a, [_chosen(condition, x, y) for (_, x), (_, y) in zip(ours, theirs, strict=True)])
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return torch.where(condition, a, b)
    alike = ours is None and theirs is None and type(a) is type(b) and not isinstance(a, Tensor) and a == b
    return a if alike or bool(condition) else b


def norm(tree: Any, order: float = 2.0) -> Tensor:
    """The norm of all tensors as one vector, () in the dtype of the tensors, float32 at least."""
    tensors = [_values(t) if t.is_sparse else t for t in leaves(tree) if isinstance(t, Tensor)]
    if all(t.dtype not in _HALVES for t in tensors):
        return torch.nn.utils.get_total_norm(tensors, order)
    norms = [
        torch.linalg.vector_norm(t, order, dtype=torch.float32 if t.dtype in _HALVES else None)  # no copy in float32
        for t in tensors
    ]
    return torch.linalg.vector_norm(torch.stack(norms), order)


def _values(tensor: Tensor) -> Tensor:
    """The elements of a sparse tensor, each once."""
    return tensor.coalesce().values()


def finite(tree: Any) -> Tensor:
    """Whether all elements of all tensors are finite, () bool. The device is not read."""
    return torch.isfinite(norm(tree, float("inf")))  # the largest absolute value cannot overflow, and NaN stays NaN


def finite_each(tensors: Sequence[Tensor]) -> Tensor:
    """Whether all elements are finite, for each dense tensor, (n,) bool. The device is not read."""
    return torch.stack([n.isfinite() for n in _foreach_norm(list(tensors), float("inf"))])


def nbytes(tree: Any) -> int:
    """The bytes of all tensors of `tree`."""
    return sum(t.numel() * t.element_size() for t in leaves(tree) if isinstance(t, Tensor))


def transformed() -> bool:
    """Whether a transform of torch.func is being evaluated; a private name of torch."""
    return bool(peek_interpreter_stack())
