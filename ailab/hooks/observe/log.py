"""Observers. LoggerHook: console and log file. RecordHook: config.json and metrics.jsonl. ProgressHook: progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ailab.config.load import snapshot
from ailab.core.epoch import began, epochs_done
from ailab.errors import ConfigError, NonFiniteError
from ailab.hooks.observe.run_view import Item, RunView, check_items, read
from ailab.hooks.observe.scalars import Report, guarded, observe, running
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Mean, Run, RunInfo, Step, TrainState
from ailab.workdir import durable
from ailab.workdir.folder import Lines


@HOOKS.register_module()
def LoggerHook(
    interval: int = 50,
    log_dir: str | None = None,
    log_items: Mapping[str, Any] | None = None,
    *,
    run: RunInfo,
    name: str = "logger",
) -> list[Middleware[Any]]:
    """Log one line every `interval` steps and at the end of each phase, to the console and to `log_dir/train.log`.

    The file has every other line of the console too: the report at the start, warnings, results at the end.

    Args:
        interval: optimizer steps between two lines, at least 1.
        log_dir: folder of the log file. The work_dir by default.
        log_items: {name: path or callable}, the values to show beside the loss and the metrics. A path reads the run:
            `"optimizer.param_groups.0.lr"`, `"meters['top1'].avg"` (mean over the epoch so far),
            `"metric_results.val_top1"` (newest result). A callable gets the `Report`.

    Raises:
        ConfigError: for an interval below 1; before the first step, for a path that does not exist in this run.
    """
    usual: dict[str, Item] = {"lr": "optimizer.param_groups.0.lr"} if run.base_lrs else {}
    items: Mapping[str, Item] = usual if log_items is None else log_items
    file = Path(log_dir or run.work_dir) / "train.log"
    latest: dict[str, float] = {}
    clock = _Clock()
    console = False  # whether the console gives its lines, which are those of this hook too

    def write(line: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as f:
            f.write(line + "\n")

    append = guarded(write, f"{name} ({file.name})", run)  # with a full disk the console still works

    def emit(report: Report) -> None:
        if report.final:
            latest.update({f"{report.phase}_{n}": v for n, v in report.means.items()})
        items_now = {n: read(item, RunView(report, latest)) for n, item in items.items()}
        wall = {n: f"{v:.4g}" for n, v in report.wall.items()}
        shown = {**report.means, **wall, **items_now}
        rate = clock.rate(report)
        rate = None if RATE in wall else rate
        while run.notes:
            append(run.notes.pop(0))
        line = _line(report, {n: v for n, v in shown.items() if v is not None}, rate, run)
        run.say(line)
        if not console:
            append(line)

    def begin(state: TrainState) -> None:
        nonlocal console
        console = run.log_to(file, append)

    hooks = observe(name, emit, run, every=interval, begin=begin)

    def checked(run_all: Run) -> Run:
        check_items(items, run, f"cfg.hooks.{name}.log_items")
        return run_all

    return [*hooks, Middleware(name, checked, "run")]


class _Clock:
    """Samples per second between two lines of the training phase."""

    def __init__(self) -> None:
        self.then, self.seen, self.epoch = time.monotonic(), 0.0, 0

    def rate(self, report: Report) -> float | None:
        now = time.monotonic()
        if report.phase != "train":
            self.then = now
            return None
        new = report.samples - (self.seen if report.epoch == self.epoch else 0.0)
        took, self.then, self.seen, self.epoch = now - self.then, now, report.samples, report.epoch
        return new / took if took > 0 and new > 0 else None


def _line(report: Report, shown: Mapping[str, Any], rate: float | None, run: RunInfo) -> str:
    values = "  ".join(f"{n} {_number(v)}" for n, v in shown.items())
    speed = f"  {rate:,.0f} samples/s" if rate else ""
    where = f"epoch {report.epoch}" + (f"/{run.total_epochs}" if run.steps_per_epoch else "")
    return f"{where}  {report.phase:<5}{'' if report.final else f' step {report.step}'}  {values}{speed}"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 or not value else f"{value:.2e}"


RATE = "samples_per_s"  # the name of the same value in a ThroughputHook; then the logger does not measure it
METRICS, CONFIG = "metrics.jsonl", "config.json"  # in the work_dir
RESTART = "resume_after_restart"  # the hook that a restart by the launcher adds to the cfg
_KEYS = ("step", "epoch", "phase", "final", "lr")


def is_reserved(key: str) -> bool:
    """Whether a key of a line of metrics.jsonl is reserved, so that no result can have this name."""
    return key in _KEYS or key.startswith("wall_")


def RecordHook(interval: int, *, run: RunInfo) -> list[Middleware[Any]]:
    """Write `config.json` and `metrics.jsonl`: one JSON object per line with step, epoch, phase and every log by name.

    It is part of every run. A resumed run removes the lines that the interrupted run wrote after the checkpoint. So the file is
    the same, byte for byte, as that of a run that was not interrupted. Only keys that start with `wall_` differ. A run without a
    train phase appends its lines.

    Raises:
        ConfigError: when a log has the name of one of the other keys of a line.
        NonFiniteError: when the loss of a line is NaN or infinite.
    """
    lines: Lines | None = None
    started = time.monotonic()

    def begin(state: TrainState) -> None:
        nonlocal lines
        configure(state)
        lines = Lines(run.work_dir / METRICS)
        epoch, step = epochs_done(state), state.at
        training = run.steps_per_epoch > 0
        lines.rewind(lambda row: not training or row["epoch"] <= epoch or (not row["final"] and row["step"] < step))
        if training and step > began(state) and step % interval == 0:
            emit(running(state, run))  # on a GPU this line may not have been written before the checkpoint: values arrive later

    def write(report: Report) -> None:
        head = {"step": report.step, "epoch": report.epoch, "phase": report.phase, "final": report.final}
        wall = {f"wall_{n}": v for n, v in report.wall.items()} | {"wall_seconds": round(time.monotonic() - started, 3)}
        if lines is not None:
            lines.append({**head, **report.means, "lr": list(report.lrs), **wall})

    configure = guarded(partial(_write_config, run=run), CONFIG, run)
    append = guarded(write, METRICS, run)  # with a full disk the check below still works

    def emit(report: Report) -> None:
        append(report)
        loss = report.means.get("loss", 0.0)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the {report.phase} loss of epoch {report.epoch} is {loss} at step {report.step}.\n"
                "  Lower optimizer.lr, or add hooks.clip = dict(type='GradClipHook', max_norm=1.0) or a SkipNonFiniteHook."
            )

    def checked(run_all: Run) -> Run:
        taken = sorted({n for names in run.result_names.values() for n in names if is_reserved(n)})
        if taken:
            raise ConfigError(
                f"cfg.hooks: the key {taken[0]!r} of metrics.jsonl is reserved; give that metric or loss another name."
            )
        return run_all

    return [*observe("record", emit, run, every=interval, begin=begin), Middleware("record", checked, "run")]


def _write_config(state: TrainState, run: RunInfo) -> None:
    """Write the cfg of this run as JSON. A run that continues with another cfg writes that beside it, with its step in the name.

    An evaluation does not overwrite the file of the training.
    """
    path = run.work_dir / CONFIG
    hooks = {n: entry for n, entry in run.cfg["hooks"].items() if n != RESTART}
    text = json.dumps(snapshot({**run.cfg, "hooks": hooks}), indent=1).encode() + b"\n"
    if not path.exists():
        durable.replace(path, text)
    elif run.steps_per_epoch:
        latest = max(run.work_dir.glob(f"{path.stem}_step_*{path.suffix}"), key=_step_of, default=path) if state.at else path
        if latest.read_bytes() != text:
            durable.replace(path.with_name(f"{path.stem}_step_{state.at:08d}{path.suffix}") if state.at else path, text)


def _step_of(path: Path) -> int:
    step = path.stem.rpartition("_")[2]
    return int(step) if step.isdecimal() else -1


def ProgressHook(bar: Any, run: RunInfo) -> list[Middleware[Any]]:
    """Update the progress bar after every training step. `bar` is a tqdm over the training steps of the run."""

    def wrap(step: Step) -> Step:
        def shown(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            bar.update(state.at - bar.n)
            return state, logs

        return shown

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def named(state: TrainState, batches: Any) -> Any:
            done = epochs_done(state)
            if run.steps_per_epoch:
                bar.set_description(f"epoch {done + 1}/{run.total_epochs}", refresh=False)
            bar.total = began(state) + (run.total_epochs - done) * run.steps_per_epoch
            bar.initial = bar.initial or state.at  # a resumed run's rate counts its own steps
            return epoch(state, batches)

        return named

    return [Middleware("progress", wrap, "host"), Middleware("progress", wrap_epoch, "epoch")]
