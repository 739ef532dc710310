"""Transforms of a sample by name: boxes, masks and points stay on what they mark, and a seed says it all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from files import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ailab.datasets import (
    DetectionTask,
    KeypointFlip,
    LetterBox,
    ListDataset,
    Mosaic,
    Stream,
    WrappedDataset,
    build_transform,
)
from ailab.datasets.tasks.objects import ObjectsTask
from ailab.datasets.transforms.pipeline import apply_transform
from ailab.errors import ConfigError
from ailab.registry import COLLATES, DATASETS


def marked(h: int, w: int, box: tuple[int, int, int, int], value: int = 200) -> dict[str, Any]:
    """A black image with one bright rectangle, which is its box, its mask and whose corner is its point."""
    x0, y0, x1, y1 = box
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = value
    return {
        "image": image,
        "boxes": torch.tensor([box], dtype=torch.float32),
        "labels": torch.tensor([0]),
        "masks": (image[:1] > 0),
        "keypoints": torch.tensor([[[x0, y0]]], dtype=torch.float32),
        "visible": torch.tensor([[2]]),
    }


class Marked(ListDataset, ObjectsTask):
    def __init__(self, items: Any, transform: Any = None):
        super().__init__(items)
        self.transform = build_transform(transform)

    def load(self, raw: Any) -> Any:
        return dict(raw)


def bright_box(image: Tensor) -> list[int]:
    """Of what is bright in an image: x0, y0, x1, y1."""
    ys, xs = (image[0] > 100).nonzero(as_tuple=True)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


SPECS = {
    "flip": [{"type": "RandomHorizontalFlip", "p": 1.0}],
    "crop": [{"type": "RandomCrop", "size": (20, 20)}],
    "resize": [{"type": "Resize", "size": (40, 60), "antialias": True}],
    "letterbox": [{"type": "LetterBox", "size": (48, 48), "fill": 0}],
    "pad": [{"type": "Pad", "padding": [3, 5, 1, 2]}],
    "zoom": [{"type": "RandomZoomOut", "p": 1.0, "side_range": (1.2, 1.5)}],
    "nested": [{"type": "RandomApply", "p": 1.0, "transforms": [{"type": "RandomVerticalFlip", "p": 1.0}]}],
}


@pytest.mark.parametrize("name", SPECS)
def test_boxes_masks_and_points_stay_on_the_object(name: str) -> None:
    """After any transform of torchvision by its own name, the box and the mask are those of what is seen in the image."""
    torch.manual_seed(1)
    sample = Marked([marked(24, 36, (12, 8, 22, 18))], SPECS[name])[0]
    assert type(sample["image"]) is type(sample["boxes"]) is Tensor
    seen = torch.tensor(bright_box(sample["image"]), dtype=torch.float32)
    assert (sample["boxes"][0] - seen).abs().max() <= 1
    ys, xs = sample["masks"][0].nonzero(as_tuple=True)
    drawn = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
    assert (drawn - seen).abs().max() <= 1
    assert sample["masks"].shape[-2:] == sample["image"].shape[-2:]


def test_an_object_that_is_cut_away_is_gone() -> None:
    """All its rows are dropped together; a point outside is not visible; without a transform nothing is dropped."""
    two = marked(20, 20, (1, 1, 4, 4))
    more = marked(20, 20, (12, 12, 18, 18))
    both = {n: torch.cat([two[n], more[n]]) if n != "image" else two[n] for n in two}
    both["labels"] = torch.tensor([5, 6])
    sample = Marked([both], [{"type": "CenterCrop", "size": 14}])[0]  # from 3 to 17
    assert sample["labels"].tolist() == [5, 6]
    assert sample["boxes"].tolist() == [[0, 0, 1, 1], [9, 9, 14, 14]]
    assert sample["visible"].tolist() == [[0], [2]]
    sample = Marked([both], [{"type": "CenterCrop", "size": 12}])[0]  # from 4 to 16
    assert {n: len(sample[n]) for n in ("boxes", "labels", "masks", "keypoints", "visible")} == dict.fromkeys(
        ("boxes", "labels", "masks", "keypoints", "visible"), 1
    )
    assert sample["labels"].tolist() == [6]
    assert torch.equal(Marked([both])[0]["boxes"], both["boxes"])


def test_a_transform_that_leaves_fields_of_different_length_is_reported() -> None:
    """Rows that no longer belong together are a bad sample, not a silent one."""

    def broken(sample: Any) -> Any:
        return {**sample, "labels": torch.tensor([0, 1])}

    with pytest.raises(ValueError, match="the fields of the objects differ in length: boxes 1, labels 2"):
        Marked([marked(8, 8, (1, 1, 4, 4))], broken)[0]


@pytest.mark.parametrize("form", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("normalize", [False, True])
def test_boxes_come_in_the_format_asked_for(form: Any, normalize: bool) -> None:
    """Of the image that is delivered, after the transform."""
    from torchvision.ops import box_convert

    class Data(Marked, DetectionTask):
        box_format = form

        def load(self, raw: Any) -> Any:
            return dict(raw)

    Data.normalize = normalize
    data = Data([marked(24, 36, (12, 8, 22, 18))], {"type": "Resize", "size": (48, 72)})
    wanted = box_convert(torch.tensor([[24.0, 16, 44, 36]]), "xyxy", form)
    torch.testing.assert_close(data[0]["boxes"], wanted / torch.tensor([72.0, 48, 72, 48]) if normalize else wanted)


@settings(max_examples=30)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(8, 64), st.integers(8, 64), st.booleans())
def test_letterbox_keeps_the_aspect(h: int, w: int, to_h: int, to_w: int, up: bool) -> None:
    """The result has the size asked for, the whole image is on it, evenly padded, its aspect right to a pixel."""
    box = LetterBox((to_h, to_w), fill=7, scale_up=up)
    kinds = {"image": "image", "boxes": "boxes", "map": "mask"}
    sample = {
        "image": torch.full((3, h, w), 200, dtype=torch.uint8),
        "boxes": torch.tensor([[0.0, 0, w, h]]),
        "map": torch.ones(h, w, dtype=torch.int64),
    }
    out = apply_transform(build_transform(box), sample, kinds)  # type: ignore[arg-type]
    assert out["image"].shape == (3, to_h, to_w)
    x0, y0, x1, y1 = bright_box(out["image"])
    torch.testing.assert_close(out["boxes"][0], torch.tensor([x0, y0, x1, y1], dtype=torch.float32), atol=1e-3, rtol=0)
    assert abs((to_w - x1) - x0) <= 1
    assert abs((to_h - y1) - y0) <= 1
    scale = min(to_h / h, to_w / w) if up else min(to_h / h, to_w / w, 1)
    assert abs((x1 - x0) - w * scale) <= 1
    assert abs((y1 - y0) - h * scale) <= 1
    inside = out["map"] == 1
    assert torch.equal(inside, out["image"][0] == 200)
    assert (out["map"][~inside] == 255).all()


def test_a_mosaic_is_four_pictures_with_their_objects() -> None:
    """Each box that is left is around the bright rectangle of its own image; masks and points are where the boxes are."""
    data = Marked(
        [marked(30, 30, (6, 6, 18, 18), value=110 + 10 * i) for i in range(8)], [{"type": "Mosaic", "size": 64, "fill": 0}]
    )
    for i in range(8):
        torch.manual_seed(i)
        sample = data[i]
        assert sample["image"].shape == (3, 64, 64)
        assert 1 <= len(sample["boxes"]) <= 4
        for (x0, y0, x1, y1), mask, point, seen in zip(
            sample["boxes"].round().int().tolist(), sample["masks"], sample["keypoints"], sample["visible"], strict=True
        ):
            inner = sample["image"][0, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1].float()
            assert inner.numel() == 0 or inner.min() > 100
            ys, xs = mask.nonzero(as_tuple=True)
            assert (
                max(abs(int(xs.min()) - x0), abs(int(ys.min()) - y0), abs(int(xs.max()) + 1 - x1), abs(int(ys.max()) + 1 - y1))
                <= 1
            )
            if seen[0]:
                assert (point[0] - torch.tensor([x0, y0])).abs().max() <= 1


def test_a_mosaic_is_a_function_of_the_seed() -> None:
    """The same batches for any number of workers; another epoch gives others; p=0 is a letterbox; a bad sample is passed over."""

    class Data(Marked):
        def load(self, raw: Any) -> Any:
            if raw is None:
                raise OSError("gone")
            return dict(raw)

    items: list[Any] = [marked(20, 30, (2, 2, 12, 12), value=110 + i) for i in range(12)]
    items[5] = None
    kept = {"boxes": 0, "labels": 0, "masks": 0, "keypoints": 0, "visible": 0}

    def pictures(workers: int, epoch: int) -> Tensor:
        data = Data(items, [{"type": "Mosaic", "size": 32, "p": 0.7}, lambda s: {n: v for n, v in s.items() if n not in kept}])
        stream = Stream(data, batch_size=4, shuffle=True, seed=3, pad=False, num_workers=workers, max_bad_frac=0.5)
        return torch.cat([b["image"] for b in stream.epoch(epoch)])

    first = pictures(0, 0)
    assert torch.equal(first, pictures(2, 0))
    assert not torch.equal(first, pictures(0, 1))
    plain = Marked(items[:1], Mosaic(32, p=0.0))[0]
    assert torch.equal(plain["image"], Marked(items[:1], LetterBox(32))[0]["image"])


def test_left_and_right_change_places_in_a_flip() -> None:
    """The named pairs are swapped with their visibility, and twice is the identity."""
    points = torch.tensor([[[1.0, 1.0], [2.0, 3.0], [6.0, 3.0]]])
    sample = {"image": pixels(0, 8, 10), "keypoints": points, "visible": torch.tensor([[2, 1, 0]])}
    kinds = {"image": "image", "keypoints": "keypoints"}
    flip = build_transform(KeypointFlip([(1, 2)], p=1.0))
    assert flip is not None
    out = apply_transform(flip, sample, kinds)
    assert torch.equal(out["image"], sample["image"].flip(-1))
    assert out["keypoints"].tolist() == [[[8, 1], [3, 3], [7, 3]]]
    assert out["visible"].tolist() == [[2, 0, 1]]
    back = apply_transform(flip, out, kinds)
    assert all(torch.equal(back[n], sample[n]) for n in sample)


def test_randaugment_and_friends_are_torchvisions() -> None:
    """Under the sample's seed they give what torchvision's own object gives."""
    from torchvision.transforms import v2

    data = WrappedDataset(
        [(pixels(0, 20, 20), 1)], transform=[{"type": "RandAugment"}, {"type": "RandomResizedCrop", "size": 12}]
    )
    torch.manual_seed(4)
    ours = data[0]["input"]
    torch.manual_seed(4)
    theirs = v2.RandomResizedCrop(12)(v2.RandAugment()(pixels(0, 20, 20)))
    assert torch.equal(ours, theirs)
    assert data[0]["target"].tolist() == 1


@pytest.mark.parametrize(
    "spec",
    [
        [{"type": "RandomResizedCrop", "size": 12}, {"type": "RandomHorizontalFlip"}],
        [{"type": "TrivialAugmentWide"}, {"type": "RandomErasing", "p": 1.0}],
        [{"type": "ColorJitter", "brightness": 0.5}, {"type": "ToDtype", "dtype": torch.float32, "scale": True}],
        [{"type": "RandomApply", "transforms": [{"type": "GaussianBlur", "kernel_size": 3}]}],
    ],
)
def test_the_fast_path_for_one_image_equals_the_path_for_a_dict(spec: list[Any]) -> None:
    """The short way for samples with one image and nothing to move with it gives the same bits, and leaves the label."""
    short, long = build_transform(spec), build_transform([*spec, lambda sample: sample])
    assert short is not None
    assert long is not None
    assert short.image_steps is not None
    assert long.image_steps is None
    as_decoded = pixels(0, 75, 100).permute(1, 2, 0).contiguous().permute(2, 0, 1)  # pixel by pixel in memory
    for seed, picture in product(range(5), (pixels(0, 20, 20), as_decoded)):
        sample = {"input": picture, "target": torch.tensor([0.0, 1.0])}
        made = []
        for pipeline in (short, long):
            torch.manual_seed(seed)
            made.append(apply_transform(pipeline, sample, {"input": "image"}))
        assert type(made[0]["input"]) is Tensor
        assert torch.equal(made[0]["input"], made[1]["input"])
        assert torch.equal(made[0]["target"], sample["target"])


@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.2, 0.25), (4.0, 5.0)])
@pytest.mark.parametrize("size", [(375, 500), (30, 400), (400, 30), (64, 80)])
def test_the_crop_of_the_fast_path_is_torchvisions(ratio: tuple[float, float], size: tuple[int, int]) -> None:
    """Every draw and every bit, where no crop fits, too, and after a transform was changed; what is drawn next is the same.

    The image is not written to.
    """
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop((64, 80), ratio=ratio), v2.RandomHorizontalFlip(0.4)]
    pipeline = build_transform(steps)
    assert pipeline is not None
    picture = pixels(1, *size).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    kept = picture.clone()
    for seed in range(30):
        if seed == 20:
            steps[0].scale, steps[0].size, steps[1].p = (0.5, 0.6), (40, 30), 0.9
        torch.manual_seed(seed)
        theirs = steps[1](steps[0](picture))
        after = torch.rand(1)
        torch.manual_seed(seed)
        ours = apply_transform(pipeline, {"input": picture}, {"input": "image"})["input"]
        assert torch.equal(ours, theirs)
        assert torch.equal(torch.rand(1), after)
        ours.zero_()
        assert torch.equal(picture, kept)


def test_a_video_is_transformed_alike_in_every_frame() -> None:
    """One crop for all frames."""
    frames = torch.arange(20 * 20, dtype=torch.int32).view(1, 1, 20, 20).expand(4, 3, 20, 20).clone().to(torch.uint8)
    crop = build_transform({"type": "RandomCrop", "size": 5})
    assert crop is not None
    out = apply_transform(crop, {"frames": frames}, {"frames": "video"})["frames"]
    assert out.shape == (4, 3, 5, 5)
    assert all(torch.equal(out[0], frame) for frame in out)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"type": "RandomHorizontalFlipp"},
            "type: there is no transform 'RandomHorizontalFlipp'.*\n.*RandomHorizontalFlip'",
        ),
        ([{"type": "Resize", "size": 4}, {"type": "LetterBox", "sise": 4}], r"transform.1.sise: LetterBox takes no 'sise'"),
        (
            {"type": "RandomApply", "transforms": [{"type": "None"}]},
            r"transform.transforms.0.type: there is no transform 'None'",
        ),
        ("Resize", "transform: expected dict"),
        ([3], "transform.0: expected dict"),
    ],
)
def test_a_transform_that_does_not_exist_is_reported(spec: Any, message: str) -> None:
    """With its place in the list, the nearest name and what it takes."""
    with pytest.raises(ConfigError, match=message):
        build_transform(spec)


def test_transforms_are_checked_with_the_cfg() -> None:
    """Before anything is built, in lists and in each other, with the path in the cfg."""
    transform = [{"type": "Resize", "sise": 4}, {"type": "RandomApply", "transforms": [{"type": "Flip"}]}, 3]
    entry = {"type": "WrappedDataset", "dataset": {"type": "Nothing"}, "transform": transform}
    problems = "\n".join(DATASETS.check(entry, "cfg.data.train"))
    assert "cfg.data.train.transform.0.sise: Resize takes no 'sise'" in problems
    assert "cfg.data.train.transform.0.size: Resize needs 'size'" in problems
    assert "cfg.data.train.transform.1.transforms.0.type: there is no transform 'Flip'" in problems
    assert "cfg.data.train.transform.2: expected dict(type=...)" in problems
    assert "cfg.data.train.dataset.type: there is no dataset 'Nothing'" in problems
    assert DATASETS.check({"type": "WrappedDataset", "dataset": [1], "transform": None}, "cfg.data.train") == []
    nested = COLLATES.check({"type": "MultiScaleCollate", "sizes": [4], "collate": "PadColate"}, "cfg")
    assert "cfg.collate.type: there is no collate function 'PadColate'" in nested[0]


def test_a_transform_has_to_give_a_dict() -> None:
    """A callable is given all fields, and what is no dict is reported; a mix of samples needs others."""
    with pytest.raises(TypeError, match="returned Image; expected a dict of fields"):
        Marked([marked(8, 8, (1, 1, 4, 4))], lambda s: s["image"])[0]
    with pytest.raises(TypeError, match="Mosaic mixes samples"):
        build_transform(Mosaic(8))({})  # type: ignore[misc]
    assert build_transform(None) is build_transform([]) is None


def test_a_transform_is_named_with_its_whole_path() -> None:
    """What one of several transforms refuses, also a nested one, begins with its place in the cfg; dtypes can be text."""
    flips: list[Any] = [dict(type="RandomHorizontalFlip"), dict(type="RandomHorizontalFlip", p=3.0)]
    entry = dict(type="WrappedDataset", dataset=[1], fields={"image": "image"}, transform=flips)
    with pytest.raises(ConfigError, match=r"^cfg\.data\.train\.transform\.1: RandomHorizontalFlip could not be built: "):
        DATASETS.build(entry, "cfg.data.train")
    entry["transform"] = [dict(type="RandomApply", transforms=flips)]
    with pytest.raises(ConfigError, match=r"^cfg\.data\.train\.transform\.0\.transforms\.1: RandomHorizontalFlip could not"):
        DATASETS.build(entry, "cfg.data.train")
    entry["transform"] = [dict(type="ToDtype", dtype="flaot32", scale=True)]
    with pytest.raises(
        ConfigError, match=r"^cfg\.data\.train\.transform\.0\.dtype: expected dtype .*\n  Did you mean 'float32'"
    ):
        DATASETS.build(entry, "cfg.data.train")
    pipeline = build_transform([dict(type="ToDtype", dtype="torch.float32", scale=True)])
    assert pipeline is not None
    image = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(apply_transform(pipeline, {"image": image}, {"image": "image"})["image"], torch.ones(3, 2, 2))
