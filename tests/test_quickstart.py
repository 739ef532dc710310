"""The quick start of the document that ailab was created from runs as it is written there."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EPOCHS = 3

# As in the document, but for `load_data`, which it leaves to the reader, ...
TRAIN = """\
import torch.nn as nn
from torch.utils.data import Dataset
from ailab import ailab_train
from ailab.registry import MODELS, DATASETS, LOSSES

@MODELS.register_module()
class MyModel(nn.Module):
    def __init__(self, in_feats, out_feats):
        super().__init__()
        self.linear = nn.Linear(in_feats, out_feats)
    def forward(self, input):
        return self.linear(input)

@DATASETS.register_module()
class MyDataset(Dataset):
    def __init__(self, data_path):
        self.data = load_data(data_path)  # 任意加载方式
    def __len__(self):
        return len(self.data)
    def __getitem__(self, idx):
        x, y = self.data[idx]
        return x, y  # 支持 tuple，框架会自动包装

@LOSSES.register_module()
class MyLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.mse = nn.MSELoss()
    def forward(self, output, target):
        return self.mse(output, target)

if __name__ == "__main__":
    from config import cfg
    ailab_train(cfg)
"""
LOAD_DATA = """\
import torch
def load_data(path):
    number, seed = {"train.pkl": (203, 0), "val.pkl": (81, 1)}[path]
    g = torch.Generator().manual_seed(seed)
    return list(zip(torch.randn(number, 128, generator=g), torch.randn(number, 10, generator=g)))

"""
# ... and here for the number of epochs and W&B's mode.
CONFIG = """\
cfg = dict(
    seed = 42,
    work_dir = "./work_dir",
    dist = dict(backend="nccl", init_method="env://"),
    # 核心流程：train → val
    workflow = [{"phase":"train"},{"phase":"val"}],
    total_epochs = 50,
    data = dict(
        train = dict(type="MyDataset", data_path="train.pkl"),
        val   = dict(type="MyDataset", data_path="val.pkl"),
        train_dataloader = dict(batch_size=32, num_workers=4, pin_memory=True),
        val_dataloader   = dict(batch_size=64, num_workers=2),
    ),

    model = dict(
        type        = "MyModel",
        in_feats    = 128,
        out_feats   = 10,
        mapping     = {"input":"input"},   # forward(input=…)
        output_keys = ["output"],          # output Tensor 命名为 'output'
    ),

    loss = dict(
        type    = "MyLoss",
        mapping = {"output":"output", "target":"target"}
    ),

    optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.01),

    hooks = dict(
        metrics = dict(
            type = "MetricHook",
            top1 = dict(
                type    = "Top1Accuracy",
                mapping = {"pred":"output", "label":"target"},
                phases  = ["train","val"]
            ),
        ),
        logger = dict(
            type      = "LoggerHook",
            interval  = 100,
            log_dir   = "./work_dir/logs",
            log_items = dict(
                lr   = "optimizer.param_groups.0.lr",
                top1 = "meters['top1'].avg"
            )
        ),
        checkpoint  = dict(type="CheckpointHook", interval=1),
        resume      = dict(type="ResumeHook"),
        lr_scheduler= dict(type="LrSchedulerHook", scheduler=dict(type="CosineAnnealingLR", T_max=10)),
        ddp         = dict(type="DDPHook"),
        amp         = dict(type="AMPHook"),
        tensorboard = dict(type="TensorboardHook"),
        wandb       = dict(type="WandbHook", init_args=dict(project="my_proj", name="exp1")),
    )
)
"""


def _written(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN.replace("@MODELS", LOAD_DATA + "@MODELS", 1))
    config = CONFIG.replace("total_epochs = 50", f"total_epochs = {EPOCHS}").replace('"exp1"', '"exp1", mode="offline"')
    (folder / "config.py").write_text(config)
    return folder


def _started(folder: Path, *command: str) -> subprocess.Popen[str]:
    kept = {f"WANDB_{kind}_DIR": str(folder / "wandb_home") for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    environment = {**os.environ, **kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int, str, str]]:
    """The quick start by itself and under torchrun, side by side: (folder, exit code, stdout, stderr)."""
    base = tmp_path_factory.mktemp("quickstart")
    one, two = _written(base / "one"), _written(base / "two")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={_free_port()}")
    started = {"one": (one, _started(one, "train.py")), "two": (two, _started(two, *torchrun, "train.py"))}
    finished: dict[str, tuple[Path, int, str, str]] = {}
    for name, (folder, process) in started.items():
        out, err = process.communicate(timeout=180)
        finished[name] = (folder, process.returncode, out, err)
    return finished


def _rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "work_dir" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["one", "two"])
def test_it_ends_well_and_leaves_what_it_says(name: str, runs: dict[str, tuple[Path, int, str, str]]) -> None:
    """Exit code 0, both reports, checkpoints that `weights_only` reads, the logs of every hook."""
    folder, code, out, err = runs[name]
    assert code == 0, err
    assert "Traceback" not in err and "failed" not in out.replace("hook 'wandb' failed: ModuleNotFoundError", "")
    assert "model     MyModel: 1,290 parameters" in out and "train 203 samples in 7 steps of 32" in out and "\ndone\n" in out
    work_dir = folder / "work_dir"
    files = {str(p.relative_to(work_dir)) for p in work_dir.rglob("*") if p.is_file()}
    assert {"metrics.jsonl", "config.json", "logs/train.log"} <= files
    assert {f for f in files if f.startswith("checkpoints/")} == {
        f"checkpoints/step_000000{step}/{file}" for step in (14, 21) for file in ("manifest.json", "model.json", "state.pt")
    }
    assert sum(f.startswith("tensorboard/events.out.tfevents") for f in files) == 1
    if importlib.util.find_spec("wandb"):
        assert sum(f.endswith(".wandb") for f in files) == 1
    content = torch.load(work_dir / "checkpoints" / "step_00000021" / "state.pt", weights_only=True)
    assert set(content["model_state"]) == {"linear.weight", "linear.bias"} and content["epoch"] == EPOCHS
    assert [(r["phase"], r["step"]) for r in _rows(folder)] == [(p, 7 * e) for e in (1, 2, 3) for p in ("train", "val")]
    log = (work_dir / "logs" / "train.log").read_text().splitlines()
    log = [line for line in log if line.startswith("epoch ")]
    assert len(log) == 2 * EPOCHS and "lr 1.00e-03" in log[0] and "top1 0." in log[0]


def test_nccl_without_cuda_is_one_line_and_gloo(runs: dict[str, tuple[Path, int, str, str]]) -> None:
    """Said once, by rank 0, and not at all where there is one process."""
    said = "dist.backend is 'nccl', but there is no CUDA device here: using gloo."
    assert (runs["two"][2] + runs["two"][3]).count(said) == 1 and ", 2 processes (ddp)" in runs["two"][2]
    assert said not in runs["one"][2] + runs["one"][3]


def test_two_processes_train_the_same_model(runs: dict[str, tuple[Path, int, str, str]]) -> None:
    """Every number of the record agrees to 1e-5: the batch of the cfg is that of all processes together."""
    one, two = (_rows(runs[name][0]) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["top1"] == pytest.approx(b["top1"], abs=1e-5)
        assert a["lr"] == b["lr"]
