"""The README's code runs as written."""

import re
from pathlib import Path
from typing import Any

import torch
from files import picture

from ailab.config.load import load as load_cfg
from ailab.fit import fit

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
CFG, DATASET, PLAIN, SEVERAL, HOOKS = BLOCKS


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


def test_several_optimizers_are_those_of_torch() -> None:
    """The README's two optimizers train what two optimizers of torch.optim train in a plain loop."""
    names: dict[str, Any] = {}
    torch.manual_seed(3)
    exec(SEVERAL, names)
    names_of, bce = (names["generator"], names["critic"]), torch.nn.BCEWithLogitsLoss()
    torch.manual_seed(3)
    generator = torch.nn.Linear(8, 2)
    critic = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    assert all(torch.equal(a, b) for a, b in zip(names_of[0].parameters(), generator.parameters(), strict=True))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (critic, generator)]
    for _ in range(20):
        real, noise = torch.randn(64, 2) + 3, torch.randn(64, 8)
        fields = torch.cat([real, generator(noise).detach()]), torch.cat([names["one"], names["zero"]])
        for model, optimizer, (x, y) in zip(
            (critic, lambda z: critic(generator(z))), optimizers, (fields, (noise, names["one"])), strict=True
        ):
            optimizer.zero_grad()
            bce(model(x), y).backward()
            optimizer.step()
    for n, p in [
        *((f"0.{n}", p) for n, p in generator.named_parameters()),
        *((f"1.{n}", p) for n, p in critic.named_parameters()),
    ]:
        assert torch.allclose(names["g_state"].params[n], p, atol=1e-5), n


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
