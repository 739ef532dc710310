"""The README's code runs as written."""

import re
from pathlib import Path
from typing import Any

import torch
from files import picture

from ailab.config.load import load as load_cfg
from ailab.fit import fit

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
CFG, DATASET, PLAIN, HOOKS = BLOCKS


def written(text: str, folder: Path, name: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def test_the_cfg_trains(tmp_path: Path) -> None:
    """The README's cfg file runs, and its net tells the moons apart."""
    cfg = load_cfg(written(CFG, tmp_path, "readme_cfg"), [f"work_dir={tmp_path / 'run'}"])
    result = fit(cfg)
    assert result.metrics["val_top1"] > 0.97
    assert result.state.at == 5 * 40


def test_the_dataset_reads_a_folder(tmp_path: Path) -> None:
    """The README's data set gives each picture of a folder per class, bit for bit, with its class."""
    names: dict[str, Any] = {}
    exec(DATASET, names)
    wanted = [(picture(tmp_path / kind / "0.png"), i) for i, kind in enumerate(("ash", "oak"))]
    leaves = names["Leaves"](tmp_path)
    assert len(leaves) == 2
    for i, (image, label) in enumerate(wanted):
        assert torch.equal(leaves[i]["input"], image)
        assert int(leaves[i]["target"]) == label


def test_the_pieces_compose_without_a_cfg() -> None:
    """The README's Python lines run, consume the state step by step and report the loss and the norm."""
    names: dict[str, Any] = {}
    exec(PLAIN, names)
    assert names["state"].at == 20
    assert list(names["logs"]) == ["loss", "grad_norm"]
    assert torch.isfinite(names["logs"]["loss"].value)


def test_the_hooks_run_at_their_depths(tmp_path: Path) -> None:
    """The README's three hooks work in a cfg: noise in the gradient, a bound on the weights, a file from the host."""
    extra = """
cfg["hooks"] = dict(noise=dict(type="GradNoiseHook", std=0.01), clamp=dict(type="WeightClampHook", limit=0.05),
                    beat=dict(type="HeartbeatHook", every=10))
"""
    mine = CFG.replace("Moons", "OtherMoons").replace("Net", "OtherNet")  # a registry has one component of a name
    cfg = load_cfg(written(mine + HOOKS + extra, tmp_path, "readme_hooks"), [f"work_dir={tmp_path / 'run'}", "total_epochs=1"])
    result = fit(cfg)
    assert all((p.abs() <= 0.05).all() for p in result.state.params.values())
    assert (tmp_path / "run" / "heartbeat").exists()
