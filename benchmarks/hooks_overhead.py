"""What hooks add to a step of the default job, `cfgs/exp.py`, in interleaved repeats within one process.

    python benchmarks/hooks_overhead.py [--epochs 40] [--out benchmarks/results/hooks_overhead.json]

Bare: the job with what is part of its recipe (augmentation, autocast) and no other hook, not even those that every run has. Each
variant adds hooks to that. All are runs of their own, eager, in threads of which one at a time is let through a whole epoch (12
steps and an evaluation), in an order that turns. Three clocks: the CPU time of the variant's thread (`thread`), that of the whole
process (`process`: with the threads of writers), and the wall (`wall`: with waiting for the disk, and for whatever else runs on
the machine).

`own` is the figure to look at: the time between the outermost and the innermost of the added hooks, at every depth, added up over
all steps and epochs (checkpoints of every tenth epoch included), as a share of the time of the bare epochs. `median` is the median
of the ratios of whole epochs to the mean of several bare runs in the same round; it has the noise that those bare runs show among
themselves, which is that of memory that lies differently, several per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from step_overhead import cpu_name

from ailab import check, config
from ailab.assemble import assemble
from ailab.hooks.log import RecordHook
from ailab.stack import Middleware

ROOT = Path(__file__).parents[1]
RECIPE = ("augment", "amp")  # they change what is computed
BARE = 4  # runs
CLOCKS: dict[str, Callable[[], float]] = {"thread": time.thread_time, "process": time.process_time, "wall": time.perf_counter}
MORE: dict[str, dict[str, Any]] = {
    "throughput": dict(type="ThroughputHook"),
    "early_stop": dict(type="EarlyStopHook", patience=10**6),
    "profiler": dict(type="ProfilerHook", wait=10**6),  # outside its window; inside, a step is several times slower
    "wandb": dict(type="WandbHook", init_args=dict(mode="offline", project="overhead")),
}


class Between:
    """The time that passes between the outermost and the innermost of some wrappers: around them minus within them."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(CLOCKS, 0.0)

    def _wrap(self, sign: int) -> Callable[[Any], Any]:
        def wrap(call: Any) -> Any:
            def timed(*args: Any) -> Any:
                before = {name: clock() for name, clock in CLOCKS.items()}
                result = call(*args)
                for name, clock in CLOCKS.items():
                    self.spent[name] += sign * (clock() - before[name])
                return result

            return timed

        return wrap

    def hooks(self, sign: int) -> list[Middleware[Any]]:
        """Around (1) or within (-1) the others at each depth."""
        wrap, both = self._wrap(sign), ("train", "val")
        inside = [Middleware("between", wrap, depth, phases=both) for depth in ("loss", "step", "host")]
        return [
            *inside,
            Middleware("between", wrap, "grad"),
            *(Middleware("between", wrap, "epoch", phases=p) for p in (both, None)),
        ]


def record(*, run: Any) -> list[Middleware[Any]]:
    """What every run has, as an entry of the cfg."""
    return RecordHook(50, run=run)


class Paced:
    """A run in a thread that does one epoch whenever it is told to, and measures it."""

    def __init__(self, name: str, hooks: dict[str, Any], epochs: int, folder: str):
        cfg = config.load(str(ROOT / "cfgs" / "exp.py"), [])
        cfg = {**cfg, "work_dir": folder, "total_epochs": epochs, "compile": False}
        self.between, given = Between(), cfg["hooks"]
        last = [*self.between.hooks(1), Middleware("pace", self._pace, "epoch")]
        first = self.between.hooks(-1)
        cfg["hooks"] = {n: given[n] for n in RECIPE} | {
            "within": dict(type=lambda: first),
            **hooks,
            "around": dict(type=lambda: last),
        }
        check.check(cfg)
        Path(folder).mkdir(parents=True)
        self.name, self.took = name, {clock: list[float]() for clock in CLOCKS}
        self.own = {clock: list[float]() for clock in CLOCKS}
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None

        self.job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.job.run(self.job.state)
        except BaseException as e:
            self.failure = e
        self.done.release()

    def _pace(self, epoch: Any) -> Any:
        def paced(state: Any, batches: Any) -> Any:
            self.go.acquire()
            before = {name: clock() for name, clock in CLOCKS.items()}
            spent = dict(self.between.spent)
            result = epoch(state, batches)
            for name, clock in CLOCKS.items():
                self.took[name].append(clock() - before[name])
                self.own[name].append(self.between.spent[name] - spent[name])
            self.done.release()
            return result

        return paced

    def epoch(self) -> None:
        """Let it do one."""
        self.go.release()
        self.done.acquire()
        if self.failure is not None:
            raise self.failure


def variants() -> list[tuple[str, dict[str, Any]]]:
    """Name and added hooks; the bare ones lie between the others."""
    given = config.load(str(ROOT / "cfgs" / "exp.py"), [])["hooks"]
    own = {n: h for n, h in given.items() if n not in (*RECIPE, "wandb")}
    always = {"record": dict(type=record)}
    alone = {n: {n: h} for n, h in {**always, **own, **MORE}.items() if n != "resume"}  # which is done before the first epoch
    alone["checkpoint"]["checkpoint"] = {**own["checkpoint"], "keep": {"last": 2}}  # by itself it knows no top-1
    early = {n: h for n, h in own.items() if n not in ("logger", "tensorboard")}
    everything = {**always, **early, **MORE, "logger": own["logger"], "tensorboard": own["tensorboard"]}
    found = [*alone.items(), ("all of cfgs/exp.py", {**always, **own}), ("all, and every observer", everything)]
    for i in range(BARE):
        found.insert(i * (len(found) // (BARE - 1)), ("bare", {}))
    return found


def rows(runs: list[Paced], skip: int) -> list[dict[str, Any]]:
    """Each variant against the mean of the bare ones."""
    bare = [run for run in runs if run.name == "bare"]
    out: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"variant": run.name}
        for clock in CLOCKS:
            mine, base = run.took[clock][skip:], [statistics.mean(t) for t in zip(*(b.took[clock][skip:] for b in bare))]
            ratios = [a / b for a, b in zip(mine, base)]
            nothing = statistics.mean(sum(b.own[clock][skip:]) for b in bare)  # the clocks themselves
            row[clock] = {
                "own": round((sum(run.own[clock][skip:]) - nothing) / sum(base), 4),
                "median": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
                "epoch_ms": round(statistics.median(mine) * 1e3, 1),
            }
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", default="benchmarks/results/hooks_overhead.json")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)
    skip = 4  # imports, allocations
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = [Paced(n, h, args.epochs + skip, f"{folder}/{i}") for i, (n, h) in enumerate(variants())]
        for i in range(args.epochs + skip):
            turn = i % len(runs)
            for run in runs[turn:] + runs[:turn]:
                run.epoch()
        for run in runs:
            run.thread.join(60)
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    report = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "epochs": args.epochs}
    report |= {"steps_per_epoch": 12, "rows": rows(runs, skip)}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    for row in report["rows"]:
        print(f"{row['variant']:<26}" + "   ".join(f"{c} {row[c]['own']:+.4f} {row[c]['median']:.3f}" for c in CLOCKS))


if __name__ == "__main__":
    main()
