"""ResumeHook: go on from a checkpoint, if it is of the run that the cfg describes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from ailab import dist
from ailab.core.epoch import PROGRESS, TOTALS, ask_to_stop, began, begun_anew, epochs_done
from ailab.errors import AilabError, CheckpointError, ConfigError
from ailab.hooks.run.checkpoint import directory_of, resume_entry, source_of
from ailab.hooks.step.lr import SLOT as SCHEDULE
from ailab.hooks.step.lr import restart_lr
from ailab.registry import HOOKS
from ailab.stack import Middleware
from ailab.types import PyTree, Run, RunInfo, TrainState
from ailab.workdir import checkpoint, record
from ailab.workdir.manifest import MANIFEST, Checkpoint

_LR = re.compile(r"cfg\.optimizer\.(param_groups\.\d+\.)?lr: ")
_SAMPLES = ("cfg.data.train", "samples of cfg.data.train", record.STEPS)  # keys of what an epoch is made of
_SHOWN = 12  # changes that a message lists


@HOOKS.register_module()
def ResumeHook(
    resume_from: str | None = None,
    resume_lr: str | float = "keep",
    save_dir: str | None = None,
    changed: Literal["refuse", "accept"] = "refuse",
    *,
    run: RunInfo,
    name: str = "resume",
) -> Middleware[Run]:
    """Continue from the newest valid checkpoint of `save_dir`, or start from `resume_from`; start afresh where there is none.

    A run goes on as the run that was begun. What its results depend on, in the cfg and in the data, has to be as it was:
    differences are refused, each as `key: old -> new`. When it ends (`total_epochs`, an early stop), observers, workers, intervals
    and paths change freely, and what costs no more than the last bits (torch, threads, processes, device, compilation) is one line.

    A run that began with `resume_from` is a run of its own: its model has to fit, and nothing else is compared. If it was
    interrupted it goes on with its own checkpoints. A run without a train phase takes parameters, buffers and the slots that its
    hooks read, and nothing else.

    Args:
        resume_from: a checkpoint folder, or a folder of them; must exist.
        resume_lr: "keep" goes on with the schedule as it stood; "initial" starts the schedule again at its beginning; a float
            does so too, with this as the rate of the first parameter group (the others in proportion).
        save_dir: where the CheckpointHook saves; `work_dir/checkpoints` by default.
        changed: "accept" goes on with another cfg or other data too, and writes down what has changed, in the log and in the
            checkpoints that follow. Hooks that are new begin with new memory. Where an epoch has another number of steps, one that
            was begun is begun anew.
        run: given by the framework.
        name: of this hook.

    Raises:
        CheckpointError: when there are checkpoints and none is valid or none fits this model and its optimizer.
        ConfigError: when the run was begun with another cfg or other data and `changed` is "refuse", or when `resume_from` is given
            and is a file, or `save_dir` holds checkpoints of another run.
    """
    path = f"cfg.hooks.{name}"
    if resume_lr not in ("keep", "initial") and not isinstance(resume_lr, (int, float)):
        raise ConfigError(f"{path}.resume_lr is {resume_lr!r}; it is 'keep', 'initial' or a learning rate.")
    if changed not in ("refuse", "accept"):
        raise ConfigError(f"{path}.changed is {changed!r}; it is 'refuse' or 'accept'.")
    source, directory = source_of(resume_from, run.cfg), directory_of(save_dir, run.work_dir)
    if source is not None and Path(source).is_file():
        _refuse_file(Path(source), f"{path}.resume_from" if resume_from else "cfg.resume_from")
    rate = resume_lr if resume_lr != "keep" else run.cfg.get("resume_lr", "keep")

    def wrap(run_all: Run) -> Run:
        def resumed(state: TrainState) -> TrainState:
            found = from_first(run.device, lambda: str(_find(source, directory, run) or ""))
            if not found:
                if not run.steps_per_epoch:
                    run.say(f"warning: there is no checkpoint in {directory}: the first weights are evaluated")
                return run_all(state)
            content, saved = checkpoint.load(Path(found))
            # A run that has begun with `resume_from` keeps the schedule that it began then.
            begun = source is not None and saved.manifest["fingerprint"].get("resume_from") == source
            if not run.steps_per_epoch:
                state = checkpoint.restore(state, _to_evaluate(content["state"], state), _words(run, {}))
            else:
                accept, other = changed == "accept", source is not None and not begun
                change = _compared(saved, run, accept=accept or other, other=other, new_lr=rate != "keep")
                _hold(content["state"], state, change, run, path)
                _tell(change, saved, run, rate)
                state = _taken(content, state, change, run)
            run.say(f"resumed from {found}: step {saved.step}, {saved.epoch} epochs done")
            if rate != "keep" and run.steps_per_epoch and not begun:
                state = restart_lr(state, run.base_lrs, None if rate == "initial" else float(rate))
            return run_all(state)

        return resumed

    holds = {"holds": directory} if run.steps_per_epoch else {}
    return Middleware(name, wrap, "run", core=holds)


def will_resume(cfg: Mapping[str, Any], device: torch.device) -> bool:
    """Whether the ResumeHook of a completed cfg will find a checkpoint, so that the model's first values are replaced.

    What rank 0 finds holds for all ranks.
    """
    entry = resume_entry(cfg)
    if entry is None:
        return False
    source, directory = source_of(entry.get("resume_from"), cfg), directory_of(entry.get("save_dir"), Path(cfg["work_dir"]))
    return bool(from_first(device, lambda: "yes" if source or checkpoint.has_any(directory) else ""))


@dataclass(frozen=True)
class _Change:
    """What differs between a checkpoint and the run that goes on from it; the same on every rank."""

    path: Path  # of the checkpoint
    accept: bool  # whether what the results depend on may differ
    other: bool  # the run is another one on purpose: it starts from the checkpoint
    results: list[str]  # `key: old -> new`
    end: list[str]
    code: list[str]
    bits: list[str]
    slots: Mapping[str, tuple[str, str]]  # of the checkpoint: where in the cfg its hook was, and its role

    def of(self, *keys: str) -> bool:
        """Whether the results depend on something that changed under one of these keys."""
        return any(line.startswith(keys) for line in self.results)


def _compared(saved: Checkpoint, run: RunInfo, *, accept: bool, other: bool, new_lr: bool) -> _Change:
    """What has changed since a checkpoint, by its manifest; rank 0 looks."""
    old: Mapping[str, Any] = saved.manifest["fingerprint"]

    def compare() -> str:
        new = run.fingerprint()
        return json.dumps([record.changes(old.get(s, {}), new.get(s, {})) for s in ("results", "end", "code", "bits")])

    results, end, code, bits = json.loads(from_first(run.device, compare))
    results = [line for line in results if not (new_lr and _LR.match(line))]
    slots = {n: (p, r) for n, (p, r) in old.get("slots", {}).items()}
    return _Change(saved.path, accept, other, results, end, code, bits, slots)


def _hold(saved: Mapping[str, Any], state: TrainState, change: _Change, run: RunInfo, path: str) -> None:
    """Raise, on every rank alike, for a checkpoint that this run cannot or shall not go on from."""
    parts = ("params", "buffers") if change.other else ("params", "buffers", "opt_state")
    ours = {n: getattr(_grafted(state, saved, run) if n == "opt_state" else state, n) for n in parts}
    problem = checkpoint.difference(ours, {n: saved[n] for n in parts}, _words(run, change.slots))
    if change.of("cfg.optimizer.type:") and not change.other:
        problem = problem or "The checkpoint does not fit this run: the memory of one optimizer is not that of another."
    if problem:
        raise CheckpointError("\n".join([f"{change.path}: {problem}", *_shown(change.results)]))
    if change.results and not change.accept:
        lr = [line.rpartition(" -> ")[2] for line in change.results if _LR.match(line)]
        hint = [f"  Another learning rate alone is {path}.resume_lr={lr[0]}."] if lr and len(lr) == len(change.results) else []
        ways = f"  To begin another run: another work_dir. To go on with this one all the same: {path}.changed='accept'."
        raise ConfigError("\n".join([f"{path}: {change.path} is of another run.", *_shown(change.results), ways, *hint]))


def _shown(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {line}" for line in lines[:_SHOWN]] + more


def _tell(change: _Change, saved: Checkpoint, run: RunInfo, rate: Any) -> None:
    """Say what has changed, to the console and to the log, and write it down for the checkpoints that follow."""
    if change.other:
        return
    if run.rank == 0:
        earlier = saved.manifest["fingerprint"].get("accepted", [])
        run.fingerprint()["accepted"] = [*earlier, [saved.step, change.results]] if change.results else earlier
    lines = [f"warning: going on from step {saved.step} with another run than was begun:", *_shown(change.results)]
    lines = lines if change.results else []
    if rate == "keep" and any(map(_LR.match, change.results)):
        follows = (
            f"follows the schedule from the cfg's {run.base_lrs[0]:g} on" if SCHEDULE in run.slots else "goes on as it was"
        )
        lines.append(f"  The learning rate {follows} (resume_lr='keep').")
    if change.code:
        where = ", ".join(line.partition(": ")[0] for line in change.code)
        lines.append(f"warning: the code of {where} is not the one that the run was begun with")
    if change.bits:
        lines.append(f"not bit for bit: {', '.join(change.bits)}")
    for line in lines:
        run.say(line)
    run.notes.extend(lines)


def _taken(content: Mapping[str, Any], state: TrainState, change: _Change, run: RunInfo) -> TrainState:
    """The state to go on with: that of the checkpoint, and new memory for hooks that it does not know."""
    saved, words = content["state"], _words(run, change.slots)
    mid_epoch = int(saved["step"]) > int(saved["slots"][PROGRESS]["began"])
    fresh = [n for n in state.slots if _begins_anew(n, state.slots[n], saved["slots"], change, run, mid_epoch)]
    old = {n: v for n, v in saved["slots"].items() if n in state.slots or not _dropped(n, change)}
    plain = checkpoint.to_plain(state)
    entries = {**saved, "slots": {**old, **{n: plain["slots"][n] for n in fresh}}}
    like = _grafted(state, saved, run)
    if change.other and (change.of("cfg.optimizer.type:") or checkpoint.misfits(like.opt_state, saved["opt_state"])):
        like, entries["opt_state"] = state, plain["opt_state"]
        run.say("cfg.optimizer begins with new memory")
    state = checkpoint.restore(like, entries, words)
    known = run.fresh_slots(state)
    for name in fresh:
        state = state.with_slot(name, known[name])
        if run.slots.get(name, ("", ""))[1] == "result":
            run.say(f"{run.slots[name][0]} begins with new memory")
    if change.other or change.end:
        state = ask_to_stop(state, False)
    if mid_epoch and (change.of(*_SAMPLES) or TOTALS in fresh):
        made = state.at - began(state)
        run.say(
            f"epoch {epochs_done(state) + 1} is begun anew at step {state.at}: {made} steps of it were made as they were before"
        )
        return begun_anew(state)
    for name, memory in content.get("memories", {}).items():
        if name in run.memories:
            run.memories[name].restore(memory)
    return state


def _begins_anew(name: str, ours: PyTree, saved: Mapping[str, Any], change: _Change, run: RunInfo, mid_epoch: bool) -> bool:
    """Whether the memory of a hook is not taken from the checkpoint."""
    role = run.slots.get(name, ("", ""))[1]
    if name == PROGRESS or (name in saved and not checkpoint.misfits(ours, saved[name])):
        return role == "end" and change.other  # its results are those of another run
    return change.accept or role in ("end", "observer") or (name == TOTALS and not mid_epoch)


def _dropped(name: str, change: _Change) -> bool:
    """Whether this run can do without the memory of a hook that it does not have."""
    return change.accept or change.slots.get(name, ("", "result"))[1] != "result"


def _grafted(state: TrainState, saved: Mapping[str, Any], run: RunInfo) -> TrainState:
    """The state, with room for what only the first update makes of the optimizer's memory, as the checkpoint has it."""
    late = {n: saved["opt_state"][n] for n in run.late if n in saved["opt_state"]}
    return state.replace(opt_state={**state.opt_state, **late})


def _words(run: RunInfo, before: Mapping[str, tuple[str, str]]) -> Callable[[str], str]:
    """What a path in the state is to somebody who wrote a cfg."""

    def words(path: str) -> str:
        part, _, rest = path.partition(".")
        if part in ("params", "buffers"):
            where = "cfg.loss" if rest.startswith("loss.") else "cfg.model"
            return f"{where}, {'parameter' if part == 'params' else 'buffer'} {rest}"
        if part == "opt_state":
            return f"cfg.optimizer, its {rest}"
        slot, _, rest = rest.partition(".")
        if slot == TOTALS:
            return "the loss and the metrics of a training step"
        where, _ = run.slots.get(slot) or before.get(slot) or (f"the hook {slot!r}", "")
        return f"{where}, its memory {rest}".rstrip()

    return words


def from_first(device: torch.device, make: Callable[[], str]) -> str:
    """What rank 0 makes, on every rank; what it raises, too."""
    if dist.world_size() == 1:
        return make()
    text, problem = "", None
    if dist.rank() == 0:
        try:
            text = make()
        except AilabError as e:
            problem = e
    dist.compare({}, problem)
    return dist.broadcast_bytes(text.encode(), device).decode()


def _refuse_file(file: Path, path: str) -> None:
    """Say what the file is, and what would load it: a run continues from a checkpoint, which is a folder."""
    if (file.parent / MANIFEST).exists():
        raise ConfigError(f"{path}: {file} is a file of a checkpoint; give its folder, {file.parent}.")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # whatever a file that is no archive raises
        content = None
    named = cast("Mapping[Any, Any]", content) if isinstance(content, Mapping) else {}
    plain = bool(named) and all(isinstance(v, torch.Tensor) for v in named.values())
    what = f"a state dict of {len(named)} tensors" if plain else "a file"
    raise ConfigError(
        f"{path}: {file} is {what}, and no folder of checkpoints: a run continues from its whole state.\n"
        f"  Weights alone are where a model begins: cfg.model.init=dict(from_={str(file)!r})."
    )


def _find(source: str | None, directory: Path, run: RunInfo) -> Path | None:
    """The checkpoint to start from."""
    if source is not None and not run.steps_per_epoch:
        return _named(source, run)
    mine = checkpoint.newest(
        directory, sweep=run.steps_per_epoch > 0, say=run.say
    )  # who only evaluates does not hold the folder
    if source is None:
        return mine.path if mine else None
    if mine is not None and mine.manifest["fingerprint"].get("resume_from") == source:
        return mine.path
    asked = _named(source, run)
    if mine is not None and mine.path.resolve() != asked.resolve():
        raise ConfigError(
            f"cfg.hooks.resume.resume_from: {directory} holds checkpoints of another run, up to step {mine.step}.\n"
            f"  To start from {asked}: another work_dir, or move those away. To go on with them: no resume_from."
        )
    return asked


def _named(source: str, run: RunInfo) -> Path:
    found = checkpoint.find(Path(source), run.say)
    if found is None:
        raise CheckpointError(f"resume_from={source!r}: there is no checkpoint there.")
    return found


def _to_evaluate(saved: Mapping[str, Any], like: TrainState) -> Mapping[str, Any]:
    """What of a saved state is needed to evaluate it: what the model and its hooks read, and the epoch that it is of."""
    slots = {n: v for n, v in saved["slots"].items() if n in like.slots}
    mine = saved["slots"][PROGRESS]
    progress = {**mine, "epoch": mine["epoch"] + (saved["step"] > mine["began"]), "stop": like.slots[PROGRESS]["stop"]}
    return {**saved, "opt_state": {}, "slots": {**slots, PROGRESS: progress}}
