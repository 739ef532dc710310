"""Checkpoint folders, atomically: one is there whole or not at all, and a newer one never costs an older one.

There is no pointer to the latest. The newest is the highest step that verifies, so a kill, a full disk or a flipped bit costs
at most the checkpoint that it hit.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ailab.errors import CheckpointError, ConfigError
from ailab.workdir import durable
from ailab.workdir.manifest import (
    MANIFEST,
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
_LEFTOVER = re.compile(r"\.(tmp|del)-[0-9]{8,}-[0-9]+")  # of a commit or a retention that was killed


@dataclass(frozen=True)
class Keep:
    """What retention spares: the newest `last` checkpoints and the `best` ones by `metric`. Raises `ConfigError`."""

    last: int = 2
    best: int = 0
    metric: str | None = None
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        if self.last < 2:
            raise ConfigError(f"keep.last is {self.last}; the least is 2, so that a damaged newest checkpoint has an heir.")
        if self.best < 0 or (self.best and not self.metric) or self.mode not in ("max", "min"):
            raise ConfigError(f"keep.best is {self.best}; it takes a 'metric' by name, and a 'mode' of 'max' or 'min'.")


def step_path(directory: Path, step: int) -> Path:
    """The folder of a step."""
    return directory / f"step_{step:08d}"


def find_committed(directory: Path, step: int, epoch: int) -> Path | None:
    """The folder of this step if it is there, valid and not of an earlier epoch; an invalid one is moved aside."""
    path = step_path(directory, step)
    if not os.path.lexists(path):
        return None
    try:
        return path if _in_place(read_checkpoint(path)[0]).epoch >= epoch else None
    except DamagedError:
        quarantine(path)
        return None


def commit(directory: Path, head: Mapping[str, Any], payload: memoryview) -> Path:
    """Write one checkpoint of `payload`; `head` is its manifest without what is known here.

    The order is the promise: the files, their folder, the rename, the parent, each durable before the next; then what is on the
    disk is compared with `payload`. Raises OSError or `DamagedError`. Older checkpoints are not touched.
    """
    final, partial = step_path(directory, head["step"]), directory / f".tmp-{head['step']:08d}-{os.getpid()}"
    trash = _trash_path(directory, head["step"])
    if not directory.is_dir():
        directory.mkdir(parents=True)
        durable.sync_directory(directory.parent)
    try:
        _remove(partial)  # a killed process may have had this pid: in a container it is always the same
        partial.mkdir()
        with ThreadPoolExecutor(1) as beside:  # sha256 lets go of the GIL, so it costs nothing while the disk is busy
            digest = beside.submit(sha256, payload)
            durable.write(partial / STATE, payload)
        manifest = encode_manifest(head, len(payload), digest.result())
        durable.write(partial / MANIFEST, manifest)
        durable.sync_directory(partial)
        if os.path.lexists(final):  # of the same step, before its epoch was complete
            os.rename(final, trash)
        os.replace(partial, final)
    finally:
        with contextlib.suppress(OSError, RuntimeError):
            _remove(partial)
    durable.sync_directory(directory)
    if not (durable.has_content(final / STATE, payload) and durable.has_content(final / MANIFEST, manifest)):
        raise DamagedError(f"{quarantine(final)} did not read back as it was written.")
    _remove(trash)
    return final


def newest(directory: Path, *, sweep: bool = True, say: Callable[[str], None] = print) -> Checkpoint | None:
    """The valid checkpoint of the highest step, or None where none was ever committed.

    Damaged ones are named through `say` and, with `sweep`, renamed to `.bad-*`; leftovers of killed processes are removed. Only
    the holder of the work_dir's lock may sweep. Raises `CheckpointError` where there are checkpoints and none is valid: a run
    never starts anew in silence.
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
            raise CheckpointError(f"{directory}: none of the checkpoints is valid. To start anew, use another work_dir.")
    return None


def retain(directory: Path, keep: Keep, protect: Iterable[Path] = ()) -> list[Path]:
    """Delete all but what `keep` and `protect` spare, oldest first, and return the paths that are gone. Call it after a commit.

    Steps and metrics come from the manifests; a non-finite metric is never best. Damaged folders neither count nor go.
    """
    held = list(_plausible(directory))
    scored = [(score, c.step, c.path) for c in held if type(score := c.manifest["metrics"].get(keep.metric)) in (int, float)]
    scored.sort(key=lambda row: (row[0] if keep.mode == "max" else -row[0], row[1]), reverse=True)
    spared = {c.path.resolve() for c in held[: keep.last]} | {path.resolve() for _, _, path in scored[: keep.best]}
    spared |= {Path(path).resolve() for path in protect}
    doomed = [c for c in reversed(held) if c.path.resolve() not in spared]
    with as_checkpoint_error(f"{directory}: an old checkpoint cannot be removed"):
        for checkpoint in doomed:
            trash = _trash_path(directory, checkpoint.step)
            os.rename(checkpoint.path, trash)  # out of sight first: a kill must not leave half a checkpoint
            shutil.rmtree(trash)
    return [c.path for c in doomed]


def _trash_path(directory: Path, step: int) -> Path:
    """A free name for a folder that is about to be deleted."""
    trash = directory / f".del-{step:08d}-{os.getpid()}"
    _remove(trash)
    return trash


def quarantine(path: Path) -> Path:
    """Rename a damaged folder to the first free `.bad-*` name beside it."""
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
    """The checkpoints that look valid without their states being read, highest step first."""
    for path in _steps(directory):
        with contextlib.suppress(DamagedError), open_folder(path) as folder:
            yield _in_place(read_manifest(path, folder))


def _sweep(directory: Path) -> None:
    for name in _names(directory):
        if _LEFTOVER.fullmatch(name):
            _remove(directory / name)


def _remove(path: Path) -> None:
    """Delete a folder of ours if it is there; a symlink or a file of that name is not ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
