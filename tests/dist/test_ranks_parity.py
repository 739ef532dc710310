"""Several processes give the numbers of one process on the joint batch: every gradient core, world size and hook of the table."""

from __future__ import annotations

from typing import Any

import pytest
from ranks import CORES, compared, config

WORLDS = (2, 3, 4)
SGD = dict(lr=0.1, momentum=0.9)
ADAMW = dict(type="AdamW", lr=0.1, momentum=None, weight_decay=0.1)
HOOKS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": dict(accumulate=dict(type="GradAccumulateHook", n=3)),
    "clip": dict(clip=dict(type="GradClipHook", max_norm=0.3)),
    "amp": dict(amp=dict(type="AMPHook", dtype="bf16")),
    "ema": dict(ema=dict(type="EMAHook", decay=0.9)),
    "sam": dict(sam=dict(type="SAMHook", rho=0.1)),
}


def twenty_steps(hooks: str, sync: str, *, double: bool, size: int = 41, **more: Any) -> dict[str, Any]:
    """5 epochs of 12, 12, 12 and 5 samples: on 4 ranks the last batch is one of two, one, one and one."""
    more = {"optimizer": SGD, "epochs": 5, **more}
    return config(size, 12, model=dict(double=double), sync=sync, hooks=HOOKS[hooks], **more)


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sync", CORES)
def test_ranks_equal_the_joint_batch(ranks: Any, sync: str, world: int, hooks: str) -> None:
    """20 steps of SGD with momentum: 1e-9 in float64, 1e-5 in float32; the first of AdamW; the same samples in each step.

    bf16 rounds the gradient of each rank. In float32 it is compared with one process that cuts its batch in as many parts, which
    rounds alike; the joint batch itself is within 2 %. (In float64 autocast does nothing.)
    """
    assert max(compared(ranks, world, twenty_steps(hooks, sync, double=True))) < 1e-9
    if hooks == "amp":
        single = twenty_steps(hooks, sync, double=False, size=48)
        parts = {**single, "hooks": {**single["hooks"], "accumulate": dict(type="GradAccumulateHook", n=world)}}
        assert max(compared(ranks, world, single, parts)) < 1e-5
        assert max(compared(ranks, world, single)) < 2e-2
    else:
        assert max(compared(ranks, world, twenty_steps(hooks, sync, double=False))) < 1e-5
        first = dict(epochs=1, optimizer=ADAMW, workflow=[dict(phase="train", iters=1)])
        assert compared(ranks, world, twenty_steps(hooks, sync, double=False, **first))[0] < 1e-5
        assert compared(ranks, world, twenty_steps(hooks, sync, double=True, **first))[0] < 1e-9
