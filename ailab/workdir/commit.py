"""Checkpoint folders: atomic commit, search for the newest, retention.

A checkpoint is there whole or not at all. There is no pointer to the latest one: the newest is the highest step whose checksums
are right. So a kill, a full disk or a flipped bit costs at most one checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ailab.errors import CheckpointError, ConfigError
from ailab.metrics.direction import known
from ailab.signature import check_arguments, mismatch, parameters
from ailab.types import Direction
from ailab.workdir import durable
from ailab.workdir.folder import CHECKPOINTS
from ailab.workdir.manifest import (
    MANIFEST,
    MODEL,
    STATE,
    Checkpoint,
    DamagedError,
    as_checkpoint_error,
    encode_manifest,
    open_folder,
    read_checkpoint,
    read_manifest,
    sha256,
)

_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
BEST = "best.json"  # beside the checkpoints
_LEFTOVER = re.compile(r"\.(tmp|del)-[0-9]{8,}-[0-9]+")  # of a killed commit or retention


@dataclass(frozen=True)
class Keep:
    """The retention policy: which checkpoints are kept.

    Args:
        last: how many of the newest ones; at least 2.
        best: how many of the best ones by `metric`.
        metric: the name of a metric in the manifests; needed if `best` is not 0.
        mode: whether "max" or "min" is best. None: the run fills it in from its results.

    Raises:
        ConfigError: a value is out of range, or `metric` is missing.
    """

    last: int = 2
    best: int = 0
    metric: str | None = None
    mode: Direction | None = None

    def __post_init__(self) -> None:
        if self.last < 2:
            raise ConfigError(
                f"keep.last: at least 2, got {self.last}: if the newest checkpoint is damaged, the one before it is needed."
            )
        if self.best < 0:
            raise ConfigError(f"keep.best: at least 0, got {self.best}.")
        if self.best and not self.metric:
            raise ConfigError(f"keep.metric: best={self.best} needs the name of a result, such as 'val_loss'.")
        if self.mode not in ("max", "min", None):
            raise ConfigError(f"keep.mode: 'max' or 'min', got {self.mode!r}.")


def check_keep(value: Any, path: str) -> list[str]:
    """The problems of `keep` in a cfg, as messages."""
    if not isinstance(value, Mapping):
        return mismatch(value, dict[str, Any] | None, path)
    given = cast("Mapping[str, Any]", value)
    if problems := check_arguments(parameters(Keep), given, path, "keep"):
        return problems
    try:
        Keep(**given)
    except ConfigError as e:
        return [path.removesuffix("keep") + str(e)]
    return []


def step_path(directory: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return directory / f"step_{step:08d}"


def find_committed(directory: Path, step: int, epoch: int) -> Path | None:
    """The folder of this step, if it holds a valid checkpoint of this or a later epoch. A damaged one is quarantined."""
    path = step_path(directory, step)
    if not os.path.lexists(path):
        return None
    try:
        return path if _in_place(read_checkpoint(path)[0]).epoch >= epoch else None
    except DamagedError:
        quarantine(path)
        return None


def commit(directory: Path, head: Mapping[str, Any], payload: memoryview, model: bytes | None = None) -> Path:
    """Write one checkpoint in one atomic step, and return its folder. Older checkpoints are not touched.

    The order matters: the files are synced, then their folder; then the folder is renamed, and the parent is synced. Last, the
    files are read back and compared with what was written.

    Args:
        directory: the folder of all checkpoints.
        head: the manifest, without format and files.
        payload: the bytes of the state file.
        model: the bytes of model.json, if there is one.

    Raises:
        OSError: a file cannot be written, synced or renamed.
        DamagedError: the files on the disk are not what was written.
    """
    final, partial = step_path(directory, head["step"]), directory / f".tmp-{head['step']:08d}-{os.getpid()}"
    trash = _trash_path(directory, head["step"])
    if not directory.is_dir():
        directory.mkdir(parents=True)
        durable.sync_directory(directory.parent)
    try:
        _remove(partial)  # left by a killed process of the same pid: in a container the pid is always the same
        partial.mkdir()
        with ThreadPoolExecutor(1) as hashing:  # sha256 releases the GIL: it runs while the disk is busy
            digest = hashing.submit(sha256, payload)
            durable.write(partial / STATE, payload)
        if model is not None:
            durable.write(partial / MODEL, model)
        manifest = encode_manifest(head, len(payload), digest.result(), model)
        durable.write(partial / MANIFEST, manifest)
        durable.sync_directory(partial)
        if os.path.lexists(final):  # a checkpoint of the same step and an earlier epoch
            os.rename(final, trash)
        os.replace(partial, final)
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            _remove(partial)
    durable.sync_directory(directory)
    written = {STATE: payload, MANIFEST: manifest} | ({} if model is None else {MODEL: model})
    if not all(durable.has_content(final / name, data) for name, data in written.items()):
        raise DamagedError(f"{quarantine(final)} did not read back as it was written. Check the disk.")
    _remove(trash)
    return final


def newest(directory: Path, *, sweep: bool = True, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The valid checkpoint of the highest step, or None if none was ever committed.

    Args:
        directory: the folder of all checkpoints; it may be missing.
        sweep: rename damaged checkpoints to `.bad-*`, and remove what killed processes left. Only the process that holds the
            lock of the work_dir may do that.
        say: called with one line for each damaged checkpoint.

    Raises:
        CheckpointError: there are checkpoints and none is valid, so that a run never starts from zero without notice. Or one
            cannot be read, or has a newer format.
    """
    with as_checkpoint_error(str(directory)):
        if sweep:
            _sweep(directory)
        steps = _steps(directory)
        for path in steps:
            try:
                return _in_place(read_checkpoint(path)[0])
            except DamagedError as error:
                say(f"damaged checkpoint skipped: {error}" + (f" It is now {quarantine(path).name}." if sweep else ""))
        if steps or any(name.startswith(".bad-") for name in _names(directory)):
            raise CheckpointError(f"{directory}: none of the checkpoints is valid. To start from zero, use another work_dir.")
    return None


def find(path: Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that a user names: its own folder, or the newest in a folder of them or in a work_dir. None: none there."""
    if (path / MANIFEST).exists():
        return path
    folders = [folder for folder in (path, path / CHECKPOINTS) if folder.is_dir()]
    return next((found.path for folder in folders if (found := newest(folder, sweep=False, say=say))), None)


def named(which: str, directory: Path, say: Callable[[str], None] = print) -> Path:
    """The checkpoint that a command line names.

    Args:
        which: "best", as `best.json` names it; "last", the newest valid one; or a path, see `find`.
        directory: the folder of all checkpoints of the run.
        say: called with one line for each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there is none; the message says what would be there.
    """
    if which == "best":
        return _best(directory)
    found = find(directory if which == "last" else Path(which), say)
    if found is None:
        where = directory if which == "last" else which
        raise CheckpointError(
            f"there is no checkpoint in {where}. A CheckpointHook writes them; --checkpoint also takes a path."
        )
    return found


def _best(directory: Path) -> Path:
    """The folder that `best.json` names. A name that is no step's is not followed."""
    try:
        entry: Any = json.loads((directory / BEST).read_bytes())
        name = entry["path"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{directory} has no {BEST}. hooks.checkpoint.keep=dict(best=1, metric='val_loss') keeps the best one; "
            "without it: --checkpoint last."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / BEST} cannot be read ({type(error).__name__}). Use --checkpoint last.") from error
    if not isinstance(name, str) or not _STEP.fullmatch(name) or not (directory / name / MANIFEST).exists():
        raise CheckpointError(f"{directory / BEST} names {name!r:.60}, and no such checkpoint is there. Use --checkpoint last.")
    return directory / name


def has_any(directory: Path) -> bool:
    """Whether a checkpoint was ever committed here, valid or not."""
    return bool(_steps(directory))


def retain(directory: Path, keep: Keep, protect: Iterable[Path] = ()) -> list[Path]:
    """Delete the checkpoints that neither `keep` nor `protect` keeps, oldest first, and return their paths.

    Call it after a commit. Steps and metrics come from the manifests. A non-finite metric is never best. Damaged checkpoints do
    not count and are not deleted.

    Args:
        directory: the folder of all checkpoints.
        keep: the retention policy.
        protect: folders that are kept in any case.

    Raises:
        CheckpointError: a checkpoint cannot be deleted.
    """
    held = list(_plausible(directory))
    spared = {c.path.resolve() for c in [*held[: keep.last], *ranked(held, keep)[: keep.best]]}
    spared |= {Path(path).resolve() for path in protect}
    doomed = [c for c in reversed(held) if c.path.resolve() not in spared]
    with as_checkpoint_error(f"{directory}: an old checkpoint cannot be removed"):
        for checkpoint in doomed:
            trash = _trash_path(directory, checkpoint.step)
            os.rename(checkpoint.path, trash)  # rename first: a kill must not leave half a checkpoint under its name
            shutil.rmtree(trash)
    return [c.path for c in doomed]


def ranked(held: Iterable[Checkpoint], keep: Keep) -> list[Checkpoint]:
    """Those that have a finite `keep.metric`, the best first, of equal ones the later. Raises `ConfigError` without a mode."""
    scored = [(score, c) for c in held if type(score := c.manifest["metrics"].get(keep.metric)) in (int, float)]
    sign = -1 if scored and known(keep.mode, str(keep.metric), {}, "keep.mode") == "min" else 1
    return [c for _, c in sorted(scored, key=lambda row: (sign * row[0], row[1].step), reverse=True)]


def record_best(directory: Path, keep: Keep) -> None:
    """Let `best.json` name the best checkpoint that is there: path, step, epoch, metric, value and mode. Written in one piece.

    It is there where `keep` holds a best one; a reader trusts it no more than the folder that it names.
    """
    best = next(iter(ranked(_plausible(directory), keep)), None) if keep.best else None
    path = directory / BEST
    if best is None:
        path.unlink(missing_ok=True)
        return
    entry = {"path": best.path.name, "step": best.step, "epoch": best.epoch, "metric": keep.metric, "mode": keep.mode}
    text = (durable.to_json({**entry, "value": best.manifest["metrics"][keep.metric]}) + "\n").encode("ascii")
    if not path.exists() or path.read_bytes() != text:
        durable.replace(path, text)


def _trash_path(directory: Path, step: int) -> Path:
    """An unused path to which a folder is renamed before it is deleted."""
    trash = directory / f".del-{step:08d}-{os.getpid()}"
    _remove(trash)
    return trash


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint to the first unused `.bad-*` name, and return that path. Nothing is deleted."""
    names = (path.with_name(f".bad-{path.name}-{n}") for n in itertools.count())
    target = next(name for name in names if not os.path.lexists(name))
    os.rename(path, target)
    return target


def _in_place(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.path != step_path(checkpoint.path.parent, checkpoint.step):
        raise DamagedError(f"{checkpoint.path}: its manifest is of step {checkpoint.step}.")
    return checkpoint


def _names(directory: Path) -> list[str]:
    return os.listdir(directory) if os.path.lexists(directory) else []


def _steps(directory: Path) -> list[Path]:
    """The folders named as steps, highest step first."""
    steps = sorted((int(m[1]) for name in _names(directory) if (m := _STEP.fullmatch(name))), reverse=True)
    return [step_path(directory, step) for step in steps]


def _plausible(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoints whose manifests are valid, highest step first. Their states are not read."""
    for path in _steps(directory):
        with contextlib.suppress(DamagedError), open_folder(path) as folder:
            yield _in_place(read_manifest(path, folder))


def _sweep(directory: Path) -> None:
    for name in _names(directory):
        if _LEFTOVER.fullmatch(name):
            _remove(directory / name)


def _remove(path: Path) -> None:
    """Delete a folder if it is there. A symlink or a file of that name stays: ailab does not make such."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
