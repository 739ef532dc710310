"""Ranks are killed, stopped, or resumed with another world size: the bytes, or the samples, are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from ranks import (
    CORES,
    ROOT,
    Crew,
    PointsInMemory,
    Spy,
    alone,
    built,
    config,
    digest,
    distance,
    free_port,
    together,
    torchrun_environ,
    trained,
)
from tiny import files_of, newest_content, rows_of

from ailab import dist
from ailab.datasets import Stream
from ailab.errors import Preempted
from ailab.stack import Middleware
from ailab.workdir import checkpoint


def until(cfg: dict[str, Any], last: int) -> dict[str, Any]:
    """Run `last` steps of a cfg; then it stops and is saved."""
    spy, steps = Spy(), 0

    def interrupted() -> bool:
        nonlocal steps
        steps += 1
        return steps == last

    job = built(cfg, extra=spy.hooks, interrupted=interrupted)
    with pytest.raises(Preempted):
        job.run(job.state)
    return {"ids": spy.ids}


@pytest.mark.parametrize("sync", CORES)
def test_the_number_of_ranks_may_change(ranks: Any, sync: str, tmp_path: Any) -> None:
    """2 ranks, then 1, then 3, each resumed in mid-epoch: every step has the samples of an undisturbed run."""
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"), ema=dict(type="EMAHook"))
    plain = config(sync=sync, workflow=[dict(phase="train")], hooks=saves)
    cfg, whole = {**plain, "work_dir": str(tmp_path / "changed")}, alone(ranks, {**plain, "work_dir": str(tmp_path / "whole")})
    first = ranks(2)(until, cfg, 5)
    second = ranks(1)(until, cfg, 3)
    third = ranks(3)(trained, cfg)
    assert together(first) + together(second) + together(third) == whole["ids"] == whole["global"]
    assert distance(third[0]["state"].params, whole["state"].params) < 1e-9
    assert distance(third[0]["state"].slots["ema"], whole["state"].slots["ema"]) < 1e-9


@pytest.mark.parametrize("change", [dict(lr=0.9), dict(seed=9), dict(resume_from="nowhere")])
def test_all_ranks_refuse_another_run_alike(ranks: Any, change: dict[str, Any], tmp_path: Any) -> None:
    """Rank 0 compares; every rank raises the same error, and none waits for another."""
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"))
    cfg = config(workflow=[dict(phase="train")], hooks=saves) | {"work_dir": str(tmp_path)}
    ranks(2)(until, cfg, 5)
    changed = {"optimizer": {**cfg["optimizer"], **change}} if "lr" in change else change
    ranks(2).send(trained, {**cfg, **changed})
    errors = [ranks(2).answer(rank, limit=30) for rank in range(2)]
    kind, said = (
        ("CheckpointError", "there is no checkpoint there") if "resume_from" in change else ("ConfigError", "cfg.seed: 3 -> 9")
    )
    said = "cfg.optimizer.lr: " if "lr" in change else said
    assert {type(e).__name__ for e in errors} == {kind}
    assert all(said in str(e) for e in errors)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch_size", [7, 8, 11])
def test_batches_lie_at_even_addresses(world: int, batch_size: int) -> None:
    """Every field of a batch starts at a multiple of 64 bytes, because the last bits of a product depend on that."""
    points = PointsInMemory(50)
    for rank in range(world):
        stream = Stream(points, batch_size=batch_size, shuffle=True, seed=0, pad=False, rank=rank, world_size=world)
        batches = list(stream.epoch(0))
        assert len(batches) == stream.steps
        for batch in batches:
            for name, values in points.fields.items():
                assert batch[name].data_ptr() % 64 == 0
                assert torch.equal(batch[name], values[batch["id"]])


# Killed.


def Signal(plan: str, name: str = "signal") -> list[Middleware[Any]]:
    """Send signals, each once, from the file `plan`: one line [rank, phase, step, "self" | "group" | "launcher", number] each.

    A phase is "train", "val", "save" (while a checkpoint is written, on rank 0) or "compile" (half a second into the first step).
    """
    lines = [json.loads(line) for line in Path(plan).read_text().splitlines()] if Path(plan).exists() else []

    def send(i: int) -> None:
        if lines[i][3] == "launcher":
            os.kill(os.getppid(), lines[i][4])
        elif lines[i][3] == "group":
            os.killpg(0, lines[i][4])  # a rank and its loader's workers: torchrun gives each rank a group of its own
        else:
            os.kill(os.getpid(), lines[i][4])

    def due(phase: str, step: int) -> None:
        for i, (rank, when, at, _, _) in enumerate(lines):
            mark = Path(f"{plan}.{i}")
            if (rank, when, at) == (dist.rank(), phase, step) and not mark.exists():
                mark.touch()
                if phase == "compile":
                    threading.Timer(0.5, send, (i,)).start()
                else:
                    send(i)

    def wrap(phase: str) -> Any:
        def wrapped(step: Any) -> Any:
            def watched(state: Any, batch: Any) -> Any:
                if phase == "train":
                    due("compile", state.at)
                state, logs = step(state, batch)
                due(phase, state.at)
                return state, logs

            return watched

        return wrapped

    if any(line[1] == "save" for line in lines):
        write = checkpoint.save

        def save(*args: Any, step: int, **more: Any) -> Any:
            due("save", step)
            return write(*args, step=step, **more)

        checkpoint.save = save
    return [Middleware(name, wrap(phase), "host", phases=(phase,)) for phase in ("train", "val")]


def cfg_file(folder: Path, *changes: str) -> str:
    """12 steps and 4 evaluations, saved every other step, without a ResumeHook; `changes` are lines such as `cfg['seed'] = 2`."""
    file = folder / "cfg_of_ranks.py"
    saves = dict(checkpoint=dict(type="CheckpointHook", every_steps=2), ema=dict(type="EMAHook"))
    lines = [
        "from ranks import config",
        "from test_ranks_restart import Signal",
        f"hooks = dict({saves!r}, signal=dict(type=Signal, plan={str(folder / 'plan')!r}))",
        f"cfg = config(20, hooks=hooks, model=dict(norm=True, double=False)) | dict(work_dir={str(folder / 'run')!r})",
    ]
    file.write_text("\n".join([*lines, *changes]) + "\n")
    return str(file)


def planned(folder: Path, *lines: list[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def left_by(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """The digest of the last state, and the rows of metrics.jsonl without times."""
    return digest(newest_content(folder / "run")["state"]), rows_of(folder / "run")


def elastic(folder: Path, world: int = 2, restarts: int = 3) -> tuple[int, list[str]]:
    """Like `torchrun --max-restarts`, with warm processes: one store for all attempts; when a rank fails, the others get SIGTERM.

    Returns the number of restarts and what was printed.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    file, place = cfg_file(folder), torchrun_environ(world, store.port)
    for attempt in range(restarts + 1):
        count = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        crew = Crew(folder, lambda rank: [file], lambda rank, count=count: {**place(rank), **count}, world)
        while any(p.exitcode is None for p in crew.processes) and not any(p.exitcode for p in crew.processes):
            time.sleep(0.02)
        for process in crew.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGTERM)
        if crew.ended(20) == [0] * world:
            return attempt, crew.printed()
    raise AssertionError("\n".join(crew.printed()))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("unharmed")
    assert elastic(folder)[0] == 0
    return left_by(folder)


KILLS = {
    "mid-epoch": [[1, "train", 5, "self", signal.SIGKILL]],
    "first step, then twice in one epoch": [
        [1, "train", 1, "self", signal.SIGKILL],
        [0, "train", 7, "self", signal.SIGKILL],
        [1, "val", 9, "self", signal.SIGKILL],
    ],
}


@pytest.mark.parametrize("kills", KILLS)
def test_a_killed_rank_changes_no_byte(unharmed: Any, kills: str, tmp_path: Path) -> None:
    """Ranks killed by SIGKILL and restarted leave the state and the record of an undisturbed run. No ResumeHook is needed."""
    restarts, printed = elastic(planned(tmp_path, *KILLS[kills]))
    assert restarts == len(KILLS[kills])
    assert left_by(tmp_path) == unharmed, printed


def test_a_restart_does_not_take_up_another_run(tmp_path: Path) -> None:
    """A run that refuses the checkpoints of an earlier run refuses them after each restart, and prints that once."""
    elastic(planned(tmp_path))
    before = files_of(tmp_path / "run")
    with pytest.raises(AssertionError) as failure:
        elastic(tmp_path, restarts=2)
    assert str(failure.value).count("holds checkpoints of an earlier run, up to step 12") == 1
    assert files_of(tmp_path / "run") == before


# Under torchrun itself.


def torchrun(folder: Path, *options: str, changes: tuple[str, ...] = (), limit: float = 120) -> tuple[int, str]:
    """Exit code and output of `torchrun --nproc_per_node=2 -m ailab.fit`; afterwards no process is left."""
    # A first compile is not broken off, and may take longer than the 30 s after which torchrun kills by default.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options, "-m", "ailab.fit"]
    paths = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests/dist'}",
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([*command, cfg_file(folder, *changes)], cwd=ROOT, env={**os.environ, **paths}, **pipes)
    try:
        printed, _ = process.communicate(timeout=limit)
    finally:
        process.kill()
    until, mine = time.monotonic() + 15, str(folder).encode()
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in read(p)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
    return process.returncode, printed


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(10))
def test_a_rank_killed_under_torchrun(unharmed: Any, seed: int, tmp_path: Path) -> None:
    """SIGKILL of a random rank after a random step, with --max-restarts=3: the bytes of an undisturbed run."""
    random = Random(seed)
    kill = [random.randrange(2), "train", random.randrange(1, 12), "self", signal.SIGKILL]
    code, printed = torchrun(planned(tmp_path, kill), "--max-restarts=3")
    assert code == 0, printed
    assert (tmp_path / "plan.0").exists()
    assert left_by(tmp_path) == unharmed


RESUME = "cfg['hooks']['resume'] = dict(type='ResumeHook')"
WORKERS = "cfg['data']['train']['type'] = __import__('ranks').Points; cfg['data']['train_dataloader']['num_workers'] = 1"


@pytest.mark.nightly
@pytest.mark.parametrize("phase", ["train", "val", "save", "compile"])
@pytest.mark.parametrize("target", ["launcher", "self", "group"])
def test_sigterm_saves_wherever_it_comes(target: str, phase: str, tmp_path: Path) -> None:
    """SIGTERM to the launcher, one rank, or a rank with its workers: saved, and resumed to the bytes of an undisturbed run."""
    changes = (RESUME, WORKERS) + (("cfg['compile'] = True",) if phase == "compile" else ())
    at = {"train": 4, "val": 6, "save": 6, "compile": 0}[phase]
    rank = 0 if phase == "save" else 1
    stopped, whole = planned(tmp_path / "stopped", [rank, phase, at, target, signal.SIGTERM]), planned(tmp_path / "whole")
    code, printed = torchrun(stopped, changes=changes, limit=300)
    assert code == 1, printed  # torchrun's own, whatever its ranks say
    assert printed.count("stopped by a signal at step") == 1, printed
    saved = checkpoint.newest(stopped / "run/checkpoints")
    assert saved is not None
    assert saved.step < 12
    for folder in (stopped, whole):
        code, printed = torchrun(folder, changes=changes)
        assert code == 0, printed
    assert left_by(stopped) == left_by(whole)


@pytest.mark.nightly
def test_two_agents_train_together_and_restart(unharmed: Any, tmp_path: Path) -> None:
    """Two agents of torchrun on one machine stand for two nodes; one loses a rank. The bytes are those of a run on one node."""
    planned(tmp_path, [1, "train", 5, "self", signal.SIGKILL])
    file, port = cfg_file(tmp_path), free_port()
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3"]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=rehearsal", "-m", "ailab.fit", file]
    paths = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests/dist'}",
        "OMP_NUM_THREADS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120",
    }
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    agents = [subprocess.Popen([*common, *meeting], cwd=ROOT, env={**os.environ, **paths}, **pipes) for _ in range(2)]
    try:
        printed = [agent.communicate(timeout=180)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(printed)
    assert left_by(tmp_path) == unharmed
