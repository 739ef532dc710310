"""The law of the start: a process imports what it uses. How long that takes is measured by benchmarks/startup.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "pandas", "torchvision", "PIL", "tensorboard", "wandb")
RUN = """
from tiny import tiny_cfg
hooks = dict(
    lr_scheduler=dict(type="LrSchedulerHook", by="step", scheduler=dict(type="OneCycleLR", max_lr=0.01)),
    ema=dict(type="EMAHook", decay=0.9),
    clip=dict(type="GradClipHook", max_norm=1.0),
    checkpoint=dict(type="CheckpointHook", interval=1),
    resume=dict(type="ResumeHook"),
)
cfg = tiny_cfg("work_dir", **hooks)
"""
MISTAKES = {
    "key": "cfg['total_epoch'] = 3",
    "type": "cfg['hooks']['ema']['type'] = 'EMAHok'",
    "model of torchvision": "cfg['model']['type'] = 'resnat18'",
    "optimizer": "cfg['optimizer']['lrr'] = 1",
    "scheduler": "cfg['hooks']['lr_scheduler']['scheduler']['max_lrr'] = 1",
}


def imported(code: str, folder: Path) -> list[str]:
    """Which of the heavy modules a fresh process has after `import torch`, and after `code` as well, in the same order."""
    before = f"import sys, json, torch; heavy = {HEAVY}; before = [m for m in heavy if m in sys.modules]\n"
    after = "\nprint(json.dumps([m for m in heavy if m in sys.modules and m not in before]))"
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", before + code + after],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_eager_run_imports_no_compiler_and_no_reader_that_it_does_not_use(tmp_path: Path) -> None:
    """Training, validation, a schedule, an average, clipping, a metric and checkpoints need torch alone."""
    assert imported(RUN + "from ailab.fit import fit\nfit(cfg)", tmp_path) == []
    assert list(tmp_path.glob("work_dir/checkpoints/step_*"))


@pytest.mark.parametrize("mistake", list(MISTAKES.values()), ids=list(MISTAKES))
def test_a_mistake_in_the_cfg_is_told_before_anything_heavy_is_imported(tmp_path: Path, mistake: str) -> None:
    """An unknown key, an unknown type and a wrong argument are found without the compiler and without torchvision."""
    (tmp_path / "exp.py").write_text(f"{RUN}\n{mistake}\n")
    assert imported("from ailab.fit import main\nassert main(['exp.py']) == 2", tmp_path) == []


def test_the_compiler_is_imported_by_a_run_that_compiles() -> None:
    """The private package is looked up when a step is compiled, and graphs are counted without importing it."""
    code = "from ailab.compile import compile, graphs_compiled, allow_traced_grad\nassert graphs_compiled() == 0"
    assert imported(code, TESTS) == []
    assert "torch._dynamo" in imported(code + "\nallow_traced_grad()", TESTS)


def test_an_optimizer_is_the_object_that_its_class_makes() -> None:
    """`instance` equals the constructor: type, groups, defaults, checks; a class with its own `add_param_group` keeps it."""
    import torch

    from ailab.optim.instance import instance

    class Counting(torch.optim.SGD):
        added = 0

        def add_param_group(self, param_group: dict) -> None:
            self.added += 1
            super().add_param_group(param_group)

    w = [torch.nn.Parameter(torch.ones(2))]
    for cls in (torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS):
        made, plain = instance(cls, w, lr=0.5), cls(w, lr=0.5)
        assert type(made) is cls
        assert vars(made).keys() == vars(plain).keys()
        assert (made.param_groups, made.defaults) == (plain.param_groups, plain.defaults)
        made.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}) if cls is not torch.optim.LBFGS else None
    assert instance(Counting, w, lr=0.5).added == 1
    with pytest.raises(ValueError, match="Invalid learning rate"):
        instance(torch.optim.AdamW, w, lr=-1.0)
