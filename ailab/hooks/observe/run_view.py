"""What the paths of `log_items` read: `optimizer.param_groups.0.lr`, `meters['top1'].avg` and so on."""

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
    """What a log item can read. `latest` has the newest results of every phase, by names such as "val_top1"."""

    report: Report
    latest: Mapping[str, float]

    def tree(self) -> dict[str, Any]:
        """The values by the first part of a path."""
        return {
            "optimizer": {"param_groups": [{"lr": lr} for lr in self.report.lrs]},
            "meters": {n: {"avg": v} for n, v in self.report.means.items()},  # class-style metrics: at the end of a phase
            "metric_results": dict(self.latest),
            "step": self.report.step,
            "epoch": self.report.epoch,
            "samples": self.report.samples,
        }


def split(path: str) -> list[str]:
    """`"meters['top1'].avg"` to `["meters", "top1", "avg"]`; an empty list when it is not a valid path."""
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
    """The value of one log item. None for a result that does not exist yet, such as a metric of a phase that has not run."""
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
    """Check that every path of `items` exists in this run.

    Raises:
        ConfigError: for a path that does not exist. It lists those that do.
    """
    known = ["step", "epoch", "samples", *(f"optimizer.param_groups.{i}.lr" for i in range(len(run.base_lrs)))]
    known += dict.fromkeys(f"meters.{n}.avg" for names in run.result_names.values() for n in names)
    known += [f"metric_results.{n}" for n in run.results]
    for name, item in items.items():
        if isinstance(item, str) and ".".join(split(item)) not in known:
            raise ConfigError(
                f"{path}.{name}: {item!r} does not exist in this run.{nearest(item, known)}\n  This run has: {', '.join(known)}."
            )
