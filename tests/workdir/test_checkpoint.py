"""A checkpoint is complete or not there, restores what was saved, and is never executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ailab import tree
from ailab.errors import CheckpointError, ConfigError, NonFiniteError
from ailab.types import Mean, TrainState
from ailab.workdir import durable, manifest
from ailab.workdir.checkpoint import (
    Checkpoint,
    Keep,
    get_target_module_state,
    load,
    newest,
    remove_module_prefix,
    restore,
    retain,
    save,
    to_plain,
)
from ailab.workdir.manifest import MANIFEST, STATE

SYSTEM_CALLS = [(os, n) for n in ("open", "write", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink")] + [
    (shutil, "rmtree")
]


class Moments(NamedTuple):
    first: Tensor
    count: int


def state_at(step: int, size: int = 6) -> TrainState:
    """A state with every kind of node; all its numbers follow from `step`."""
    draw = torch.Generator().manual_seed(step)
    params = {"0.weight": torch.randn(3, size, generator=draw), "0.bias": torch.randn(3, generator=draw)}
    return TrainState(
        step=torch.tensor(step),
        params=params,
        buffers={"1.running_var": torch.rand(3, generator=draw), "mask": torch.tensor([0.0, -torch.inf])},
        opt_state={
            "moments": Moments(torch.full((3, size), step + 0.5), step),
            "groups": [{"lr": torch.tensor(0.1)}],
            "none": None,
        },
        slots={
            "ema": {k: v * 0.5 for k, v in params.items()},
            "best": Mean(torch.tensor(torch.inf), torch.tensor(1.0)),
            "empty": {},
        },
    )


def content_of(state: TrainState) -> dict[str, Any]:
    plain = to_plain(state)
    return {
        "model_state": {**plain["params"], **plain["buffers"]},
        "optimizer_state": {"state": {0: plain["opt_state"]}},
        "state": plain,
    }


def saved(directory: Path, step: int, **kwargs: Any) -> Path:
    return save(directory, content_of(state_at(step)), step=step, epoch=step // 2, **kwargs)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of two trees with equal paths."""
    left, right = dict(tree.items(to_plain_any(a))), dict(tree.items(to_plain_any(b)))
    return left.keys() == right.keys() and all(
        torch.equal(x, right[p]) and x.dtype == right[p].dtype if isinstance(x, Tensor) else x == right[p]
        for p, x in left.items()
    )


def to_plain_any(value: Any) -> Any:
    return to_plain(value) if isinstance(value, TrainState) else value


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked child and return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside torch's threads: the child computes nothing large
        pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fail_at(patch: pytest.MonkeyPatch, n: int, act: Callable[[], None], calls: Any = SYSTEM_CALLS) -> list[str]:
    """Make the n-th of the calls do `act` first; returns the growing list of the calls made."""
    made: list[str] = []

    def wrapped(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == n + 1:
                act()
            return real(*args, **kwargs)

        patch.setattr(module, name, call)

    for module, name in calls:
        wrapped(module, name)
    return made


def check_old_or_new(directory: Path, old: int, new: int) -> int:
    found = newest(directory)
    assert found is not None and found.step in (old, new)
    content, _ = load(found.path)
    assert same(content["state"], state_at(found.step))
    assert not [name for name in os.listdir(directory) if name.startswith((".tmp-", ".del-"))]
    return found.step


def prepare(directory: Path, scenario: str) -> None:
    saved(directory, 1), saved(directory, 2)
    if scenario == "over a damaged leftover":
        saved(directory, 3)
        (directory / "step_00000003" / STATE).write_bytes(b"torn")


def save_and_retain(directory: Path) -> None:
    saved(directory, 3)
    retain(directory, Keep(last=2))


# -- what comes back -----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    """restore(like, load(save(state))) is the state, bit for bit, in new memory and with the layouts of `like`."""
    state = state_at(7)
    path = save(
        tmp_path, content_of(state), step=7, epoch=3, fingerprint={"world": 2}, metrics={"acc": 0.5, "loss": float("nan")}
    )
    content, checkpoint = load(path)
    like = tree.map(lambda t: torch.zeros_like(t), state)
    like.params["0.weight"] = torch.zeros(6, 3).t()
    back = restore(like, content["state"])
    assert same(back, state)
    assert back.params["0.weight"].stride() == (1, 3)
    assert isinstance(back.opt_state["moments"], Moments) and isinstance(back.slots["best"], Mean)
    assert back.opt_state["moments"].count == 7 and back.slots["empty"] == {}
    assert (checkpoint.step, checkpoint.epoch, content["step"], content["epoch"]) == (7, 3, 7, 3)
    assert checkpoint.manifest["fingerprint"] == {"world": 2} and checkpoint.manifest["metrics"] == {"acc": 0.5, "loss": "nan"}
    assert checkpoint.path == path == tmp_path / "step_00000007"
    pointers = {t.untyped_storage().data_ptr() for t in tree.leaves(content) if isinstance(t, Tensor)}
    assert not pointers & {t.untyped_storage().data_ptr() for t in tree.leaves(back) if isinstance(t, Tensor)}


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(
        [torch.arange(6.0).view(2, 3).t(), torch.tensor(3), torch.zeros(0, 2), torch.ones(4, dtype=torch.bfloat16)[1:3]]
    ),
)
TREES = st.recursive(
    LEAVES,
    lambda node: (
        st.lists(node, max_size=3)
        | st.tuples(node, node)
        | st.dictionaries(st.text(max_size=3) | st.integers(), node, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slot=TREES)
def test_any_plain_tree_survives(tmp_path: Path, slot: Any) -> None:
    """Any nest of dicts, lists and tuples of tensors and plain values comes back with its types and values."""
    shutil.rmtree(tmp_path / "any", ignore_errors=True)
    state = state_at(1).replace(slots={"any": slot})
    content, _ = load(save(tmp_path / "any", content_of(state), step=1, epoch=0))

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        return type(a) is type(b) and (a == b or a != a)

    assert equal(slot, content["state"]["slots"]["any"])


def test_model_state_loads_into_the_users_own_module(tmp_path: Path) -> None:
    """`torch.load(state.pt, weights_only=True)["model_state"]` is a state_dict for the plain module, strictly.

    The tensors are the same bits; so are the outputs of the same kernel, which depends on the memory layout.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    params, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    state = TrainState(torch.tensor(1), params, buffers, {})
    model_state = {**params, **buffers}
    path = save(tmp_path, {"model_state": model_state, "state": to_plain(state)}, step=1, epoch=1)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other.load_state_dict(torch.load(path / STATE, weights_only=True)["model_state"])
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in net.state_dict().items())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(net.eval()(x), other.to(memory_format=torch.channels_last).eval()(x))


def test_bytes_depend_on_values_alone(tmp_path: Path) -> None:
    """The same values give the same state.pt, whatever their memory, their place on disk, and whether they were restored."""
    state = state_at(4, size=4)
    big = torch.zeros(1000)
    big[8:20] = state.params["0.weight"].reshape(-1)
    texts = {"mode": "".join(["o", "k"]), "again": "ok"}
    one = state.replace(
        params={**state.params, "0.weight": big[8:20].view(3, 4)}, slots={"t": texts, "w": state.params["0.bias"]}
    )
    other = state.replace(
        params={**state.params, "0.weight": state.params["0.weight"].t().contiguous().t().requires_grad_()},
        slots={"t": {"mode": "ok", "again": "ok"}, "w": state.params["0.bias"].clone()},
    )
    first = save(tmp_path / "a", content_of(one), step=4, epoch=2)
    second = save(tmp_path / "deep" / "b", content_of(other), step=4, epoch=2)
    restored = restore(other, load(first)[0]["state"])
    third = save(tmp_path / "c", content_of(restored), step=4, epoch=2)
    assert (first / STATE).read_bytes() == (second / STATE).read_bytes() == (third / STATE).read_bytes()
    assert (first / MANIFEST).read_bytes() == (third / MANIFEST).read_bytes()


def test_every_leaf_is_in_the_hash(tmp_path: Path) -> None:
    """A change of one unit in the last place of any leaf changes state.pt."""
    plain = to_plain(state_at(2))
    hashes = set()
    for i, (path, leaf) in enumerate([("", None), *tree.items(plain)]):
        if path and not isinstance(leaf, Tensor):
            continue
        moved = (
            (lambda t: t + 1)
            if path and not leaf.is_floating_point()
            else (lambda t: torch.nextafter(t, torch.zeros_like(t) - 9))
        )
        flat = [moved(v) if p == path else v for p, v in tree.items(plain)]
        content = {"state": tree.unflatten(plain, flat)}
        hashes.add(json.loads((save(tmp_path / str(i), content, step=2, epoch=0) / MANIFEST).read_text())["files"][STATE][1])
    assert len(hashes) == 1 + sum(isinstance(leaf, Tensor) for leaf in tree.leaves(plain))


def test_shared_memory_is_stored_once(tmp_path: Path) -> None:
    """model_state adds nothing to the file, and a view does not drag its storage along."""
    weight = torch.randn(100_000)[:50_000]
    plain = to_plain(TrainState(torch.tensor(0), {"w": weight}, {}, {}))
    path = save(tmp_path, {"model_state": {"w": plain["params"]["w"]}, "state": plain}, step=0, epoch=0)
    assert 200_000 < (path / STATE).stat().st_size < 203_000


@pytest.mark.parametrize("leaf", [np.float64(1.0), Path("x"), {1, 2}, b"x", torch.float32, torch.eye(2).to_sparse()], ids=repr)
def test_foreign_leaves_are_refused_at_save(tmp_path: Path, leaf: Any) -> None:
    """What `weights_only` could not read back is refused before anything is written, with its path."""
    with pytest.raises(CheckpointError):
        save(tmp_path / "c", {"state": {**to_plain(state_at(1)), "slots": {"x": leaf}}}, step=1, epoch=0)
    assert not (tmp_path / "c").exists()


MUTANTS: dict[str, Callable[[TrainState], TrainState]] = {
    "params.0.weight": lambda s: s.replace(params={**s.params, "0.weight": torch.zeros(6, 3)}),
    "params.0.bias": lambda s: s.replace(params={**s.params, "0.bias": torch.zeros(1)}),
    "params.new": lambda s: s.replace(params={**s.params, "new": torch.zeros(1)}),
    "buffers.1.running_var": lambda s: s.replace(buffers={k: v.double() for k, v in s.buffers.items()}),
    "slots.ema.0.weight": lambda s: s.replace(slots={k: v for k, v in s.slots.items() if k != "ema"}),
    "opt_state.none": lambda s: s.replace(opt_state={**s.opt_state, "none": torch.tensor(0.0)}),
    "opt_state.moments.1": lambda s: s.replace(opt_state={**s.opt_state, "moments": Moments(torch.zeros(3, 6), True)}),
    "step": lambda s: s.replace(step=torch.tensor(0, dtype=torch.int32)),
}


@pytest.mark.parametrize("path", MUTANTS)
def test_another_run_is_refused(path: str) -> None:
    """restore names the paths that differ in shape, dtype, type or presence, and neither casts nor broadcasts."""
    with pytest.raises(CheckpointError, match=rf"\n  {path}: checkpoint has "):
        restore(MUTANTS[path](state_at(1)), to_plain(state_at(1)))


def test_first_five_differences_are_named() -> None:
    """An error lists at most 5 paths, and a hostile name cannot forge a line of it."""
    saved_state = {**to_plain(state_at(1)), "params": {f"p{i}\n\x1b[2J": torch.zeros(1) for i in range(9)}}
    with pytest.raises(CheckpointError) as caught:
        restore(state_at(1), saved_state)
    assert len(str(caught.value).splitlines()) == 6 and "11 entries" in str(caught.value) and "\x1b" not in str(caught.value)


# -- what is refused at save ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("path", ["params.0.bias", "opt_state.moments.0", "buffers.1.running_var", "slots.ema.0.weight"])
def test_non_finite_states_are_refused(tmp_path: Path, path: str, bad: float) -> None:
    """A NaN or an infinity in params, optimizer, running statistics or an average is refused by name and leaves no trace."""
    saved(tmp_path, 1)
    before = sorted(os.listdir(tmp_path))
    state = state_at(2)
    dict(tree.items(state))[path].view(-1)[1] = bad
    with pytest.raises(NonFiniteError, match=f"^{path} "):
        save(tmp_path, content_of(state), step=2, epoch=0)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(("path", "bad"), [("buffers.mask", -torch.inf), ("slots.hook.best", torch.nan)])
def test_a_mask_and_the_memory_of_a_hook_may_be_infinite(tmp_path: Path, path: str, bad: float) -> None:
    """A buffer that is no running statistic may hold an infinity, and a slot that is no average of the model anything."""
    state = state_at(1)
    state = state.replace(buffers={**state.buffers, "mask": torch.zeros(3)}).with_slot("hook", {"best": torch.zeros(3)})
    dict(tree.items(state))[path][1] = bad
    assert load(save(tmp_path, content_of(state), step=1, epoch=0))
    state.buffers["mask"][1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^buffers\.mask "):
        save(tmp_path, content_of(state), step=2, epoch=0)


def test_large_finite_values_are_no_infinity(tmp_path: Path) -> None:
    """Values whose sum overflows are saved: only the values themselves count."""
    state = state_at(1).replace(params={"w": torch.full((9,), 3e38), "h": torch.full((9,), 6e4, dtype=torch.float16)})
    assert load(save(tmp_path, {"state": to_plain(state)}, step=1, epoch=0))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")], ids=repr)
@pytest.mark.parametrize("scenario", ["fresh", "over a damaged leftover"])
def test_an_error_at_any_call_leaves_old_or_new(tmp_path: Path, scenario: str, error: Exception) -> None:
    """An OSError or RuntimeError at each system call of a save is a CheckpointError, and costs no older checkpoint."""

    def act() -> None:
        raise error

    outcomes, n = set[int](), 0
    while True:
        directory = tmp_path / str(n)
        prepare(directory, scenario)
        with pytest.MonkeyPatch.context() as patch:
            made = fail_at(patch, n, act)
            try:
                saved(directory, 3)
            except CheckpointError as caught:
                assert "step" in str(caught)
        if len(made) <= n:
            break
        assert not [name for name in os.listdir(directory) if name.startswith(".tmp-")]
        outcomes.add(check_old_or_new(directory, 2, 3))
        n += 1
    assert n >= 14 and outcomes == {2, 3}


@pytest.mark.parametrize("scenario", ["fresh", "over a damaged leftover"])
def test_a_death_at_any_call_leaves_old_or_new(tmp_path: Path, scenario: str) -> None:
    """A process that dies at any system call of save and retain leaves the old checkpoint or the new one, whole."""
    outcomes, n = set[int](), 0
    while True:
        directory = tmp_path / str(n)
        prepare(directory, scenario)

        def work(n: int = n, directory: Path = directory) -> None:
            with pytest.MonkeyPatch.context() as patch:
                fail_at(patch, n, lambda: os._exit(9))
                save_and_retain(directory)

        code = in_child(work)
        assert code in (0, 9)
        outcomes.add(check_old_or_new(directory, 2, 3))
        if code == 0:
            break
        n += 1
    assert n >= 20 and outcomes == {2, 3}


@pytest.mark.parametrize("n", range(2))
def test_a_death_in_the_middle_of_a_write(tmp_path: Path, n: int) -> None:
    """Half a file on the disk is never read as a checkpoint."""
    prepare(tmp_path, "fresh")

    def work() -> None:
        real, calls = os.write, iter(range(9))

        def torn(fd: int, data: memoryview) -> int:
            if next(calls) == n:
                real(fd, data[: len(data) // 2])
                os._exit(9)
            return real(fd, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", torn)
            saved(tmp_path, 3)

    assert in_child(work) == 9
    assert check_old_or_new(tmp_path, 2, 3) == 2


def test_short_writes_are_continued(tmp_path: Path) -> None:
    """A write call that takes only a part of the data does not cut the file."""
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
        assert load(saved(tmp_path, 3))


def test_order_of_durability(tmp_path: Path) -> None:
    """Files are synced, then their folder, then renamed, then the parent is synced; only then retention deletes."""
    prepare(tmp_path, "fresh")
    with pytest.MonkeyPatch.context() as patch:
        made = fail_at(patch, -1, lambda: None)
        save_and_retain(tmp_path)
    order = [name for name in made if name in ("mkdir", "write", "fsync", "replace", "rename", "rmtree")]
    assert order == ["mkdir", "write", "fsync", "write", "fsync", "fsync", "replace", "fsync", "rename", "rmtree"]


def test_what_reads_back_differently_is_no_checkpoint(tmp_path: Path) -> None:
    """A disk that loses a bit between write and read is found at save, while the older checkpoints are still there."""
    prepare(tmp_path, "fresh")
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:-1] + b"\x00"))
        with pytest.raises(CheckpointError):
            saved(tmp_path, 3)
    assert check_old_or_new(tmp_path, 2, 2) == 2


def test_sigkill_at_random_times(tmp_path: Path) -> None:
    """After 30 SIGKILLs of a process that saves without pause, each time the newest checkpoint is whole and never older."""

    def work() -> None:
        found = newest(tmp_path)
        for step in range(found.step + 1 if found else 1, 10_000):
            saved(tmp_path, step)
            retain(tmp_path, Keep(last=2))

    saved(tmp_path, 1)
    last, delays = 1, torch.rand(30, generator=torch.Generator().manual_seed(0)).mul(0.06).tolist()
    for delay in delays:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(70)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        said: list[str] = []
        found = newest(tmp_path, say=said.append)
        assert found is not None and found.step >= last and not said
        assert same(load(found.path)[0]["state"], state_at(found.step))
        last = found.step
    assert last > 10


# -- damage --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints; the younger one is to be damaged."""
    return saved(tmp_path, 1), save(tmp_path, content_of(state_at(2, size=2000)), step=2, epoch=1, metrics={"acc": 0.5})


def assert_detected(path: Path) -> None:
    with pytest.raises(CheckpointError):
        load(path)
    found = newest(path.parent, sweep=False, say=lambda _: None)
    assert found is not None and found.step == 1


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_flips_cuts_and_holes_are_detected(pair: tuple[Path, Path], name: str) -> None:
    """Of 200 flipped bits, 100 truncations and all zeroed pages, in either file, none is loaded."""
    good, file = (pair[1] / name).read_bytes(), pair[1] / name
    draw = torch.Generator().manual_seed(1)
    for bit in torch.randint(len(good) * 8, (200,), generator=draw).tolist():
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert_detected(pair[1])
    for size in torch.randint(len(good), (100,), generator=draw).tolist():
        file.write_bytes(good[:size])
        assert_detected(pair[1])
    for start in range(0, len(good), 4096):
        page = good[start : start + 4096]
        file.write_bytes(good[:start] + bytes(len(page)) + good[start + len(page) :])
        assert_detected(pair[1])
    file.write_bytes(good)
    assert load(pair[1])


def as_symlink(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def file_as_symlink(path: Path) -> None:
    (path / STATE).rename(path.parent / "elsewhere.pt")
    (path / STATE).symlink_to("../elsewhere.pt")


def as_pipe(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


STRUCTURAL: dict[str, Callable[[Path], object]] = {
    "no state": lambda p: (p / STATE).unlink(),
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "empty folder": lambda p: [f.unlink() for f in p.iterdir()],
    "extra file": lambda p: (p / "extra.pt").write_bytes(b""),
    "empty state": lambda p: (p / STATE).write_bytes(b""),
    "empty manifest": lambda p: (p / MANIFEST).write_bytes(b""),
    "state longer": lambda p: (p / STATE).write_bytes((p / STATE).read_bytes() + b"\0"),
    "manifest longer": lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes() + b"\n"),
    "huge manifest": lambda p: (p / MANIFEST).write_bytes(b"[" * (20 << 20)),
    "folder as state": lambda p: ((p / STATE).unlink(), (p / STATE).mkdir()),
    "file as folder": lambda p: (shutil.rmtree(p), p.write_bytes(b"x")),
    "symlinked folder": as_symlink,
    "symlinked file": file_as_symlink,
    "pipe as manifest": as_pipe,
    "manifest of another step": lambda p: shutil.copy(p.parent / "step_00000001" / MANIFEST, p / MANIFEST),
    "another step's files": lambda p: (shutil.rmtree(p), shutil.copytree(p.parent / "step_00000001", p)),
}


@pytest.mark.parametrize("kind", STRUCTURAL)
def test_structural_damage_is_set_aside(pair: tuple[Path, Path], kind: str) -> None:
    """A damaged newest checkpoint is named, renamed to .bad-*, and the next older valid one is found."""
    STRUCTURAL[kind](pair[1])
    said: list[str] = []
    found = newest(pair[0].parent, say=said.append)
    assert found is not None and found.path == pair[0]
    assert len(said) == 1 and "step_00000002" in said[0] and ".bad-step_00000002-0" in said[0]
    assert not os.path.lexists(pair[1]) and os.path.lexists(pair[1].with_name(".bad-step_00000002-0"))
    assert newest(pair[0].parent, say=said.append) == found and len(said) == 1


def test_no_valid_checkpoint_is_never_a_fresh_start(pair: tuple[Path, Path]) -> None:
    """Where checkpoints were and none is valid, newest raises, also the second time; where none ever was, it is None."""
    for path in pair:
        (path / STATE).write_bytes(b"")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none of the checkpoints is valid"):
            newest(pair[0].parent, say=lambda _: None)
    assert newest(pair[0].parent / "none") is None
    (pair[0].parent / "file").touch()
    with pytest.raises(CheckpointError):
        newest(pair[0].parent / "file")


def test_an_unreadable_checkpoint_is_not_called_damaged(pair: tuple[Path, Path]) -> None:
    """Too many open files, or a lack of rights, blames the system: nothing is renamed."""

    def act() -> None:
        raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="Permission denied"):
        fail_at(patch, 0, act, [(os, "open")])
        newest(pair[0].parent)
    assert pair[1].exists()


def test_looking_changes_nothing(pair: tuple[Path, Path]) -> None:
    """newest(sweep=False) renames and removes nothing, so that it may run beside a training."""
    (pair[1] / STATE).write_bytes(b"")
    (pair[0].parent / ".tmp-00000003-1").mkdir()
    before = sorted(os.listdir(pair[0].parent))
    found = newest(pair[0].parent, sweep=False, say=lambda _: None)
    assert found is not None and found.step == 1 and sorted(os.listdir(pair[0].parent)) == before


def test_the_sweep_removes_our_leftovers_alone(tmp_path: Path) -> None:
    """Leftovers by our own names go; other names, files and symlinks by our names, and what these point to, stay."""
    saved(tmp_path, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").touch()
    (tmp_path / ".del-00000009-9").symlink_to("mine")
    (tmp_path / ".tmp-00000009-8").touch()
    for name in (".tmp-00000002-77", ".del-00000002-77", ".tmp-2", ".tmp-abc", "tmp-00000002-77", "step_3", "step_000000001"):
        (tmp_path / name).mkdir()
    newest(tmp_path)
    gone = {".tmp-00000002-77", ".del-00000002-77"}
    assert not gone & set(os.listdir(tmp_path)) and len(os.listdir(tmp_path)) == 9
    assert (tmp_path / "mine" / "data").exists()


def test_saving_again(tmp_path: Path) -> None:
    """A valid checkpoint of the step is kept as it is; a damaged one is moved aside and written anew."""
    path = saved(tmp_path, 3)
    before = (path / STATE).stat()
    assert saved(tmp_path, 3) == path and (path / STATE).stat() == before
    (path / STATE).write_bytes(b"torn")
    assert saved(tmp_path, 3) == path
    assert same(load(path)[0]["state"], state_at(3)) and (tmp_path / ".bad-step_00000003-0").exists()


def test_a_leftover_of_the_same_pid_is_no_obstacle(tmp_path: Path) -> None:
    """In a container each start has the same pid: its own leftovers do not stop a save or a retention."""
    for kind in ("tmp", "del"):
        for step in (1, 4):
            (tmp_path / f".{kind}-{step:08d}-{os.getpid()}" / "x").mkdir(parents=True)
    prepare(tmp_path, "fresh")
    for step in (3, 4):
        saved(tmp_path, step)
    assert len(retain(tmp_path, Keep())) == 2


# -- malice --------------------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def packed(value: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # duplicate names
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def entries_of(data: bytes) -> list[tuple[str, bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(data))
    return [(info.filename, archive.read(info)) for info in archive.infolist()]


def endless() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def oversized() -> bytes:
    """A tensor that claims a thousand times the elements that its storage has."""
    good = entries_of(packed({"state": {"w": torch.zeros(300, dtype=torch.uint8)}}))
    return zipped([(name, data.replace(struct.pack("<H", 300), struct.pack("<H", 60_000))) for name, data in good])


GOOD = {"state": {"w": torch.zeros(3)}}
HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "zip": lambda c: packed({"state": {"w": Payload(c)}}),
    "legacy": lambda c: packed({"state": {"w": Payload(c)}}, _use_new_zipfile_serialization=False),
    "plain pickle": lambda c: pickle.dumps({"state": Payload(c)}),
    "nested key": lambda c: packed({"state": {"w": torch.zeros(1)}, "x": [{(1, Payload(c)): 1}]}),
    "import by name": lambda c: zipped(
        [("a/data.pkl", b"cbuiltins\neval\n(S'1'\ntR."), ("a/version", b"3\n"), ("a/byteorder", b"little")]
    ),
    "numpy": lambda c: packed({"state": {"w": np.float64(3)}}),
    "torchscript": lambda c: zipped([*entries_of(packed(GOOD)), ("archive/constants.pkl", pickle.dumps(Payload(c)))]),
    "deflated": lambda c: zipped(entries_of(packed(GOOD)), zipfile.ZIP_DEFLATED),
    "duplicate names": lambda c: zipped(entries_of(packed(GOOD)) * 2),
    "oversized tensor": lambda c: oversized(),
    "meta tensor": lambda c: packed({"state": {"w": torch.zeros(10**9, device="meta")}}),
    "sparse tensor": lambda c: packed({"state": {"w": torch.eye(3).to_sparse()}}),
    "no dict": lambda c: packed([1, 2]),
    "no state": lambda c: packed({"model_state": {}}),
    "endless": lambda c: packed({"state": endless()}),
    "legacy tensors": lambda c: packed(GOOD, _use_new_zipfile_serialization=False),
    "not a file of torch": lambda c: b"\x00" * 500,
}


def forged(directory: Path, state: bytes, described: Any = (("w", "float32", (3,)),), **head: Any) -> Path:
    """A checkpoint whose hashes are right, as someone who knows the format would make it."""
    path = directory / "step_00000005"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    base = {"step": 5, "epoch": 0, "tree": described, "torch": "2", "fingerprint": {}, "metrics": {}}
    (path / STATE).write_bytes(state)
    (path / MANIFEST).write_bytes(manifest.encode_manifest({**base, **head}, len(state), manifest.sha256(state)))
    return path


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_states_are_refused(tmp_path: Path, kind: str) -> None:
    """A state with right hashes and a payload raises CheckpointError; the payload's canary is never created."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces what it is about to refuse
        path = forged(tmp_path, HOSTILE[kind](tmp_path / "canary"))
        with pytest.raises(CheckpointError):
            load(path)
    assert not (tmp_path / "canary").exists()


def test_the_forger_can_write_a_good_one(tmp_path: Path) -> None:
    """The forged checkpoints of these tests are refused for their payload, not for their form."""
    assert torch.equal(load(forged(tmp_path, packed(GOOD)))[0]["state"]["w"], torch.zeros(3))
    with pytest.raises(CheckpointError, match="not the one that its manifest describes"):
        load(forged(tmp_path, packed(GOOD), [["w", "float32", [4]]]))


@pytest.mark.parametrize(
    "head",
    [
        {"step": -1},
        {"step": True},
        {"step": "5"},
        {"epoch": 0.5},
        {"tree": {}},
        {"tree": [["w", "float32"]]},
        {"metrics": {"acc": "high"}},
        {"metrics": {"acc": [1]}},
        {"surplus": 1},
        {"format": 0},
        {"fingerprint": []},
        {"sha256": "0"},
    ],
    ids=str,
)
def test_manifests_off_the_schema_are_damaged(tmp_path: Path, head: dict[str, Any]) -> None:
    """A manifest with a right seal and a wrong field, type or value is refused."""
    with pytest.raises(manifest.DamagedError):
        load(forged(tmp_path, packed(GOOD), **head))


@pytest.mark.parametrize(
    "forge",
    [
        lambda good: good + b',"epoch":0',
        lambda good: good.replace(b'"metrics":{', b'"metrics":{"acc":NaN'),
        lambda good: good.replace(b'"tree":', b'"tree":' + b"[" * 100_000),
        lambda good: good.replace(b'"step":5', b'"step":' + b"9" * 5000),
        lambda good: good[:-1],
        lambda good: good.replace(b"torch", b"\xff"),
        lambda good: b"[1",
    ],
    ids=["duplicate key", "NaN", "deep", "huge number", "cut", "no text", "list"],
)
def test_manifests_that_are_no_json_are_damaged(tmp_path: Path, forge: Callable[[bytes], bytes]) -> None:
    """Duplicate keys, NaN, deep nests and what is no JSON object are refused, with a right seal too."""
    path = forged(tmp_path, packed(GOOD))
    body = forge((path / MANIFEST).read_bytes().rpartition(b',"sha256"')[0])
    (path / MANIFEST).write_bytes(body + b',"sha256":"%s"}\n' % manifest.sha256(body).encode())
    with pytest.raises(manifest.DamagedError):
        load(path)


def test_a_newer_format_is_neither_read_nor_damaged(pair: tuple[Path, Path]) -> None:
    """A checkpoint of a newer ailab says so, is not renamed, and no older one is taken in its place."""
    path = forged(pair[0].parent, packed(GOOD), format=manifest.FORMAT + 1, novelty={})
    with pytest.raises(CheckpointError, match=f"format {manifest.FORMAT + 1} is newer"):
        newest(pair[0].parent)
    assert path.exists() and pair[1].exists()


def test_an_earlier_format_is_said_and_left_as_it_is(pair: tuple[Path, Path]) -> None:
    """A checkpoint of an earlier ailab is no damaged one: it is named with its format, not renamed, and no other is taken."""
    path = forged(pair[0].parent, packed(GOOD), format=1)
    with pytest.raises(CheckpointError, match="its format is 1, of an earlier ailab; this one reads formats 2 to 3"):
        newest(pair[0].parent)
    assert path.exists() and pair[1].exists()


# -- retention -----------------------------------------------------------------------------------------------------------------


def steps_in(directory: Path) -> list[int]:
    return sorted(int(name.removeprefix("step_")) for name in os.listdir(directory) if name.startswith("step_"))


SCORES = {1: 0.9, 2: float("nan"), 3: 0.1, 4: float("inf"), 5: 0.9, 6: 0.2, 7: 0.3, 8: 0.4}


@pytest.mark.parametrize(
    ("keep", "protect", "left"),
    [
        (Keep(), (), [7, 8]),
        (Keep(last=3), (), [6, 7, 8]),
        (Keep(last=99), (), [1, 2, 3, 4, 5, 6, 7, 8]),
        (Keep(best=1, metric="acc", mode="max"), (), [5, 7, 8]),
        (Keep(best=2, metric="acc", mode="max"), (), [1, 5, 7, 8]),
        (Keep(best=1, metric="acc", mode="min"), (), [3, 7, 8]),
        (Keep(best=1, metric="absent"), (), [7, 8]),
        (Keep(), (2, 4), [2, 4, 7, 8]),
    ],
    ids=str,
)
def test_retention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Keep, protect: tuple[int, ...], left: list[int]
) -> None:
    """The last, the best and the protected stay, by step and manifest, whatever the times of the files say."""
    for step, score in SCORES.items():
        path = saved(tmp_path, step, metrics={"acc": score})
        os.utime(path, (10_000 - step, 10_000 - step))
    monkeypatch.chdir(tmp_path)
    gone = retain(tmp_path, keep, protect=[Path(f"step_{step:08d}") for step in protect])
    assert steps_in(tmp_path) == left
    assert [int(path.name.removeprefix("step_")) for path in gone] == [step for step in SCORES if step not in left]
    assert set(os.listdir(tmp_path)) == {f"step_{step:08d}" for step in left}


def test_damaged_checkpoints_do_not_count(tmp_path: Path) -> None:
    """Retention keeps two that look valid beside a damaged one, and leaves that one alone."""
    for step in (1, 2, 3, 4):
        saved(tmp_path, step)
    (tmp_path / "step_00000003" / STATE).write_bytes(b"")
    retain(tmp_path, Keep())
    assert steps_in(tmp_path) == [2, 3, 4]


@pytest.mark.parametrize("bad", [{"last": 1}, {"last": 0}, {"best": 1}, {"best": -1}, {"mode": "low"}], ids=str)
def test_unsafe_retention_is_refused_when_it_is_built(bad: dict[str, Any]) -> None:
    """Fewer than two checkpoints, or a best without a metric, is a ConfigError before any training."""
    with pytest.raises(ConfigError):
        Keep(**bad)


# -- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "module.model.", "module.module."]
)
def test_wrapper_prefixes_go(prefix: str) -> None:
    """The names of a wrapped model become those of the model, in a new dict with the same tensors in order."""
    inner = {"conv.weight": torch.ones(1), "head.module.bias": torch.ones(2)}
    wrapped = {prefix + name: value for name, value in inner.items()}
    short = remove_module_prefix(wrapped)
    assert list(short) == list(inner) and all(short[name] is inner[name] for name in inner)
    assert list(wrapped) == [prefix + name for name in inner]


def test_names_that_are_no_wrapper_stay() -> None:
    """A model's own "model." stays, alone or beside other names; two names never become one in silence."""
    assert list(remove_module_prefix({"model.a": torch.ones(1)})) == ["model.a"]
    assert list(remove_module_prefix({"module.model.a": torch.ones(1), "module.loss.b": torch.ones(1)})) == [
        "model.a",
        "loss.b",
    ]
    assert remove_module_prefix({}) == {}
    with pytest.raises(ConfigError):
        remove_module_prefix(OrderedDict([("module.a", torch.ones(1)), ("a", torch.zeros(1))]))


def test_the_state_of_a_sub_module() -> None:
    """The entries of a sub-module come under its own names; an unknown one is an error that names the nearest."""
    net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 3)), "encoder2": nn.Linear(2, 3)})
    found = get_target_module_state(net.state_dict(), "encoder")
    nn.Sequential(nn.Linear(2, 3)).load_state_dict(found)
    assert list(get_target_module_state(net.state_dict(), "encoder.0")) == ["weight", "bias"]
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        get_target_module_state(net.state_dict(), "encodr")


def test_a_checkpoint_is_private_to_no_one(tmp_path: Path) -> None:
    """Checkpoints are plain files without execute permission."""
    path = saved(tmp_path, 1)
    assert isinstance(newest(tmp_path), Checkpoint)
    assert all(not (file.stat().st_mode & (stat.S_IXUSR | stat.S_IWOTH)) for file in path.iterdir())
    assert durable.has_content(path / STATE, (path / STATE).read_bytes()) and not durable.has_content(path / STATE, b"")
