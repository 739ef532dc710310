"""Datasets out of a cfg, from the command line: what trains, and what is reported of a bad annotation before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import coco, picture, thing, voc

from ailab.fit import main

CFG = """
import torch

cfg = dict(
    seed=0, work_dir={work_dir!r}, total_epochs={epochs}, compile=False,
    data=dict(train={data!r}, train_dataloader={loader!r}),
    model=dict(type="ConvNet", in_channels=3, num_classes=2, widths=(8,), depth=1, mean=128.0, std=64.0, mapping={mapping!r}),
    loss=dict(type="CrossEntropyLoss"),
    optimizer=dict(type="AdamW", lr=0.02),
    hooks=dict(logger=dict(type="LoggerHook", interval=1)),
)
"""


def run(folder: Path, data: dict[str, Any], loader: dict[str, Any], mapping: dict[str, str], epochs: int = 1) -> int:
    """The exit code of a run on `data`."""
    file = folder / "exp.py"
    file.write_text(CFG.format(work_dir=str(folder / "run"), epochs=epochs, data=data, loader=loader, mapping=mapping))
    return main([str(file)])


def squares(folder: Path, n: int = 12) -> Path:
    """Bright and dark images of three sizes, in a folder for each class."""
    for i in range(n):
        for name, level in (("bright", 200), ("dark", 50)):
            image = torch.full((3, 20 + i % 3, 24), level + i, dtype=torch.uint8)
            picture(folder / name / f"{i}.png", image)
    return folder


def test_folders_of_images_train_by_names_in_the_cfg(tmp_path: Path) -> None:
    """A folder, transforms by name and workers: the loss of two classes that differ in brightness goes to zero."""
    data = dict(
        type="ClassificationImageDataset",
        source=str(squares(tmp_path / "data")),
        transform=[
            dict(type="RandomResizedCrop", size=16, scale=(0.5, 1.0)),
            dict(type="RandomHorizontalFlip"),
            dict(type="ToDtype", dtype=torch.float32),
        ],
    )
    assert run(tmp_path, data, dict(batch_size=8, num_workers=2), {}, epochs=8) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in rows if "loss" in r]
    assert losses[-1] < 0.1 < losses[0]


def bad_column(folder: Path) -> dict[str, Any]:
    (folder / "a.csv").write_text("file,label\nx.png,0\n")
    return dict(type="ClassificationImageDataset", source=str(folder / "a.csv"))


def bad_class(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text('{"image": "x.png", "label": "cow"}\n')
    return dict(type="ClassificationImageDataset", source=str(folder / "a.jsonl"), classes=["cat"])


def bad_path(folder: Path) -> dict[str, Any]:
    (folder / "a.txt").write_text("ok.png 0\n../../x.png 1\n")
    return dict(type="ClassificationImageDataset", source=str(folder / "a.txt"))


def bad_box(folder: Path) -> dict[str, Any]:
    path = coco(folder, [thing(4, [9, 9, 40, 2])])
    return dict(type="COCODataset", annotation_file=str(path), images_root=str(folder / "images"))


def bad_id(folder: Path) -> dict[str, Any]:
    path = coco(folder, [thing(4, [1, 1, 2, 2]), thing(4, [2, 2, 2, 2])])
    return dict(type="COCODataset", annotation_file=str(path), images_root=str(folder / "images"))


def bad_xml(folder: Path) -> dict[str, Any]:
    voc(folder, "a", [], more='<!DOCTYPE a [<!ENTITY x "y">]>')
    return dict(type="VOCDataset", root=str(folder), split=None)


def bad_folders(folder: Path) -> dict[str, Any]:
    squares(folder / "d", 1)
    picture(folder / "d" / "Dark" / "0.png")
    return dict(type="ClassificationImageDataset", source=str(folder / "d"))


def empty(folder: Path) -> dict[str, Any]:
    (folder / "a.jsonl").write_text("\n")
    return dict(type="ClassificationImageDataset", source=str(folder / "a.jsonl"))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (bad_column, "a.csv, line 2: there is no 'image'. It has: file, label"),
        (bad_class, "a.jsonl, line 1, 'label': unknown class 'cow'"),
        (bad_path, "a.txt, line 2: '../../x.png' leads out of the dataset's root"),
        (bad_box, "coco.json, annotation id 4: the box [9, 9, 40, 2] (xywh) reaches outside the image of 16x12 pixels"),
        (bad_id, "coco.json: the annotation id 4 occurs twice"),
        (bad_xml, "a.xml, line 1: declares a document type or entity"),
        (bad_folders, "the classes 'Dark' and 'dark' differ only in case"),
        (empty, "a.jsonl: the split is empty"),
    ],
)
def test_a_bad_annotation_ends_a_run_before_it_begins(
    made: Callable[[Path], dict[str, Any]], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, at most four lines with the file, the row and what is expected, and no checkpoint."""
    assert run(tmp_path, made(tmp_path), dict(batch_size=2), {}) == 3
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 4
    assert not list((tmp_path / "run").glob("checkpoints/*"))
