"""The time of a training step on the host, relative to a bare eager loop in the same process, in interleaved repeats.

    python benchmarks/step_overhead.py [--repeats 9] [--out benchmarks/results/step_overhead.json]

Bare: `zero_grad, forward, backward, step` with fused AdamW, over batches that are sliced beforehand. Ours: everything that a
default run does for a step (batch from the stream, seeding, step, logs, the logger, the record). Whole epochs are timed, each
followed by the same number of bare steps. Ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from ailab.config import check
from ailab.hooks.observe.log import LoggerHook, RecordHook
from ailab.job.assemble import assemble
from ailab.stack import Middleware


class MLP(nn.Module):
    def __init__(self, sizes: list[int]):
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.net(input)


def data(batch: int, steps: int, features: int, classes: int) -> TensorDataset:
    g = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(batch * steps, features, generator=g), torch.randint(classes, (batch * steps,), generator=g)
    )


class Bare:
    """The usual training loop."""

    def __init__(self, sizes: list[int], batch: int, steps: int):
        torch.manual_seed(0)
        x, y = data(batch, steps, sizes[0], sizes[-1]).tensors
        self.batches = list(zip(x.split(batch), y.split(batch)))
        self.model, self.loss = MLP(sizes), nn.CrossEntropyLoss()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)

    def epoch(self) -> float:
        start = time.perf_counter()
        for x, y in self.batches:
            self.optimizer.zero_grad()
            loss = self.loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / len(self.batches)


def ours(sizes: list[int], batch: int, steps: int, repeats: int, compiled: bool) -> tuple[list[float], list[float]]:
    """Seconds per step of ours and of the bare loop, one pair per repeat."""
    bare = Bare(sizes, batch, steps)
    mine: list[float] = []
    theirs: list[float] = []

    def timed(epoch: Any) -> Any:
        def run(state: Any, batches: Any) -> Any:
            start = time.perf_counter()
            result = epoch(state, batches)
            mine.append((time.perf_counter() - start) / steps)
            theirs.append(bare.epoch())
            return result

        return run

    with tempfile.TemporaryDirectory() as folder:
        cfg = dict(
            work_dir=folder,
            workflow=[{"phase": "train"}],
            total_epochs=repeats + 2,
            data=dict(
                train=dict(type=lambda: data(batch, steps, sizes[0], sizes[-1])), train_dataloader=dict(batch_size=batch)
            ),
            model=dict(type=MLP, sizes=sizes),
            loss=dict(type="CrossEntropyLoss"),
            optimizer=dict(type="AdamW", lr=1e-3),
            compile=compiled,
        )
        check.check(cfg)

        def extra(run: Any) -> list[Any]:
            return [
                Middleware("timed", timed, "epoch", phases=("train",)),
                *RecordHook(50, run=run),
                *LoggerHook(run=run),
            ]

        job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None, extra=extra)
        job.run(job.state)
    return mine[2:], theirs[2:]


def row(name: str, sizes: list[int], batch: int, steps: int, repeats: int) -> dict[str, Any]:
    result: dict[str, Any] = {"model": name, "batch": batch, "steps": steps, "repeats": repeats}
    for mode in ("eager", "compiled"):
        mine, theirs = ours(sizes, batch, steps, repeats, mode == "compiled")
        ratios = sorted(a / b for a, b in zip(mine, theirs))
        result[mode] = {
            "us": round(statistics.median(mine) * 1e6, 1),
            "bare_us": round(statistics.median(theirs) * 1e6, 1),
            "ratio": round(statistics.median(mine) / statistics.median(theirs), 3),
            "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        }
        print(f"{name:<22}{mode:<9}{result[mode]['us']:>9.1f} us  bare {result[mode]['bare_us']:>9.1f} us  "
              f"ratio {result[mode]['ratio']:.3f}  quartiles {result[mode]['ratio_quartiles']}", flush=True)  # fmt: skip
    return result


def deep(tensors: int) -> list[int]:
    """The layer sizes of an MLP with 16 units per layer and this many parameter tensors."""
    return [16] * (tensors // 2) + [10]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", default="benchmarks/results/step_overhead.json")
    parser.add_argument("--tensors", type=int, nargs="*", default=[10, 100, 1000], help="sizes of the growth table")
    args = parser.parse_args()
    cases = [("MLP 64-128-128-10", [64, 128, 128, 10], 128, 300, args.repeats)]
    cases += [(f"{n} tensors", deep(n), 16, max(20, 3000 // n), max(3, args.repeats // 2)) for n in args.tensors]
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for case in cases:  # written after each case: the last one compiles for minutes
        rows.append(row(*case))
        report = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "rows": rows}
        out.write_text(json.dumps(report, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
