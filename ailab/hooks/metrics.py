"""MetricHook: named metrics; pure ones are traced into the step, class-style ones run on the host."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ailab import dist
from ailab.binding import Binding, bind
from ailab.errors import ConfigError
from ailab.registry import HOOKS, METRICS
from ailab.stack import Middleware
from ailab.types import WEIGHT, Aux, Batch, Buffers, Epoch, Logs, Loss, Mean, Params, RunInfo, Step, TrainState

PHASES = ("train", "val", "test")


@HOOKS.register_module()
def MetricHook(*, run: RunInfo, name: str = "metrics", **metrics: Mapping[str, Any]) -> list[Middleware[Any]]:
    """Metrics by name: `top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}, phases=["val"])`.

    A pure metric is a callable that returns a `Mean`; it is traced into the step and costs no host work. A class-style metric
    has `update`, `compute` and `reset` (a `LabBaseMetric`, any torchmetrics object): the fields that it names come out of the
    step, padding is cut off, and its result joins the epoch's logs. Both see the global batch or its exact sums.

    Args:
        run: given by the framework.
        name: of this hook.
        **metrics: each with `type`, optional `mapping`, `phases` (all by default) and the arguments of its type.
    """
    hooks: list[Middleware[Any]] = []
    for key, entry in metrics.items():
        path = f"cfg.hooks.{name}.{key}"
        args = {k: v for k, v in entry.items() if k not in ("mapping", "phases")}
        metric = METRICS.build(args, path)
        phases = tuple(entry.get("phases", PHASES))
        bound = bind(metric, entry.get("mapping", {}), path, defaults={"weight": WEIGHT})
        hooks += (
            _host(key, metric, bound, phases, run) if hasattr(metric, "compute") else [_pure(key, metric, bound, phases, path)]
        )
    return hooks


def _check_entries(entry: Mapping[str, Any], path: str) -> list[str]:
    """The problems of a MetricHook entry of the cfg: each of its metrics is a component of its own."""
    problems: list[str] = []
    for key, metric in entry.items():
        problems += METRICS.check(metric, f"{path}.{key}", keys={"mapping": dict[str, str], "phases": list[str]})
        if isinstance(metric, Mapping):
            strange = [p for p in metric.get("phases", ()) if p not in PHASES]
            problems += [f"{path}.{key}.phases: there is no phase {p!r}; phases are {', '.join(PHASES)}." for p in strange]
    return problems


MetricHook.check = _check_entries  # type: ignore[attr-defined]


def _checker(bound: Binding) -> Any:
    def check(fields: Collection[str], phase: str) -> list[str]:
        return bound.check(fields)

    return check


def _pure(key: str, metric: Any, bound: Binding, phases: tuple[str, ...], path: str) -> Middleware[Loss]:
    def wrap(loss: Loss) -> Loss:
        def measured(params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Aux]:
            total, aux = loss(params, buffers, batch)
            with torch.no_grad():
                mean = metric(**bound.kwargs({**batch, **aux.outputs}))
            if not isinstance(mean, Mean):
                raise ConfigError(
                    f"{path}: the metric returned {type(mean).__name__}; a pure metric returns Mean(total, weight)."
                )
            return total, replace(aux, logs={**aux.logs, key: mean})

        return measured

    return Middleware(key, wrap, "loss", phases=phases, check=_checker(bound))


def _host(key: str, metric: Any, bound: Binding, phases: tuple[str, ...], run: RunInfo) -> list[Middleware[Any]]:
    if hasattr(metric, "to"):
        metric = metric.to(run.device)
    if hasattr(metric, "sync_on_compute"):
        metric.sync_on_compute = False  # every rank is shown every sample below, so there is nothing left to gather
    copies = {phase: metric if i == 0 else copy.deepcopy(metric) for i, phase in enumerate(phases)}
    counted = dict.fromkeys(phases, 0)

    def host(phase: str) -> Middleware[Step]:
        def wrap(step: Step) -> Step:
            def measured(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
                state, logs = step(state, batch)
                assert isinstance(logs, Logs)
                fields = bound.kwargs(_real({**batch, **logs.outputs}))
                copies[phase].update(**{p: _gathered(v) for p, v in fields.items()})
                counted[phase] += 1
                return state, logs

            return measured

        return Middleware(key, wrap, "host", phases=(phase,), check=_checker(bound), core={"outputs": _fields(bound)})

    def result(phase: str) -> Middleware[Epoch]:
        def wrap(epoch: Epoch) -> Epoch:
            def computed(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
                state, logs = epoch(state, batches)
                if not counted[phase]:
                    return state, logs
                value = torch.as_tensor(copies[phase].compute(), dtype=torch.float64).reshape(1, 1)
                copies[phase].reset()
                counted[phase] = 0
                row = torch.cat([value, torch.ones_like(value)], 1).to(logs.packed.device)
                return state, Logs.join([logs, Logs((key,), row)])

            return computed

        return Middleware(key, wrap, "epoch", phases=(phase,))

    return [m for phase in phases for m in (host(phase), result(phase))]


def _fields(bound: Binding) -> tuple[str, ...]:
    return tuple(f for _, f in (*bound.mapped, *bound.free))


def _real(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without the padded samples."""
    if WEIGHT not in fields:
        return fields
    keep = fields[WEIGHT] > 0
    size = keep.shape[0]
    return {n: v[keep] if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == size else v for n, v in fields.items()}


def _gathered(value: Any) -> Any:
    return dist.all_gather(value) if isinstance(value, Tensor) else value
