"""MetricHook: named metrics. Pure metrics are traced into the step, class-style metrics run on the host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.binding import Binding, bind
from ailab.errors import ConfigError
from ailab.hooks.measure.class_metrics import Entry, class_metric
from ailab.registry import HOOKS, METRICS
from ailab.stack import Middleware
from ailab.types import WEIGHT, Aux, Batch, Buffers, Loss, Mean, Params, RunInfo

PHASES = ("train", "val", "test")
_OWN: dict[str, Any] = {
    "mapping": dict[str, str],
    "phases": list[str],
    "reduce": Literal["mean"] | None,
    "probe": bool,
}  # keys of an entry that its type does not get


@HOOKS.register_module()
def MetricHook(*, run: RunInfo, name: str = "metrics", **metrics: Mapping[str, Any]) -> list[Middleware[Any]]:
    """Metrics by name: `top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}, phases=["val"])`.

    A pure metric is a callable that returns a `Mean`. It is traced into the step and costs no host work. A class-style metric
    has `update`, `compute` and `reset` (a `LabBaseMetric`, or any torchmetrics object). Its fields are returned from the step
    without padding, and it is updated on the host. Both kinds measure the global batch. When a metric returns a dict, each of
    its numbers is one result, with the name "<name>_<key>".

    A class-style metric is tested on a few samples before the run. If it fails during the run, this epoch has no result of it.
    After three failures it is switched off.

    Args:
        **metrics: for each name a dict with `type`, optional `mapping` and `phases` (all by default), and the arguments of the
            type. For a class-style metric also `reduce="mean"`, to average a result that is not a single number, and
            `probe=False`, to skip the test on a few samples.

    Raises:
        ConfigError: before the first step, for a metric that fails on the first samples, or whose result is not a number.
    """
    hooks: list[Middleware[Any]] = []
    for key, entry in metrics.items():
        path = f"cfg.hooks.{name}.{key}"
        metric = METRICS.build({k: v for k, v in entry.items() if k not in _OWN}, path)
        phases = tuple(entry.get("phases", PHASES))
        bound = bind(metric, entry.get("mapping", {}), path, defaults={"weight": (WEIGHT,)})
        if hasattr(metric, "compute"):
            own = Entry(key, path, metric, bound, phases, entry.get("reduce"), entry.get("probe", True))
            hooks += class_metric(own, run)
        else:
            hooks.append(_pure(key, metric, bound, phases, path))
    return hooks


def _check_entries(entry: Mapping[str, Any], path: str) -> list[str]:
    """The problems of a MetricHook entry of the cfg. Each of its metrics is checked as a component."""
    problems: list[str] = []
    for key, metric in entry.items():
        problems += METRICS.check(metric, f"{path}.{key}", keys=_OWN)
        if isinstance(metric, Mapping):
            strange = [p for p in metric.get("phases", ()) if p not in PHASES]
            problems += [f"{path}.{key}.phases: there is no phase {p!r}; phases are {', '.join(PHASES)}." for p in strange]
    return problems


MetricHook.check = _check_entries  # type: ignore[attr-defined]


def _pure(key: str, metric: Any, bound: Binding, phases: tuple[str, ...], path: str) -> Middleware[Loss]:
    def wrap(loss: Loss) -> Loss:
        def measured(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            total, aux = loss(params, buffers, batch)
            with torch.no_grad():
                found = metric(**bound.kwargs({**batch, **aux.outputs}))
            named = {f"{key}_{n}": m for n, m in found.items()} if isinstance(found, Mapping) else {key: found}
            if strange := [m for m in named.values() if not isinstance(m, Mean)]:
                raise ConfigError(
                    f"{path}: the metric returned {type(strange[0]).__name__}; a pure metric returns Mean(total, weight), "
                    "or a dict of them."
                )
            return total, replace(aux, logs={**aux.logs, **named})

        return measured

    def check(fields: Collection[str], phase: str) -> list[str]:
        return bound.check(fields)

    return Middleware(key, wrap, "loss", phases=phases, check=check, core={"metric": metric})
