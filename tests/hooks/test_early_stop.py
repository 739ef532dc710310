"""Ending early, what is saved of it, and the one check of every result that a hook reads."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import info
from tiny import rows_of, tiny_cfg

from ailab.core.epoch import PROGRESS
from ailab.errors import ConfigError
from ailab.fit import fit
from ailab.hooks import EarlyStopHook
from ailab.hooks.run.checkpoint import CheckpointHook
from ailab.stack import Middleware
from ailab.testing import TinyNet
from ailab.types import Logs, TrainState

VALUES = [3.0, 2.0, 2.5, 1.95, float("nan"), 1.5, 1.49, 1.48, 1.47, 1.0]


def fed(values: list[float], *, name: str = "fed") -> Middleware[Any]:
    """Replaces val_loss by a number from a list, one for each epoch."""

    def wrap(epoch: Any) -> Any:
        def replaced(state: TrainState, batches: Any) -> Any:
            state, logs = epoch(state, batches)
            packed = logs.packed.clone()
            packed[logs.names.index("val_loss")] = torch.tensor([values[int(state.slots[PROGRESS]["epoch"]) - 1], 1.0])
            return state, Logs(logs.names, packed, logs.outputs, logs.wall)

        return replaced

    return Middleware(name, wrap, "epoch")


def stops_after(values: list[float], mode: str, patience: int, min_delta: float) -> int | None:
    """The same rule in five lines."""
    best, since = None, 0
    for epoch, value in enumerate(values, 1):
        better = value == value and (best is None or (value - best if mode == "max" else best - value) > min_delta)
        best, since = (value, 0) if better else (best, since + 1)
        if since == patience:
            return epoch
    return None


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("min_delta", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_stops_where_the_rule_says(mode: str, min_delta: float, patience: int, tmp_path: Path) -> None:
    """After `patience` results in a row without an improvement of more than min_delta. Its memory is only in the state."""
    state, stopped = TinyNet(build(tmp_path, mode, patience, min_delta)).state, None
    for epoch, value in enumerate(VALUES, 1):
        [hook] = build(tmp_path, mode, patience, min_delta)  # a new one each time
        logs = Logs(("val_loss",), torch.tensor([[value, 1.0]], dtype=torch.float64))
        state, _ = hook(lambda state, batches, logs=logs: (state, logs))(state, {})
        if int(state.slots[PROGRESS]["stop"]):
            stopped = epoch
            break
    assert stopped == stops_after(VALUES, mode, patience, min_delta)


def build(folder: Path, mode: Any, patience: int, min_delta: float) -> list[Middleware[Any]]:
    return EarlyStopHook("val_loss", mode, patience, min_delta, run=info(folder))


def stopping_cfg(folder: Path, order: tuple[str, ...], epochs: int = 10) -> dict[str, Any]:
    entries: dict[str, dict[str, Any]] = {
        "fed": dict(type=fed, values=VALUES),
        "stop": dict(type="EarlyStopHook", patience=2, min_delta=0.1),
        "checkpoint": dict(type="CheckpointHook", interval=3),
        "resume": dict(type="ResumeHook"),
    }
    return {**tiny_cfg(folder, **{n: entries[n] for n in order}), "total_epochs": epochs}


@pytest.mark.parametrize("order", [("fed", "stop", "checkpoint", "resume"), ("checkpoint", "resume", "fed", "stop")])
def test_the_last_epoch_is_saved_and_a_restart_trains_no_more(order: tuple[str, ...], tmp_path: Path) -> None:
    """With any interval and any order of the hooks, the last epoch is saved together with the stop flag."""
    state = fit(stopping_cfg(tmp_path, order)).state
    epochs = stops_after(VALUES, "min", 2, 0.1)
    assert epochs == 4 and state.at == 5 * epochs
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000015", "step_00000020"]
    again = fit(stopping_cfg(tmp_path, order)).state
    assert again.at == state.at
    assert torch.equal(again.slots["stop"]["best"], state.slots["stop"]["best"])


@pytest.mark.parametrize("order", [("fed", "stop", "checkpoint", "resume"), ("checkpoint", "resume", "fed", "stop")])
def test_a_resumed_run_stops_where_the_whole_one_does(order: tuple[str, ...], tmp_path: Path) -> None:
    """Best value and count come back exactly, also where the early stop is listed after the checkpoint."""
    whole = fit(stopping_cfg(tmp_path / "whole", order)).state
    first = fit(stopping_cfg(tmp_path / "cut", order, epochs=3)).state  # in the midst of a row of bad epochs
    assert int(first.slots["stop"]["bad"]) == 1
    resumed = fit(stopping_cfg(tmp_path / "cut", order)).state
    assert resumed.at == whole.at
    for name, p in whole.params.items():
        assert torch.equal(p, resumed.params[name]), name


@pytest.mark.parametrize("order", [("lr_scheduler", "checkpoint", "resume"), ("checkpoint", "resume", "lr_scheduler")])
def test_a_plateau_resumes_wherever_it_stands(order: tuple[str, ...], tmp_path: Path) -> None:
    """The state of ReduceLROnPlateau after an epoch is in the checkpoint of that epoch, in either order of the hooks."""
    entries: dict[str, dict[str, Any]] = {
        "lr_scheduler": dict(type="LrSchedulerHook", scheduler=dict(type="ReduceLROnPlateau", patience=0, threshold=0.5)),
        "checkpoint": dict(type="CheckpointHook", interval=2),
        "resume": dict(type="ResumeHook"),
    }
    hooks = {n: entries[n] for n in order}
    whole = fit({**tiny_cfg(tmp_path / "whole", **copy.deepcopy(hooks)), "total_epochs": 6}).state
    fit({**tiny_cfg(tmp_path / "cut", **copy.deepcopy(hooks)), "total_epochs": 3})
    resumed = fit({**tiny_cfg(tmp_path / "cut", **copy.deepcopy(hooks)), "total_epochs": 6}).state
    assert float(whole.opt_state["lr"][0]) < 1e-2
    assert torch.equal(resumed.opt_state["lr"][0], whole.opt_state["lr"][0])
    for name, p in whole.params.items():
        assert torch.equal(p, resumed.params[name]), name


@pytest.mark.parametrize(("metric", "mode"), [("val_top1", "max"), ("val_loss", "min")])
def test_a_plateau_asks_the_result_which_is_better(metric: str, mode: str, tmp_path: Path) -> None:
    """Without a mode the rate of each epoch is that of torch's scheduler with the right one."""
    scheduler = dict(type="ReduceLROnPlateau", patience=0, threshold=0.5, factor=0.5)
    hooks = dict(lr_scheduler=dict(type="LrSchedulerHook", metric=metric, scheduler=scheduler))
    fit({**tiny_cfg(tmp_path, **hooks), "total_epochs": 8})
    rows = [r for r in rows_of(tmp_path) if r["final"] and r["phase"] == "val"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, patience=0, threshold=0.5, factor=0.5)
    for row, after in itertools.pairwise(rows):
        oracle.step(row[metric.removeprefix("val_")])
        assert after["lr"] == [optimizer.param_groups[0]["lr"]]
    assert rows[-1]["lr"] != [0.01]


@pytest.mark.parametrize(
    ("hooks", "path"),
    [
        (dict(stop=dict(type="EarlyStopHook", metric="val_top")), "cfg.hooks.stop.metric"),
        (
            dict(checkpoint=dict(type="CheckpointHook", keep=dict(last=2, best=1, metric="val_top"))),
            "cfg.hooks.checkpoint.keep.metric",
        ),
        (
            dict(lr_scheduler=dict(type="LrSchedulerHook", metric="val_top", scheduler=dict(type="ReduceLROnPlateau"))),
            "cfg.hooks.lr_scheduler.metric",
        ),
    ],
)
def test_a_result_that_does_not_exist_is_named_at_the_start(hooks: dict[str, Any], path: str, tmp_path: Path) -> None:
    """Before anything is written, with the path, the nearest name and what an epoch of this run has."""
    with pytest.raises(ConfigError) as caught:
        fit(tiny_cfg(tmp_path / "run", **hooks))
    text = str(caught.value)
    assert f"{path}: there is no result 'val_top'. Did you mean 'val_top1'?" in text
    assert "train_loss, train_top1, val_loss, val_top1" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad", [dict(patience=0), dict(min_delta=-1.0), dict(min_delta=float("nan")), dict(mode="up"), dict(metric="val_top1")]
)
def test_settings_out_of_range_are_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    """A ConfigError when the hook is built; a metric is checked later, when the results are known."""
    if "metric" in bad:
        assert EarlyStopHook(**bad, run=info(tmp_path))[0].reads == {"cfg.hooks.early_stop.metric": "val_top1"}
        return
    with pytest.raises(ConfigError, match=r"cfg\.hooks\.early_stop"):
        EarlyStopHook(**bad, run=info(tmp_path))


def test_an_epoch_between_intervals_is_not_saved(tmp_path: Path) -> None:
    """Of 5 epochs with interval 2, those after epochs 2, 4 and the last are saved, each with its results."""
    cfg = {**tiny_cfg(tmp_path, checkpoint=dict(type=CheckpointHook, interval=2, keep=dict(last=9))), "total_epochs": 5}
    fit(cfg)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step_{5 * e:08d}" for e in (2, 4, 5)]
