"""Hooks and halves: averages of bf16 and fp16 parameters, and the logs of steps that fp16 undid. The oracle is float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import info
from tiny import newest_content, tiny_cfg
from torch import Tensor, nn

from ailab import tree
from ailab.build import loss_of
from ailab.compile import compile
from ailab.config import check
from ailab.core.epoch import PROGRESS, TOTALS, fresh_progress
from ailab.core.grad import local_grad
from ailab.core.loss import module_state
from ailab.core.step import eval_step, train_step
from ailab.fit import fit
from ailab.hooks import EMAHook, LookaheadHook, SpikeHook, SWAHook
from ailab.job.assemble import assemble
from ailab.optim import build_optimizer
from ailab.stack import at, stack, with_slots
from ailab.types import Batch, Mean, TrainState

STEPS = 400


def drifting(dtype: torch.dtype, hooks: Any) -> tuple[TrainState, list[Tensor]]:
    """The last state of steps that move a parameter from 1 to 3, and the parameter after each, in float64."""
    values = torch.linspace(1.0, 3.0, STEPS, dtype=torch.float64).to(dtype)

    def bare(state: TrainState, batch: Batch) -> Any:
        return state.replace(step=state.step + 1, params={"w": state.params["w"] + batch["move"]}), {}

    slots = {PROGRESS: fresh_progress(torch.device("cpu"))}
    state = TrainState(torch.zeros((), dtype=torch.int64), {"w": torch.ones(3, dtype=dtype)}, {}, {}, slots)
    state = with_slots(state, hooks)
    step, seen = stack(bare, at(hooks, "step")), []
    for i in range(STEPS):
        state, _ = step(state, {"move": values[i] - state.params["w"]})
        seen.append(state.params["w"].double())
    return state, seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_halves_moves(dtype: torch.dtype, tmp_path: Path) -> None:
    """EMA and SWA of parameters in a half are those of the same parameters in float64, to 1e-5."""
    state, seen = drifting(dtype, EMAHook(decay=0.999, warmup=False))
    right = torch.ones(3, dtype=torch.float64)
    for w in seen:
        right = 0.999 * right + 0.001 * w
    torch.testing.assert_close(state.slots["ema"]["w"].double(), right, rtol=1e-5, atol=0)
    state, seen = drifting(dtype, SWAHook(1, by="step", run=info(tmp_path, total_epochs=STEPS)))
    torch.testing.assert_close(state.slots["swa"]["mean"]["w"].double(), torch.stack(seen).mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_weights_of_halves_move(dtype: torch.dtype) -> None:
    """Lookahead's slow weights with alpha=0.01 come within 2 % of the fast ones that stand still; in a half they stop before."""
    hook = LookaheadHook(k=1, alpha=0.01)

    def bare(state: TrainState, batch: Batch) -> Any:
        return state.replace(step=state.step + 1, params={"w": torch.full((2,), 2.0, dtype=dtype)}), {}

    state = TrainState(torch.zeros((), dtype=torch.int64), {"w": torch.ones(2, dtype=dtype)}, {}, {}, {})
    state, step = with_slots(state, [hook]), stack(bare, [hook])
    for _ in range(STEPS):
        state, _ = step(state, {})
    assert state.params["w"].dtype == dtype
    torch.testing.assert_close(state.slots["lookahead"]["w"], torch.full((2,), 2 - 0.99**STEPS), rtol=1e-4, atol=0)
    assert torch.equal(state.params["w"], state.slots["lookahead"]["w"].to(dtype))


def test_the_average_of_complex_parameters_is_an_average() -> None:
    """EMA of complex parameters is `0.9 * old + 0.1 * new`, and not the new ones."""
    start, end = {"w": torch.ones(2, dtype=torch.cfloat)}, {"w": torch.full((2,), 1j)}
    torch.testing.assert_close(tree.lerp(start, end, torch.tensor(0.1))["w"], torch.full((2,), 0.9 + 0.1j))


@pytest.mark.parametrize("hook", ["ema", "swa"])
def test_the_average_is_evaluated_in_the_dtype_of_the_parameters(hook: str, tmp_path: Path) -> None:
    """Validation runs the model in its own dtype at the rounded average."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    hooks = EMAHook(0.9) if hook == "ema" else SWAHook(1, by="step", run=info(tmp_path, total_epochs=50))
    state = module_state(model).clone().with_slot(PROGRESS, fresh_progress(torch.device("cpu")))
    optimizer = build_optimizer("SGD", state.params, lr=0.1)
    state = with_slots(state.replace(opt_state=optimizer.init(state.params)), hooks)
    batch = {"input": torch.randn(6, 4).bfloat16(), "target": torch.randint(3, (6,))}
    loss = loss_of(model, nn.CrossEntropyLoss())
    step = stack(train_step(local_grad(loss), optimizer), at(hooks, "step"))
    for _ in range(5):
        state, _ = step(state, batch)
    mean = state.slots["ema"] if hook == "ema" else state.slots["swa"]["mean"]
    assert {m.dtype for m in mean.values()} == {torch.float32}
    after, logs = stack(eval_step(loss), at(hooks, "step", "val"))(state, batch)
    _, right = eval_step(loss)(state.replace(params={n: m.bfloat16() for n, m in mean.items()}), batch)
    assert torch.equal(logs["loss"].total, right["loss"].total)
    assert {p.dtype for p in after.params.values()} == {torch.bfloat16}


class HalfNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3).bfloat16()

    def forward(self, input: Tensor) -> Tensor:
        return self.last(input.bfloat16())


def test_a_checkpoint_of_a_half_model_has_its_dtype(tmp_path: Path) -> None:
    """`model_state` is the average in the dtype of the parameters; the average itself is float32 in the state."""
    cfg = tiny_cfg(tmp_path, ema=dict(type="EMAHook", decay=0.9), checkpoint=dict(type="CheckpointHook"))
    fit({**cfg, "model": dict(type=HalfNet)})
    content = newest_content(tmp_path)
    slot = content["state"]["slots"]["ema"]
    for n, value in content["model_state"].items():
        assert (value.dtype, slot[n].dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(value, slot[n].bfloat16())


# ---- fp16 and its loss scale


ORDERS = {
    "amp, clip": ("amp", "clip"),
    "clip, amp": ("clip", "amp"),
    "amp, stats": ("amp", "stats"),
    "stats, amp": ("stats", "amp"),
}
ENTRIES: dict[str, Any] = {
    "amp": dict(type="AMPHook", dtype="fp16", init_scale=2.0**20),
    "clip": dict(type="GradClipHook", max_norm=1.0),
    "stats": dict(type="GradStatsHook"),
}


def job(work_dir: Path, hooks: dict[str, Any], **more: Any) -> Any:
    cfg = check.complete({**tiny_cfg(work_dir, **hooks), "compile": False, **more})
    return assemble(cfg, torch.device("cpu"), say=lambda line: None)


@pytest.mark.parametrize("order", list(ORDERS))
def test_the_logs_of_an_undone_step_do_not_count(order: str, tmp_path: Path) -> None:
    """With overflows at the start, each log of the epoch is the mean over the steps that were not undone."""
    made = job(tmp_path, {n: ENTRIES[n] for n in ORDERS[order]})
    state, kept = made.state, []
    for epoch in range(2):
        for batch in made.streams["train"].epoch(epoch):
            before = float(state.slots["amp"]["scale"])
            state, logs = made.steps["train"](state, batch)
            if float(state.slots["amp"]["scale"]) == before:
                kept.append(logs.packed.clone())
                assert all(kept[-1][:, 1] > 0)
            else:
                assert not logs.packed[:, 1].any()
    assert 0 < len(kept) < state.at
    totals = state.slots[TOTALS]
    assert totals.isfinite().all()
    torch.testing.assert_close(totals, torch.stack(kept).sum(0))


class Tokens(torch.utils.data.TensorDataset):
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        y = torch.randint(0, 16, (32, 256), generator=g)
        super().__init__(nn.functional.one_hot(y, 16).float() + 0.1 * torch.randn(32, 256, 16, generator=g), y)


class TokenNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input: Tensor) -> Tensor:
        return self.b(self.a(input).relu()).transpose(1, 2)


def test_micro_batches_of_tokens_keep_the_loss_scale(tmp_path: Path) -> None:
    """A loss over 256 tokens a sample overflows under accumulation no sooner than in one backward, and gives its parameters."""
    ends: list[Any] = []
    for hooks in ({}, {"acc": dict(type="GradAccumulateHook", n=2)}):
        data = dict(train=dict(type=Tokens), train_dataloader=dict(batch_size=8))
        more = dict(data=data, model=dict(type=TokenNet), workflow=[{"phase": "train"}])
        made = job(tmp_path / str(len(ends)), {**hooks, "amp": dict(type="AMPHook", dtype="fp16")}, **more)
        state = made.state
        for batch in made.streams["train"].epoch(0):
            state, _ = made.steps["train"](state, batch)
        ends.append(state)
    assert float(ends[0].slots["amp"]["scale"]) == float(ends[1].slots["amp"]["scale"]) == 2.0**16
    for n, p in ends[0].params.items():
        torch.testing.assert_close(ends[1].params[n], p, rtol=1e-3, atol=1e-5)


def test_an_undone_step_is_not_in_the_window_of_spikes() -> None:
    """A loss of weight 0, as of a step that was skipped, neither enters the window nor is a spike."""
    [hook] = SpikeHook(window=4)

    def bare(state: TrainState, batch: Batch) -> Any:
        return state.replace(step=state.step + 1), {"loss": Mean(batch["loss"], batch["weight"])}

    state = with_slots(TrainState(torch.zeros((), dtype=torch.int64), {}, {}, {}, {}), [hook])
    step = compile(stack(bare, [hook]), enabled=False)
    for value, weight in [(1.0, 1.0), (0.0, 0.0), (2.0, 1.0), (0.0, 0.0)]:
        state, logs = step(state, {"loss": torch.tensor(value), "weight": torch.tensor(weight)})
        assert float(logs["spike"].total) == 0
    assert state.slots["spike"]["losses"].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert int(state.slots["spike"]["seen"]) == 2
