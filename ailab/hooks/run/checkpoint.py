"""CheckpointHook: save the state after an epoch, within one, and when a signal ends the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from ailab import dist
from ailab.core.epoch import Interrupted, began, epochs_done
from ailab.errors import CheckpointError, ConfigError, Preempted
from ailab.metrics.direction import known
from ailab.registry import HOOKS
from ailab.signature import CheckedBy, short_name
from ailab.stack import Middleware
from ailab.types import Batch, Epoch, Logs, Mean, Run, RunInfo, Step, TrainState
from ailab.workdir import checkpoint
from ailab.workdir.checkpoint import Keep
from ailab.workdir.commit import check_keep, record_best
from ailab.workdir.folder import CHECKPOINTS

Save = Callable[[TrainState, Mapping[str, float]], None]


@HOOKS.register_module()
def CheckpointHook(
    interval: int = 1,
    every_steps: int | None = None,
    save_dir: str | None = None,
    keep: Annotated[Mapping[str, Any], CheckedBy(check_keep)] | None = None,
    *,
    run: RunInfo,
    name: str = "checkpoint",
) -> list[Middleware[Any]]:
    """Save a checkpoint to `save_dir/step_00001234/` after every `interval`-th epoch, after the last one, and at a signal.

    Rank 0 writes it, and a rename makes it complete. A checkpoint is written after all hooks of its step or epoch, wherever this
    hook is listed. So the one of an epoch has the results of all phases, and the state of an early stop or a plateau scheduler
    after that epoch; the one of a step has what metrics have gathered up to that step. With `keep.best`, `best.json` in the folder
    names the best checkpoint.

    Args:
        interval: workflow epochs between two checkpoints, at least 1.
        every_steps: also save after every so many optimizer steps, at least 1. None: only after epochs.
        save_dir: folder of the checkpoints, for one run at a time. `work_dir/checkpoints` by default.
        keep: which checkpoints to keep, such as `dict(last=2, best=1, metric="val_top1")`. The newest two by default. Which values
            are better follows from the metric: a loss goes down, a metric says it itself. Otherwise give `mode="min"` or `"max"`.

    Raises:
        ConfigError: for an interval below 1, a `keep.metric` that no epoch of this run reports, or one without a direction.
        CheckpointError: when a checkpoint cannot be written. This ends the run.
    """
    if interval < 1 or (every_steps is not None and every_steps < 1):
        raise ConfigError(f"cfg.hooks.{name}: interval={interval}, every_steps={every_steps}; both are at least 1.")
    if not run.steps_per_epoch:
        return []  # nothing new comes out of an evaluation
    directory, kept = directory_of(save_dir, run.work_dir), Keep(**dict(keep or {}))
    files = _Files(directory, kept, run, f"cfg.hooks.{name}.keep.mode")
    pending = _PendingSave(files.save, interval, every_steps)

    def wrap_epoch(epoch: Epoch) -> Epoch:
        def saved(state: TrainState, batches: Any) -> tuple[TrainState, Logs]:
            pending.save_if_due(state, last=False)
            state, logs = epoch(state, batches)
            pending.results = logs.values_as_floats()
            return state, logs

        return saved

    def wrap_run(run_all: Run) -> Run:
        def preemptible(state: TrainState) -> TrainState:
            if run.rank == 0 and resume_entry(run.cfg) is None:
                _refuse_earlier_run(directory)
            if run.rank == 0:
                run.fingerprint()  # now and not at the first save: it reads some samples
            if run.rank == 0 and (rendezvous := dist.current_rendezvous()) is not None:
                rendezvous.set_flag("begun")  # from here on a restart by the launcher continues from what is saved
            try:
                state = run_all(state)
            except Interrupted as stop:
                files.save(stop.state, {})
                raise Preempted(f"stopped by a signal at step {stop.state.at}; the state is saved in {directory}.") from None
            pending.save_if_due(state, last=True)
            files.name_best()
            return state

        return preemptible

    reads = {f"cfg.hooks.{name}.keep.metric": kept.metric} if kept.metric else {}
    ranks = {f"cfg.hooks.{name}.keep.mode": kept.metric} if kept.metric and kept.mode is None else {}
    around: list[Middleware[Any]] = [
        Middleware(name, wrap_epoch, "epoch", role="observer", reads=reads, ranks=ranks),
        Middleware(name, wrap_run, "run", core={"holds": directory}),
    ]
    return [Middleware(name, pending.mid_epoch, "host"), *around] if every_steps else around


class _PendingSave:
    """A step or an epoch that has ended and is not saved yet. It is saved after all hooks around it have run."""

    def __init__(self, save: Save, interval: int, every_steps: int | None):
        self.save, self.interval, self.every_steps = save, interval, every_steps
        self.results: Mapping[str, float] | None = None
        self.step_due = False

    def save_if_due(self, state: TrainState, *, last: bool) -> None:
        """Save the epoch if a checkpoint is due. `state` is the state after all hooks around it."""
        due = last or epochs_done(state) % self.interval == 0 or (self.every_steps and state.at % self.every_steps == 0)
        if self.results is not None and due:
            self.save(state, self.results)
        self.results, self.step_due = None, False

    def mid_epoch(self, step: Step) -> Step:
        """Save after every `every_steps` steps, when the next step begins. The last step of an epoch is saved with its results."""
        every = self.every_steps or 1

        def saved(state: TrainState, batch: Batch) -> tuple[TrainState, Mapping[str, Mean]]:
            if self.step_due:
                self.save(state, {})
            state, logs = step(state, batch)
            self.step_due = state.at % every == 0
            return state, logs

        return saved


class _Files:
    """The checkpoints of a run. Rank 0 writes them, and all ranks raise if it fails."""

    def __init__(self, directory: Path, keep: Keep, run: RunInfo, path: str):
        self.directory, self.keep, self.run, self.path = directory, keep, run, path

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Write a state with its results, and delete the checkpoints that are not to be kept."""
        dist.check_same_state(state, self.run.device)
        failed, run, epoch = None, self.run, epochs_done(state)
        if run.rank == 0:
            try:
                made_of, content = _fingerprint(run), contents(state, run)
                heads: dict[str, Any] = {"step": state.at, "epoch": epoch, "fingerprint": made_of, "metrics": metrics}
                checkpoint.save(self.directory, content, **heads, model=run.model_json())
                checkpoint.retain(self.directory, self._known())
                record_best(self.directory, self._known())
            except Exception as e:  # the other ranks must know it before it is raised here
                failed = e
        if dist.any_rank(failed is not None, run.device):
            raise failed or CheckpointError("rank 0 could not save a checkpoint; its message says why.")

    def name_best(self) -> None:
        """Let `best.json` agree with what is there, after a resume too."""
        if self.run.rank == 0 and self.directory.is_dir():
            record_best(self.directory, self._known())

    def _known(self) -> Keep:
        keep = self.keep
        return replace(keep, mode=known(keep.mode, keep.metric, self.run.directions, self.path)) if keep.metric else keep


def contents(state: TrainState, run: RunInfo) -> dict[str, Any]:
    """The content of `state.pt`: model and optimizer in torch's own formats, the whole state, and the memory of host hooks."""
    memories = {name: memory.save() for name, memory in run.memories.items()} if state.at > began(state) else {}
    return {
        "model_state": run.model_state(state),
        "optimizer_state": run.optimizer_state(state),
        "state": checkpoint.to_plain(state),
        "memories": memories,  # in the middle of an epoch
    }


def _refuse_earlier_run(directory: Path) -> None:
    """Refuse to start a new run in a folder with checkpoints of another run. Called before anything is written."""
    earlier = checkpoint.newest(directory, sweep=False)
    if earlier is not None:
        raise ConfigError(
            f"cfg.work_dir: {directory} holds checkpoints of an earlier run, up to step {earlier.step}.\n"
            "  To continue it: hooks.resume = dict(type='ResumeHook'). To start a new run: another work_dir."
        )


def directory_of(save_dir: str | None, work_dir: Path) -> Path:
    """The folder of the checkpoints of a run."""
    return Path(save_dir) if save_dir else work_dir / CHECKPOINTS


def directory_in(cfg: Mapping[str, Any]) -> Path:
    """The folder of the checkpoints of the run that a completed cfg describes."""
    kinds = {short_name(e["type"]): e for e in cfg["hooks"].values()}
    entry = kinds.get("CheckpointHook", kinds.get("ResumeHook", {}))
    return directory_of(entry.get("save_dir"), Path(cfg["work_dir"]))


def resume_entry(cfg: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry of the enabled ResumeHook of a completed cfg."""
    entries = [e for e in cfg["hooks"].values() if short_name(e["type"]) == "ResumeHook" and e["enable"]]
    return entries[0] if entries else None


def source_of(resume_from: str | Path | None, cfg: Mapping[str, Any]) -> str | None:
    """The absolute path of `resume_from`."""
    source = resume_from or cfg.get("resume_from")
    return os.path.abspath(source) if source else None


def _fingerprint(run: RunInfo) -> dict[str, Any]:
    entry = resume_entry(run.cfg)
    source = None if entry is None else source_of(entry.get("resume_from"), run.cfg)
    return {**run.fingerprint(), "resume_from": source}
