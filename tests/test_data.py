"""`python -m ailab.data`: what it counts is in the files, what it draws is where the annotations say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import damage, encoded, photo
from PIL import Image

from ailab.config.check import complete
from ailab.data import main, read_split, summary_text
from ailab.pictures.contact_sheet import FieldInfo, colour, contact_sheet, corners

ROOT = Path(__file__).parents[1]


def folder(root: Path, count: int = 12) -> Path:
    """Images of two classes, two of them damaged, one truncated."""
    for i in range(count):
        path = root / ("ants" if i % 3 else "bees") / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i, (48, 64)), "JPEG"))
    damage(root / "ants" / "20.jpg", "empty")
    damage(root / "bees" / "21.jpg", "png_checksum")
    data = encoded(photo(5, (320, 240)), "JPEG")
    (root / "bees" / "22.jpg").write_bytes(data[: len(data) * 9 // 10])
    return root


def cfg_file(path: Path, data: dict[str, Any], **more: Any) -> Path:
    cfg = {"model": {"type": "MLP", "sizes": [1, 1]}, "optimizer": {"type": "SGD", "lr": 0.1}, "loss": {"type": "MSELoss"}}
    path.write_text(f"cfg = { ({**cfg, 'data': data, **more})!r}\n")
    return path


def test_the_command_counts_lists_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, classes, shapes, mean and standard deviation are those of the files; each bad file is named with its kind."""
    root = folder(tmp_path / "set")
    entry = {"type": "ClassificationImageDataset", "source": str(root)}
    path = cfg_file(tmp_path / "exp.py", {"train": entry, "truncated": "fill"})
    assert main([str(path), "--out", str(tmp_path / "x.png"), "--show", "6"]) == 0
    text = capsys.readouterr().out
    assert "train: 15 samples" in text
    assert "uint8 (3, 48, 64) x 12, uint8 (3, 320, 240) x 1" in text
    assert "2 classes: ants 8, bees 5" in text
    assert "bad: 2 (1 corrupt, 1 empty); damaged and used: 1" in text
    for name, kind in (("20", "empty"), ("21", "corrupt"), ("22", "truncated")):
        assert any(f"{name}.jpg" in line and f" {kind}: " in line for line in text.splitlines())
    with Image.open(tmp_path / "x.png") as shown:
        assert shown.width > 900
    assert main([str(path), "--split", "val"]) == 2
    assert "there is no such split" in capsys.readouterr().err
    assert main([str(path), "data.train.source=" + str(tmp_path / "nowhere")]) == 3


def test_the_numbers_are_those_of_the_samples() -> None:
    """Mean, standard deviation and range per channel against numpy; `samples` reads evenly spaced ones only."""
    cfg = complete({"model": {}, "data": {"val": {"type": "Digits", "split": "val"}}})
    summary = read_split(cfg, "val", show=5)
    from ailab.datasets import Digits

    fields = Digits("val").tensors()
    mean, std = summary.fields["input"].moments()
    assert mean[0] == pytest.approx(fields["input"].double().mean().item())
    assert std[0] == pytest.approx(fields["input"].double().std(correction=0).item())
    assert (summary.fields["input"].low, summary.fields["input"].high) == (0, 16)
    assert dict(summary.fields["target"].classes) == dict(enumerate(fields["target"].bincount().tolist()))
    assert [i for i, _ in summary.first] == [0, 72, 144, 216, 288]
    few = read_split(cfg, "val", samples=10, show=3)
    assert (few.read, few.size) == (10, 360)
    assert [i for i, _ in few.first] == [0, 108, 216]
    assert "360 samples, 10 of them read" in summary_text(few, "val")


@pytest.mark.parametrize("form", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("normalize", [False, True])
def test_boxes_masks_and_points_are_drawn_where_they_are(form: str, normalize: bool) -> None:
    """On a black image: the outline of a box in any format, the tint of a mask, the dots of keypoints, at the right pixels."""
    box = {"xyxy": [10.0, 20, 40, 60], "xywh": [10.0, 20, 30, 40], "cxcywh": [25.0, 40, 30, 40]}[form]
    boxes = torch.tensor([box, [0.0, 0, 0, 0]])
    points = torch.tensor([[[80.0, 50, 2], [90, 50, 0]]])
    if normalize:
        boxes = boxes / 96
    mask = torch.zeros(1, 96, 96, dtype=torch.uint8)
    mask[0, 70:90, 5:25] = 1
    sample = {"image": torch.zeros(3, 96, 96, dtype=torch.uint8), "boxes": boxes, "masks": mask, "keypoints": points}
    info = FieldInfo({"image": "image", "boxes": "boxes", "masks": "mask", "keypoints": "keypoints"}, None, form, normalize)
    assert corners(boxes, info, (96, 96))[0].tolist() == pytest.approx([10, 20, 40, 60])
    drawn = np.asarray(contact_sheet([sample], ["a"], info)).astype(int)[6:198, 6:198]  # twice the size, after the gap
    tints = [np.array(colour(i)) for i in range(2)]
    assert (drawn[40, 30:70] == tints[0]).all()
    assert (drawn[50:110, 20] == tints[0]).all()
    assert (drawn[80, 40] == 0).all()
    assert (abs(drawn[160, 30] - 0.45 * tints[1]) <= 1).all()
    assert (drawn[100, 160] == tints[1]).all()
    assert (drawn[100, 180] == 0).all()


def test_a_sheet_takes_any_sample() -> None:
    """Series, texts and scalars without an image, a map of classes, one channel or four: all have a cell."""
    info = FieldInfo({}, ["cat", "dog"])
    samples = [
        {"input": torch.randn(7), "target": 1, "name": "x\x1b"},
        {"input": torch.rand(1, 20, 30), "target": torch.tensor(0)},
        {"image": torch.zeros(4, 9, 9, dtype=torch.uint8), "mask": torch.ones(9, 9, dtype=torch.int64)},
        {"text": "words", "boxes": torch.zeros(0, 4)},
    ]
    whole = contact_sheet(samples, ["a", "b", "c", "d"], info)
    assert whole.width > 4 * 192
    assert [info.kind(n, v, (9, 9)) for n, v in samples[2].items()] == ["image", "mask"]


def test_the_model_sees_augmented_pictures(tmp_path: Path) -> None:
    """The batch augmentations of the hooks are applied to what is drawn, in their phases only."""
    from ailab.data import augmented

    hooks = {"a": {"type": "AugmentHook", "ops": [{"type": "BatchFlip", "p": 1.0}]}}
    cfg = complete({"model": {}, "data": {}, "hooks": hooks})
    sample = {"input": torch.rand(3, 5, 5)}
    assert torch.equal(augmented(cfg, "train", [sample])[0]["input"], sample["input"].flip(-1))
    assert torch.equal(augmented(cfg, "val", [sample])[0]["input"], sample["input"])


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    """`python -m ailab.data` on the example cfg, from another folder."""
    command = [sys.executable, "-m", "ailab.data", str(ROOT / "cfgs" / "exp.py"), "--split", "val", "--samples", "40"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "val.png").exists()
    assert "10 classes" in done.stdout


def coco(root: Path) -> dict[str, Any]:
    """A COCO set with boxes, polygons and keypoints around what is in the images; used by hand too, to look at a sheet."""
    images, annotations = [], []
    for i in range(6):
        pixels = photo(i, (120, 160), 2).copy()
        x, y, w, h = 20 + 8 * i, 15 + 5 * i, 50, 40
        pixels[y : y + h, x : x + w] = colour(i + 3)
        (root / f"{i}.jpg").write_bytes(encoded(pixels, "JPEG", quality=95))
        images.append({"id": i, "file_name": f"{i}.jpg", "width": 160, "height": 120})
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        points = [x, y, 2, x + w, y + h, 2, x + w // 2, y + h // 2, 0]
        annotations.append({
            "id": i + 1, "image_id": i, "category_id": 1 + i % 2, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
            "segmentation": [polygon], "keypoints": points, "num_keypoints": 2,
        })  # fmt: skip
    names = ["head", "foot", "hand"]
    categories = [{"id": k + 1, "name": n, "keypoints": names, "skeleton": []} for k, n in enumerate(("brick", "tile"))]
    (root / "a.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return {"annotation_file": str(root / "a.json"), "images_root": str(root)}


@pytest.mark.parametrize("box_format", ["xyxy", "coco", "yolo"])
def test_a_detection_set_is_drawn(box_format: str, tmp_path: Path) -> None:
    """The box of each object of a COCO set frames what is in the image there, whatever the format it is delivered in."""
    entry = {"type": "COCODataset", **coco(tmp_path), "box_format": box_format, "normalize": box_format == "yolo"}
    summary = read_split(complete({"model": {}, "data": {"train": {**entry, "tasks": ["bbox", "mask", "keypoints"]}}}), "train")
    assert not summary.bad
    for index, sample in summary.first:
        box = corners(sample["boxes"], summary.info, (120, 160))[0]
        assert sample["keypoints"][0, 1].tolist() == [70 + 8 * index, 55 + 5 * index]
        assert box.tolist() == pytest.approx([20 + 8 * index, 15 + 5 * index, 70 + 8 * index, 55 + 5 * index], abs=1e-3)
    whole = contact_sheet([s for _, s in summary.first], [str(i) for i, _ in summary.first], summary.info)
    whole.save(tmp_path / "sheet.png")
    assert whole.height > 150
