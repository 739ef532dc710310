"""`torchrun -m ailab.fit cfgs/exp.py optimizer.lr=3e-4`: a cfg to a finished run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextlib import closing as closing_of
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ailab import __version__, dist, tree
from ailab.config.load import load as load_cfg
from ailab.core.epoch import Interrupted
from ailab.errors import AilabError, Preempted
from ailab.hooks.observe.log import RESTART, LoggerHook, ProgressHook, RecordHook
from ailab.job.assemble import Job, assemble
from ailab.job.session import report_error, started
from ailab.job.show import picture
from ailab.job.summary import closing, opening, results
from ailab.process.console import Console
from ailab.process.signals import Signals
from ailab.signature import short_name
from ailab.types import RunInfo, TrainState
from ailab.workdir.bad_samples import BAD_SAMPLES, BadSampleLog
from ailab.workdir.folder import CHECKPOINTS, is_run, lock

_RECORD_EVERY = 50  # steps between two lines of metrics.jsonl


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    state: TrainState
    work_dir: Path
    metrics: dict[str, float]  # last results, as "val_top1"


def fit(cfg: Mapping[str, Any]) -> Result:
    """Run a cfg to its end and return the last state and results. Can be called several times in a process.

    Raises:
        AilabError: one of its kinds, each with the exit code that the command line would give.
    """
    return _fit(lambda: cfg)


def _fit(load: Callable[[], Mapping[str, Any]]) -> Result:
    with started(load) as (full, device, warnings), Console() as say, Signals() as signals:
        for line in warnings:
            say(f"warning: {line}")
        full = _resuming(full)
        # Everything is built before the first byte is written: what does not fit harms no work_dir.
        job = assemble(full, device, say=say, log_to=say.log_to, interrupted=signals, extra=_always(full, say.bar))
        work_dir = job.info.work_dir
        say.bar.reset(total=job.info.total_steps)
        with closing_of(job), _held(job) if dist.rank() == 0 else nullcontext():
            say(opening(job))
            for stream in job.streams.values():
                stream.record_bad(BadSampleLog(work_dir / BAD_SAMPLES))
            state = _trained(job)
            found = results(job.info)
            say(closing(job, found))
        return Result(state, work_dir, {r.name: r.last for r in found})


@contextmanager
def _held(job: Job) -> Generator[None]:
    """The folders that the run writes its state to, each for this process alone: the work_dir, and that of the checkpoints.

    Checkpoints in the work_dir of another run are held by its lock too.
    """
    mine = job.info.work_dir
    folders = {mine.resolve(): mine}
    for folder in dict.fromkeys(h.core["holds"] for hooks in job.hooks.values() for h in hooks if "holds" in h.core):
        if folder.resolve() != mine.resolve() / CHECKPOINTS:
            folders |= {folder.resolve(): folder} | ({folder.resolve().parent: folder.parent} if is_run(folder.parent) else {})
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(lock(folder))
        yield


def _trained(job: Job) -> TrainState:
    try:
        return job.run(job.state)
    except Interrupted as stop:  # a CheckpointHook would have caught it
        raise Preempted(f"stopped by a signal at step {stop.state.at}; there is no CheckpointHook, nothing is saved.") from None


def ailab_train(cfg: Mapping[str, Any]) -> Result:
    """`fit` for a script of one's own: errors end the process with one message and their exit code, as on the command line."""
    try:
        return fit(cfg)
    except (AilabError, KeyboardInterrupt) as e:
        sys.exit(report_error(e))


def _resuming(cfg: dict[str, Any]) -> dict[str, Any]:
    """The cfg, with a ResumeHook if the launcher has restarted a run that saves checkpoints and had begun."""
    rendezvous = dist.current_rendezvous()
    kinds = {short_name(entry["type"]): entry for entry in cfg["hooks"].values() if entry["enable"]}
    if rendezvous is None or "ResumeHook" in kinds or "CheckpointHook" not in kinds or not rendezvous.has_flag("begun"):
        return cfg
    entry = {"type": "ResumeHook", "save_dir": kinds["CheckpointHook"].get("save_dir"), "enable": True}
    return {**cfg, "hooks": {**cfg["hooks"], RESTART: entry}}


def _always(cfg: Mapping[str, Any], bar: Any) -> Callable[[RunInfo], list[Any]]:
    """The hooks that every run has: the record, the bar, and a logger unless the cfg has one."""

    def extra(run: RunInfo) -> list[Any]:
        hooks = RecordHook(_RECORD_EVERY, run=run)
        if bar is not None and not bar.disable:
            hooks = [*hooks, *ProgressHook(bar, run)]
        has_logger = any(short_name(entry["type"]) == "LoggerHook" for entry in cfg["hooks"].values())
        return hooks if has_logger else [*hooks, *LoggerHook(run=run)]

    return extra


def dry_run(cfg: Mapping[str, Any]) -> str:
    """Build everything, run two steps of each phase on one batch, write nothing; the time and memory they took."""
    with started(lambda: cfg) as (full, device, _):
        job = assemble(full, device, extra=_always(full, None))
        state, lines = job.state, [picture(job)]
        for phase, step in job.steps.items():
            batch = next(iter(job.streams[phase].epoch(0)))
            working = state if phase == "train" else _for_eval(job, state, phase)
            took: list[float] = []
            values = ""
            for _ in range(2):
                start = time.monotonic()
                working, logs = step(working, batch)
                values = "".join(f", {n} {float(m.value):.4f}" for n, m in logs.items())
                took.append(time.monotonic() - start)
            lines.append(f"{phase:<6} first step {took[0]:.2f} s, second {took[1] * 1e3:.1f} ms{values}")
            state = working if phase == "train" else state
        return "\n".join([*lines, _memory(device, state)])


def _for_eval(job: Job, state: TrainState, phase: str) -> TrainState:
    totals = torch.zeros(len(job.info.log_names[phase]), 2, dtype=torch.float64, device=job.info.device)
    return state.replace(opt_state={}).with_slot("totals", totals)


def _memory(device: torch.device, state: TrainState) -> str:
    held = f"state {tree.nbytes(state) / 2**20:.1f} MiB"
    if device.type == "cuda":
        return f"memory {held}, peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on the device"
    import resource

    return f"memory {held}, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB of the process"


def show(cfg: Mapping[str, Any]) -> str:
    """The picture of the stack of this cfg; nothing is run or written."""
    with started(lambda: cfg) as (full, device, _):
        return picture(assemble(full, device, extra=_always(full, None)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    more = f"python -m ailab.help tells what a cfg can say: all names, one name, a place such as cfg.data. ailab {__version__}"
    parser = argparse.ArgumentParser(prog="ailab.fit", description="Train what a cfg file describes.", epilog=more)
    parser.add_argument("cfg", help="a Python file that defines `cfg`")
    parser.add_argument("overrides", nargs="*", metavar="a.b.c=value", help="changes to the cfg, such as optimizer.lr=3e-4")
    parser.add_argument("--show", action="store_true", help="print the stack of this run and stop")
    parser.add_argument("--dry-run", action="store_true", help="build everything, run two steps of each phase, report")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.show or args.dry_run:
            cfg = load_cfg(args.cfg, args.overrides)
            text = show(cfg) if args.show else dry_run(cfg)
            if int(os.environ.get("RANK", "0")) == 0:
                print(text)
        else:
            _fit(lambda: load_cfg(args.cfg, args.overrides))
    except (AilabError, KeyboardInterrupt) as e:
        if args.debug:
            raise
        return report_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())
