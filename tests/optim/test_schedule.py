"""Learning-rate schedules: equal to torch.optim.lr_scheduler."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler

from ailab.errors import ConfigError
from ailab.optim.plateau import plateau
from ailab.optim.schedule import WarmupAndCosineAnnealingLR, lr_at, lr_table
from ailab.registry import LR_SCHEDULERS

BASE = (0.1, 0.02)
N = 300


class Sawtooth(lr_scheduler.LRScheduler):
    """A user's own class."""

    def get_lr(self) -> list[Any]:
        return [base * (1 + self.last_epoch % 7) for base in self.base_lrs]


SIMPLE: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": [lambda t: 1 / (1 + t), lambda t: 0.9**t]},
    "MultiplicativeLR": {"lr_lambda": lambda t: 0.99},
    "StepLR": {"step_size": 40, "gamma": 0.5},
    "MultiStepLR": {"milestones": [10, 80], "gamma": 0.3},
    "ConstantLR": {"factor": 0.2, "total_iters": 9},
    "LinearLR": {"start_factor": 0.1, "total_iters": 50},
    "ExponentialLR": {"gamma": 0.98},
    "PolynomialLR": {"total_iters": 200, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 70, "eta_min": 0.001},
    "CosineAnnealingWarmRestarts": {"T_0": 30, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 20, "mode": "triangular2"},
    "OneCycleLR": {"max_lr": [0.1, 0.4], "total_steps": N},
}


def reference(make: Any, n: int = N) -> torch.Tensor:
    """Torch's own loop: the lr that each update would see."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in BASE]
    optimizer = torch.optim.AdamW(groups)
    scheduler, rows = make(optimizer), list[list[float]]()
    for _ in range(n + 1):
        rows.append([float(g["lr"]) for g in optimizer.param_groups])
        optimizer.step()
        if len(rows) <= n:
            scheduler.step()
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("name", list(SIMPLE))
def test_equals_torch(name: str) -> None:
    """The table of each class is bitwise what torch's loop gives over 300 steps."""
    expected = reference(lambda o: getattr(lr_scheduler, name)(o, **SIMPLE[name]))
    assert torch.equal(lr_table({"type": name, **SIMPLE[name]}, BASE, N), expected)


def test_every_torch_class_is_tested() -> None:
    """A class that torch adds fails here until the tests know it."""
    nested = {"SequentialLR", "ChainedScheduler", "ReduceLROnPlateau", "LRScheduler"}
    classes = {n for n in lr_scheduler.__all__ if isinstance(getattr(lr_scheduler, n), type)}
    assert classes == {*SIMPLE, *nested, "SWALR"} & classes | {*SIMPLE, *nested}


@pytest.mark.parametrize("name", ["SequentialLR", "ChainedScheduler"])
def test_nested_equal_torch(name: str) -> None:
    """Nested schedulers, two deep, give torch's values bitwise."""
    first = {"type": "LinearLR", "start_factor": 0.1, "total_iters": 5}
    inner = {
        "type": "ChainedScheduler",
        "schedulers": [{"type": "ExponentialLR", "gamma": 0.99}, {"type": "StepLR", "step_size": 9}],
    }
    extra = {"milestones": [20]} if name == "SequentialLR" else {}

    def make(o: Any) -> Any:
        chained = None
        linear = lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5)
        chained = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.99), lr_scheduler.StepLR(o, 9)])
        return (
            getattr(lr_scheduler, name)(o, [linear, chained], **extra)
            if extra
            else lr_scheduler.ChainedScheduler([linear, chained])
        )

    if name == "SequentialLR":  # torch's SequentialLR cannot hold a ChainedScheduler
        inner = {"type": "CosineAnnealingLR", "T_max": 100}

        def make(o: Any) -> Any:
            parts = [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 100)]
            return lr_scheduler.SequentialLR(o, parts, [20])

    assert torch.equal(lr_table({"type": name, "schedulers": [first, inner], **extra}, BASE, N), reference(make))


def test_users_classes_and_factories() -> None:
    """A class of the user, given as itself, through a resolver or by a factory, gives its own values."""
    expected = reference(Sawtooth)
    assert torch.equal(lr_table({"type": Sawtooth}, BASE, N), expected)
    assert torch.equal(lr_table(Sawtooth, BASE, N), expected)
    LR_SCHEDULERS.register_module("mine", force=True)(Sawtooth)
    assert torch.equal(lr_table({"type": "mine"}, BASE, N), expected)


def test_a_run_shorter_than_its_warmup_ends_in_it() -> None:
    """With warmup_steps >= total_steps the lr only climbs, by the same steps as in a whole run."""
    table = lr_table({"type": "WarmupAndCosineAnnealingLR", "warmup_steps": 48}, [0.48], 24)
    torch.testing.assert_close(table[:, 0], 0.01 * torch.arange(25, dtype=torch.float64))


def test_total_steps_is_the_length_of_the_run() -> None:
    """A class that takes total_steps is given n, unless the cfg says otherwise."""
    one = lr_table({"type": "OneCycleLR", "max_lr": 0.3}, BASE, N)
    assert torch.equal(one, lr_table({"type": "OneCycleLR", "max_lr": 0.3, "total_steps": N}, BASE, N))
    assert torch.equal(one, lr_table({"type": "OneCycleLR", "max_lr": 0.3, "epochs": 3, "steps_per_epoch": N // 3}, BASE, N))


def test_warmup_and_cosine_is_its_closed_form() -> None:
    """Warm-up is linear to the base lr, the cosine ends at eta_min, and eta_min stays."""
    table = lr_table(
        {"type": "WarmupAndCosineAnnealingLR", "warmup_steps": 10, "eta_min": 1e-3, "warmup_start_factor": 0.1}, BASE, 110
    )
    for g, base in enumerate(BASE):
        assert table[0, g].item() == pytest.approx(0.1 * base)
        assert table[5, g].item() == pytest.approx(0.55 * base)
        assert table[10, g].item() == base
        assert table[35, g].item() == pytest.approx(1e-3 + (base - 1e-3) * (1 + math.cos(math.pi / 4)) / 2)
        assert table[110, g].item() == pytest.approx(1e-3)
    longer = lr_table({"type": WarmupAndCosineAnnealingLR, "warmup_steps": 0, "total_steps": 50}, BASE, 60)
    assert torch.equal(longer[0], torch.tensor(BASE, dtype=torch.float64)) and longer[50:].abs().max() < 1e-12


def test_lookup_is_traced_and_clamps() -> None:
    """lr_at reads one row, is traced once for every position, and keeps the last row past the end."""
    table = lr_table({"type": "ExponentialLR", "gamma": 0.5}, BASE, 5)
    counter = CompileCounterWithBackend("aot_eager")
    look = torch.compile(lr_at, backend=counter, fullgraph=True)
    for position in (0, 3, 5, 9):
        for found in (lr_at(table, torch.tensor(position)), look(table, torch.tensor(position))):
            assert torch.equal(torch.stack(found), table[min(position, 5)]) and found[0].shape == ()
    assert counter.frame_count == 1


def test_long_tables_are_quick() -> None:
    """50 000 positions take less than half a second, so a million take less than ten."""
    start = time.process_time()
    lr_table({"type": "CosineAnnealingLR", "T_max": 50_000}, BASE[:1], 50_000)
    assert time.process_time() - start < 1.5


@pytest.mark.parametrize(
    "kwargs",
    [{"patience": 1}, {"mode": "max", "factor": 0.3, "cooldown": 2, "threshold_mode": "abs"}, {"min_lr": [0.01, 0.001]}],
)
def test_plateau_equals_torch(kwargs: dict[str, Any]) -> None:
    """ReduceLROnPlateau as pure functions equals torch's, bitwise, also when steps are replayed from an old memory."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in BASE]
    optimizer = torch.optim.SGD(groups)
    theirs = lr_scheduler.ReduceLROnPlateau(optimizer, **kwargs)
    pure = plateau({"type": "ReduceLROnPlateau", **kwargs}, BASE)
    memory, lrs = pure.init(), list(BASE)
    for i in range(60):
        metric = 1.0 / (1 + i // 15) + 0.01 * (i % 3)
        theirs.step(metric)
        before = {k: v.clone() for k, v in memory.items()}
        pure.update(pure.init(), 123.0, [1.0, 1.0])  # a call in between leaves nothing behind
        new, new_lrs = pure.update(memory, metric, lrs)
        assert new_lrs == [g["lr"] for g in optimizer.param_groups]
        assert all(torch.equal(v, before[k]) for k, v in memory.items())
        memory, lrs = new, new_lrs
    assert {k: (v.shape, v.dtype) for k, v in memory.items()} == {k: (v.shape, v.dtype) for k, v in pure.init().items()}


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            {"type": "CosineAnealingLR"},
            r"cfg\.lr_scheduler\.type: there is no lr scheduler 'CosineAnealingLR'\.\n  Did you mean 'CosineAnnealingLR'",
        ),
        ({"type": "StepLR", "step_sise": 3}, r"cfg\.lr_scheduler\.step_sise: StepLR takes no.*'step_size'"),
        ({"type": "StepLR"}, r"cfg\.lr_scheduler: StepLR refuses.*step_size"),
        ({"gamma": 3}, r"needs a `type`"),
        ({"type": "SequentialLR", "schedulers": [{"type": "StepLR", "a": 1}], "milestones": []}, r"schedulers\.0\.a"),
        ({"type": "OneCycleLR", "max_lr": 1.0, "total_steps": 20}, r"ends before position 21 of 300"),
        ({"type": "ReduceLROnPlateau"}, r"use plateau"),
        ({"type": "WarmupAndCosineAnnealingLR", "warmup_steps": -1}, r"warmup_steps >= 0"),
    ],
)
def test_mistakes_are_named(cfg: dict[str, Any], message: str) -> None:
    """A mistake in the cfg is a ConfigError that says where, what came and what would do."""
    with pytest.raises(ConfigError, match=message):
        lr_table(cfg, BASE, N)
