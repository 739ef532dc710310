"""What ailab adds to `import torch`: until it is imported, and until a mistake in a cfg is told.

    python benchmarks/startup.py [--repeats 7] [--out benchmarks/results/startup.json]

Each time is that of a fresh process from its start to its end, on two clocks: the wall, and the CPU time of the process. The
cases take turns, and each has a round before that is not counted, in which Python writes its bytecode: that of an installed
package is there. Ratios and differences are between times of one round; what is reported is their median.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from step_overhead import cpu_name

ROOT = Path(__file__).parents[1]
IMPORTS = {"import torch": ["-c", "import torch"], "import ailab.fit": ["-c", "import ailab.fit"]}
MISTAKES = {
    "an unknown key": ["total_epoch=3"],
    "an unknown type": ["model.type=resnat18"],
    "a wrong argument of a torch optimizer": ["optimizer.lrr=1"],
}
LIMITS = {"ratio of the imports": 1.15, "seconds after import torch": 1.5}


def cases() -> dict[str, tuple[list[str], int]]:
    """(arguments of Python, exit code) of each."""
    run = ["-m", "ailab.fit", "cfgs/exp.py"]
    return {n: (a, 0) for n, a in IMPORTS.items()} | {n: ([*run, *a], 2) for n, a in MISTAKES.items()}


def timed(arguments: list[str], code: int, cache: str) -> dict[str, float]:
    """Seconds of one fresh process, by clock."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    used, start = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    wall, now = time.perf_counter() - start, os.times()
    assert done.returncode == code, done.stderr
    return {"wall": wall, "cpu": now.children_user + now.children_system - used.children_user - used.children_system}


def measure(repeats: int) -> list[dict[str, dict[str, float]]]:
    """The times of each round by case."""
    with tempfile.TemporaryDirectory() as cache:
        rounds = [{name: timed(*case, cache) for name, case in cases().items()} for _ in range(repeats + 1)]
    return rounds[1:]


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, by clock."""
    out: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        base = [r["import torch"][clock] for r in rounds]
        times = {name: [r[name][clock] for r in rounds] for name in cases()}
        out[clock] = {
            "seconds": {name: round(statistics.median(t), 3) for name, t in times.items()},
            "ratio of the imports": round(
                statistics.median(a / b for a, b in zip(times["import ailab.fit"], base, strict=True)), 3
            ),
            "seconds after import torch": {
                name: round(statistics.median(a - b for a, b in zip(times[name], base, strict=True)), 3) for name in MISTAKES
            },
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/startup.json")
    args = parser.parse_args()
    found = summary(measure(args.repeats))
    print(json.dumps(found, indent=1))
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    report = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine, "repeats": args.repeats}
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**report, "limits": LIMITS, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
