"""The laws that hold for any cfg. Each is a function of a draw that returns what is wrong with it, in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from fuzz import components as c
from fuzz.draw import Draw
from fuzz.outcome import Outcome, differences, outcome, row_differences
from fuzz.plain import Plain, mean
from ranks import traced, trained
from tiny import newest_state

from ailab.errors import AilabError, ConfigError, NonFiniteError

# Relative to the largest value of a kind of leaf. One float32 operation rounds by 6e-8 and these runs make some hundred in a row,
# in another order: 1e-5. In halves, of 8 bits, an operation rounds by 4e-3: a few of them in a row, averaged over a batch: 3e-2.
FLOAT32, HALF = 1e-5, 3e-2
Found = list[str]


def tolerance(drawn: Draw) -> float:
    return HALF if drawn.coarse else FLOAT32


def alike(a: Outcome, b: Outcome, tolerance: float, what: str) -> Found:
    """What differs between two runs that should end alike."""
    if a.end != b.end or str(a.error) != str(b.error):
        return [f"{what}: {a.end} {a.error} / {b.end} {b.error}"]
    if a.end != "done":
        return []
    found = differences(a.state, b.state, tolerance) + row_differences(a.rows, b.rows, tolerance)
    return [f"{what}: {', '.join(found[:8])}"] if found else []


# Compiled.


def compiled_equals_eager(drawn: Draw, work_dir: Path, cut: str | None = None) -> Found:
    """The compiled run is the eager run: its state, its record, and what it refuses. By default the seed says what is compiled."""
    eager = outcome(drawn.cfg, work_dir / "eager")
    if isinstance(eager.error, ConfigError):
        return []
    cut = cut or ("step", "grad", "loss")[drawn.seed % 3]
    if "remat" in drawn.hooks:
        cut = "loss"  # the hook asks for it
    torch._dynamo.reset()
    compiled = outcome({**drawn.cfg, "compile": dict(cut=cut)}, work_dir / "compiled")
    return alike(eager, compiled, tolerance(drawn), f"cut {cut}")


# Resumed.


def resumed_equals_whole(drawn: Draw, work_dir: Path) -> Found:
    """A run that was stopped and resumed is the one that was not: the same bytes of the last checkpoint and of the record."""
    if drawn.total < 2:
        return []
    dice = random.Random(f"resume {drawn.seed}")
    at, how = dice.randrange(1, drawn.total), dice.choice(["raise", "signal"])
    hooks = list(drawn.hooks.items())
    for name, entry in (
        ("resume", dict(type="ResumeHook")),
        ("save", dict(type="CheckpointHook", every_steps=dice.choice([1, 1, 2, 3]))),
        ("stop", dict(type=c.StopOnce, at=at, how=how)),
    ):
        hooks.insert(dice.randrange(len(hooks) + 1), (name, entry))
    cfg = drawn.with_hooks(dict(hooks)).cfg
    (work_dir / "whole").mkdir(parents=True)
    (work_dir / "whole" / "stopped").touch()
    whole = outcome(cfg, work_dir / "whole")
    if whole.end != "done":
        return []
    where = f"stopped by {how} after step {at} of {drawn.total}, hooks {' '.join(n for n, _ in hooks)}"
    first = outcome(cfg, work_dir / "parts")
    if first.end != "stopped":
        return [f"{where}: {first.end} {first.error}"]
    found = alike(whole, outcome(cfg, work_dir / "parts"), 0.0, where)
    if not found and newest_state(work_dir / "whole") != newest_state(work_dir / "parts"):
        return [f"{where}: the bytes of the last checkpoints differ"]
    return found


# Read by workers.


def workers_change_nothing(drawn: Draw, work_dir: Path) -> Found:
    """The run does not depend on who reads the data: this process, one worker, two, or nobody because they are in memory."""
    runs: list[Outcome] = []
    for workers in (0, 1, 2, None):
        data = dict(drawn.cfg["data"])
        for phase in ("train", "val"):
            if phase in data:
                data[phase] = {**data[phase], "type": c.InMemory if workers is None else c.BySample}
                data[f"{phase}_dataloader"] = {**data[f"{phase}_dataloader"], "num_workers": workers or 0}
        runs.append(outcome({**drawn.cfg, "data": data}, work_dir / f"{workers}"))
    pairs = zip(("1 worker", "2 workers", "in memory"), runs[1:], strict=True)
    return [problem for name, run in pairs for problem in alike(runs[0], run, 0.0, name)]


# On ranks.


def counts_batches(drawn: Draw) -> bool:
    """Whether the model has a buffer that depends on how often it is called, so on micro-batches; or BatchNorm, which sees them."""
    return bool(drawn.cfg["model"].get("norm") or drawn.cfg["model"].get("counting"))


def for_ranks(drawn: Draw) -> Draw:
    """The draw with what makes it independent of how a batch is cut.

    A hook inside accumulation sees micro-batches, and there are others on ranks. BatchNorm takes the statistics of all ranks.
    What is a step function of a value (a hit, a spike, Rprop's sign) is not asked for where values are rounded to halves.
    """
    hooks = dict(drawn.hooks)
    if drawn.coarse:
        for name in ("metrics", "spike", *(["amp"] if drawn.cfg["optimizer"]["type"] == "Rprop" else [])):
            hooks.pop(name, None)
    accumulate = hooks.pop("accumulate", None)
    if drawn.cfg["model"].get("norm"):
        hooks["batchnorm"] = dict(type="SyncBatchNormHook")
    if accumulate is not None and not counts_batches(drawn):
        hooks = {"accumulate": accumulate, **hooks}
    return drawn.with_hooks(hooks)


def ranks_equal_one_process(ranks: Any, drawn: Draw, sync: str, compiled: bool = False) -> Found:
    """Two ranks train as one process does, and have one state."""
    drawn = for_ranks(drawn)
    cfg = {**drawn.cfg, "work_dir": "/nonexistent", "dist": dict(sync=sync), "compile": compiled}
    run = traced if compiled else trained
    try:
        one = ranks(1)(run, cfg)[0]
    except AilabError as error:
        one = error
    try:
        both = ranks(2)(run, cfg)
    except AilabError as error:
        expected = isinstance(error, ConfigError) or type(error) is type(one)
        return [] if expected and (str(error) == str(one) or str(error).startswith("cfg.")) else [f"{error!r} / {one!r}"]
    if isinstance(one, AilabError):
        return [f"only one process is refused: {one}"]
    found: Found = [] if both[0]["steps"] == both[1]["steps"] else ["the ranks have other parameters after a step"]
    found += [] if both[0]["epochs"] == both[1]["epochs"] else ["the ranks have other states after an epoch"]
    rows = [[_means(logs) for logs in result["logs"]] for result in (one, both[0])]
    found += differences(one["state"], both[0]["state"], tolerance(drawn)) + row_differences(*rows, tolerance(drawn))
    return [f"{sync}: {', '.join(found[:8])}"] if found else []


def _means(logs: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    return {"phase": "all", **{name: total / weight if weight else 0.0 for name, (total, weight) in logs.items()}}


# In plain torch.


def for_plain(drawn: Draw) -> Draw:
    """The draw with accumulation as what changes nothing: innermost."""
    hooks = dict(drawn.hooks)
    accumulate = hooks.pop("accumulate", None)
    if accumulate is not None and not counts_batches(drawn):
        hooks = {"accumulate": accumulate, **hooks}
    return drawn.with_hooks(hooks)


def equals_plain_torch(drawn: Draw, work_dir: Path) -> Found:
    """Parameters, buffers, losses and validation losses are those of a textbook loop in plain torch over the same batches."""
    drawn, recording = for_plain(drawn), c.Recording()
    run = outcome({**drawn.cfg, "hooks": {**drawn.hooks, "recording": dict(type=recording.hook)}}, work_dir)
    if run.end != "done":
        return [] if isinstance(run.error, ConfigError) else [f"{run.end} {run.error}"]
    assert recording.first is not None and run.state is not None
    plain = Plain(drawn, {**recording.first.params, **recording.first.buffers})
    rows = _plain_rows(plain, drawn, recording.ids)
    ours = [{k: row[k] for k in ("phase", "loss")} for row in run.rows if row["final"]]
    after = {**plain.params, **{n: b for n, b in plain.model.named_buffers() if n in run.state.buffers}}
    found = differences(after, {n: {**run.state.params, **run.state.buffers}[n] for n in after}, FLOAT32)
    found += row_differences(rows, ours, FLOAT32)
    return [", ".join(found[:8])] if found else []


def _plain_rows(plain: Plain, drawn: Draw, ids: list[list[int]]) -> list[dict[str, Any]]:
    """The results of all epochs of the textbook loop, whose batches have these samples."""
    data = drawn.cfg["data"]

    def batches_of(phase: str, batches: list[list[int]]) -> list[dict[str, Any]]:
        fields = c.samples(**{k: v for k, v in data[phase].items() if k != "type"})
        return [{n: v[batch] for n, v in fields.items()} for batch in batches]

    training, rows, steps = batches_of("train", ids), [], drawn.steps
    for start in range(0, len(training), steps):
        results = {"train_loss": mean([plain.step(batch) for batch in training[start : start + steps]])}
        for entry in drawn.cfg["workflow"][1:]:
            size, n = data["val_dataloader"]["batch_size"], data["val"]["n"]
            cut = [list(range(n))[i : i + size] for i in range(0, n, size)]
            cut = [cut[i % len(cut)] for i in range(entry.get("iters", len(cut)))]
            results["val_loss"] = plain.evaluate(batches_of("val", cut))
        plain.end_epoch(results)
        rows += [{"phase": name.removesuffix("_loss"), "loss": value} for name, value in results.items()]
    return rows


# Refused.


def runs_or_is_refused(drawn: Draw, work_dir: Path) -> Found:
    """A cfg runs, or is refused before its first step with a sentence that begins with a path of the cfg.

    A NaN that nobody skips ends a run later, and says so.
    """
    recording = c.Recording()
    run = outcome({**drawn.cfg, "hooks": {**drawn.hooks, "recording": dict(type=recording.hook)}}, work_dir)
    if run.end == "done" or (isinstance(run.error, NonFiniteError) and "nan" in drawn.hooks):
        return []
    if not str(run.error).startswith("cfg."):
        return [f"{type(run.error).__name__} without a path: {run.error}"]
    return [f"refused after {len(recording.ids)} steps: {run.error}"] if recording.ids else []


def over(law: Callable[[Draw, Path], Found], draws: Iterable[Draw], work_dir: Path) -> Found:
    """What is wrong with each draw for which a law does not hold, exceptions too."""
    failures: Found = []
    for drawn in draws:
        try:
            found = law(drawn, work_dir / str(drawn.seed))
        except Exception as error:  # whatever it is, it is of this seed, and the others shall be tried too
            found = [f"{type(error).__name__}: {error}"]
        failures += [f"{problem}\n    {drawn}" for problem in found]
    return failures
