"""Warm gloo ranks on a CPU, and what they run: runs of a tenth of a second, with every sample and every byte recorded."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ailab import dist, tree
from ailab.compile import graphs_compiled
from ailab.config import check
from ailab.core.epoch import Interrupted
from ailab.errors import AilabError
from ailab.fit import main
from ailab.job.assemble import Job, assemble
from ailab.metrics import LabBaseMetric
from ailab.stack import Middleware
from ailab.types import WEIGHT, RunInfo, TrainState

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WORLDS = (2, 3)
CORES = ("ddp", "graph")


# Ranks are forked from a process that has imported everything. They join one group and run one job after another.


def _serve(pipe: Any, rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        dist.start({"backend": "gloo", "init_method": f"file://{folder}/store{os.getppid()}_{world}", "timeout_s": 60}, CPU)
    while True:
        try:
            job, args, kwargs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = job(*args, **kwargs)
        except Exception as error:
            answer = error if isinstance(error, AilabError) else RuntimeError(traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


class Ranks:
    """`world` warm processes. `ranks(job, ...)` runs `job(...)` on each, and returns a list of the results."""

    def __init__(self, world: int, folder: Path):
        forker = multiprocessing.get_context("forkserver")
        pipes = [forker.Pipe() for _ in range(world)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            forker.Process(target=_serve, args=(theirs, rank, world, str(folder)), daemon=True, name=f"rank{rank}")
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def send(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((job, args, kwargs)))

    def answer(self, rank: int, limit: float = 120) -> Any:
        assert self.pipes[rank].poll(limit), f"rank {rank} gave no answer within {limit} s"
        return pickle.loads(self.pipes[rank].recv_bytes())

    def __call__(self, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        self.send(job, *args, **kwargs)
        answers = [self.answer(rank) for rank in range(len(self.pipes))]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()


# What they run.


class Net(nn.Module):
    """A classifier of points, in float64 by default. With `still` its BatchNorm is always in eval mode."""

    def __init__(
        self,
        double: bool = True,
        norm: bool = False,
        still: bool = False,
        dropout: float = 0.0,
        unused: bool = False,
        draw: bool = False,
    ):
        super().__init__()
        self.still = still
        if draw:
            torch.manual_seed(os.getpid())  # a careless model
        layers = [nn.Linear(6, 16), *([nn.BatchNorm1d(16)] if norm else []), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 4)]
        self.body = nn.Sequential(*layers)
        if unused:
            self.spare = nn.Linear(3, 3)
        self.double() if double else self.float()

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        if self.still:
            self.body[1].eval()
        return self

    def forward(self, input: Tensor) -> Tensor:
        return self.body(input.to(self.body[0].weight.dtype))


class Points:
    """`size` points of four classes with their ids. The point with the index `bad` is NaN."""

    def __init__(self, size: int, bad: int | None = None):
        random = torch.Generator().manual_seed(size)
        inputs = torch.randn(size, 6, generator=random)
        if bad is not None:
            inputs[bad] = float("nan")
        self.fields = {"input": inputs, "target": torch.randint(4, (size,), generator=random), "id": torch.arange(size)}

    def __len__(self) -> int:
        return len(self.fields["id"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.fields.items()}


class PointsInMemory(Points):
    def tensors(self) -> dict[str, Tensor]:
        return self.fields


class ScalarLoss:
    """A user's loss: a mean over the samples, which cannot be masked."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target)


class Ordered(LabBaseMetric):
    """A metric that depends on every sample and on their order."""

    def reset(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __init__(self) -> None:
        self.reset()

    def update(self, pred: Tensor, id: Tensor) -> None:
        self.seen += list(zip(id.tolist(), pred.argmax(1).tolist(), strict=True))

    def compute(self) -> float:
        return float(sum((place + 1) * (10 * index + label) for place, (index, label) in enumerate(self.seen)))


TOP1 = dict(type="MetricHook", top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"}))
ORDERED = dict(**TOP1, ordered=dict(type=Ordered, mapping={"pred": "output", "id": "id"}))


def config(
    size: int = 17,
    batch_size: int = 8,
    *,
    model: Mapping[str, Any] | None = None,
    loss: Any = "CrossEntropyLoss",
    optimizer: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    val: int = 7,
    epochs: int = 4,
    sync: str = "ddp",
    hooks: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The cfg of a run of 12 steps over 17 points. An epoch has batches of 8, 8 and 1; the last is padding except on rank 0."""
    return dict(
        seed=3,
        work_dir="/nonexistent",
        total_epochs=epochs,
        compile=more.pop("compile", False),
        dist=dict(sync=sync),
        model=dict(type=Net, **(model or {})),
        loss=loss if isinstance(loss, dict) else dict(type=loss),
        optimizer={n: v for n, v in {"type": "SGD", "lr": 0.3, "momentum": 0.9, **(optimizer or {})}.items() if v is not None},
        data=dict(
            train={"type": PointsInMemory, "size": size, **(dataset or {})},
            val=dict(type=PointsInMemory, size=val),
            train_dataloader=dict(batch_size=batch_size),
            val_dataloader=dict(batch_size=3),
            nan_is_bad=False,  # a NaN is there for the hooks to find
        ),
        hooks={"metrics": TOP1, **(hooks or {})},
        **more,
    )


def digest(state: Any) -> str:
    """A hash of the names and bytes of all leaves of a tree."""
    found = hashlib.sha256()
    for name, leaf in tree.items(state):
        found.update(f"{name}{getattr(leaf, 'dtype', leaf)}".encode())
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if leaf.numel() else b"")
    return found.hexdigest()


class Spy:
    """Records what happens in a run: sample ids, logs, and hashes of the state."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.step_bytes: list[str] = []
        self.epoch_bytes: list[str] = []
        self.logs: list[dict[str, tuple[float, float]]] = []

    def hooks(self, run: RunInfo) -> list[Middleware[Any]]:
        def wrap(step: Any) -> Any:
            def seen(state: TrainState, batch: Any) -> Any:
                ids = batch["id"][batch[WEIGHT] > 0] if WEIGHT in batch else batch["id"]
                self.ids.append(ids.tolist())
                state, logs = step(state, batch)
                self.step_bytes.append(digest((state.params, state.buffers)))
                return state, logs

            return seen

        def wrap_epoch(epoch: Any) -> Any:
            def seen(state: TrainState, batches: Any) -> Any:
                state, logs = epoch(state, batches)
                self.epoch_bytes.append(digest(state))
                self.logs.append(dict(zip(logs.names, map(tuple, logs.packed.tolist()), strict=True)))
                return state, logs

            return seen

        return [Middleware("spy", wrap, "host"), Middleware("spy", wrap_epoch, "epoch")]


def built(cfg: Mapping[str, Any], **more: Any) -> Job:
    check.check(cfg)
    return assemble(check.complete(cfg), CPU, say=lambda line: None, **more)


def traced(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`trained`, but `torch.compile` generates no code. It traces and functionalizes as always, and takes half a minute less."""
    whole = torch.compile

    def compiled(fn: Any, **options: Any) -> Any:
        kept = {n: o for n, o in (options.get("options") or {}).items() if n == "guard_filter_fn"}  # the others are Inductor's
        return whole(fn, **{**options, "backend": "aot_eager", "mode": None, "options": kept or None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", compiled)
        return trained(cfg)


def trained(cfg: Mapping[str, Any], stop_at: int | None = None) -> dict[str, Any]:
    """Run a cfg on this rank, up to its end or to the step `stop_at`, and return what happened."""
    spy, steps, graphs = Spy(), 0, graphs_compiled()

    def interrupted() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop_at

    job = built(cfg, extra=spy.hooks, interrupted=interrupted)
    first = digest(job.state.params)
    try:
        state = job.run(job.state)
    except Interrupted as stop:
        state = stop.state
    return {
        "first": first,
        "state": state,
        "ids": spy.ids,
        "steps": spy.step_bytes,
        "epochs": spy.epoch_bytes,
        "logs": spy.logs,
        "bytes": digest(state),
        "global": [job.streams["train"].indices(*divmod(n, len(job.streams["train"]))).tolist() for n in range(len(spy.ids))]
        if "train" in job.streams
        else [],
        "graphs": graphs_compiled() - graphs,
    }


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of two dicts of tensors, each relative to the largest value of its tensor."""
    assert list(a) == list(b)
    far = {n: ((a[n] - b[n]).abs().max() / b[n].abs().max().clamp(min=1e-30)).detach() for n in a}
    return max((float(d) for d in far.values()), default=0.0)


_alone: dict[str, dict[str, Any]] = {}


def alone(ranks: Any, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The run of a cfg in one process. It is cached; cfgs that differ only in `dist` share it."""
    key = repr({k: v for k, v in cfg.items() if k != "dist"})
    if key not in _alone:
        [_alone[key]] = ranks(1)(trained, cfg)
    return _alone[key]


def together(runs: list[dict[str, Any]]) -> list[list[int]]:
    """The sample ids of each step, concatenated over the ranks."""
    return [list(chain(*parts)) for parts in zip(*(run["ids"] for run in runs), strict=True)]


def compared(ranks: Any, world: int, cfg: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> tuple[float, float]:
    """The distances of parameters and of logs between `world` ranks and one process, which runs `like`.

    Everything that must be equal is asserted here.
    """
    one, all_of_them = alone(ranks, like or cfg), ranks(world)(trained, cfg)
    for other in all_of_them[1:]:
        assert other["steps"] == all_of_them[0]["steps"], "parameters or buffers differ between ranks after a step"
        assert other["epochs"] == all_of_them[0]["epochs"], "the state differs between ranks after an epoch"
        assert other["logs"] == all_of_them[0]["logs"]
    assert together(all_of_them) == one["ids"] == one["global"]
    ours, his = all_of_them[0], one
    far = distance(ours["state"].params, his["state"].params)
    if "ema" in his["state"].slots:
        far = max(far, distance(ours["state"].slots["ema"], his["state"].slots["ema"]))
    return far, max(log_distance(*pair) for pair in zip(ours["logs"], his["logs"], strict=True))


def log_distance(ours: Mapping[str, Any], his: Mapping[str, Any]) -> float:
    """The largest relative difference of a sum or a weight."""
    assert list(ours) == list(his)
    return max(abs(a - b) / max(abs(b), 1e-30) for n in his for a, b in zip(ours[n], his[n], strict=True))


# Whole runs of `ailab.fit`, as a launcher would start them, in processes that have imported everything.


def _command(argv: list[str], environ: dict[str, str], log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    torch.set_num_threads(1)
    os.environ.update(environ)
    try:
        code = main(argv)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Crew:
    """`world` processes that run the command line, each with its own log. `argv` and `environ` may differ between them."""

    def __init__(self, folder: Path, argv: Callable[[int], list[str]], environ: Callable[[int], dict[str, str]], world: int):
        forker = multiprocessing.get_context("forkserver")
        self.logs = [folder / f"rank{rank}.log" for rank in range(world)]
        self.processes = [
            forker.Process(target=_command, args=(argv(rank), environ(rank), str(self.logs[rank]))) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def ended(self, limit: float) -> list[int | None]:
        """The exit codes. A process that runs longer than `limit` seconds is killed, and has None."""
        until = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def printed(self) -> list[str]:
        return [log.read_text() if log.exists() else "" for log in self.logs]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def torchrun_environ(world: int, port: int) -> Callable[[int], dict[str, str]]:
    def of(rank: int) -> dict[str, str]:
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    return of
