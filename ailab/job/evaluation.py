"""The evaluation of a split by the step that training uses: a cfg without training, the state of a checkpoint, no observers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ailab import dist
from ailab.core.step import eval_step
from ailab.errors import ConfigError
from ailab.hooks.measure.sample_values import ClassScores, SampleValues
from ailab.hooks.run.resume import ResumeHook
from ailab.job.assemble import Job, assemble
from ailab.job.probe import output_names
from ailab.stack import TRACED, Middleware, at, role_of, stack
from ailab.types import Batches, Epoch, Logs, RunInfo, TrainState

Split = Literal["train", "val", "test"]
_TRAINING_ONLY = ("shuffle", "drop_last", "sampler")  # how training samples are drawn: an evaluation sees each of them once


@dataclass
class Measured:
    """What an evaluation found."""

    logs: dict[str, float] = field(default_factory=dict[str, float])  # results without the phase, as "top1"
    directions: dict[str, str] = field(default_factory=dict[str, str])  # "min" or "max", where it is known
    samples: int = 0
    bad: int = 0  # samples that could not be read and do not count
    rows: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 2))  # (N, M, 2): what each sample adds to M means
    row_names: list[str] = field(default_factory=list[str])
    failure: str = ""  # why there are no rows
    matrix: Tensor | None = None  # (C, C) int64, a row per true class
    scores: Tensor | None = None  # (N, C) float32
    labels: Tensor | None = None  # (N,) int64
    classes: list[str] | None = None


def evaluating(cfg: Mapping[str, Any], split: Split) -> dict[str, Any]:
    """The cfg of an evaluation of `split`: one phase, and no first weights to read, for a checkpoint replaces them.

    The training split is evaluated as a "val" phase: its samples are read as training reads them, each once and in their order.

    Raises:
        ConfigError: the cfg has no such split.
    """
    data = cast("Mapping[str, Any]", cfg["data"]) if isinstance(cfg.get("data"), Mapping) else {}
    if data.get(split) is None:
        known = [s for s in ("train", "val", "test") if data.get(s) is not None]
        raise ConfigError(f"cfg.data.{split}: there is no such split. The cfg has: {', '.join(known) or 'none'}.")
    phase = phase_of(split)
    loader = {k: v for k, v in data.get(f"{split}_dataloader", {}).items() if split != "train" or k not in _TRAINING_ONLY}
    data = {**data, phase: data[split], f"{phase}_dataloader": loader}
    model = {**cfg["model"], "init": None} if isinstance(cfg.get("model"), Mapping) else cfg.get("model")
    found = {**cfg, "data": data, "workflow": [{"phase": phase}]}
    return {**found, "model": model} if "model" in cfg else found


def phase_of(split: Split) -> Literal["val", "test"]:
    """The phase that evaluates a split."""
    return "test" if split == "test" else "val"


def measure(
    cfg: Mapping[str, Any],
    device: torch.device,
    checkpoint: Path,
    split: Split,
    *,
    values: bool = True,
    say: Callable[[str], None] = print,
) -> Measured:
    """Evaluate a split with the state of a checkpoint, on every rank. Nothing is written.

    The step is the one of the run's own evaluation: the same hooks below the compile line and the same metrics, in the same order.
    So the results are those that the run itself would report. Its observers, its checkpoints and its ends take no part.

    Args:
        cfg: completed, of `evaluating`.
        device: where the state and the batches live.
        checkpoint: the folder of one checkpoint; that of rank 0 counts.
        split: for which `cfg` was made.
        values: whether to gather what each sample adds to the results.
        say: one line to the console.

    Raises:
        ConfigError, DataError, CheckpointError: as `assemble` and `ResumeHook` do.
    """
    phase, found = phase_of(split), Measured()
    jobs: list[Job] = []

    @cache
    def places() -> list[Tensor]:
        return _places(jobs[0], phase)

    output, label = _names(cfg)
    rows, scores = SampleValues(phase, places), ClassScores(phase, output, label, places)

    def extra(run: RunInfo) -> list[Middleware[Any]]:
        gather = [rows.hook()] if values else []
        return [*gather, scores.hook(), _results(found), ResumeHook(resume_from=str(checkpoint), run=run)]

    job = assemble(cfg, device, say=say, extra=extra, serves=lambda hook: _measures(hook, phase))
    jobs.append(job)
    loss = stack(job.parts.losses[phase], at(job.hooks[phase], "loss", phase))
    rows.bare = stack(eval_step(loss), at(job.hooks[phase], "step", phase))
    scores.output = output or next(iter(output_names(job.parts)), "")
    job.run(job.state)
    bad = torch.tensor(float(len(job.streams[phase].bad)), device=device)
    found.samples, found.bad = job.streams[phase].samples, int(dist.all_reduce(bad))
    found.directions = {n.removeprefix(f"{phase}_"): d for n, d in job.info.directions.items()}
    found.classes = _classes(job.parts.datasets[phase])
    found.failure = rows.failure
    if values:
        found.rows, found.row_names = rows.gathered(device)
    found.matrix, found.scores, found.labels = scores.gathered(device)
    return found


def _measures(hook: Middleware[Any], phase: str) -> bool:
    """Whether a hook has a part in the results of an evaluation. What is below the compile line has memory for others too."""
    return hook.depth in TRACED or (role_of(hook) == "result" and hook.phases is not None and phase in hook.phases)


def _results(found: Measured) -> Middleware[Epoch]:
    """Keeps the results of the workflow, in all digits."""

    def wrap(epoch: Epoch) -> Epoch:
        def kept(state: TrainState, batches: Batches) -> tuple[TrainState, Logs]:
            state, logs = epoch(state, batches)
            found.logs = {n.partition("_")[2]: v for n, v in logs.values_as_floats().items()}
            return state, logs

        return kept

    return Middleware("results", wrap, "epoch", role="observer")


def _places(job: Job, phase: str) -> list[Tensor]:
    """The places in the epoch of this rank's samples, per batch."""
    order = job.streams[phase].order
    begins = [0]
    for step in range(order.steps):
        begins.append(begins[-1] + order.length(step))
    return [order.part(torch.arange(begins[step], begins[step + 1])) for step in range(order.steps)]


def _names(cfg: Mapping[str, Any]) -> tuple[str, str]:
    """The model output and the field that the loss compares; "" for the first output."""
    mapping = cfg["loss"]["mapping"] if cfg["loss"] else {}
    return mapping.get("input", ""), mapping.get("target", "target")


def _classes(dataset: Any) -> list[str] | None:
    names = getattr(dataset, "classes", None)
    return [str(n) for n in names] if names else None


def rank_0_says(line: str) -> None:
    """Print a line on rank 0."""
    if dist.rank() == 0:
        print(line, flush=True)
