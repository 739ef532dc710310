"""Datasets that need no code, against independent readers of the same files."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import coco, picture, pixels, sound, thing, voc
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from ailab import tree
from ailab.datasets import (
    AudioClassificationDataset,
    ClassificationImageDataset,
    COCODataset,
    COCOSegmentationDataset,
    MAEAnnFileDataset,
    MaskingGenerator,
    PadCollate,
    SplitDataset,
    Stream,
    TextWindows,
    VOCDataset,
    VOCSegmentationDataset,
    WindowedTimeSeries,
    WrappedDataset,
)
from ailab.datasets.files.rle import decompress_counts, mask_from_counts
from ailab.errors import AilabError, ConfigError, DataError
from ailab.registry import DATASETS

# Of pycocotools with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# Image classification


def images(folder: Path, n: int = 3) -> list[str]:
    for i in range(n):
        picture(folder / f"{i}.png", pixels(i))
    return [f"{i}.png" for i in range(n)]


@pytest.mark.parametrize("kind", ["folder", "jsonl", "json", "csv", "xlsx", "txt"])
def test_images_are_classified_from_anything(tmp_path: Path, kind: str) -> None:
    """A folder per class and every kind of file give the same images, classes and labels."""
    names, labels = images(tmp_path / "all"), ["dog", "cat", "dog"]
    if kind == "folder":
        for i, label in enumerate(labels):
            picture(tmp_path / "f" / label / f"{i}.png", pixels(i))
        data, order = ClassificationImageDataset(tmp_path / "f"), [1, 0, 2]
    else:
        path, rows = tmp_path / "all" / f"a.{kind}", [{"image": n, "label": c} for n, c in zip(names, labels, strict=True)]
        if kind in ("csv", "xlsx"):
            import pandas as pd

            getattr(pd.DataFrame(rows), {"csv": "to_csv", "xlsx": "to_excel"}[kind])(path, index=False)
        elif kind == "txt":
            path.write_text("\n".join(f"{r['image']} {r['label']}" for r in rows))
        else:
            path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
        data, order = ClassificationImageDataset(path), [0, 1, 2]
    assert data.classes == ["cat", "dog"]
    assert [d["target"].item() for d in data] == [["cat", "dog"].index(labels[i]) for i in order]
    assert all(torch.equal(data[k]["input"], pixels(i)) for k, i in enumerate(order))


def test_labels_may_be_numbers_or_many(tmp_path: Path) -> None:
    """Indices as they are, also as text; several labels of an image give 0 and 1 for each class; val gets train's classes."""
    images(tmp_path)
    path = tmp_path / "a.csv"
    path.write_text("file,y\n0.png,2\n1.png,0\n")
    numbered = ClassificationImageDataset(path, "file", "y")
    assert [d["target"].item() for d in numbered] == [2, 0]
    assert numbered.classes == ["0", "1", "2"]
    small = ClassificationImageDataset(path, "file", "y", resize=(6, 8), size_hint=(6, 8))
    assert small[0]["input"].shape == (3, 6, 8)
    path.write_text("file,y\n0.png,b;a\n1.png,\n2.png,c\n")
    many = ClassificationImageDataset(path, "file", "y", multi_label=True)
    assert [d["target"].tolist() for d in many] == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    path.write_text("file,y\n0.png,b\n")
    assert ClassificationImageDataset(path, "file", "y", classes=["a", "b"])[0]["target"].item() == 1


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("file,label\n0.png,a\n", {"x_key": "image"}, r"a\.csv, line 2: there is no 'image'"),
        ("image,label\n0.png,a\n1.png,b\n", {"classes": ["a", "c"]}, r"a\.csv, line 3, 'label': unknown class 'b'"),
        ("image,label\n0.png,5\n", {"classes": ["a", "c"]}, r"a\.csv, line 2, 'label': there is no class 5; there are 2"),
        ("image,label\n../0.png,a\n", {}, r"a\.csv, line 2: '../0.png' leads out of the dataset's root"),
        ("image,label\n", {}, "the split is empty"),
        (
            "image,label\n0.png,999999999\n",
            {},
            r"a\.csv: a label is 999999999\. Expected class indices from 0 to at most 1048575",
        ),
        ("image,label\n0.png,0.5\n", {"classes": ["0.5x"]}, r"line 2, 'label': unknown class '0.5'.* Did you mean '0.5x'"),
    ],
)
def test_bad_records_are_reported_before_training(tmp_path: Path, text: str, settings: Any, message: str) -> None:
    """A missing column, an unknown class, a path outside and an empty split: with the file and the line."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        ClassificationImageDataset(tmp_path / "a.csv", **settings)


# COCO, against pycocotools

COLOURS = {10: 30, 11: 200}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six images of 60x80 with polygons, run lengths of both kinds, crowds, keypoints, and one without objects."""
    folder = tmp_path_factory.mktemp("coco")
    mask = pytest.importorskip("pycocotools.mask")
    g = torch.Generator().manual_seed(0)
    annotations: list[dict[str, Any]] = []
    for i in range(5):
        for _ in range(4):
            x, y = (int(torch.randint(0, n, (), generator=g)) for n in (50, 35))
            w, h = (int(torch.randint(6, n, (), generator=g)) for n in (29, 24))
            spots = torch.cat(
                [torch.rand(3, 2, generator=g) * torch.tensor([w, h]) + torch.tensor([x, y]), torch.ones(3, 1)], 1
            )
            polygon = [
                x + 0.3,
                y + 0.4,
                x + w - 0.2,
                y + 1.1,
                x + w - 1.7,
                y + h - 0.6,
                x + w / 2,
                y + h / 2,
                x + 0.9,
                y + h - 2.0,
            ]
            box = np.zeros((60, 80), dtype=np.uint8)
            box[y : y + h, x : x + w] = 1
            kind = len(annotations) % 4
            runs = [len(list(r)) for r in np.split(box.T.ravel(), np.flatnonzero(np.diff(box.T.ravel())) + 1)]
            runs = runs if box[0, 0] == 0 else [0, *runs]
            packed = mask.encode(np.asfortranarray(box))
            segmentation: Any = {
                0: [polygon],
                1: [polygon, [x, y, x + 5, y, x + 5, y + 5.5]],
                2: {"size": [60, 80], "counts": runs},
                3: {"size": [60, 80], "counts": packed["counts"].decode()},
            }[kind]
            annotations.append(
                thing(
                    len(annotations) + 1,
                    [x, y, w, h],
                    image=10 + i,
                    category=(3, 7)[len(annotations) % 3 == 0],
                    iscrowd=int(len(annotations) % 7 == 6 and kind > 1),
                    segmentation=segmentation,
                    keypoints=[float(v) for v in spots.flatten()],
                    num_keypoints=3,
                )
            )
    return coco(folder, annotations, images=6, h=60, w=80), folder / "images"


def oracle(path: Path) -> Any:
    from pycocotools.coco import COCO

    return COCO(str(path))


def test_masks_are_those_of_pycocotools(scene: tuple[Path, Path]) -> None:
    """Bitwise, for polygons and run lengths, plain and compressed, in the order of the file."""
    data, api = COCODataset(*scene, tasks=("bbox", "segmentation"), ignore_crowd=False), oracle(scene[0])
    kinds = set()
    for i in range(len(data)):
        sample = data[i]
        found = api.loadAnns(api.getAnnIds(int(sample["image_id"])))
        assert len(sample["masks"]) == len(found)
        for mask, annotation in zip(sample["masks"], found, strict=True):
            assert np.array_equal(mask.numpy(), api.annToMask(annotation).astype(bool))
            kinds.add(type(annotation["segmentation"]).__name__)
    assert kinds == {"list", "dict"}


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=40))
def test_compressed_run_lengths_are_read_back(counts: list[int]) -> None:
    """What pycocotools writes for any run lengths is what comes out."""
    mask = pytest.importorskip("pycocotools.mask")
    size = [sum(counts), 1]
    packed = mask.frPyObjects({"size": size, "counts": counts}, *size)
    assert decompress_counts(packed["counts"]) == counts
    assert np.array_equal(mask_from_counts(counts, (size[0], 1)).numpy(), mask.decode(packed).astype(bool))


def test_objects_are_those_of_pycocotools(scene: tuple[Path, Path]) -> None:
    """Boxes in any format, labels, crowds, areas, keypoints; small and crowd objects are left out where that is asked."""
    api, plain = oracle(scene[0]), COCODataset(*scene, tasks=("bbox", "keypoints"), ignore_crowd=False)
    for i in range(len(plain)):
        sample = plain[i]
        found = api.loadAnns(api.getAnnIds(int(sample["image_id"])))
        boxes = torch.tensor([a["bbox"] for a in found]).view(-1, 4).float()
        wanted = {
            f: COCODataset(*scene, box_format=f, ignore_crowd=False)[i]["boxes"] for f in ("xywh", "coco", "yolo", "cxcywh")
        }
        assert torch.equal(wanted["xywh"], boxes)
        assert torch.equal(wanted["coco"], boxes)
        assert torch.equal(sample["boxes"], torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        centre = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], 1)
        torch.testing.assert_close(wanted["cxcywh"], centre)
        torch.testing.assert_close(wanted["yolo"], centre / torch.tensor([80.0, 60, 80, 60]))
        assert sample["labels"].tolist() == [{3: 0, 7: 1}[a["category_id"]] for a in found]
        assert sample["iscrowd"].tolist() == [a["iscrowd"] for a in found]
        assert sample["keypoints"].shape == (len(found), 3, 2)
        points = torch.tensor([a["keypoints"] for a in found]).view(-1, 3, 3)
        assert torch.equal(sample["keypoints"], points[..., :2])
        assert torch.equal(sample["visible"], points[..., 2].long())
    assert len(plain) == 6
    assert len(COCODataset(*scene, keep_empty=False)) == 5
    counts = [len(d["labels"]) for d in COCODataset(*scene, min_area=300.0)]
    assert counts == [len(api.getAnnIds(10 + i, areaRng=[299.9, 1e9], iscrowd=False)) for i in range(6)]


def test_average_precision_is_that_of_pycocotools(scene: tuple[Path, Path]) -> None:
    """Targets of the dataset in torchmetrics, against COCOeval on the file, with the same detections: boxes and masks."""
    detection = pytest.importorskip("torchmetrics.detection")
    from pycocotools import mask as coder
    from pycocotools.cocoeval import COCOeval

    data, api = COCODataset(*scene, tasks=("bbox", "mask"), ignore_crowd=False), oracle(scene[0])
    g = torch.Generator().manual_seed(1)
    for kind in ("bbox", "segm"):
        metric = detection.MeanAveragePrecision(iou_type=kind)
        results = []
        for i in range(len(data)):
            sample = data[i]
            n = len(sample["boxes"])
            moved = sample["boxes"] + 3 * torch.randn(n, 4, generator=g)
            moved = torch.cat([moved[:, :2], torch.maximum(moved[:, 2:], moved[:, :2] + 2)], 1)
            masks = sample["masks"].roll((1, 2), (1, 2))
            scores = torch.rand(n, generator=g)
            labels = torch.where(torch.rand(n, generator=g) < 0.8, sample["labels"], 1 - sample["labels"])
            target = {n: sample[n] for n in ("boxes", "labels", "masks", "iscrowd", "area")}
            metric.update([dict(boxes=moved, scores=scores, labels=labels, masks=masks)], [target])
            for k in range(n):
                x0, y0, x1, y1 = moved[k].tolist()
                one: dict[str, Any] = dict(
                    image_id=int(sample["image_id"]), category_id=[3, 7][labels[k]], score=float(scores[k])
                )
                one["bbox"] = [x0, y0, x1 - x0, y1 - y0]
                if kind == "segm":
                    del one["bbox"]
                    one["segmentation"] = coder.encode(np.asfortranarray(masks[k].numpy().astype(np.uint8)))
                results.append(one)
        evaluation = COCOeval(api, api.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ours = metric.compute()
        for name, value in zip(("map", "map_50", "map_75", "map_small"), evaluation.stats, strict=False):
            assert float(ours[name]) == pytest.approx(float(value), abs=1e-6)
        assert 0.05 < float(ours["map_50"]) < 1


def test_class_maps_and_their_iou(scene: tuple[Path, Path]) -> None:
    """Maps are painted as pycocotools' masks say, crowds do not count, and mean IoU is that of a confusion matrix by hand."""
    classification = pytest.importorskip("torchmetrics.classification")
    data, api = COCOSegmentationDataset(*scene), oracle(scene[0])
    assert data.classes == ["background", "cat", "dog"]
    metric = classification.MulticlassJaccardIndex(3, ignore_index=255)
    table = np.zeros((3, 3))
    seen = np.zeros(3)
    g = torch.Generator().manual_seed(2)
    for i in range(len(data)):
        sample = data[i]
        wanted = np.zeros((60, 80), dtype=np.int64)
        drawn = [(api.annToMask(a).astype(bool), a) for a in api.loadAnns(api.getAnnIds(int(sample["image_id"])))]
        for mask, annotation in sorted(drawn, key=lambda m: -m[0].sum()):
            wanted[mask] = 255 if annotation["iscrowd"] else {3: 1, 7: 2}[annotation["category_id"]]
        assert np.array_equal(sample["mask"].numpy(), wanted)
        noise = torch.randint(0, 3, wanted.shape, generator=g)
        guess = torch.where(
            torch.rand(wanted.shape, generator=g) < 0.3, noise, torch.from_numpy(np.where(wanted == 255, 0, wanted))
        )
        metric.update(guess[None], sample["mask"][None])
        for t in range(3):
            seen[t] += (wanted == t).sum()
            for p in range(3):
                table[t, p] += ((wanted == t) & (guess.numpy() == p)).sum()
    assert any((sample["mask"] == 255).any() for sample in data)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert float(metric.compute()) == pytest.approx(float((table.diagonal() / union).mean()), abs=1e-6)
    weights = (seen.sum() / seen) / (seen.sum() / seen).mean()
    torch.testing.assert_close(data.class_weights(), torch.from_numpy(weights).float())
    instances = COCOSegmentationDataset(*scene, mode="instance")[0]
    assert torch.equal(instances["masks"], COCODataset(*scene, tasks=("mask",))[0]["masks"])


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (dict(segmentation=None), {"tasks": ["mask"]}, "annotation id 1: expected a segmentation of polygons"),
        (dict(segmentation=[[1, 2, 3, 4]]), {"tasks": ["mask"]}, "annotation id 1: expected a segmentation of polygons"),
        (dict(segmentation={"size": [12, 16], "counts": [3, 4]}), {"tasks": ["mask"]}, "got size .12, 16. and 7 pixels"),
        (dict(segmentation={"size": [12, 16], "counts": [-1, 193]}), {"tasks": ["mask"]}, "expected RLE counts"),
        (dict(segmentation={"size": [12, 16], "counts": "~~~"}), {"tasks": ["mask"]}, "these are no RLE counts"),
        (
            dict(segmentation={"size": [9, 9], "counts": [81]}),
            {"tasks": ["mask"]},
            r"expected RLE counts of the image, size \[12, 16\]",
        ),
        (
            dict(keypoints=[1, 2, 2]),
            {"tasks": ["keypoints"]},
            "expected 3 x 3 numbers of keypoints, by the categories of the file, got .1, 2, 2.",
        ),
        ({}, {"tasks": ["keypoints"]}, "annotation id 1: there is no 'keypoints', which the task 'keypoints' needs"),
        ({}, {"tasks": ["boxes"]}, "tasks has 'boxes'; there are bbox, mask, keypoints"),
        ({}, {"min_area": 1e6, "keep_empty": False}, "the split is empty: no image has an object"),
    ],
)
def test_annotations_that_a_task_cannot_use_are_reported(tmp_path: Path, change: Any, settings: Any, message: str) -> None:
    """When the dataset is made, with the id of the annotation; no malformed mask reaches a C decoder."""
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], **change)])
    with pytest.raises(DataError, match=message):
        COCODataset(path, tmp_path / "images", **settings)


def test_polygons_without_pycocotools_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run lengths need no package; polygons say which, when the dataset is made."""
    polygon, runs = [[1.0, 1, 5, 1, 5, 5]], {"size": [12, 16], "counts": [10, 5, 177]}
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], segmentation=runs)])
    assert COCODataset(path, tmp_path / "images", tasks=["mask"])[0]["masks"].sum() == 5
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], segmentation=polygon)])
    with pytest.raises(DataError, match=r"pip install 'ailab\[coco\]'"):
        COCODataset(path, tmp_path / "images", tasks=["mask"])


def test_an_image_of_another_size_is_a_bad_sample(tmp_path: Path) -> None:
    """Boxes of another image must not be trained on."""
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], segmentation={"size": [12, 16], "counts": [192]})])
    picture(tmp_path / "images" / "0.png", pixels(0, 6, 8))
    for mode in ("instance", "semantic"):
        with pytest.raises(ValueError, match=r"0\.png: \(6, 8\) pixels; .* \(12, 16\)"):
            COCOSegmentationDataset(path, tmp_path / "images", mode=mode)[0]


def test_detection_trains_from_padded_batches(scene: tuple[Path, Path]) -> None:
    """With a letterbox and PadCollate, batches have one shape, images without objects included."""
    data = COCODataset(*scene, transform=[{"type": "LetterBox", "size": 32}], box_format="cxcywh", normalize=True)
    collate = PadCollate(max_size={"boxes": 8, "labels": 8}, pad_value={"labels": -1})
    batches = list(Stream(data, batch_size=4, shuffle=True, seed=0, pad=True, collate_fn=collate).epoch(0))
    assert {tuple(b["image"].shape) for b in batches} == {(4, 3, 32, 32)}
    assert {tuple(b["boxes"].shape) for b in batches} == {(4, 8, 4)}
    assert all(((b["boxes"] >= 0) & (b["boxes"] <= 1)).all() for b in batches)


# VOC, against torchvision and by hand


def test_voc_is_what_torchvision_reads(tmp_path: Path) -> None:
    """The layout of the development kit; difficult objects only where asked; maps keep 255."""
    voc(tmp_path, "a", [("dog", (2, 3, 4, 6)), ("cat", (1, 1, 16, 12))])
    voc(tmp_path, "b", [])
    (tmp_path / "Annotations" / "a.xml").write_text(
        (tmp_path / "Annotations" / "a.xml").read_text().replace("<difficult>0", "<difficult>1", 1)
    )
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("b\na\n")
    from torchvision.ops import box_convert

    data = VOCDataset(tmp_path, "val", difficult=True, box_format="cxcywh")
    assert data[0]["boxes"].shape == (0, 4)
    corners = torch.tensor([[1.0, 2, 4, 6], [0, 0, 16, 12]])
    torch.testing.assert_close(data[1]["boxes"], box_convert(corners, "xyxy", "cxcywh"))
    assert [data.classes[i] for i in data[1]["labels"]] == ["dog", "cat"]
    assert VOCDataset(tmp_path, None)[0]["boxes"].tolist() == [[0, 0, 16, 12]]
    with pytest.raises(DataError, match=r"test\.txt: cannot be read"):
        VOCDataset(tmp_path, "test")


def test_voc_maps_of_classes(tmp_path: Path) -> None:
    """Indices of the palette as torchvision's VOCSegmentation gives them."""
    from torchvision.datasets import VOCSegmentation

    root = tmp_path / "VOCdevkit" / "VOC2012"
    values = torch.randint(0, 21, (12, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values[0] = 255
    for folder in ("SegmentationClass", "JPEGImages", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    map_ = Image.fromarray(values.numpy())
    map_.putpalette([(7 * i) % 256 for i in range(768)])
    map_.save(root / "SegmentationClass" / "a.png")
    Image.fromarray(pixels().permute(1, 2, 0).contiguous().numpy()).save(root / "JPEGImages" / "a.jpg")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    sample = VOCSegmentationDataset(root)[0]
    theirs = VOCSegmentation(tmp_path)[0]
    assert torch.equal(sample["mask"], torch.from_numpy(np.array(theirs[1])).long())
    assert torch.equal(sample["image"], torch.from_numpy(np.array(theirs[0])).permute(2, 0, 1))
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("../../a\n")
    with pytest.raises(DataError, match="leads out of the dataset's root"):
        VOCSegmentationDataset(root)


# Masked images


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1))
def test_a_mask_hides_an_exact_number_of_patches(rows: int, columns: int, ratio: float) -> None:
    """round(ratio * patches), for any sizes; hidden and shown ones add up."""
    mask = MaskingGenerator((rows, columns), ratio)()
    assert (mask.dtype, mask.shape) == (torch.bool, (rows * columns,))
    assert int(mask.sum()) == round(ratio * rows * columns)
    assert int(mask.sum()) + int((~mask).sum()) == rows * columns


def test_every_patch_is_hidden_as_often() -> None:
    """Masks differ, and the share of each patch is the ratio (within 5 standard deviations)."""
    torch.manual_seed(0)
    generator = MaskingGenerator(4, 0.75)
    share = torch.stack([generator() for _ in range(2000)]).float().mean(0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 2000) ** 0.5


def test_masked_pictures_and_their_psnr(tmp_path: Path) -> None:
    """Paths come from a file; the image is that of the file, so PSNR of a copy with noise is that of the formula."""
    metrics = pytest.importorskip("torchmetrics.image")
    for i in range(3):
        picture(tmp_path / f"{i}.png", pixels(i, 32, 32))
    (tmp_path / "a.txt").write_text("0.png\n1.png\n2.png\n")
    data = MAEAnnFileDataset(tmp_path / "a.txt", img_size=32, patch_size=8, mask_ratio=0.6, transform=[])
    (batch,) = Stream(data, batch_size=3, shuffle=False, seed=0, pad=False).epoch(0)
    assert batch["mask"].sum(1).tolist() == [10, 10, 10]
    clean = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / f"{i}.png"))) for i in range(3)]).permute(0, 3, 1, 2)
    assert torch.equal(batch["image"], clean)
    noisy = (clean.float() + 20 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    psnr = metrics.PeakSignalNoiseRatio(data_range=255.0)
    psnr.update(noisy, batch["image"].float())
    by_hand = 10 * np.log10(255.0**2 / np.mean((noisy.numpy().astype("float64") - clean.numpy()) ** 2))
    assert float(psnr.compute()) == pytest.approx(float(by_hand), abs=1e-4)
    cropped = MAEAnnFileDataset(tmp_path / "a.txt", img_size=24, patch_size=8)
    assert cropped[0]["image"].shape == (3, 24, 24)
    with pytest.raises(ValueError, match="img_size is 24"):
        MAEAnnFileDataset(tmp_path / "a.txt", img_size=24, patch_size=8, transform=[])[0]
    with pytest.raises(ConfigError, match="patches of 7 do not fill an image of 24"):
        MAEAnnFileDataset(tmp_path / "a.txt", img_size=24, patch_size=7)
    with pytest.raises(ConfigError, match="expected a ratio in"):
        MaskingGenerator(4, 1.5)


# Sequences


def test_windows_of_a_time_series(tmp_path: Path) -> None:
    """Each window is followed by what it predicts, none leaves its part, and train normalises every part."""
    rows = torch.arange(20, dtype=torch.float32)
    (tmp_path / "t.csv").write_text("a,b\n" + "\n".join(f"{v},{v * 10}" for v in rows.tolist()))
    data = WindowedTimeSeries(tmp_path / "t.csv", 3, 2, stride=4, targets=["b"])
    assert len(data) == 4
    assert data[1]["series"].tolist() == [[4, 40], [5, 50], [6, 60]]
    assert data[1]["target"].tolist() == [[70], [80]]
    train = WindowedTimeSeries(tmp_path / "t.csv", 3, 1, part=(0, 0.5), normalize=(0, 0.5))
    val = WindowedTimeSeries(tmp_path / "t.csv", 3, 1, part=(0.5, 1), normalize=(0, 0.5))
    assert (len(train), len(val)) == (7, 7)
    std, mean = torch.std_mean(rows[:10])
    torch.testing.assert_close(train[6]["target"][0], (rows[9] - mean).expand(2) / std)
    torch.testing.assert_close(val[0]["series"][:, 0], (rows[10:13] - mean) / std)
    (batch, *_) = Stream(val, batch_size=4, shuffle=True, seed=0, pad=True).epoch(0)
    assert batch["series"].shape == (4, 3, 2)
    with pytest.raises(DataError, match=r"the split is empty: part=\(0.9, 1\) has 2 rows; one window needs 4"):
        WindowedTimeSeries(tmp_path / "t.csv", 3, 1, part=(0.9, 1))
    with pytest.raises(DataError, match="expected part="):
        WindowedTimeSeries(tmp_path / "t.csv", 3, 1, part=(0.9, 0.1))


@pytest.mark.parametrize("level", ["byte", "char"])
def test_windows_of_a_text(tmp_path: Path, level: Any) -> None:
    """Targets are the inputs one token on, every token is predicted once, and read by window or at once they are the same."""
    text = "Größe ist relativ. " * 5
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    data = TextWindows(tmp_path / "t.txt", 8, level=level)
    tokens = torch.cat([data[i]["input"] for i in range(len(data))])
    assert data.vocabulary.decode(tokens) == (
        text.encode()[: len(tokens)].decode(errors="replace") if level == "byte" else text[: len(tokens)]
    )
    stacked = data.tensors()
    assert stacked is not None
    assert len(data) == len(stacked["input"]) == (len(text.encode() if level == "byte" else text) - 1) // 8
    for i in range(len(data)):
        assert torch.equal(data[i]["input"][1:], data[i]["target"][:-1])
        assert all(torch.equal(data[i][n], stacked[n][i]) for n in stacked)
    half = TextWindows(tmp_path / "t.txt", 8, level=level, part=(0.5, 1), stride=3)
    size = len(text.encode() if level == "byte" else text)
    assert len(half) == (size - round(size * 0.5) - 9) // 3 + 1


def test_texts_that_cannot_be_read_are_reported(tmp_path: Path) -> None:
    """Missing, empty, short, no UTF-8, and a character outside the alphabet."""
    path = tmp_path / "t.txt"
    with pytest.raises(DataError, match=r"t\.txt: cannot be read"):
        TextWindows(path, 4)
    for content, settings, message in (
        (b"", {}, "the split is empty"),
        (b"abcd", {}, "has 4 rows; one window needs 5"),
        (b"ab\xffcdefg", {"level": "char"}, "line 1: no UTF-8"),
        (b"abcdefg", {"level": "char", "alphabet": "abcde"}, "the character 'f' .at 5. is not in the alphabet of 5"),
        (b"abcdefg", {"stride": 0}, "window and stride must be at least 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            TextWindows(path, 4, **settings)


def test_sounds_are_cut_and_filled_to_one_length(tmp_path: Path) -> None:
    """Centre, start and random cuts; channels are averaged; zeros behind a short one; another rate is a bad sample."""
    long = torch.arange(100).repeat(2, 1) * 100
    sound(tmp_path / "s" / "a" / "long.wav", long)
    sound(tmp_path / "s" / "b" / "short.wav", long[:, :4])

    def read(i: int, **settings: Any) -> Tensor:
        return AudioClassificationDataset(tmp_path / "s", 10, 8000, **settings)[i]["audio"]

    wave = (long[:1] / 32768).float()
    assert torch.equal(read(0, crop="start"), wave[:, :10])
    assert torch.equal(read(0, crop="center", mono=False), wave[:, 45:55].repeat(2, 1))
    torch.manual_seed(0)
    starts = {int(read(0)[0, 0] * 32768 / 100) for _ in range(40)}
    assert len(starts) > 10
    assert starts <= set(range(91))
    assert torch.equal(read(1), torch.cat([wave[:, :4], torch.zeros(1, 6)], 1))
    (tmp_path / "a.jsonl").write_text('{"audio": "s/a/long.wav", "label": "x"}\n')
    listed = AudioClassificationDataset(tmp_path / "a.jsonl", 10, 16000)
    assert listed.classes == ["x"]
    with pytest.raises(ValueError, match=r"long\.wav: 8000 frames per second; expected 16000"):
        listed[0]


def test_flac_files_without_soundfile_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the dataset is made, and not sample by sample."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.flac").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(DataError, match=r"x\.flac: reading a .flac file needs the package soundfile"):
        AudioClassificationDataset(tmp_path, 10)


# Datasets of others


class Rows:
    """As a dataset of Hugging Face: a length, an index, rows that are dicts of Python values."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.fromarray(pixels(index).permute(1, 2, 0).contiguous().numpy())
        return {"img": image, "label": index % 2, "text": f"row {index}", "scores": [0.5, index], "meta": {"id": index}}


def test_rows_of_dicts_become_tensors() -> None:
    """Images of PIL as uint8, numbers and lists of them as tensors, text stays; fields are chosen and renamed."""
    data = WrappedDataset(Rows(), transform={"type": "Resize", "size": (6, 8)})
    sample = data[2]
    assert (sample["img"].shape, sample["img"].dtype) == ((3, 6, 8), torch.uint8)
    assert (sample["label"].item(), sample["text"], sample["scores"].tolist(), sample["meta"]["id"].item()) == (
        0,
        "row 2",
        [0.5, 2],
        2,
    )
    chosen = WrappedDataset(Rows(), fields={"input": "img", "target": "label"})
    (batch,) = Stream(chosen, batch_size=4, shuffle=False, seed=0, pad=False).epoch(0)
    assert torch.equal(batch["input"], torch.stack([pixels(i) for i in range(4)]))
    assert batch["target"].tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match=r"samples have no field 'image'.* They have: img, label"):
        WrappedDataset(Rows(), fields={"input": "image"})
    with pytest.raises(DataError, match="the split is empty"):
        WrappedDataset([])


def test_torchvision_data_sets_go_by_name(tmp_path: Path) -> None:
    """ImageFolder by its own name gives the samples of ours, with torchvision's transforms or with ours."""
    for i, label in enumerate(("a", "b")):
        picture(tmp_path / label / "x.png", pixels(i))
    by_name = DATASETS.build(
        dict(
            type="WrappedDataset",
            dataset=dict(type="ImageFolder", root=str(tmp_path)),
            transform=[dict(type="CenterCrop", size=8)],
        ),
        "data",
    )
    ours = ClassificationImageDataset(tmp_path, transform=[dict(type="CenterCrop", size=8)])
    assert by_name.classes == ours.classes == ["a", "b"]
    for i in range(2):
        assert torch.equal(by_name[i]["input"], ours[i]["input"])
        assert torch.equal(by_name[i]["target"], ours[i]["target"])


class Pairs(torch.utils.data.Dataset[Any]):
    """A torch dataset whose samples are nested tuples and dicts of any names."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {"two": (torch.tensor([index]), {"inner": [torch.tensor(index), 2.0 * index]})}


def test_nested_samples_of_any_names_make_batches() -> None:
    """Dicts in tuples in dicts keep their form; each leaf is stacked."""
    (batch,) = Stream(Pairs(), batch_size=4, shuffle=False, seed=0, pad=True).epoch(0)
    assert batch["two"][0].tolist() == [[0], [1], [2], [3]]
    assert batch["two"][1]["inner"][0].tolist() == [0, 1, 2, 3]
    assert batch["two"][1]["inner"][1].tolist() == [0, 2, 4, 6]


def test_a_dataset_is_split_in_two(tmp_path: Path) -> None:
    """The parts are disjoint and are all together, each class gives its share, and in-memory data stays in memory."""
    for i in range(20):
        picture(tmp_path / ("a" if i < 15 else "b") / f"{i}.png", pixels(i, 4, 4))
    entry = dict(type="ClassificationImageDataset", source=str(tmp_path))
    parts = [SplitDataset(entry, part, val_fraction=0.2, seed=3) for part in ("train", "val")]
    assert [len(p) for p in parts] == [16, 4]
    assert [p.targets.bincount().tolist() for p in parts] == [[12, 4], [3, 1]]
    assert sorted(torch.cat([p.indices for p in parts]).tolist()) == list(range(20))
    assert parts[1].classes == ["a", "b"]
    whole = ClassificationImageDataset(tmp_path)
    for part in parts:
        for i, index in enumerate(part.indices.tolist()):
            assert torch.equal(part[i]["input"], whole[index]["input"])
            assert part[i]["target"] == whole[index]["target"] == part.targets[i]
    (tmp_path / "t.csv").write_text("a,b\n" + "".join(f"{i},{i}\n" for i in range(10)))
    table = SplitDataset(dict(type="TableDataset", table_path=str(tmp_path / "t.csv")), "val", val_fraction=0.3)
    assert table.tensors()["target"].tolist() == [table[i]["target"].item() for i in range(3)]  # type: ignore[index]
    assert SplitDataset([1, 2, 3], "val", val_fraction=0.5).tensors() is None
    with pytest.raises(DataError, match="leaves none for 'val'"):
        SplitDataset([1, 2, 3], "val", val_fraction=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda scene: COCODataset(*scene, box_format="xxyy"), "COCODataset: box_format: expected 'xyxy' | .* got str 'xxyy'"),
        (lambda scene: COCODataset(*scene, box_policy="clamp"), "COCODataset: box_policy: expected 'error'"),
        (lambda scene: COCOSegmentationDataset(*scene, mode="panoptic"), "mode: expected 'semantic' | 'instance', got"),
        (lambda scene: VOCDataset(scene[1], box_format="yolo"), "VOCDataset: box_format: expected"),
        (lambda scene: TextWindows(scene[0], 4, level="word"), "TextWindows: level: expected 'byte' | 'char', got str 'word'"),
        (lambda scene: AudioClassificationDataset(scene[1], 4, crop="middle"), "AudioClassificationDataset: crop: expected"),
        (lambda scene: SplitDataset([1], "test"), "SplitDataset: part: expected 'train' | 'val', got str 'test'"),
        (lambda scene: PadCollate(overflow="drop"), "PadCollate: overflow: expected 'error' | 'cut', got str 'drop'"),
    ],
)
def test_a_word_that_is_not_known_is_never_taken_for_another(make: Any, message: str, scene: tuple[Path, Path]) -> None:
    """In Python too, where no cfg was checked."""
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        make(scene)


def test_damaged_pictures_are_listed_by_kind(scene: tuple[Path, Path], tmp_path: Path) -> None:
    """In any of the datasets: the file and the kind of damage, and the good samples as ever."""
    shutil.copytree(scene[1], tmp_path / "images")
    (tmp_path / "images" / "0.png").write_bytes(b"")
    (tmp_path / "images" / "3.png").unlink()
    whole = (tmp_path / "images" / "4.png").read_bytes()
    (tmp_path / "images" / "4.png").write_bytes(whole[:-200])
    data = COCODataset(scene[0], tmp_path / "images", transform={"type": "LetterBox", "size": 32})
    collate = PadCollate(max_size={"boxes": 8, "labels": 8})
    stream = Stream(data, batch_size=3, shuffle=False, seed=0, pad=True, collate_fn=collate, max_bad_frac=0.5)
    batches = list(stream.epoch(0))
    assert {b.sample: b.kind for b in stream.bad} == {0: "empty", 3: "missing", 4: "truncated"}
    assert all(f"images/{b.sample}.png" in f"{b.path} {b.message}" for b in stream.bad)
    assert [b["_weight"].tolist() for b in batches] == [[0, 1, 1], [0, 0, 1]]
    assert [int(i) for b in batches for i, w in zip(b["image_id"], b["_weight"], strict=True) if w] == [11, 12, 15]


def ready(folder: Path, scene: tuple[Path, Path]) -> list[Any]:
    """One of each kind."""
    picture(folder / "f" / "cat" / "0.png")
    (folder / "a.txt").write_text("f/cat/0.png\n")
    (folder / "t.csv").write_text("a,b\n" + "1,2\n" * 9)
    sound(folder / "s" / "a" / "x.wav", torch.arange(20)[None])
    flip = [{"type": "RandomHorizontalFlip"}]
    return [
        ClassificationImageDataset(folder / "f", transform=flip),
        COCODataset(*scene, tasks=("bbox", "mask", "keypoints"), transform=[{"type": "Mosaic", "size": 32}]),
        COCOSegmentationDataset(*scene, transform=flip),
        MAEAnnFileDataset(folder / "a.txt", img_size=8, patch_size=4),
        AudioClassificationDataset(folder / "s", 10),
        TextWindows(folder / "t.csv", 5),
        TextWindows(folder / "t.csv", 5, level="char", part=(0.2, 1)),
        WindowedTimeSeries(folder / "t.csv", 3),
        WrappedDataset([(1.0, 2)]),
    ]


def test_data_sets_travel_to_workers(tmp_path: Path, scene: tuple[Path, Path]) -> None:
    """Pickled, as spawn does it, every one is the same: the same length and, under a seed, the same sample; and none is large."""
    for data in ready(tmp_path, scene):
        content = pickle.dumps(data)
        copy = pickle.loads(content)
        assert len(content) < 60_000
        assert len(copy) == len(data)
        made = []
        for one in (data, copy):
            torch.manual_seed(3)
            made.append(dict(tree.items(one[0])))
        assert list(made[0]) == list(made[1])
        assert all(torch.equal(made[0][n], made[1][n]) for n in made[0])


READY = "AudioClassificationDataset COCODataset COCOSegmentationDataset ClassificationImageDataset MAEAnnFileDataset TextWindows VOCDataset VOCSegmentationDataset WindowedTimeSeries"  # noqa: E501


@pytest.mark.parametrize("name", READY.split())
def test_a_file_that_is_not_there_is_one_clear_error(name: str, tmp_path: Path) -> None:
    """Exit code 3, at most four lines, and the path is in it."""
    more = {"COCODataset": dict(images_root="i"), "COCOSegmentationDataset": dict(images_root="i")}
    sizes = {"AudioClassificationDataset": dict(frames=4), "TextWindows": dict(window=4), "WindowedTimeSeries": dict(window=4)}
    first = {"TextWindows": "path", "VOCDataset": "root", "VOCSegmentationDataset": "root", "WindowedTimeSeries": "table_path"}
    first |= dict.fromkeys(["AudioClassificationDataset", "ClassificationImageDataset"], "source")
    entry = {first.get(name, "annotation_file"): str(tmp_path / "none.csv"), **more.get(name, {}), **sizes.get(name, {})}
    with pytest.raises(AilabError, match=r"none\.csv") as error:
        DATASETS.build({"type": name, **entry}, "data")
    assert error.value.exit_code == 3
    assert len(str(error.value).splitlines()) <= 4
