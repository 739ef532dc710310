"""Every cfg that is shipped runs."""

from __future__ import annotations

import gc
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ailab.config import check
from ailab.config.load import load as load_cfg
from ailab.datasets.ready import fashion_mnist
from ailab.errors import DataError
from ailab.fit import dry_run, fit
from ailab.job.assemble import assemble
from ailab.stack import Middleware

CFGS = sorted((Path(__file__).parents[1] / "cfgs").glob("**/*.py"))


def idx(path: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.numpy().tobytes(), 1))


@pytest.fixture(autouse=True)
def _no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Fashion-MNIST is not on this machine, files of noise in its format stand in; nothing is downloaded."""

    def noise() -> Path:
        g = torch.Generator().manual_seed(0)
        for prefix, n in {"train": 256, "t10k": 64}.items():
            idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=g))
            idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", torch.randint(0, 10, (n,), dtype=torch.uint8, generator=g))
        return tmp_path

    monkeypatch.setattr(fashion_mnist, "_downloaded", noise)


@pytest.mark.parametrize("file", CFGS, ids=lambda file: file.stem)
def test_it_runs_one_shrunk_step_of_each_phase(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dry run of the cfg on a CPU steps through its phases with finite numbers and writes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    cfg = load_cfg(file)
    try:
        text = dry_run(cfg)
    except DataError as absent:
        pytest.skip(f"{file.name}: its data is not on this machine: {str(absent).splitlines()[0]}")
    for phase in (entry["phase"] for entry in cfg["workflow"]):
        found = re.search(rf"^{phase} +first step .* loss ([\d.]+)", text, re.MULTILINE)
        assert found is not None, text
    assert {p.name for p in tmp_path.iterdir() if not p.name.endswith(".gz")} == before


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch 2.11 importing its own inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_the_main_cfg_compiled_is_the_eager_one(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Two epochs from the first step, at lr 0, on: the losses of the compiled run are those of the eager one.

    Without the augmentation: the compiler has random numbers of its own.
    """
    if backend == "aot_eager":
        request.getfixturevalue("aot_eager")
    losses: dict[bool, list[float]] = {}
    for compiled in (False, True):
        work_dir = tmp_path / str(compiled)
        over = [f"work_dir={work_dir}", "total_epochs=2", f"compile={compiled}", "workflow=[{'phase':'train'}]"]
        off = [f"hooks.{name}.enable=False" for name in ("checkpoint", "resume", "augment")]
        fit(load_cfg(CFGS[0].parent / "exp.py", [*over, *off]))
        rows = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
        losses[compiled] = [row["loss"] for row in rows if row["final"]]
    assert len(losses[True]) == 2
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_an_epoch_leaves_no_tensor_to_the_garbage_collector(tmp_path: Path) -> None:
    """All that a step of the main cfg made goes with its last reference: memory does not wait for a cycle to be found.

    In a process of its own: what other tests have left would be found, too.
    """
    path = os.pathsep.join([str(Path(__file__).parent), str(CFGS[0].parents[1])])
    code = f"import test_cfgs, pathlib; print(test_cfgs.left_by_epochs(pathlib.Path({str(tmp_path)!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0, 0]"], done.stdout + done.stderr  # train and val, twice


def left_by_epochs(work_dir: Path) -> list[int]:
    """How many tensors each of two epochs of training and evaluation leaves to the garbage collector."""
    left: list[int] = []

    def wrap(epoch: Any) -> Any:
        def counted(state: Any, batches: Any) -> Any:
            gc.collect()
            gc.disable()
            try:
                result = epoch(state, batches)
                gc.set_debug(gc.DEBUG_SAVEALL)
                gc.collect()
                left.append(sum(issubclass(type(found), Tensor) for found in gc.garbage))
                return result
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()

        return counted

    cfg = load_cfg(CFGS[0].parent / "exp.py", [f"work_dir={work_dir}", "total_epochs=2", "compile=False"])
    check.check(cfg)
    job = assemble(
        check.complete(cfg),
        torch.device("cpu"),
        extra=lambda _: [Middleware("counted", wrap, "epoch", phases=("train", "val"))],
    )
    job.run(job.state)
    return left


def test_there_are_cfgs() -> None:
    """The test above has something to run."""
    assert {f.stem for f in CFGS} >= {"exp", "fashion_mnist"}
