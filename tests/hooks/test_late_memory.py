"""Optimizers that make their memory at the first update: saved, resumed, and undone as torch's own are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import Stop
from tiny import Net, newest_state, rows_of, tiny_cfg

from ailab.fit import fit


class MySGD(torch.optim.SGD):
    """torch's own, as a class that ailab does not know."""


class Counting(torch.optim.Optimizer):
    """Remembers plain numbers, lists that grow, and a value in its group."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "seen": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    memory = self.state[p]
                    memory["n"] = memory.get("n", 0) + 1
                    memory["past"] = [*memory.get("past", []), p.grad.clone()][-3:]
                    p.sub_(torch.stack(memory["past"]).mean(0), alpha=group["lr"] / (memory["n"] + group["seen"]))


class Calm(Net):
    """Without dropout: LBFGS looks at one batch several times."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = torch.nn.Identity()  # type: ignore[assignment]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "LBFGS": dict(type="LBFGS", lr=0.1, max_iter=3, history_size=4),
    "own": dict(type=MySGD, lr=0.1, momentum=0.9),
    "counting": dict(type=Counting),
}
UNDONE: dict[str, dict[str, Any]] = {
    "skip": dict(type="SkipNonFiniteHook", policy="skip"),
    "spike": dict(type="SpikeHook", policy="skip", threshold=0.1, window=3),
    "fp16": dict(type="AMPHook", dtype="fp16", init_scale=2.0**24),
    "freeze": dict(type="FreezeHook", params=["last.*"], until=1),
}


def cfg_of(folder: Path, optimizer: dict[str, Any], **hooks: Any) -> dict[str, Any]:
    return tiny_cfg(folder, **hooks) | {"optimizer": dict(optimizer), "model": dict(type=Calm)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", [2, 7])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(kind: str, at: int, tmp_path: Path) -> None:
    """In mid-epoch, early and late: the same bytes of the state, optimizer included, and the same record."""
    saves = dict(checkpoint=dict(type="CheckpointHook", every_steps=1), resume=dict(type="ResumeHook"))
    fit(cfg_of(tmp_path / "whole", OPTIMIZERS[kind], **saves))
    with pytest.raises(InterruptedError):
        fit(cfg_of(tmp_path / "cut", OPTIMIZERS[kind], **saves, stop=dict(type=Stop, at=at)))
    fit(cfg_of(tmp_path / "cut", OPTIMIZERS[kind], **saves))
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert newest_state(tmp_path / "cut") == newest_state(tmp_path / "whole")


@pytest.mark.parametrize("undone", UNDONE)
def test_a_step_is_undone_as_it_is_for_torchs_own(undone: str, tmp_path: Path) -> None:
    """Skipped spikes and overflows, frozen layers: parameters are those of the traced SGD, and momentum is undone with them."""
    hooks = {"undone": UNDONE[undone]}
    a = fit(cfg_of(tmp_path / "a", OPTIMIZERS["own"], **hooks)).state
    b = fit(cfg_of(tmp_path / "b", dict(type="SGD", lr=0.1, momentum=0.9), **hooks)).state
    for name, p in a.params.items():
        torch.testing.assert_close(p, b.params[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            a.opt_state["state"][name]["momentum_buffer"], b.opt_state["momentum_buffer"][name], rtol=1e-4, atol=1e-5
        )
    assert (undone != "fp16") or float(a.slots["undone"]["scale"]) < 2.0**24


@pytest.mark.parametrize("undone", UNDONE)
@pytest.mark.parametrize("kind", ["LBFGS", "counting"])
def test_memory_of_any_shape_goes_with_the_step(kind: str, undone: str, tmp_path: Path) -> None:
    """Lists and plain numbers of a step that is undone are as before it, and counters count the steps that were taken."""
    hooks = {"undone": UNDONE[undone]}
    state = fit(cfg_of(tmp_path, OPTIMIZERS[kind], **hooks) | {"workflow": [{"phase": "train"}]}).state
    assert all(bool(p.isfinite().all()) for p in state.params.values())
    if kind == "counting" and undone == "skip":
        assert state.opt_state["groups"] == [{"seen": 15}] and state.opt_state["state"]["last.bias"]["n"] == 15
    if kind == "counting" and undone == "freeze":
        assert state.opt_state["state"]["last.bias"]["n"] == 10 and state.opt_state["state"]["first.bias"]["n"] == 15
    if kind == "counting" and undone == "fp16":
        taken = state.opt_state["groups"][0]["seen"]
        assert 0 < taken < 15 and taken == state.opt_state["state"]["last.bias"]["n"]
