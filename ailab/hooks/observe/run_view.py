"""A read-only view of the run for `log_items`: paths such as `optimizer.param_groups.0.lr` or `meters['top1'].avg`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ailab.errors import ConfigError, nearest
from ailab.hooks.observe.scalars import Report
from ailab.types import RunInfo

Item = str | Callable[[Report], Any]
_PART = re.compile(r"\.?([A-Za-z_][A-Za-z0-9_]*)|\.?(\d+)|\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]")


@dataclass(frozen=True)
class RunView:
    """What a log item can read; `latest` holds the newest results of every phase as "val_top1"."""

    report: Report
    latest: Mapping[str, float]

    def tree(self) -> dict[str, Any]:
        """The names a path can start with."""
        return {
            "optimizer": {"param_groups": [{"lr": lr} for lr in self.report.lrs]},
            "meters": {n: {"avg": v} for n, v in self.report.means.items()},  # class-style ones when their phase has ended
            "metric_results": dict(self.latest),
            "step": self.report.step,
            "epoch": self.report.epoch,
            "samples": self.report.samples,
        }


def split(path: str) -> list[str]:
    """`"meters['top1'].avg"` to `["meters", "top1", "avg"]`; empty when it is no path."""
    parts: list[str] = []
    at = 0
    while at < len(path):
        found = _PART.match(path, at)
        if found is None:
            return []
        parts.append(next(g for g in found.groups() if g is not None))
        at = found.end()
    return parts


def read(item: Item, view: RunView) -> Any:
    """The value of one log item; None for a result that does not exist yet (a metric of a phase that has not run)."""
    if not isinstance(item, str):
        return item(view.report)
    node: Any = view.tree()
    for part in split(item):
        if isinstance(node, list):
            node = node[int(part)]
        elif part not in node:
            return None
        else:
            node = node[part]
    return node


def check_items(items: Mapping[str, Item], run: RunInfo, path: str) -> None:
    """Compare every path with what this run will have.

    Raises:
        ConfigError: for a path that leads nowhere, with what is on offer.
    """
    known = ["step", "epoch", "samples", *(f"optimizer.param_groups.{i}.lr" for i in range(len(run.base_lrs)))]
    known += dict.fromkeys(f"meters.{n}.avg" for names in run.result_names.values() for n in names)
    known += [f"metric_results.{n}" for n in run.results]
    for name, item in items.items():
        if isinstance(item, str) and ".".join(split(item)) not in known:
            raise ConfigError(
                f"{path}.{name}: {item!r} leads nowhere.{nearest(item, known)}\n  A run like this one has: {', '.join(known)}."
            )
