"""A run of a tenth of a second on random points, in this process or in one that can be killed."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ailab.fit import main
from ailab.stack import Middleware

TESTS = Path(__file__).parent
TOP1 = dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"})


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(4, width),
            nn.BatchNorm1d(width),
            nn.Dropout(0.2),
            nn.Linear(width, 3),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(input)).relu()))


def Points(n: int = 50, seed: int = 0) -> TensorDataset:
    """A dataset in memory, so that no workers read it."""
    g = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


class NoisyPoints(Dataset[Any]):
    """A dataset that is read by sample; each sample has its own noise."""

    def __init__(self, n: int = 50, seed: int = 0):
        self.points = Points(n, seed)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.points[index]
        return {"input": x + 0.1 * torch.randn(4), "target": y}


def Die(*, step: int = -1, epoch: int = -1, by: int = signal.SIGKILL, name: str = "die") -> list[Middleware[Any]]:
    """A hook that sends a signal to this process: after a training step, or at the second validation batch of an epoch (from 1)."""
    seen = {"val": 0}

    def wrap(train: Any) -> Any:
        def dying(state: Any, batch: Any) -> Any:
            state, logs = train(state, batch)
            if state.at == step:
                os.kill(os.getpid(), by)
            return state, logs

        return dying

    def wrap_val(val: Any) -> Any:
        def dying(state: Any, batches: Any) -> Any:
            def watched() -> Any:
                for i, batch in enumerate(batches):
                    if i == 1 and int(state.slots["progress"]["epoch"]) + 1 == epoch:
                        os.kill(os.getpid(), by)
                    yield batch

            seen["val"] += 1
            return val(state, watched())

        return dying

    return [Middleware(name, wrap, "host"), Middleware(name, wrap_val, "epoch", phases=("val",))]


def tiny_cfg(work_dir: Path | str, **hooks: Any) -> dict[str, Any]:
    """3 epochs of 5 training steps and 3 validation steps; `hooks` come after the metric."""
    return dict(
        seed=1,
        work_dir=str(work_dir),
        workflow=[{"phase": "train"}, {"phase": "val"}],
        total_epochs=3,
        data=dict(
            train=dict(type=Points),
            val=dict(type=Points, n=20, seed=1),
            train_dataloader=dict(batch_size=11),
            val_dataloader=dict(batch_size=8),
        ),
        model=dict(type=Net),
        loss=dict(type="CrossEntropyLoss"),
        optimizer=dict(type="AdamW", lr=1e-2),
        hooks=dict(metrics=dict(type="MetricHook", top1=copy.deepcopy(TOP1)), **hooks),
        compile=False,
    )


def cfg_file(folder: Path, *lines: str, hooks: str = "") -> str:
    """A cfg file whose run works in `folder/run`, changed by lines such as `cfg['seed'] = 2`."""
    file = folder / "tiny_exp.py"
    head = f"from tiny import *\nfrom ailab.types import Mean\ncfg = tiny_cfg({str(folder / 'run')!r}, {hooks})"
    file.write_text("\n".join([head, *lines]) + "\n")
    return str(file)


def files_of(folder: Path) -> dict[str, bytes]:
    """{path: bytes} of every file, and {path: b"/"} of every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/" for p in sorted(folder.rglob("*"))}


def rows_of(work_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times; the order of the keys stays."""
    lines = (work_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("wall_")} for line in lines]


def epochs_of(log: Path) -> list[str]:
    """The lines of a train.log about steps and epochs."""
    return [line for line in log.read_text().splitlines() if line.startswith("epoch ")]


def newest_state(work_dir: Path) -> bytes:
    return max((work_dir / "checkpoints").glob("step_*")).joinpath("state.pt").read_bytes()


def newest_content(work_dir: Path) -> dict[str, Any]:
    return torch.load(max((work_dir / "checkpoints").glob("step_*")) / "state.pt", weights_only=True)


def _run(argv: Sequence[str], log: str) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    multiprocessing.set_start_method("fork", force=True)  # of data workers; it is inherited from the test process otherwise
    torch.set_num_threads(1)
    sys.exit(main(argv))


def launch(argv: Sequence[str], log: Path) -> multiprocessing.process.BaseProcess:
    """The command line in a process of its own, forked from one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_run, args=(list(argv), str(log)))
    process.start()
    return process


def ended(argv: Sequence[str], log: Path) -> int:
    """The exit code of such a process; -9 for one that was killed."""
    process = launch(argv, log)
    process.join(60)
    assert process.exitcode is not None, log.read_text()
    return process.exitcode
