"""What hooks add to the default job, `cfgs/exp.py`: within one run, epochs with the hooks and without them take turns.

    python benchmarks/hooks_overhead.py [--epochs 200] [--out benchmarks/results/hooks_overhead.json]

Bare: the job with what is part of its recipe (augmentation, autocast) and no other hook, not even those that every run has. Each
variant adds hooks to that. Both kinds of epoch (12 steps and an evaluation; eager, one thread) are given the same state and the
same batches, in turns of with, without, without, with: so the weights, the memory that they lie in and the state of the machine
are the same for both, and only the hooks differ. (Runs beside each other, with memory and weights of their own, differed by up
to 11 % from causes that were no hook's.) The row `nothing` adds no hook: what it shows is the noise.

`median` is the median, over turns, of the time of two epochs with hooks by that of two without, on two clocks: the CPU time of the
process (with the threads of writers) and the wall (with waiting for the disk). `total` is all the time with hooks by all without:
rare work, such as a checkpoint every ten epochs, shows in it alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from step_overhead import cpu_name

from ailab.config import check
from ailab.config.load import load as load_cfg
from ailab.core.epoch import TOTALS
from ailab.heap import keep_freed
from ailab.hooks.observe.log import RecordHook
from ailab.job.assemble import Job, assemble
from ailab.stack import Middleware
from ailab.types import Epoch

ROOT = Path(__file__).parents[1]
RECIPE = ("augment", "amp")  # they change what is computed
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
SKIP = 8  # epochs: imports, allocations
MORE: dict[str, dict[str, Any]] = {
    "throughput": dict(type="ThroughputHook"),
    "early_stop": dict(type="EarlyStopHook", patience=10**6),
    "profiler": dict(type="ProfilerHook", wait=10**6),  # outside its window; inside, a step is several times slower
    "wandb": dict(type="WandbHook", init_args=dict(mode="offline", project="overhead")),
}


def record(*, run: Any) -> list[Middleware[Any]]:
    """What every run has, as an entry of the cfg."""
    return RecordHook(50, run=run)


def job(hooks: dict[str, Any], around: Callable[[Epoch], Epoch], epochs: int, folder: Path) -> Job:
    """The default job with these hooks and `around` outside of them all."""
    cfg = load_cfg(str(ROOT / "cfgs" / "exp.py"), [])
    cfg = {**cfg, "work_dir": str(folder), "total_epochs": epochs, "compile": False}
    recipe = {n: cfg["hooks"][n] for n in RECIPE}
    cfg["hooks"] = {**recipe, **hooks, "turns": dict(type=lambda: Middleware("turns", around, "epoch"))}
    check.check(cfg)
    folder.mkdir(parents=True)
    return assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)


def measure(hooks: dict[str, Any], epochs: int, folder: Path) -> dict[str, dict[bool, list[float]]]:
    """Seconds of each epoch by clock, and by whether it ran with the hooks."""
    took = {clock: {True: list[float](), False: list[float]()} for clock in CLOCKS}
    without: list[Epoch] = []

    def take(epoch: Epoch) -> Epoch:
        without.append(epoch)
        return epoch

    bare = job({}, take, epochs, folder / "bare").state.slots[TOTALS]
    done = 0

    def take_turns(epoch: Epoch) -> Epoch:
        def turned(state: Any, batches: Any) -> Any:
            nonlocal done
            hooked, done = done % 4 in (0, 3), done + 1
            totals = torch.zeros_like(state.slots[TOTALS])  # metrics have rows there, and an epoch leaves them at zero
            state = state if hooked else state.with_slot(TOTALS, torch.zeros_like(bare))
            before = {name: clock() for name, clock in CLOCKS.items()}
            state, logs = (epoch if hooked else without[0])(state, batches)
            for name, clock in CLOCKS.items():
                took[name][hooked].append(clock() - before[name])
            return state.with_slot(TOTALS, totals), logs

        return turned

    run = job(hooks, take_turns, epochs, folder / "hooked")
    run.run(run.state)
    return took


def row(took: dict[str, dict[bool, list[float]]]) -> dict[str, Any]:
    """The ratios of one variant."""
    out: dict[str, Any] = {}
    for clock, times in took.items():
        hooked, bare = (times[kind][SKIP // 2 :] for kind in (True, False))
        turns = [(sum(hooked[i : i + 2])) / sum(bare[i : i + 2]) for i in range(0, len(bare) - 1, 2)]
        out[clock] = {
            "median": round(statistics.median(turns), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(turns, n=4)[::2]],
            "total": round(sum(hooked) / sum(bare), 4),
            "bare_epoch_ms": round(statistics.median(bare) * 1e3, 1),
        }
    return out


def variants() -> dict[str, dict[str, Any]]:
    """Name and added hooks."""
    given = load_cfg(str(ROOT / "cfgs" / "exp.py"), [])["hooks"]
    own = {n: h for n, h in given.items() if n not in (*RECIPE, "wandb")}
    always = {"record": dict(type=record)}
    alone = {n: {n: h} for n, h in {**always, **own, **MORE}.items() if n != "resume"}  # which is done before the first epoch
    alone["checkpoint"]["checkpoint"] = {**own["checkpoint"], "keep": {"last": 2}}  # by itself it knows no top-1
    early = {n: h for n, h in own.items() if n not in ("logger", "tensorboard")}
    everything = {**always, **early, **MORE, "logger": own["logger"], "tensorboard": own["tensorboard"]}
    return {"nothing": {}, **alone, "all of cfgs/exp.py": {**always, **own}, "all, and every observer": everything}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200, help="of each variant, half of them with its hooks")
    parser.add_argument("--out", default="benchmarks/results/hooks_overhead.json")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)
    keep_freed(1 << 30)  # as a run does
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for i, (name, hooks) in enumerate(variants().items()):
            found = row(measure(hooks, args.epochs + SKIP, Path(folder) / str(i)))
            rows.append({"variant": name, **found})
            print(
                f"{name:<26}" + "   ".join(f"{c} {v['median']:.3f} (total {v['total']:.3f})" for c, v in found.items()),
                flush=True,
            )
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    report = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "epochs": args.epochs}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**report, "steps_per_epoch": 12, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
