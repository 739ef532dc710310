"""The cost of a step's control message between gloo ranks, relative to the same step without it, in interleaved rounds.

    python benchmarks/ranks.py [--world 2] [--rounds 60] [--out benchmarks/results/ranks.json]

Each rank computes the gradient of an MLP with `ddp_grad`; a step takes about 10 ms. The variants:

- "none": gradients only, as if every rank knew the weight of the global batch.
- "none again": the same with memory of its own. Its ratio shows the noise.
- "in a bucket": what ailab does. Weight, logs and stop flag are the gradient of one more parameter.
- "apart": the control message is an all-reduce of its own during the backward, as when gradients are sent in another dtype.

A round has 10 steps of each variant, one after the other. The ratios are medians over rounds, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from ailab import dist
from ailab.build import loss_of
from ailab.core import grad as core
from ailab.core.loss import module_state
from ailab.heap import keep_freed
from ailab.types import STOP, Aux, Batch

STEPS = 10


class GradientsOnly(core._Owner):
    """Sends no control message."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        del self.message
        self.message = torch.zeros((), requires_grad=True)  # no parameter, so DDP does not know of it

    def forward(self, fixed: Any, buffers: Any, batch: Batch, before: Aux | None) -> Any:
        total, aux = self.loss({**fixed, **dict(zip(self.keys, self.own, strict=True))}, buffers, batch)
        return total, aux, self.message


def known(aux: Aux, *_: Any) -> Aux:
    return replace(aux, weight=aux.weight * dist.world_size())


OWNER, REDUCED = core._Owner, core.reduced
MODES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "none": (GradientsOnly, known, {}),
    "none again": (GradientsOnly, known, {}),
    "in a bucket": (OWNER, REDUCED, {"numbers": 6}),
    "apart": (OWNER, REDUCED, {"numbers": 6, "compress": torch.float32}),
}


def rank(me: int, world: int, store: str, rounds: int, width: int, out: Any) -> None:
    torch.set_num_threads(1)
    keep_freed(1 << 30)
    os.environ.update(RANK=str(me), WORLD_SIZE=str(world), LOCAL_RANK=str(me))
    dist.start({"backend": "gloo", "init_method": f"file://{store}", "timeout_s": 60}, torch.device("cpu"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    state, loss = module_state(model).clone(), loss_of(model, nn.CrossEntropyLoss())
    batch = {"input": torch.randn(256, 64), "target": torch.randint(10, (256,)), STOP: torch.zeros(())}
    grads: dict[str, Any] = {}
    for mode, (core._Owner, core.reduced, settings) in MODES.items():
        grads[mode] = core.ddp_grad(loss, state, sample=(loss, batch), gradient_as_bucket_view=True, **settings)
    took: dict[str, list[tuple[float, float]]] = {mode: [] for mode in MODES}
    for number in range(rounds + 2):
        for mode in sorted(MODES, key=lambda m: (list(MODES).index(m) + number) % len(MODES)):
            core.reduced, grad = MODES[mode][1], grads[mode]
            dist.barrier()
            start, worked = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                grad(state, batch)
            if number >= 2:
                took[mode].append(((time.perf_counter() - start) / STEPS, (time.process_time() - worked) / STEPS))
    out.put((me, took))
    dist.barrier()
    dist.stop()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--out")
    args = parser.parse_args()
    out = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(rank, (args.world, f"{folder}/store", args.rounds, args.width, out), args.world, join=False)
        found = dict(out.get() for _ in range(args.world))
        while not context.join():
            pass
    wall = {mode: [max(t for t, _ in each) for each in zip(*(found[r][mode] for r in found))] for mode in MODES}
    cpu = {mode: [sum(c for _, c in each) / args.world for each in zip(*(found[r][mode] for r in found))] for mode in MODES}

    def ratios(times: dict[str, list[float]]) -> dict[str, float]:
        return {m: round(statistics.median(a / b for a, b in zip(times[m], times["none"])), 4) for m in MODES}

    result = {
        "date": str(date.today()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "world": args.world,
        "rounds": args.rounds,
        "median_step_ms": {mode: round(1e3 * statistics.median(times), 3) for mode, times in wall.items()},
        "shortest_step_ms": {mode: round(1e3 * min(times), 3) for mode, times in wall.items()},
        "median_cpu_ms_per_rank": {mode: round(1e3 * statistics.median(times), 3) for mode, times in cpu.items()},
        "median_ratio_of_times": ratios(wall),
        "median_ratio_of_cpu_times": ratios(cpu),
    }
    print(json.dumps(result, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
