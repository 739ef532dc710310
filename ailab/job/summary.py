"""What a run says of itself when it begins and when it has ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ailab.hooks.observe.log import METRICS, is_reserved
from ailab.job.assemble import Job
from ailab.metrics.direction import is_better
from ailab.types import RunInfo
from ailab.workdir.commit import BEST


@dataclass(frozen=True)
class Outcome:
    """A result over the epochs of a run."""

    name: str  # as "val_top1"
    last: float
    best: float | None  # where it is known which is better
    epoch: int  # of the best


def opening(job: Job) -> str:
    """The report at the start: model, parameters, data sizes, device, world size, precision, what is compiled."""
    info, parts = job.info, job.parts
    trained = sum(job.state.params[n].numel() for n in parts.trainable)
    total = sum(p.numel() for p in job.state.params.values())
    sizes = {phase: info.cfg["data"][f"{phase}_dataloader"]["batch_size"] for phase in job.streams}
    data = ", ".join(f"{p} {len(parts.datasets[p])} samples in {n} steps of {sizes[p]}" for p, n in info.phase_steps.items())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in job.state.params.values()})
    amp = any(h.name == "amp" and h.depth == "loss" for hooks in job.hooks.values() for h in hooks)
    precision = "/".join(dtypes) + (" with autocast" if amp else "")
    graph = ", replayed as a CUDA graph" if job.plan.replay is not None else ""
    processes = f", {info.world_size} processes ({job.plan.sync})" if info.world_size > 1 else ""
    return "\n".join(
        [
            f"model     {type(parts.model).__name__}: {total:,} parameters, {trained:,} trained",
            f"data      {data}",
            f"device    {_device_name(info.device)}{processes}, torch {torch.__version__}, {precision}",
            f"compile   {'the ' + job.plan.cut if job.plan.enabled else 'no'} ({job.plan.why}){graph}",
            f"work_dir  {info.work_dir}",
        ]
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def results(info: RunInfo) -> list[Outcome]:
    """The results of this run's phases, from metrics.jsonl."""
    record = info.work_dir / METRICS
    if info.rank != 0 or not record.exists():  # a finished run that is started again does not write one anew
        return []
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    found: dict[str, Outcome] = {}
    for row in (r for r in rows if r["final"] and r["phase"] in info.phase_steps):
        for key, value in row.items():
            if is_reserved(key) or not isinstance(value, float):
                continue
            name = f"{row['phase']}_{key}"
            direction = info.directions.get(name)
            best = value if direction else None
            before = found.get(name, Outcome(name, value, best, row["epoch"]))
            if direction and before.best is not None and is_better(value, before.best, direction):
                before = replace(before, best=value, epoch=row["epoch"])
            found[name] = replace(before, last=value)
    return list(found.values())


def closing(job: Job, found: Sequence[Outcome]) -> str:
    """The report at the end: the results, the best checkpoint, and what there is in the work_dir."""
    work_dir = job.info.work_dir
    rows = [
        f"  {r.name:<20} last {r.last:.4f}" + ("" if r.best is None else f"   best {r.best:.4f} (epoch {r.epoch})")
        for r in found
    ]
    left = sorted(p.name for p in work_dir.iterdir() if not p.name.startswith("."))
    return "\n".join(["done", *rows, *_best(job), f"  in {work_dir}: {', '.join(left)}"])


def _best(job: Job) -> list[str]:
    """The best checkpoint of each folder that names one."""
    folders = dict.fromkeys(h.core["holds"] for hooks in job.hooks.values() for h in hooks if "holds" in h.core)
    named = [(Path(folder), json.loads((folder / BEST).read_text())) for folder in folders if (folder / BEST).exists()]
    return [
        f"  best checkpoint      {folder / b['path']} ({b['metric']} {b['value']:.4f}, epoch {b['epoch']})"
        for folder, b in named
    ]
