"""CheckpointHook and ResumeHook: save the state to checkpoints and continue from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ailab import dist
from ailab.core.epoch import PROGRESS, Interrupted, epochs_done
from ailab.errors import CheckpointError, ConfigError, Preempted
from ailab.hooks.step.lr import restart_lr
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, Run, RunInfo, Step, TrainState
from ailab.workdir import checkpoint
from ailab.workdir.checkpoint import Keep
from ailab.workdir.manifest import MANIFEST

Save = Callable[[TrainState, Mapping[str, float]], None]


@HOOKS.register_module()
def CheckpointHook(
    interval: int = 1,
    every_steps: int | None = None,
    save_dir: str | None = None,
    keep: Mapping[str, Any] | None = None,
    *,
    run: RunInfo,
    name: str = "checkpoint",
) -> list[Middleware[Any]]:
    """Save a checkpoint to `save_dir/step_00001234/` after every `interval`-th epoch, after the last one, and at a signal.

    Rank 0 writes it, and a rename makes it complete. The checkpoint of an epoch is written after all phases and all hooks of the
    epoch, wherever this hook is listed. So it has the results of the epoch, and the state of an early stop or a plateau scheduler
    after that epoch.

    Args:
        interval: workflow epochs between two checkpoints, at least 1.
        every_steps: also save after every so many optimizer steps, at least 1. None: only after epochs.
        save_dir: folder of the checkpoints. `work_dir/checkpoints` by default.
        keep: which checkpoints to keep, such as `dict(last=2, best=1, metric="val_top1", mode="max")`. The newest two by default.

    Raises:
        ConfigError: for an interval below 1, or a `keep.metric` that no epoch of this run reports.
        CheckpointError: when a checkpoint cannot be written. This ends the run.
    """
    if interval < 1 or (every_steps is not None and every_steps < 1):
        raise ConfigError(f"cfg.hooks.{name}: interval={interval}, every_steps={every_steps}; both are at least 1.")
    if not run.steps_per_epoch:
        return []  # nothing new comes out of an evaluation
    directory, kept = _directory(save_dir, run), Keep(**dict(keep or {}))
    save = _saver(directory, kept, run)
    pending = _PendingSave(save, interval, every_steps)

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def saved(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            pending.save_if_due(state, last=False)
            state, logs = epoch(state, batches)
            pending.results = logs.values_as_floats()
            return state, logs

        return saved

    def wrap_run(run_all: Run) -> Run:
        def preemptible(state: TrainState) -> TrainState:
            if run.rank == 0 and _resume_entry(run) is None:
                _refuse_earlier_run(directory)
            if run.rank == 0 and (rendezvous := dist.current_rendezvous()) is not None:
                rendezvous.set_flag("begun")  # from here on a restart by the launcher continues from what is saved
            try:
                state = run_all(state)
            except Interrupted as stop:
                save(stop.state, {})
                raise Preempted(f"stopped by a signal at step {stop.state.at}; the state is saved in {directory}.") from None
            pending.save_if_due(state, last=True)
            return state

        return preemptible

    reads = {f"cfg.hooks.{name}.keep.metric": kept.metric} if kept.metric else {}
    hooks: list[Middleware[Any]] = [Middleware(name, wrap_epoch, "epoch", reads=reads), Middleware(name, wrap_run, "run")]
    return [Middleware(name, _mid_epoch(every_steps, save, run), "host"), *hooks] if every_steps else hooks


class _PendingSave:
    """The results of an epoch that has ended and is not saved yet. It is saved after all hooks around it have run."""

    def __init__(self, save: Save, interval: int, every_steps: int | None):
        self.save, self.interval, self.every_steps = save, interval, every_steps
        self.results: Mapping[str, float] | None = None

    def save_if_due(self, state: TrainState, *, last: bool) -> None:
        """Save the epoch if a checkpoint is due. `state` is the state after all hooks around it."""
        due = last or epochs_done(state) % self.interval == 0 or (self.every_steps and state.at % self.every_steps == 0)
        if self.results is not None and due:
            self.save(state, self.results)
        self.results = None


def _mid_epoch(every: int, save: Save, run: RunInfo) -> Callable[[Step], Step]:
    """Save after every `every` steps. The last step of an epoch is saved with the results of the epoch."""

    def wrap(step: Step) -> Step:
        def saved(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            state, logs = step(state, batch)
            if state.at % every == 0 and state.at % run.steps_per_epoch:
                save(state, {})
            return state, logs

        return saved

    return wrap


def _saver(directory: Path, keep: Keep, run: RunInfo) -> Save:
    """A function that saves a state with its results. Rank 0 writes, and all ranks raise if it fails."""

    def save(state: TrainState, metrics: Mapping[str, float]) -> None:
        failed = None
        if run.rank == 0:
            try:
                content = contents(state, run)
                epoch = epochs_done(state)
                checkpoint.save(directory, content, step=state.at, epoch=epoch, fingerprint=_fingerprint(run), metrics=metrics)
                checkpoint.retain(directory, keep)
            except Exception as e:  # the other ranks must know it before it is raised here
                failed = e
        if dist.any_rank(failed is not None, run.device):
            raise failed or CheckpointError("rank 0 could not save a checkpoint; its message says why.")

    return save


@HOOKS.register_module()
def ResumeHook(
    resume_from: str | None = None, resume_lr: str | float = "keep", save_dir: str | None = None, *, run: RunInfo
) -> Middleware[Run]:
    """Continue from the newest valid checkpoint of `save_dir`, or start from `resume_from`. Without a checkpoint, start new.

    An interrupted run that started from `resume_from` continues from its own checkpoints. A run without a train phase loads
    only parameters, buffers and the slots that its hooks read.

    Args:
        resume_from: a checkpoint folder, or a folder of checkpoints. It must exist.
        resume_lr: "keep" continues the schedule. "initial" restarts it. A float restarts it with this learning rate for the
            first parameter group, and the others in proportion.
        save_dir: the folder in which the CheckpointHook saves. `work_dir/checkpoints` by default.

    Raises:
        CheckpointError: when there are checkpoints but none is valid, or the checkpoint does not fit this model.
        ConfigError: when `resume_from` is given and `save_dir` holds checkpoints of another run.
    """
    if resume_lr not in ("keep", "initial") and not isinstance(resume_lr, (int, float)):
        raise ConfigError(f"cfg.hooks.resume.resume_lr is {resume_lr!r}; it must be 'keep', 'initial' or a learning rate.")
    source = _source(resume_from, run)
    directory = _directory(save_dir, run)
    rate = resume_lr if resume_lr != "keep" else run.cfg.get("resume_lr", "keep")

    def wrap(run_all: Run) -> Run:
        def resumed(state: TrainState) -> TrainState:
            path = _agreed(_find(source, directory, run), run)
            if path is None:
                if not run.steps_per_epoch:
                    run.say(f"warning: there is no checkpoint in {directory}: the initial parameters are evaluated")
                return run_all(state)
            content, found = checkpoint.load(path)
            state = checkpoint.restore(state, _fitting(content["state"], state, run))
            run.say(f"resumed from {path}: step {found.step}, {found.epoch} epochs done")
            # A run that has begun with `resume_from` keeps the schedule that it began then.
            begun = source is not None and found.manifest["fingerprint"].get("resume_from") == source
            if rate != "keep" and run.steps_per_epoch and not begun:
                state = restart_lr(state, run.base_lrs, None if rate == "initial" else float(rate))
            return run_all(state)

        return resumed

    return Middleware("resume", wrap, "run")


def contents(state: TrainState, run: RunInfo) -> dict[str, Any]:
    """The content of `state.pt`: model and optimizer in torch's own formats, and the whole state."""
    return {
        "model_state": run.model_state(state),
        "optimizer_state": run.optimizer_state(state),
        "state": checkpoint.to_plain(state),
    }


def _refuse_earlier_run(directory: Path) -> None:
    """Refuse to start a new run in a folder with checkpoints of another run. Called before anything is written."""
    earlier = checkpoint.newest(directory, sweep=False)
    if earlier is not None:
        raise ConfigError(
            f"cfg.work_dir: {directory} holds checkpoints of an earlier run, up to step {earlier.step}.\n"
            "  To continue it: hooks.resume = dict(type='ResumeHook'). To start a new run: another work_dir."
        )


def _directory(save_dir: str | None, run: RunInfo) -> Path:
    return Path(save_dir) if save_dir else run.work_dir / "checkpoints"


def _resume_entry(run: RunInfo) -> Mapping[str, Any] | None:
    """The entry of this run's ResumeHook in the cfg."""
    entries = [e for e in run.cfg["hooks"].values() if e["type"] in ("ResumeHook", ResumeHook) and e["enable"]]
    return entries[0] if entries else None


def _source(resume_from: str | Path | None, run: RunInfo) -> str | None:
    """The absolute path of `resume_from`."""
    source = resume_from or run.cfg.get("resume_from")
    return os.path.abspath(source) if source else None


def _find(source: str | None, directory: Path, run: RunInfo) -> Path | None:
    """The checkpoint to start from. Only rank 0 searches."""
    if run.rank != 0:
        return None
    if source is not None and not run.steps_per_epoch:
        return _named(source, run)
    mine = checkpoint.newest(directory, say=run.say)
    if source is None:
        return mine.path if mine else None
    if mine is not None and mine.manifest["fingerprint"].get("resume_from") == source:
        return mine.path
    asked = _named(source, run)
    if mine is not None and mine.path.resolve() != asked.resolve():
        raise ConfigError(
            f"cfg.hooks.resume.resume_from: {directory} holds checkpoints of another run, up to step {mine.step}.\n"
            f"  To start from {asked}: another work_dir, or move those away. To continue from them: no resume_from."
        )
    return asked


def _named(source: str, run: RunInfo) -> Path:
    path = Path(source)
    if (path / MANIFEST).exists():
        return path
    found = checkpoint.newest(path, sweep=False, say=run.say) if path.is_dir() else None
    if found is None:
        raise CheckpointError(f"resume_from={source!r}: there is no checkpoint there.")
    return found.path


def _fitting(saved: Mapping[str, Any], like: TrainState, run: RunInfo) -> Mapping[str, Any]:
    """The part of a saved state that a run loads: all of it to train; only what the model and the hooks read to evaluate."""
    if run.steps_per_epoch:
        return saved
    slots = {n: v for n, v in saved["slots"].items() if n in like.slots}
    return {**saved, "opt_state": {}, "slots": {**slots, PROGRESS: like.slots[PROGRESS]}}


def _agreed(path: Path | None, run: RunInfo) -> Path | None:
    """Rank 0's path on every rank."""
    if run.world_size == 1:
        return path
    text = dist.broadcast_bytes(str(path).encode() if path else b"", run.device)
    return Path(text.decode()) if text else None


def _fingerprint(run: RunInfo) -> dict[str, Any]:
    entry = _resume_entry(run)
    source = None if entry is None else _source(entry.get("resume_from"), run)
    made_on = {"seed": run.seed, "world_size": run.world_size, "device": run.device.type, "torch": torch.__version__}
    return {**made_on, "resume_from": source}
