"""The laws of observers: they read the device only at their interval, and their failures end no run and change no result."""

from __future__ import annotations

import errno
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import OWN, info, made
from test_wandb import Fake
from tiny import newest_state, rows_of, tiny_cfg
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ailab.compile import compile
from ailab.core.epoch import tally
from ailab.errors import CheckpointError, NonFiniteError
from ailab.fit import fit
from ailab.registry import HOOKS
from ailab.stack import Middleware, at, stack, with_slots
from ailab.testing import TinyNet
from ailab.types import Batch, TrainState

FAR = 10**6  # steps: later than any of a test
INTERVALS = ("interval", "every", "every_steps", "wait")  # what hooks call it
READS = {"item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__", "__contains__"}


class Calls(TorchFunctionMode):
    """Methods of tensors that wait for the device; on a CPU not all of them reach the dispatcher."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Operators whose result is a number, or has a shape that only the device knows."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        mask = func.overloadpacket is aten.index and any(t is not None and t.dtype == torch.bool for t in args[1])
        if mask or func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def reads(found: list[str]) -> Iterator[None]:
    """Note the device reads that happen inside."""
    with Calls(found), Operators(found):
        yield


def stepped(hooks: list[Middleware[Any]], n: int = 3) -> list[str]:
    """The device reads that these hooks make above the line in `n` steps, after a first one."""
    net, found = TinyNet(hooks), list[str]()
    names = tuple(net.run(compile(net.step(), enabled=False, donate=False))[1])
    inner = compile(stack(net.step(), [tally(names)]), enabled=False, donate=False)

    def unseen(state: TrainState, batch: Batch) -> Any:
        before = len(found)
        out = inner(state, batch)
        del found[before:]  # torch's own SGD reads its rate
        return out

    step = stack(unseen, at(net.hooks, "host"))
    state, _ = step(with_slots(net.state, [tally(names)]), net.batches[0])
    with reads(found):
        for i in range(n):
            state, _ = step(state, net.batches[i % 2])
    return found


def far_away(name: str, folder: Path) -> list[Middleware[Any]]:
    takes = inspect.signature(HOOKS.get(name)).parameters
    return made(name, folder, **{p: FAR for p in INTERVALS if p in takes})


def host_hooks() -> list[str]:
    with_host = [n for n in OWN if any(h.depth == "host" for h in far_away(n, Path("unused")))]
    assert {"LoggerHook", "TensorboardHook", "WandbHook", "ThroughputHook", "ProfilerHook", "CheckpointHook"} <= {*with_host}
    return with_host


@pytest.mark.parametrize("name", host_hooks())
def test_no_hook_reads_the_device_off_its_interval(name: str, tmp_path: Path) -> None:
    """Steps between two intervals make no `.item()`, nor anything else that waits for the device; new hooks are found here."""
    assert stepped(far_away(name, tmp_path)) == []


def test_all_of_them_together_read_nothing_either(tmp_path: Path) -> None:
    """One inside the other, and what each run has anyway."""
    from ailab.hooks.observe.log import RecordHook

    hooks = [h for n in host_hooks() for h in far_away(n, tmp_path) if h.depth == "host"]
    assert stepped([*RecordHook(FAR, run=info(tmp_path)), *hooks]) == []


def test_the_counter_counts(tmp_path: Path) -> None:
    """At its interval a logger reads once a step, and each way to read a tensor is seen."""
    assert len(stepped(made("LoggerHook", tmp_path))) == 3
    t = torch.ones(2)
    ways: list[Callable[[], Any]] = [
        lambda: t.tolist(),
        lambda: t[0].item(),
        lambda: float(t[0]),
        lambda: bool(t[0]),
        lambda: int(t[0]),
        lambda: t.numpy(),
        lambda: t[t > 0],
        lambda: torch.equal(t, t),
    ]
    for way in ways:
        found: list[str] = []
        with reads(found):
            way()
        assert found


def test_a_slot_that_changes_does_not_hide_the_step() -> None:
    """A state that differs in its slots alone knows its step without a read; one with another step does not."""
    state, found = TinyNet().state, list[str]()
    assert state.at == 0
    with reads(found):
        assert state.with_slot("mine", torch.ones(1)).at == state.replace(slots={}).at == 0
        assert found == []
        assert state.replace(step=state.step + 1).at == 1
    assert found


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def fill(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for one writer only."""
    if where == "record":
        monkeypatch.setattr("ailab.workdir.folder.Lines.append", full)
    elif where == "config":
        monkeypatch.setattr("ailab.hooks.observe.log._write_config", full)
    elif where == "logger":
        real = Path.open
        monkeypatch.setattr(Path, "open", lambda p, *a, **k: full() if p.name == "train.log" else real(p, *a, **k))
    elif where == "tensorboard_open":
        pytest.importorskip("tensorboard", reason="an optional writer")
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", full)
    elif where == "tensorboard_write":
        pytest.importorskip("tensorboard", reason="an optional writer")
        importlib.import_module("torch.utils.tensorboard")
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    elif where == "tensorboard_close":
        pytest.importorskip("tensorboard", reason="an optional writer")
        importlib.import_module("torch.utils.tensorboard")
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", full)
    elif where == "wandb":
        monkeypatch.setattr(Fake, "log", full)
    elif where == "profiler":
        monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", full)


def watched_cfg(folder: Path) -> dict[str, Any]:
    return tiny_cfg(
        folder,
        speed=dict(type="ThroughputHook", interval=1),
        logger=dict(type="LoggerHook", interval=1),
        profiler=dict(type="ProfilerHook", wait=1, warmup=1, active=1),
        tensorboard=dict(type="TensorboardHook", interval=1),
        wandb=dict(type="WandbHook", interval=1),
        checkpoint=dict(type="CheckpointHook"),
    )


WARNINGS = {"config": 1, "tensorboard_open": 1, "tensorboard_close": 1, "profiler": 1}  # the others are asked again


@pytest.mark.parametrize(
    "where",
    ["record", "config", "logger", "tensorboard_open", "tensorboard_write", "tensorboard_close", "wandb", "profiler"],
)
def test_a_full_disk_under_an_observer(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three warnings, and the observer is switched off. The run completes, with the same bytes in its checkpoint."""
    monkeypatch.setitem(sys.modules, "wandb", Fake("well"))
    fit(watched_cfg(tmp_path / "plain"))
    assert "warning" not in capsys.readouterr().out
    fill(where, monkeypatch)
    fit(watched_cfg(tmp_path / "full"))
    out = capsys.readouterr().out
    wanted = WARNINGS.get(where, 3)
    assert out.count("No space left on device") == out.count("warning") == wanted
    assert out.count("it is switched off now") == (wanted == 3)
    assert newest_state(tmp_path / "full") == newest_state(tmp_path / "plain")
    assert out.count("epoch 3/3  val") == 1  # the console speaks on
    if where != "record":
        assert rows_of(tmp_path / "full") == rows_of(tmp_path / "plain")


def test_a_record_that_cannot_be_written_still_sees_a_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the loss is not switched off with the file."""
    fill("record", monkeypatch)
    cfg = {**tiny_cfg(tmp_path), "total_epochs": 10}
    cfg["hooks"]["spoil"] = dict(type=spoiling, step=42)
    with pytest.raises(NonFiniteError, match="epoch 9"):
        fit(cfg)


def spoiling(step: int, *, name: str = "spoil") -> Middleware[Any]:
    def wrap(train: Any) -> Any:
        def spoilt(state: Any, batch: Any) -> Any:
            batch = {**batch, "input": batch["input"] * float("nan")} if state.at == step else batch
            return train(state, batch)

        return spoilt

    return Middleware(name, wrap, "host")


def test_a_full_disk_under_a_checkpoint_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CheckpointHook is not an observer: exit code 5."""
    monkeypatch.setattr("ailab.workdir.durable.write", full)
    monkeypatch.setattr("ailab.hooks.observe.log._write_config", lambda run: None)
    monkeypatch.setattr("ailab.workdir.folder._probe", lambda folder: None)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        fit(tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")))
    assert caught.value.exit_code == 5
