"""Runs over a folder with damaged images, from the command line: what is written, what is told, when the run ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import damage, encoded, photo
from tiny import tiny_cfg

from ailab.datasets.files.cache import SHARED, run_cache
from ailab.errors import ConfigError
from ailab.fit import fit, main

CFG = """
cfg = dict(
    seed=0, work_dir={work_dir!r}, total_epochs=2, compile=False,
    data=dict(train=dict(type="ClassificationImageDataset", source={folder!r}), {more}
              train_dataloader=dict(batch_size=16, num_workers=1)),
    model=dict(type="ConvNet", in_channels=3, num_classes=2, widths=(4,), depth=1, mean=128.0, std=64.0),
    loss=dict(type="CrossEntropyLoss"), optimizer=dict(type="SGD", lr=0.01),
    hooks=dict(checkpoint=dict(type="CheckpointHook"), resume=dict(type="ResumeHook")),
)
"""


def pictures(root: Path, damaged: tuple[str, ...], count: int = 60) -> Path:
    for i in range(count):
        path = root / ("ab"[i % 2]) / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i, (24, 32)), "JPEG"))
    for i, kind in enumerate(damaged):
        (root / "a" / f"{4 * i:03}.jpg").unlink()
        damage(root / "a" / f"{4 * i:03}.jpg", kind)
    return root


def run(tmp_path: Path, folder: Path, more: str = "", work: str = "run", *overrides: str) -> int:
    file = tmp_path / "exp.py"
    file.write_text(CFG.format(work_dir=str(tmp_path / work), folder=str(folder), more=more))
    return main([str(file), *overrides])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without times."""
    return [{k: v for k, v in row.items() if not k.startswith("wall_")} for row in rows(path)]


def test_a_run_lists_its_bad_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two damaged files of 60: trained around, one line each in bad_samples.jsonl, counts in the log; none again on resume."""
    folder = pictures(tmp_path / "set", ("jpeg_cut", "png_checksum"))
    assert run(tmp_path, folder, "max_bad_frac=0.05,") == 0
    said = capsys.readouterr().out
    assert "cfg.data.train: 2 of 60 samples were bad so far (1 corrupt, 1 truncated)." in said
    found = rows(tmp_path / "run" / "bad_samples.jsonl")
    assert sorted((r["kind"], Path(r["path"]).name, r["split"]) for r in found) == [
        ("corrupt", "004.jpg", "cfg.data.train"),
        ("truncated", "000.jpg", "cfg.data.train"),
    ]
    assert run(tmp_path, folder, "max_bad_frac=0.05,", "run", "total_epochs=3") == 0
    assert "was replaced" not in capsys.readouterr().out
    assert rows(tmp_path / "run" / "bad_samples.jsonl") == found


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        (("empty", "text", "png_cut", "png_bomb"), "more than 1 of 60 samples are bad"),
        (("empty",) * 15, "more than 1 of 60 samples are bad"),
    ],
)
def test_too_many_end_the_run(damaged: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above `max_bad_frac` the exit code is 3, with the counts by kind and the first one, in four lines."""
    assert run(tmp_path, pictures(tmp_path / "set", damaged)) == 3
    told = capsys.readouterr().err.strip().splitlines()
    assert says in told[0]
    assert "Bad so far: " in told[1]
    assert str(tmp_path / "set" / "a") in told[2]
    assert len(told) <= 4


def test_cached_runs_are_the_same_and_leave_no_memory(tmp_path: Path) -> None:
    """With cache="ram" and "disk" a run gives the numbers of one without; shared memory is given back, the disk keeps its files."""
    folder = pictures(tmp_path / "set", ())
    assert run(tmp_path, folder, "", "plain") == 0
    wanted = numbers(tmp_path / "plain" / "metrics.jsonl")
    for kind in ("ram", "disk"):
        assert run(tmp_path, folder, f"cache={kind!r},", kind) == 0
        assert numbers(tmp_path / kind / "metrics.jsonl") == wanted
        cache = run_cache(kind, tmp_path / kind)
        assert cache is not None
        kept = sum(p.is_file() for p in cache.folder.rglob("*")) if cache.folder.exists() else 0
        assert kept == (60 if kind == "disk" else 0)
    assert SHARED.is_dir()


def test_wrong_settings_are_told_before_anything_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cache, truncated and nan_is_bad take what they take, and nothing else."""
    more = "cache='rom', truncated='fil', nan_is_bad='no',"
    assert run(tmp_path, tmp_path, more) == 2
    told = capsys.readouterr().err
    assert "cfg.data.cache: expected 'ram' | 'disk' | None, got str 'rom'" in told
    assert "Did you mean 'fill'?" in told
    assert "cfg.data.nan_is_bad" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_batches_reach_a_gpu_in_order() -> None:
    """The copy ahead on a stream of its own changes no batch, with steps that take their time in between."""
    from test_stream import Noisy, stream

    device = torch.device("cuda")
    plain = list(stream(Noisy(40)).epoch(0))
    busy = torch.randn(2000, 2000, device=device)
    for ours, wanted in zip(stream(Noisy(40), device=device, num_workers=2).epoch(0), plain, strict=True):
        busy = busy @ busy / 50
        assert ours["noise"].device.type == "cuda"
        assert torch.equal((ours["noise"] + 0 * busy[0, 0].nan_to_num(0)).cpu(), wanted["noise"])


def test_a_loss_that_fails_on_what_a_hook_makes_is_named(tmp_path: Path) -> None:
    """The loss alone takes class indices, and a hook gives it probabilities: the error begins with the loss's path."""
    cfg = tiny_cfg(tmp_path / "run", smoothing=dict(type="LabelSmoothingHook", classes=3))
    cfg["loss"] = dict(type="CrossEntropyLoss", ignore_index=2)
    with pytest.raises(ConfigError, match=r"^cfg\.loss: failed in the first train step: RuntimeError: ignore_index"):
        fit(cfg)
