"""The time that hooks add to the default job, `cfgs/exp.py`. Epochs with and without them alternate within one run.

    python benchmarks/hooks_overhead.py [--epochs 200] [--out benchmarks/results/hooks_overhead.json]

Bare: the job with the hooks of its recipe (augmentation, autocast) and no other hook, also without those that every run has. Each
variant adds hooks to that. An epoch is 12 steps and an evaluation, eager, with one thread. Both kinds of epoch get the same state
and the same batches, in the order with, without, without, with. So weights, memory and the state of the machine are the same, and
only the hooks differ. (Separate runs differed by up to 11 % for other reasons.) The row `nothing` adds no hook: it shows the noise.

`median` is the median of a ratio: the time of two epochs with hooks divided by that of two epochs without. There are two clocks:
the CPU time of the process (with the threads of writers), and the wall time (with waiting for the disk). `total` is the whole time
with hooks divided by the whole time without. Rare work, such as a checkpoint every ten epochs, shows only there.
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
    "profiler": dict(type="ProfilerHook", wait=10**6),  # outside its window; in the window a step is several times slower
    "wandb": dict(type="WandbHook", init_args=dict(mode="offline", project="overhead")),
}


def record(*, run: Any) -> list[Middleware[Any]]:
    """The record that every run has, as a hook for the cfg."""
    return RecordHook(50, run=run)


def job(hooks: dict[str, Any], around: Callable[[Epoch], Epoch], epochs: int, folder: Path) -> Job:
    """The default job with these hooks, and with `around` as the outermost hook."""
    cfg = load_cfg(str(ROOT / "cfgs" / "exp.py"), [])
    cfg = {**cfg, "work_dir": str(folder), "total_epochs": epochs, "compile": False}
    recipe = {n: cfg["hooks"][n] for n in RECIPE}
    cfg["hooks"] = {**recipe, **hooks, "turns": dict(type=lambda: Middleware("turns", around, "epoch"))}
    check.check(cfg)
    folder.mkdir(parents=True)
    return assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)


def measure(hooks: dict[str, Any], epochs: int, folder: Path) -> dict[str, dict[bool, list[float]]]:
    """Seconds of each epoch, by clock and by whether it ran with the hooks."""
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
            totals = torch.zeros_like(state.slots[TOTALS])  # metrics have rows there; after an epoch they are zero
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
    """{name of a variant: the hooks that it adds}."""
    given = load_cfg(str(ROOT / "cfgs" / "exp.py"), [])["hooks"]
    own = {n: h for n, h in given.items() if n not in (*RECIPE, "wandb")}
    always = {"record": dict(type=record)}
    alone = {n: {n: h} for n, h in {**always, **own, **MORE}.items() if n != "resume"}  # it works only before the first epoch
    alone["checkpoint"]["checkpoint"] = {**own["checkpoint"], "keep": {"last": 2}}  # without the metric hook there is no top-1
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
