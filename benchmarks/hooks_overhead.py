"""What hooks add to a step of the default job, `cfgs/exp.py`, in interleaved repeats within one process.

    python benchmarks/hooks_overhead.py [--epochs 60] [--out benchmarks/results/hooks_overhead.json]

Bare: the job with what is part of its recipe (augmentation, autocast) and no other hook, not even those that every run has. Each
variant adds hooks to that. All are runs of their own, in threads of which one at a time is let through a whole epoch (12 steps
and an evaluation), in an order that turns; so each ratio is of epochs that were run within seconds of each other. A second bare
run shows the noise.

Three clocks: the CPU time of the variant's thread (`thread`), that of the whole process (`process`: with the threads of writers),
and the wall (`wall`: with waiting for the disk, and for other processes on the machine). `median` is the median of the ratios of
paired epochs; `total` the ratio of the sums over all epochs, which also has what happens every tenth epoch only. `own` is exact
where those are noisy: the time between the outermost and the innermost of the hooks above the compile line, added up over all
steps and epochs, as a share of the bare epochs; what a hook does below the line is not in it.
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
from ailab.hooks.log import LoggerHook, RecordHook
from ailab.stack import Middleware

ROOT = Path(__file__).parents[1]
RECIPE = ("augment", "amp")  # they change what is computed
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
        """Around (1) or within (-1) all others at each depth above the line."""
        wrap, both = self._wrap(sign), ("train", "val")
        return [
            Middleware("between", wrap, "host", phases=both),
            Middleware("between", wrap, "epoch", phases=both),
            Middleware("between", wrap, "epoch"),
        ]


class Paced:
    """A run in a thread that does one epoch whenever it is told to, and measures it."""

    def __init__(self, name: str, hooks: dict[str, Any], record: bool, epochs: int, folder: str):
        cfg = config.load(str(ROOT / "cfgs" / "exp.py"), [])
        cfg = {**cfg, "work_dir": f"{folder}/{name}", "total_epochs": epochs, "compile": False}
        self.between = Between()
        last = [*self.between.hooks(1), Middleware("pace", self._pace, "epoch")]
        cfg["hooks"] = {**hooks, "pace": dict(type=lambda: last)}
        check.check(cfg)
        Path(cfg["work_dir"]).mkdir(parents=True)
        self.name, self.took = name, {clock: list[float]() for clock in CLOCKS}
        self.own = {clock: list[float]() for clock in CLOCKS}
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.failure: BaseException | None = None

        def extra(run: Any) -> list[Any]:
            logger = [] if "logger" in hooks else LoggerHook(run=run)
            return [*self.between.hooks(-1), *([*RecordHook(50, run=run), *logger] if record else [])]

        self.job = assemble(check.complete(cfg), torch.device("cpu"), say=lambda line: None, extra=extra)
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


def variants() -> dict[str, tuple[dict[str, Any], bool]]:
    """Hooks by variant, and whether what every run has (record, logger) is there too."""
    given = config.load(str(ROOT / "cfgs" / "exp.py"), [])["hooks"]
    recipe = {n: given[n] for n in RECIPE}
    own = {n: h for n, h in given.items() if n not in (*RECIPE, "wandb")}
    alone = {n: h for n, h in {**own, **MORE}.items() if n != "resume"}  # which does its work before the first epoch
    alone["checkpoint"] = {**alone["checkpoint"], "keep": {"last": 2}}  # by itself it knows no top-1
    found = {"bare": (recipe, False), "bare again": (recipe, False)}
    found |= {n: ({**recipe, n: h}, False) for n, h in alone.items()}
    found["record and logger, as every run has"] = (recipe, True)
    found["all of cfgs/exp.py"] = ({n: given[n] for n in given if n != "wandb"}, True)  # in the order of the file
    observers = {n: h for n, h in own.items() if n != "tensorboard"}
    found["all, and every observer there is"] = ({**recipe, **MORE, **observers, "tensorboard": given["tensorboard"]}, True)
    return found


def rows(runs: list[Paced], skip: int) -> list[dict[str, Any]]:
    """Each variant against the bare one."""
    bare = runs[0]
    out: list[dict[str, Any]] = []
    for run in runs:
        row: dict[str, Any] = {"variant": run.name}
        for clock in CLOCKS:
            mine, base = run.took[clock][skip:], bare.took[clock][skip:]
            ratios = [a / b for a, b in zip(mine, base)]
            row[clock] = {
                "median_ms": round(statistics.median(mine) * 1e3, 2),
                "median": round(statistics.median(ratios), 4),
                "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
                "total": round(sum(mine) / sum(base), 4),
                "own": round((sum(run.own[clock][skip:]) - sum(bare.own[clock][skip:])) / sum(base), 4),
            }
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", default="benchmarks/results/hooks_overhead.json")
    args = parser.parse_args()
    os.environ.setdefault("WANDB_SILENT", "true")
    torch.set_num_threads(1)
    skip = 4  # imports, allocations
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        runs = [Paced(n.replace("/", " "), h, r, args.epochs + skip, folder) for n, (h, r) in variants().items()]
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
        print(
            f"{row['variant']:<36}"
            + "  ".join(f"{c} {row[c]['median']:.3f} {row[c]['total']:.3f} {row[c]['own']:+.4f}" for c in CLOCKS)
        )


if __name__ == "__main__":
    main()
