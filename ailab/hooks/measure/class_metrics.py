"""Class-style metrics: `update` on the host after each step, `compute` when the phase has ended."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ailab import dist
from ailab.binding import Binding
from ailab.core.epoch import began
from ailab.errors import AilabError, ConfigError
from ailab.hooks.measure.metric_memory import memory_of, restore
from ailab.hooks.observe.scalars import MAX_FAILURES
from ailab.stack import Middleware
from ailab.types import WEIGHT, Batch, Epoch, HostMemory, Logs, Mean, PyTree, RunInfo, Step, TrainState


@dataclass(frozen=True)
class Entry:
    """A metric of the cfg."""

    key: str
    path: str  # in the cfg
    metric: Any
    bound: Binding
    phases: tuple[str, ...]
    reduce: str | None  # "mean": of a result that is no single number
    probe: bool  # whether it is tried on the first samples


def class_metric(entry: Entry, run: RunInfo) -> list[Middleware[Any]]:
    """The middlewares of a metric with `update`, `compute` and `reset`: a host and an epoch one for each phase.

    In training a checkpoint in the middle of an epoch holds what the metric has gathered, lists of samples too. So a resumed epoch
    has the result of the whole epoch. A metric that keeps other objects has no result in such an epoch, and a warning says so.
    """
    metric = entry.metric.to(run.device) if hasattr(entry.metric, "to") else entry.metric
    parts: list[Any] = list(metric.modules()) if isinstance(metric, torch.nn.Module) else [metric]
    for part in parts:
        if hasattr(part, "sync_on_compute"):
            part.sync_on_compute = False  # every rank is updated with all samples, so nothing is left to gather
    copies = [metric, *(copy.deepcopy(metric) for _ in entry.phases[1:])]
    return [m for phase, own in zip(entry.phases, copies, strict=True) for m in _Counted(entry, own, phase, run).hooks()]


class _Counted:
    """One metric in one phase: the steps counted in this epoch, and its failures."""

    def __init__(self, entry: Entry, metric: Any, phase: str, run: RunInfo):
        self.entry, self.metric, self.phase, self.run = entry, metric, phase, run
        self.seen = self.failures = 0
        self.spoilt = False  # in this epoch: a metric that missed a batch has no result
        self.resumed: PyTree = None  # what a checkpoint in mid-epoch holds of it
        metric.reset()
        if phase == "train":
            run.memories[entry.path] = HostMemory(self._saved, self._resume)

    def hooks(self) -> list[Middleware[Any]]:
        """The middlewares of the metric in this phase."""
        key, fields, phases = self.entry.key, self.entry.bound, (self.phase,)
        outputs = tuple(f for _, f in (*fields.mapped, *fields.free))

        def check(found: Collection[str], phase: str) -> list[str]:
            return fields.check(found)

        core = {"outputs": outputs, "metric": self.entry.metric}
        host = Middleware(key, self._update, "host", None, phases, role="result", check=check, core=core)
        return [host, Middleware(key, self._result, "epoch", None, phases, role="result", reports=self._probe)]

    def _saved(self) -> PyTree:
        memory = None if self.spoilt else memory_of(self.metric)
        return None if memory is None else {"seen": self.seen, "memory": memory}

    def _resume(self, saved: PyTree) -> None:
        self.resumed = saved

    def _update(self, step: Step) -> Step:
        def measured(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            assert isinstance(logs, Logs)
            fields = self.entry.bound.kwargs(_real({**batch, **logs.outputs}))
            fields = {p: _gathered(v) for p, v in fields.items()}  # by every rank, also where this one's metric is off
            self._try(lambda: self.metric.update(**fields))
            self.seen += 1
            return state, logs

        return measured

    def _result(self, epoch: Epoch) -> Epoch:
        def computed(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            self._begin(state)
            state, logs = epoch(state, batches)
            values: dict[str, Tensor] = {}
            if self.seen and not self.spoilt:
                self._try(lambda: values.update(numbers(self.entry, self.metric.compute())[0]))
            if not values:
                return state, logs
            column = torch.stack([v.to(logs.packed.device) for v in values.values()])
            rows = torch.stack([column, torch.ones_like(column)], 1)
            return state, Logs.join([logs, Logs(tuple(values), rows)])

        return computed

    def _begin(self, state: TrainState) -> None:
        """Reset the metric, or restore its memory in the middle of an epoch."""
        self.metric.reset()
        self.seen, self.spoilt = 0, self.failures >= MAX_FAILURES
        done = state.at - began(state) if self.phase == "train" else 0
        saved, self.resumed = self.resumed, None
        if not done:
            return
        if saved is not None and saved["seen"] == done:
            restore(self.metric, saved["memory"], self.run.device)
            self.seen = done
        else:
            self.spoilt = True
            self.run.say(
                f"warning: {self.entry.path}: no train result of this epoch: what it saw before step {state.at} is not saved"
            )

    def _try(self, call: Any) -> None:
        """Call, unless the metric has failed in this epoch. After three failures it is switched off."""
        if self.spoilt:
            return
        try:
            call()
        except Exception as e:  # whatever the user's metric raises: it is an observer
            self.spoilt, self.failures = True, self.failures + 1
            off = "; it is switched off now" if self.failures == MAX_FAILURES else ""
            what = f"{self.entry.path}: no {self.phase} result of this epoch: {type(e).__name__}: {e}"
            self.run.say(f"warning: {what}{off}")

    def _probe(self, sample: Batch, phase: str) -> tuple[str, ...]:
        """The names of its results, computed on the first samples.

        Raises:
            ConfigError: when it fails on them, or its result is not a number.
        """
        entry = self.entry
        if not entry.probe:
            return (entry.key,)
        fields = entry.bound.kwargs(sample)
        strange = [f for f, v in fields.items() if not isinstance(v, Tensor)]
        if strange and self.run.world_size > 1:
            raise ConfigError(f"{entry.path}: {strange[0]!r} is not a tensor, so it cannot be gathered from several processes.")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # these are about four samples only
                self.metric.update(**fields)
                names, left_out = numbers(entry, self.metric.compute())
        except AilabError:
            raise
        except Exception as e:
            raise ConfigError(
                f"{entry.path}: {entry.bound.what} failed on the first samples: {type(e).__name__}: {e}\n"
                "  For a metric that needs more samples than these few: probe=False."
            ) from e
        finally:
            self.metric.reset()
        if left_out:
            self.run.say(f"{entry.path}: not reported, because they are not single numbers: {', '.join(left_out)}")
        return tuple(names)


def numbers(entry: Entry, value: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The results of `compute` as 0-d float64 tensors by name, and the names of those that are not single numbers.

    Raises:
        ConfigError: when there is no number in `value`.
    """
    if not isinstance(value, Mapping):
        named: dict[str, Any] = {entry.key: value}
    else:
        named = {f"{entry.key}_{n}": v for n, v in cast("Mapping[str, Any]", value).items()}
    found = {n: t for n, v in named.items() if (t := _number(v, entry.reduce)) is not None}
    if not found:
        shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"{entry.path}: {entry.bound.what} returned {shape}; a result is a number, or a dict of numbers by name.\n"
            "  Set the metric to return one (in torchmetrics often average='macro'), or average its result: reduce='mean'."
        )
    return found, [n for n in named if n not in found]


def _number(value: Any, reduce: str | None) -> Tensor | None:
    try:
        tensor = torch.as_tensor(value).detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None
    if tensor.numel() == 1:
        return tensor.reshape(())
    return tensor.mean() if reduce == "mean" and tensor.numel() else None


def _real(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without the padded samples."""
    if WEIGHT not in fields:
        return fields
    keep = fields[WEIGHT] > 0
    size = keep.shape[0]
    return {n: v[keep] if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == size else v for n, v in fields.items()}


def _gathered(value: Any) -> Any:
    return dist.all_gather(value) if isinstance(value, Tensor) else value
