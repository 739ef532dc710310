"""How the run of a cfg ended, and by how much two of them differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from fuzz.components import Stopped
from tiny import rows_of
from torch import Tensor

from ailab import tree
from ailab.errors import AilabError, Preempted
from ailab.fit import fit
from ailab.types import TrainState


@dataclass(frozen=True)
class Outcome:
    """`end` is "done", "stopped" (by `StopOnce`) or "refused"; any other exception is no outcome, it fails the test."""

    end: str
    state: TrainState | None = None
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # of metrics.jsonl, without times
    error: AilabError | None = None


def outcome(cfg: Mapping[str, Any], work_dir: Path) -> Outcome:
    """Run a cfg in this process, in silence."""
    try:
        with redirect_stdout(StringIO()):
            result = fit({**cfg, "work_dir": str(work_dir)})
    except (Stopped, Preempted):
        return Outcome("stopped")
    except AilabError as error:
        return Outcome("refused", error=error)
    return Outcome("done", result.state, rows_of(work_dir))


def differences(a: Any, b: Any, tolerance: float) -> list[str]:
    """The leaves of two states that differ by more than `tolerance`, relative to the largest value among the leaves of a kind.

    A kind is the parameters, the buffers, one memory of the optimizer, one slot: a leaf that is zero but for rounding is measured
    with the others. NaN equals NaN.
    """
    left, right = (dict(_tensors(tree.items(s))) for s in (a, b))
    if list(left) != list(right):
        return [f"other leaves: {sorted({*left} ^ {*right})}"]
    largest: dict[str, float] = {}
    for path, leaf in left.items():
        finite = leaf[leaf.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        largest[_kind(path)] = max(largest.get(_kind(path), 1e-12), size)
    found: list[str] = []
    for path, leaf in left.items():
        far = _far(leaf, right[path]) / largest[_kind(path)]
        if not far <= tolerance:
            found.append(f"{path} by {far:.2g}")
    return found


def _tensors(items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in float64, so that any two dtypes can be compared."""
    for path, leaf in items:
        if isinstance(leaf, Tensor):
            yield path, leaf.detach().to(torch.float64)


def _kind(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[: {"opt_state": 2, "slots": 2}.get(parts[0], 1)])


def _far(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; infinity where one is not finite and the other is something else."""
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs())
    return float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0


def row_differences(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], tolerance: float) -> list[str]:
    """The numbers of two records that differ by more than `tolerance`, relative to the largest of that name in the record."""
    if [list(row) for row in a] != [list(row) for row in b]:
        return [f"other rows: {a} and {b}"]
    largest: dict[str, float] = {}
    for row in a:
        for name, value in row.items():
            if isinstance(value, float) and abs(value) < float("inf"):
                largest[name] = max(largest.get(name, 1e-12), abs(value))
    found: list[str] = []
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        for name, value in one.items():
            if value == other[name] or (value != value and other[name] != other[name]):
                continue
            if not isinstance(value, float) or not abs(value - other[name]) <= tolerance * largest.get(name, 0.0):
                found.append(f"row {i}, {one['phase']} {name}: {value} and {other[name]}")
    return found
