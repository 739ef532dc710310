"""Several gloo ranks on a CPU: the numbers of one process, the same bytes on every rank, and a clear error when one fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    CORES,
    ORDERED,
    ROOT,
    WORLDS,
    Points,
    Ranks,
    ScalarLoss,
    alone,
    built,
    compared,
    config,
    digest,
    distance,
    together,
    traced,
    trained,
)
from torch import Tensor, nn

from ailab import dist
from ailab.errors import AilabError, ConfigError, DataError, PeerError
from ailab.metrics import LabBaseMetric
from ailab.stack import Middleware
from ailab.types import TrainState
from ailab.workdir import checkpoint

# One process and many.

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class metric": {"hooks": dict(metrics=ORDERED)},
    "accumulate": {"hooks": dict(accumulate=dict(type="GradAccumulateHook", n=3))},
    "clip": {"hooks": dict(clip=dict(type="GradClipHook", max_norm=0.3))},
    "ema": {"hooks": dict(ema=dict(type="EMAHook", decay=0.9))},
    "skip": {"dataset": dict(bad=5), "hooks": dict(skip=dict(type="SkipNonFiniteHook", policy="skip"))},
    "loader": {"dataset": dict(type=Points)},
    "all": {
        "dataset": dict(bad=5),
        "hooks": dict(
            accumulate=dict(type="GradAccumulateHook", n=3),
            clip=dict(type="GradClipHook", max_norm=0.3),
            skip=dict(type="SkipNonFiniteHook", policy="skip"),
            ema=dict(type="EMAHook", decay=0.9),
        ),
    },
    "six": {"size": 22},  # a tail of 6 samples
    "scalar": {"loss": ScalarLoss},
    "scalar, accumulate": {"loss": ScalarLoss, "hooks": dict(accumulate=dict(type="GradAccumulateHook", n=3))},
    "scalar, loader": {"loss": ScalarLoss, "dataset": dict(type=Points)},
    "class weights": {"loss": dict(type="CrossEntropyLoss", weight=torch.tensor([1.0, 0.2, 3.0, 0.7]).double())},
    "frozen": {"optimizer": dict(freeze=["body.0.*"])},
    "unused": {"model": dict(unused=True), "hooks": dict(ddp=dict(type="DDPHook", find_unused_parameters=True))},
    "norm in eval": {"model": dict(norm=True, still=True)},
}


FULL = ("plain", "accumulate", "clip", "ema", "skip")
CASES = [(variant, sync, world) for variant in FULL for sync in CORES for world in WORLDS]
CASES += [(variant, sync, world) for variant in VARIANTS if variant not in FULL for sync, world in (("ddp", 3), ("graph", 2))]


@pytest.mark.parametrize(("variant", "sync", "world"), CASES)
def test_ranks_equal_one_process(ranks: Any, variant: str, sync: str, world: int) -> None:
    """The same samples in each of 12 steps. In float64 parameters agree within 1e-9, logs within 1e-12; ranks agree bitwise."""
    params, logs = compared(ranks, world, config(sync=sync, **VARIANTS[variant]))
    assert params < 1e-9
    assert logs < 1e-12


@pytest.mark.parametrize(("sync", "world"), [("ddp", 3), ("graph", 2)])
@pytest.mark.parametrize("variant", ["plain", "all", "scalar"])
def test_ranks_equal_one_process_in_float32(ranks: Any, variant: str, sync: str, world: int) -> None:
    """In float32 parameters and logs agree within 1e-5 after 12 steps of SGD with momentum."""
    cfg = config(sync=sync, **{**VARIANTS[variant], "model": dict(double=False)})
    assert max(compared(ranks, world, cfg)) < 1e-5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sync", CORES)
def test_batch_norm_sees_its_own_part(ranks: Any, sync: str, world: int) -> None:
    """In training each rank normalises with its own samples: like micro-batches of one process, unlike the joint batch."""
    cfg = config(4 * world, 2 * world, model=dict(norm=True), sync=sync, workflow=[{"phase": "train"}])
    parts = {**cfg, "hooks": {**cfg["hooks"], "accumulate": dict(type="GradAccumulateHook", n=world)}}
    assert max(compared(ranks, world, cfg, parts)) < 1e-9
    assert compared(ranks, world, cfg)[0] > 1e-3


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("sync", CORES)
def test_a_run_that_was_cut_in_two_has_the_same_bytes(ranks: Any, sync: str, world: int, tmp_path: Path) -> None:
    """A run that is stopped in mid-epoch and resumed from a checkpoint ends with the same bytes as without the stop."""
    hooks = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"), ema=dict(type="EMAHook"))
    hooks |= dict(ddp=dict(type="DDPHook", bucket_cap_mb=1e-4))  # several buckets
    cfg = config(22, model=dict(norm=True, double=False), sync=sync, hooks=hooks) | {"work_dir": str(tmp_path / "cut")}
    whole = ranks(world)(trained, {**cfg, "work_dir": str(tmp_path / "whole")})
    with pytest.raises(AilabError, match="stopped by a signal at step 4"):
        ranks(world)(trained, cfg, stop_at=7)  # 3 of training and 3 of evaluation, and 1; the next batch is a full one
    again = ranks(world)(trained, cfg)
    assert [a["bytes"] for a in again] == [w["bytes"] for w in whole]
    assert [w["ids"][4:] for w in whole] == [a["ids"] for a in again]
    assert again[0]["logs"] == whole[0]["logs"][1:]


@pytest.mark.parametrize("sync", CORES)
def test_unused_parameters_are_named(ranks: Any, sync: str) -> None:
    """Under ddp a trainable parameter that the loss does not use is a ConfigError that names it, until it is frozen."""
    cfg = config(sync=sync, model=dict(unused=True))
    if sync == "ddp":
        with pytest.raises(ConfigError, match=r"does not use 2 of 6 trainable parameters: spare\.weight, spare\.bias\."):
            ranks(2)(trained, cfg)
        cfg = config(sync=sync, model=dict(unused=True), optimizer=dict(freeze=["spare.*"]))
    assert compared(ranks, 2, cfg)[0] < 1e-9


@pytest.mark.parametrize("job", [traced, trained])
@pytest.mark.parametrize("sync", CORES)
def test_compiled_equals_eager(ranks: Any, sync: str, job: Callable[..., Any]) -> None:
    """ddp compiled up to the loss, and graph with its reductions inside, give eager's numbers (1e-5) and never recompile."""
    cfg = config(16, model=dict(double=False, norm=True), sync=sync, workflow=[{"phase": "train"}])
    eager, compiled = ranks(2)(trained, cfg), ranks(2)(job, {**cfg, "compile": True})
    assert compiled[0]["steps"] == compiled[1]["steps"]
    assert compiled[0]["epochs"] == compiled[1]["epochs"]
    for name in ("params", "buffers"):
        assert distance(getattr(compiled[0]["state"], name), getattr(eager[0]["state"], name)) < 1e-5
    assert compiled[0]["graphs"] == (2 if sync == "ddp" else 1)  # the loss and the update; the step


# Evaluation.


def evaluated(sizes: list[int], loss: Any) -> list[dict[str, tuple[float, float]]]:
    """The logs of an evaluation of each size."""
    found = []
    for size in sizes:
        cfg = config(
            val=size, loss=loss, model=dict(double=False), workflow=[{"phase": "val"}], epochs=1, hooks=dict(metrics=ORDERED)
        )
        found.append(trained({**cfg, "optimizer": None})["logs"][0])
    return found


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", ScalarLoss], ids=["maskable", "scalar"])
def test_evaluation_is_exact(ranks: Any, loss: Any) -> None:
    """For 1..20 samples over 1..4 ranks: hits, counts and class-style metrics equal, the loss within 1e-6."""
    sizes = list(range(1, 21))
    one, *others = (ranks(world)(evaluated, sizes, loss) for world in (1, 2, 3, 4))
    assert [logs["val_top1"][1] for logs in one[0]] == sizes
    for answers in others:
        assert all(answer == answers[0] for answer in answers)
        for ours, his in zip(answers[0], one[0], strict=True):
            assert {n: v for n, v in ours.items() if n != "val_loss"} == {n: v for n, v in his.items() if n != "val_loss"}
            assert ours["val_loss"] == pytest.approx(his["val_loss"], rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_empty_evaluation_is_a_data_error(ranks: Any, world: int) -> None:
    """No samples at all are an error on every rank, at every world size, that names the dataset."""
    with pytest.raises(DataError, match=r"cfg\.data\.val: the dataset \(PointsInMemory\) is empty\."):
        ranks(world)(evaluated, [0], "CrossEntropyLoss")


# Randomness.


class Masks(nn.Module):
    """A model whose second output is its dropout mask."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.drop = nn.Dropout(0.5)

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        mask = self.drop(torch.ones(64)) * self.scale
        return {"output": input[:, :4] + mask.sum(), "mask": mask.expand(len(input), -1)}


class Kept(LabBaseMetric):
    """The share of mask elements on which the two halves of the samples (two ranks) agree."""

    def reset(self) -> None:
        self.rows: list[Tensor] = []

    def __init__(self) -> None:
        self.reset()

    def update(self, pred: Tensor) -> None:
        self.rows.append(pred)

    def compute(self) -> float:
        return sum(float((rows[0] == rows[-1]).double().mean()) for rows in self.rows) / len(self.rows)


@pytest.mark.parametrize("sync", CORES)
def test_dropout_differs_between_ranks(ranks: Any, sync: str) -> None:
    """In the same step each rank draws its own dropout mask, and the same one when the step is run again."""
    cfg = config(16, sync=sync, optimizer=dict(lr=0.0))
    cfg |= {"model": dict(type=Masks, output_keys=["output", "mask"])}
    cfg["hooks"] = dict(metrics=dict(type="MetricHook", alike=dict(type=Kept, mapping={"pred": "mask"}, phases=["train"])))
    one, again = ranks(2)(trained, cfg), ranks(2)(trained, cfg)
    shares = [logs["train_alike"][0] for logs in one[0]["logs"]]
    assert all(0.2 < share < 0.8 for share in shares)
    assert one[0]["logs"] == one[1]["logs"] == again[0]["logs"]
    assert all(logs["train_alike"][0] == 1 for logs in alone(ranks, cfg)["logs"])


@pytest.mark.parametrize("sync", CORES)
def test_first_weights_are_those_of_rank_0(ranks: Any, sync: str) -> None:
    """Ranks start from the same weights: those of one process, and rank 0's where a model draws without the seed."""
    plain, careless = (ranks(3)(trained, config(sync=sync, epochs=1, model=dict(draw=draw))) for draw in (False, True))
    assert {run["first"] for run in plain} == {alone(ranks, config(epochs=1, model=dict(draw=False)))["first"]}
    assert len({run["first"] for run in careless}) == 1
    assert len({run["bytes"] for run in careless}) == 1


# The end of a peer.


def cut_short(cfg: Mapping[str, Any], how: str) -> Any:
    """Run a cfg until rank 1 ends before its 5th step of training (3 of the first epoch, 3 of evaluation, 1), or in it."""
    asked = 0

    def interrupted() -> bool:
        nonlocal asked
        asked += 1
        if asked == 8 and dist.rank() == 1 and how != "in the backward":
            end(how)
        return False

    def end(how: str) -> None:
        if how == "raised":
            raise RuntimeError("a mistake of the user's own")
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(loss: Any) -> Any:
        def deadly(*args: Any) -> Any:
            total, aux = loss(*args)
            if asked == 8 and dist.rank() == 1 and how == "in the backward":
                total.register_hook(lambda grad: end(how))
            return total, aux

        return deadly

    job = built(cfg, interrupted=interrupted, extra=lambda run: [Middleware("deadly", wrap, "loss")])
    return job.run(job.state)


@pytest.mark.parametrize("how", ["between steps", "in the backward"])
@pytest.mark.parametrize("sync", CORES)
def test_a_killed_peer_is_a_peer_error(sync: str, how: str, tmp_path: Path) -> None:
    """When a rank is killed, the others end within seconds with a PeerError that names the step; its exit code is 7."""
    three = Ranks(3, tmp_path)
    try:
        three.send(cut_short, config(sync=sync), how)
        for rank in (0, 2):
            expect_peer_error(three, rank)
    finally:
        three.stop()


def test_a_mistake_of_one_rank_is_no_peer_error_there(tmp_path: Path) -> None:
    """A rank that raises keeps its own error; the others end with a PeerError after it has ended."""
    three = Ranks(3, tmp_path)
    try:
        three.send(cut_short, config(), "raised")
        own = three.answer(1, 15)
        assert not isinstance(own, AilabError)
        assert "a mistake of the user's own" in str(own)
        three.pipes[1].close()  # the process ends
        for rank in (0, 2):
            expect_peer_error(three, rank)
    finally:
        three.stop()


def expect_peer_error(ranks: Ranks, rank: int) -> None:
    error = ranks.answer(rank, 15)
    assert isinstance(error, PeerError), error
    assert error.exit_code == 7
    assert re.match(rf"step 5: rank {rank}: .* failed: another process ended", str(error))


# Under torchrun.


def slow(seconds: float = 0.0, fail_at: int = 0, fail_file: str = "") -> Middleware[Any]:
    """A hook that waits in each step, and whose rank 1 raises after step `fail_at`."""

    def wrap(step: Any) -> Any:
        def waiting(state: TrainState, batch: Any) -> Any:
            time.sleep(seconds)
            state, logs = step(state, batch)
            if state.at == fail_at and dist.rank() == 1:
                Path(fail_file).write_text(str(time.time()))
                raise ValueError("a mistake of the user's own")
            return state, logs

        return waiting

    return Middleware("slow", wrap, "host")


def long_config(work_dir: Path, **more: Any) -> dict[str, Any]:
    """61 steps an epoch, two epochs, with checkpoints."""
    saves = dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook"), ema=dict(type="EMAHook"))
    hooks = dict(slow=dict(type=slow), logger=dict(type="LoggerHook", interval=2), **saves)
    return config(481, epochs=2, hooks=hooks) | {"work_dir": str(work_dir), **more}


def launched(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    """`torchrun --nproc_per_node=2 -m ailab.fit` on `long_config`."""
    file = folder / "cfg_of_test_parallel.py"
    file.write_text(
        f"from pathlib import Path\nfrom test_parallel import long_config\ncfg = long_config(Path({str(folder)!r}) / 'run')\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "ailab.fit"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{ROOT / 'tests/dist'}", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*torchrun, str(file), *overrides], cwd=ROOT, env={**os.environ, **paths}, **pipes)


def ended(launcher: subprocess.Popen[str], folder: Path, limit: float = 90) -> tuple[int, str]:
    """The exit code of the launcher and all that was printed; no process is left."""
    printed, _ = launcher.communicate(timeout=limit)
    mine = str(folder).encode()
    left = [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if mine in _read(p)]
    assert not left, printed
    return launcher.returncode, printed


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def final_bytes(checkpoints: Path) -> str:
    newest = checkpoint.newest(checkpoints)
    assert newest is not None
    content, _ = checkpoint.load(newest.path)
    return digest(content["state"])


def test_torchrun_ends_well_and_writes_once(tmp_path: Path) -> None:
    """Exit code 0, each line of each file once, and one warning that gloo is used instead of nccl."""
    code, printed = ended(launched(tmp_path, "dist.backend=nccl", "total_epochs=1"), tmp_path)
    assert code == 0, printed
    warned = [line for line in printed.splitlines() if "nccl" in line]
    assert warned == ["warning: dist.backend is 'nccl', but there is no CUDA device here: using gloo."]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["step"], row["final"]) for row in rows] == [
        ("train", 50, False),
        ("train", 61, True),
        ("val", 61, True),
    ]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000061"]
    logged = [line for line in (tmp_path / "run/train.log").read_text().splitlines() if line.startswith("epoch ")]
    assert len(logged) == len(set(logged)) == 32
    assert printed.count(logged[-1]) == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["total_epochs"] == 1


def test_a_rank_that_raises_ends_the_launch(tmp_path: Path) -> None:
    """Within 15 s of one rank's exception every process is gone, and the exit code is not 0."""
    stamp = tmp_path / "failed"
    code, printed = ended(launched(tmp_path, "hooks.slow.fail_at=5", f"hooks.slow.fail_file={stamp}"), tmp_path)
    assert time.time() - float(stamp.read_text()) < 15
    assert code != 0
    assert "a mistake of the user's own" in printed


def test_sigterm_saves_and_the_next_launch_goes_on(ranks: Any, tmp_path: Path) -> None:
    """SIGTERM saves in mid-epoch. A relaunch ends with the bytes of an undisturbed run; one rank can resume it too."""
    launcher = launched(tmp_path, "hooks.slow.seconds=0.03")
    log = tmp_path / "run/train.log"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (log.exists() and "step 4 " in log.read_text()):
        time.sleep(0.02)
    launcher.terminate()
    code, printed = ended(launcher, tmp_path)
    saved = checkpoint.newest(tmp_path / "run/checkpoints")
    assert code != 0, printed
    assert saved is not None, printed
    assert saved.epoch == 0, printed
    assert 4 <= saved.step < 61
    assert printed.count("stopped by a signal at step") == 1
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "kept")

    whole = ranks(2)(trained, long_config(tmp_path / "whole"))
    code, printed = ended(launched(tmp_path), tmp_path)
    assert code == 0, printed
    assert final_bytes(tmp_path / "run/checkpoints") == final_bytes(tmp_path / "whole/checkpoints")

    [one] = ranks(1)(trained, long_config(tmp_path / "one", resume_from=str(tmp_path / "kept")))
    assert one["ids"] == together(whole)[saved.step :]
    assert distance(one["state"].params, whole[0]["state"].params) < 1e-5
