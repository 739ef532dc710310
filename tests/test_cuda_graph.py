"""Whole-step replay, with the stand-in that records on a CPU: what is replayed is what would have run, bitwise."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Die, tiny_cfg
from torch import Tensor, nn

from ailab import cuda_graph, tree
from ailab.compile import compile
from ailab.cuda_graph import HostRecorder, Recording, Replay, _uses_of_memory
from ailab.errors import DonatedError, Preempted
from ailab.fit import fit
from ailab.hooks.step.ema import EMAHook
from ailab.job import plan
from ailab.testing import TinyNet
from ailab.types import TrainState

Batch = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("aot_eager")


def batches(n: int, size: int = 6) -> list[Batch]:
    g = torch.Generator().manual_seed(size)
    return [{"input": torch.randn(size, 4, generator=g), "target": torch.randint(3, (size,), generator=g)} for _ in range(n)]


class Case:
    """The same step twice: replayed, and as it is."""

    def __init__(self, recorder: Any = None, said: list[str] | None = None):
        self.net = TinyNet(EMAHook(decay=0.9))
        self.net.model[2] = nn.Sequential(nn.ReLU(), nn.Dropout(0.3))
        self.replay = Replay(recorder or HostRecorder(), (said if said is not None else []).append)
        self.step, self.plain = compile(self.net.step(), replay=self.replay), compile(self.net.step())

    def recorded(self) -> int:
        return sum(c.homes is not None for c in self.replay.captured)


def same(a: Any, b: Any) -> bool:
    pairs = zip(tree.items(a), tree.items(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for (_, x), (_, y) in pairs)


def test_a_replay_is_the_step_bitwise() -> None:
    """State and logs over 12 steps with dropout, of two shapes of batches; each step's logs stay what they were."""
    case = Case()
    mine, theirs = case.net.state.clone(), case.net.state.clone()
    kept: list[tuple[Tensor, Tensor]] = []
    for some in [*batches(5), *batches(4, size=3), *batches(3)]:
        mine, logs = case.step(mine, some)
        theirs, wanted = case.plain(theirs, some)
        kept.append((logs.packed, wanted.packed))
        assert same(mine, theirs)
    assert case.recorded() == 2
    assert all(torch.equal(a, b) for a, b in kept), "a later replay writes to no log that was handed out"


def test_a_step_does_not_see_what_comes_of_its_batch_later() -> None:
    """A batch is copied: its memory may be written to as soon as the call has returned, and another one at its place is seen."""
    case, one = Case(), batches(1)[0]
    mine, theirs = case.net.state.clone(), case.net.state.clone()
    for some in batches(6):
        for name in one:
            one[name].copy_(some[name])
        mine, _ = case.step(mine, one)
        theirs, _ = case.plain(theirs, some)
    assert case.recorded() == 1
    assert same(mine, theirs)


def with_new_slot(state: TrainState) -> TrainState:
    return state.with_slot("ema", {n: t * 0.5 for n, t in state.slots["ema"].items()})


def with_new_momentum(state: TrainState) -> TrainState:
    return state.replace(opt_state=tree.map(lambda t: t.clone() * 2 if t.dim() else t, state.opt_state))


@pytest.mark.parametrize("change", [with_new_slot, with_new_momentum, TrainState.clone])
def test_a_state_that_moves_is_followed(change: Callable[[TrainState], TrainState]) -> None:
    """A hook replaces parts of the state between steps: values are those of the unrecorded run, and it is replayed all the same."""
    case = Case()
    mine, theirs = case.net.state.clone(), case.net.state.clone()
    replayed = 0
    for some in batches(9):
        mine, theirs = change(mine), change(theirs)
        mine, _ = case.step(mine, some)
        theirs, _ = case.plain(theirs, some)
        assert same(mine, theirs)
        replayed += any(c.homes is case.step._leaves for c in case.replay.captured)
    assert replayed >= 6


def test_what_somebody_keeps_is_not_written_over() -> None:
    """Parts of an earlier state that a hook holds, whole or as a view, keep their values; once they are let go it is replayed."""
    said: list[str] = []
    case = Case(said=said)
    mine = case.net.state.clone()
    for some in batches(4):
        mine, _ = case.step(mine, some)
    assert case.recorded() == 1
    kept = [mine.slots["ema"]["0.weight"], mine.slots["ema"]["3.weight"][0]]
    values = tree.clone(kept)
    mine = with_new_slot(mine)
    for some in batches(20):
        mine, _ = case.step(mine, some)
    assert same(kept, values)
    assert said == ["train step: no CUDA graph in 20 steps: parts of an earlier state are kept"]
    assert case.step._leaves is not case.replay.captured[0].homes
    kept.clear()
    mine, _ = case.step(with_new_slot(mine), batches(1)[0])
    assert case.step._leaves is case.replay.captured[0].homes


def test_two_states_do_not_share_a_home() -> None:
    """A second run through the same step leaves the state of the first one alone."""
    case = Case()
    first, second = case.net.state.clone(), case.net.state.clone()
    for some in batches(4):
        first, _ = case.step(first, some)
    values = first.clone()
    for some in batches(4):
        second, _ = case.step(second, some)
    assert same(first, values)
    assert same(second, first)


def test_the_state_that_another_was_made_of_is_consumed_too() -> None:
    """They share memory that the step writes to: reading the older one is an error, and no old or new value."""
    case = Case()
    state = case.net.state.clone()
    for some in batches(5):
        older, state = state, with_new_slot(state)
        newer = state
        state, _ = case.step(state, some)
        with pytest.raises(DonatedError, match="consumed this TrainState"):
            _ = newer.params
        if state.at > 1:
            with pytest.raises(DonatedError, match="consumed this TrainState"):
                _ = older.params


class Refusing(HostRecorder):
    """A recorder on which nothing can be recorded."""

    def record(self, call: Callable[[], Any]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once() -> None:
    """The reason is one line, and the values are those of the step."""
    said: list[str] = []
    case = Case(Refusing(), said)
    mine, theirs = case.net.state.clone(), case.net.state.clone()
    for some in batches(6):
        mine, _ = case.step(mine, some)
        theirs, _ = case.plain(theirs, some)
    assert same(mine, theirs)
    assert said == ["train step: no CUDA graph: operation not permitted when stream is capturing"]


def test_batches_of_many_shapes_are_recorded_up_to_a_number() -> None:
    """Four shapes, not more: a recording takes time and memory."""
    said: list[str] = []
    case = Case(said=said)
    mine = case.net.state.clone()
    for size in range(2, 8):
        for some in batches(4, size):
            mine, _ = case.step(mine, some)
    assert case.recorded() == 4
    assert said == ["train step: no CUDA graph: batches come in more than 4 shapes; pad them to one"] * 2


def test_an_expanded_field_is_not_written_to() -> None:
    """A field whose elements are one place in memory cannot be a fixed field."""
    said: list[str] = []
    case = Case(said=said)
    mine = case.net.state.clone()
    for some in batches(4):
        mine, _ = case.step(mine, {**some, "_weight": torch.ones(()).expand(6)})
    assert said == ["train step: no CUDA graph: a field of the batch is expanded"]


def test_after_the_end_steps_run_as_they_are() -> None:
    """Closing frees the recordings; the state is as good as before."""
    case = Case()
    mine, theirs = case.net.state.clone(), case.net.state.clone()
    for i, some in enumerate(batches(8)):
        if i == 5:
            case.replay.close()
        mine, _ = case.step(mine, some)
        theirs, _ = case.plain(theirs, some)
    assert same(mine, theirs)
    assert not case.replay.captured


def test_uses_of_memory_are_counted() -> None:
    """Behind the one private name of torch: a tensor, its views and what is detached from it."""
    tensor = torch.zeros(3)
    assert _uses_of_memory(tensor) == 1
    view, other = tensor[1:], tensor.detach()
    assert _uses_of_memory(tensor) == _uses_of_memory(view) == 3
    del view, other
    assert _uses_of_memory(tensor) == 1


# Whole runs.


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Replay]:
    """Runs of a cfg are replayed, on a CPU. The list gets the recordings of each."""
    made: list[Replay] = []

    def replay(recorder: Any, say: Any) -> Replay:
        made.append(Replay(recorder, say))
        return made[-1]

    monkeypatch.setattr(plan, "_no_replay", lambda *args: "")
    monkeypatch.setattr(plan, "CudaRecorder", lambda device: HostRecorder())
    monkeypatch.setattr(plan, "Replay", replay)
    return made


HOOKS: dict[str, dict[str, Any]] = {
    "none": {},
    "many": dict(
        clip=dict(type="GradClipHook", max_norm=0.5),
        lr=dict(type="LrSchedulerHook", by="step", scheduler=dict(type="OneCycleLR", max_lr=0.05)),
        ema=dict(type="EMAHook", decay=0.9),
        skip=dict(type="SkipNonFiniteHook", policy="skip"),
    ),
    "plateau": dict(lr=dict(type="LrSchedulerHook", metric="val_loss", scheduler=dict(type="ReduceLROnPlateau", patience=0))),
    "swa": dict(swa=dict(type="SWAHook", start=1)),
}


@pytest.mark.parametrize("hooks", list(HOOKS))
def test_a_run_that_is_replayed_ends_with_the_same_bits(hooks: str, tmp_path: Path, replayed: list[Replay]) -> None:
    """Training and validation in turns, epochs that begin with new totals, schedules: state and results are bitwise the same."""
    cfg = {**tiny_cfg(tmp_path / "a", **HOOKS[hooks]), "compile": dict(cut="step")}
    ours = fit({**cfg, "total_epochs": 6})
    assert replayed[-1].closed
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plan, "_no_replay", lambda *args: "not here")
        plain = fit({**cfg, "work_dir": str(tmp_path / "b"), "total_epochs": 6})
    assert same(ours.state, plain.state)
    assert ours.metrics == plain.metrics


def test_most_steps_of_a_run_are_replayed(tmp_path: Path, replayed: list[Replay], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 epochs of 5 training and 3 validation steps all but three calls of each shape are replays: one compiles."""
    kinds: list[tuple[str, bool]] = []
    call = cuda_graph.Captured.__call__

    def watched(self: Any, leaves: Any, fields: Any) -> Any:
        kinds.append((self.name, self._recording is not None and leaves is self.homes))
        return call(self, leaves, fields)

    monkeypatch.setattr(cuda_graph.Captured, "__call__", watched)
    fit({**tiny_cfg(tmp_path / "a", **HOOKS["many"]), "compile": dict(cut="step"), "total_epochs": 6})
    assert len(replayed) == 1
    replays = [k for k in kinds if k[1]]
    assert len(kinds) - len(replays) == 2 * 3, "a training step of two shapes, and one of validation"
    assert {n for n, _ in replays} == {"train", "val"}


def test_a_replayed_run_that_is_stopped_is_resumed_bitwise(tmp_path: Path, replayed: list[Replay]) -> None:
    """Stopped in the third epoch and resumed: what a checkpoint gives is memory of its own, and becomes the home."""
    hooks = dict(**HOOKS["many"], checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
    cfg = {**tiny_cfg(tmp_path / "a", **hooks), "compile": dict(cut="step"), "total_epochs": 6}
    whole = fit(cfg)
    cut = {**cfg, "work_dir": str(tmp_path / "b")}
    stopping = {**cut["hooks"], "die": dict(type=Die, step=13, by=signal.SIGTERM)}
    with pytest.raises(Preempted):
        fit({**cut, "hooks": stopping})
    end = fit({**cut, "hooks": {**stopping, "die": dict(type=Die)}})
    assert same(end.state, whole.state)
    assert end.metrics == whole.metrics
