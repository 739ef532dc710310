"""Tasks, alone and with every storage that they make sense with, on small real files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from files import coco, picture, pixels, sound, thing, voc
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ailab.datasets import (
    AudioClassificationTask,
    BadFile,
    ByteVocabulary,
    CharVocabulary,
    ClassificationTask,
    CocoAnnotationDataset,
    DetectionTask,
    FileAnnotationDataset,
    FolderPerClassDataset,
    GraphTask,
    InstanceSegmentationTask,
    KeypointTask,
    ListDataset,
    PadCollate,
    PanopticTask,
    RegressionTask,
    SegmentationTask,
    Seq2SeqTask,
    SpeechRecognitionTask,
    Stream,
    StreamDataset,
    TableAnnotationDataset,
    TextClassificationTask,
    TimeSeriesTask,
    VideoClassificationTask,
    VocAnnotationDataset,
    read_audio,
    read_frames,
    read_image,
    read_label_map,
)
from ailab.datasets.files.rle import decode_mask
from ailab.errors import DataError

CLASSES = ["cat", "dog"]
H, W = 12, 16


def maps() -> tuple[Tensor, Tensor]:
    """A map of classes and one of objects, (H, W) uint8."""
    semantic = torch.zeros(H, W, dtype=torch.uint8)
    semantic[2:6, 3:9] = 1
    instance = torch.zeros(H, W, dtype=torch.uint8)
    instance[2:6, 3:6], instance[2:6, 6:9] = 1, 2
    return semantic, instance


def record(folder: Path) -> dict[str, Any]:
    """One record that has all that any task needs, and its files. Its values are plain JSON."""
    semantic, instance = maps()
    picture(folder / "x.png")
    picture(folder / "semantic.png", semantic)
    picture(folder / "instance.png", instance)
    for i in range(4):
        picture(folder / "clip" / f"{i}.png", pixels(i))
    sound(folder / "x.wav", torch.arange(-8, 8)[None] * 2048)
    return {
        "image": str(folder / "x.png"),
        "label": "dog",
        "labels": "cat dog",
        "value": 2.5,
        "boxes": [[1, 2, 5, 6], [0, 0, 16, 12]],
        "names": ["dog", "cat"],
        "points": [[[1, 2, 2], [3, 4, 1]], [[5, 6, 2], [0, 0, 0]]],
        "semantic": str(folder / "semantic.png"),
        "instance": str(folder / "instance.png"),
        "clip": str(folder / "clip"),
        "series": [0.5, 1.5, 2.5],
        "audio": str(folder / "x.wav"),
        "text": "né",
        "reply": "ja",
        "nodes": [[1, 2], [3, 4], [5, 6]],
        "edges": [[0, 1], [2, 0]],
    }


class Picture:
    def load_input(self, raw: Any) -> Any:
        return read_image(raw["image"])

    def load_image(self, raw: Any) -> Any:
        return read_image(raw["image"])

    def load_boxes(self, raw: Any) -> Any:
        return raw["boxes"]

    def load_labels(self, raw: Any) -> Any:
        return raw["names"]

    def load_label(self, raw: Any) -> Any:
        return raw["label"]


class Classified(Picture, ClassificationTask):
    classes = CLASSES


class MultiLabelled(Picture, ClassificationTask):
    classes, multi_label = CLASSES, True

    def load_label(self, raw: Any) -> Any:
        return raw["labels"].split()


class Valued(Picture, RegressionTask):
    def load_target(self, raw: Any) -> Any:
        return raw["value"]


class Detected(Picture, DetectionTask):
    classes = CLASSES


class Instances(Picture, InstanceSegmentationTask):
    classes = CLASSES

    def load_masks(self, raw: Any) -> Any:
        instance = read_label_map(raw["instance"])
        return torch.stack([instance == 1, instance == 2])


class Segmented(Picture, SegmentationTask):
    classes = CLASSES

    def load_mask(self, raw: Any) -> Any:
        return read_label_map(raw["semantic"])


class Panoptic(Picture, PanopticTask):
    classes = CLASSES

    def load_semantic(self, raw: Any) -> Any:
        return read_label_map(raw["semantic"])

    def load_instance(self, raw: Any) -> Any:
        return read_label_map(raw["instance"])


class Pointed(Picture, KeypointTask):
    def load_keypoints(self, raw: Any) -> Any:
        return raw["points"]


class Filmed(Picture, VideoClassificationTask):
    classes = CLASSES

    def load_frames(self, raw: Any) -> Any:
        return read_frames(raw["clip"], 2)


class Timed(TimeSeriesTask):
    def load_series(self, raw: Any) -> Any:
        return raw["series"]

    def load_target(self, raw: Any) -> Any:
        return raw["value"]


class Sounded(Picture, AudioClassificationTask):
    classes = CLASSES

    def load_audio(self, raw: Any) -> Any:
        return read_audio(raw["audio"])[0]


class Spoken(SpeechRecognitionTask):
    vocabulary = CharVocabulary("néja")

    def load_audio(self, raw: Any) -> Any:
        return read_audio(raw["audio"])[0]

    def load_transcript(self, raw: Any) -> str:
        return raw["text"]


class Read(Picture, TextClassificationTask):
    classes = CLASSES

    def load_text(self, raw: Any) -> str:
        return raw["text"]


class Translated(Seq2SeqTask):
    def load_source(self, raw: Any) -> str:
        return raw["text"]

    def load_target(self, raw: Any) -> str:
        return raw["reply"]


class Linked(GraphTask):
    def load_graph(self, raw: Any) -> Mapping[str, Any]:
        return {"nodes": raw["nodes"], "edges": raw["edges"]}

    def load_label(self, raw: Any) -> Any:
        return raw["value"]


def expected() -> dict[type, dict[str, Tensor]]:
    """What each task makes of the record, written once more by hand."""
    semantic, instance = (m.long() for m in maps())
    image, dog = pixels(), torch.tensor(1)
    wave, text = (torch.arange(-8, 8)[None] / 16), torch.tensor([110, 195, 169])
    boxes = torch.tensor([[1.0, 2, 5, 6], [0, 0, 16, 12]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 0])}
    return {
        Classified: {"input": image, "target": dog},
        MultiLabelled: {"input": image, "target": torch.tensor([1.0, 1.0])},
        Valued: {"input": image, "target": torch.tensor(2.5)},
        Detected: {"image": image, **found},
        Instances: {"image": image, **found, "masks": torch.stack([instance == 1, instance == 2])},
        Segmented: {"image": image, "mask": semantic},
        Panoptic: {"image": image, "semantic": semantic, "instance": instance},
        Pointed: {
            "image": image,
            "keypoints": torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [0, 0]]]),
            "visible": torch.tensor([[2, 1], [2, 0]]),
        },
        Filmed: {"frames": torch.stack([pixels(1), pixels(3)]), "target": dog},
        Timed: {"series": torch.tensor([[0.5], [1.5], [2.5]]), "target": torch.tensor(2.5)},
        Sounded: {"audio": wave, "target": dog},
        Spoken: {"audio": wave, "text": torch.tensor([5, 6])},  # a, j, n, é are 3 to 6
        Read: {"text": text, "target": dog},
        Translated: {"source": text, "target": torch.tensor([257, 106, 97, 258])},
        Linked: {
            "nodes": torch.tensor([[1.0, 2], [3, 4], [5, 6]]),
            "edges": torch.tensor([[0, 1], [2, 0]]),
            "target": torch.tensor(2.5),
        },
    }


TASKS = list(expected())
FLAT = [Classified, MultiLabelled, Segmented, Panoptic, Filmed, Sounded, Spoken, Read, Translated]  # records of text alone


def composed(storage: str, task: type, folder: Path) -> Any:
    """A dataset of two equal records."""
    rows = [record(folder)] * 2
    if storage in ("json", "jsonl"):
        text = json.dumps(rows) if storage == "json" else "\n".join(map(json.dumps, rows))
        (folder / f"a.{storage}").write_text(text)
        return type("Data", (FileAnnotationDataset, task), {})(folder / f"a.{storage}")
    if storage in ("csv", "table", "xlsx"):
        import pandas as pd

        frame = pd.DataFrame([{k: v for k, v in row.items() if isinstance(v, (str, float))} for row in rows])
        path = folder / ("a.xlsx" if storage == "xlsx" else "a.csv")
        (frame.to_excel if storage == "xlsx" else frame.to_csv)(path, index=False)
        return type("Data", (FileAnnotationDataset if storage == "csv" else TableAnnotationDataset, task), {})(path)
    return type("Data", (ListDataset if storage == "list" else StreamDataset, task), {})(rows)


PAIRS = [(s, t) for s in ("json", "jsonl", "list", "stream") for t in TASKS] + [
    (s, t) for s in ("csv", "table", "xlsx") for t in [*FLAT, *([] if s == "csv" else [Valued])]
]


@pytest.mark.parametrize(("storage", "task"), PAIRS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_record_becomes_a_sample(storage: str, task: Any, tmp_path: Path) -> None:
    """Whatever stores the record, a task makes the same fields of it, of the same types, and they collate."""
    data = composed(storage, task, tmp_path)
    sample, wanted = data[1], expected()[task]
    assert list(sample) == list(wanted)
    for name, value in wanted.items():
        assert (sample[name].dtype, sample[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(sample[name], value), name
    (batch,) = Stream(data, batch_size=2, shuffle=False, seed=0, pad=True).epoch(0)
    assert all(torch.equal(batch[n][0], v) and len(batch[n]) == 2 for n, v in wanted.items())


# Folders


def test_a_folder_per_class_holds_anything(tmp_path: Path) -> None:
    """Images, clips, sounds, texts and series, by the task and the endings."""
    for kind, label in (("cat", 0), ("dog", 1)):
        picture(tmp_path / "p" / kind / "x.png", pixels(label))
        for i in range(2):
            picture(tmp_path / "v" / kind / "clip" / f"{i}.png", pixels(i))
        sound(tmp_path / "s" / kind / "x.wav", torch.full((1, 4), label * 16384))
        (tmp_path / "t" / kind).mkdir(parents=True)
        (tmp_path / "t" / kind / "x.txt").write_text(kind)
        (tmp_path / "n" / kind).mkdir(parents=True)
        (tmp_path / "n" / kind / "x.csv").write_text(f"{label}\n2\n")

    class Base(FolderPerClassDataset):
        def load_label(self, raw: Any) -> int:
            return raw[1]

    class Pictures(Base, ClassificationTask):
        def load_input(self, raw: Any) -> Any:
            return read_image(raw[0])

    class Clips(Base, VideoClassificationTask):
        def load_frames(self, raw: Any) -> Any:
            return read_frames(raw[0], 3)

    class Sounds(Base, AudioClassificationTask):
        def load_audio(self, raw: Any) -> Any:
            return read_audio(raw[0])[0]

    class Texts(Base, TextClassificationTask):
        def load_text(self, raw: Any) -> str:
            return raw[0].read_text()

    class Series(Base, TimeSeriesTask):
        def load_series(self, raw: Any) -> Any:
            return [float(line) for line in raw[0].read_text().split()]

        def load_target(self, raw: Any) -> int:
            return raw[1]

    assert torch.equal(Pictures(tmp_path / "p")[1]["input"], pixels(1))
    clip = Clips(tmp_path / "v", folders=True)[0]["frames"]
    assert torch.equal(clip, torch.stack([pixels(0), pixels(1), pixels(1)]))
    assert Sounds(tmp_path / "s", extensions=[".wav"])[1]["audio"].tolist() == [[0.5] * 4]
    assert ByteVocabulary().decode(Texts(tmp_path / "t", extensions=[".txt"])[1]["text"]) == "dog"
    series = Series(tmp_path / "n", extensions=[".csv"])[1]
    assert (series["series"].tolist(), series["target"].tolist()) == ([[1.0], [2.0]], 1)


# COCO and VOC


class Shown(CocoAnnotationDataset):
    def load_image(self, raw: Any) -> Any:
        return read_image(self.image_file(raw[1]))

    load_input = load_image

    def load_boxes(self, raw: Any) -> Any:
        return [[a["bbox"][0], a["bbox"][1], a["bbox"][0] + a["bbox"][2], a["bbox"][1] + a["bbox"][3]] for a in raw[2]]

    def load_labels(self, raw: Any) -> Any:
        return [self.class_index[a["category_id"]] for a in raw[2]]

    load_label = load_labels

    def load_keypoints(self, raw: Any) -> Any:
        return [[a["keypoints"][i : i + 3] for i in range(0, 9, 3)] for a in raw[2]]

    def load_masks(self, raw: Any) -> Any:
        return torch.stack([decode_mask(a["segmentation"], (H, W), "here") for a in raw[2]])

    def load_mask(self, raw: Any) -> Any:
        return self.load_masks(raw).long().amax(0)

    load_semantic = load_mask

    def load_instance(self, raw: Any) -> Any:
        return (self.load_masks(raw).long() * torch.arange(1, 1 + len(raw[2]))[:, None, None]).amax(0)


def test_every_vision_task_reads_coco(tmp_path: Path) -> None:
    """Detection, instances, keypoints, semantic and panoptic maps, and several labels of one image, out of one file."""
    square = {"size": [H, W], "counts": [0, 5, H * W - 5]}  # the first five pixels down the first column
    more = {"keypoints": [1, 2, 2, 3, 4, 1, 0, 0, 0], "segmentation": square}
    path = coco(tmp_path, [thing(1, [1, 2, 3, 4], **more), thing(2, [0, 0, 2, 2], category=7, **more)], images=1)

    def made(task: type, **more: Any) -> Any:
        return type("Data", (Shown, task), more)(path, tmp_path / "images")[0]

    column = torch.zeros(H, W, dtype=torch.bool)
    column[:5, 0] = True
    assert made(DetectionTask)["boxes"].tolist() == [[1, 2, 4, 6], [0, 0, 2, 2]]
    assert made(DetectionTask)["labels"].tolist() == [0, 1]
    assert torch.equal(made(InstanceSegmentationTask)["masks"], torch.stack([column, column]))
    assert made(KeypointTask)["keypoints"][0].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert made(KeypointTask)["visible"].tolist() == [[2, 1, 0]] * 2
    assert torch.equal(made(SegmentationTask)["mask"], column.long())
    assert torch.equal(made(PanopticTask)["instance"], 2 * column.long())
    assert made(ClassificationTask, multi_label=True)["target"].tolist() == [1.0, 1.0]


def test_vision_tasks_read_voc(tmp_path: Path) -> None:
    """Detection, several labels of one image, and a map beside the image."""
    voc(tmp_path, "a", [("dog", (2, 3, 4, 6))])
    picture(tmp_path / "SegmentationClass" / "a.png", maps()[0])

    class Base(VocAnnotationDataset):
        classes = CLASSES

        def load_image(self, raw: Any) -> Any:
            return read_image(raw[0])

        load_input = load_image

        def load_boxes(self, raw: Any) -> Any:
            return [o["box"] for o in raw[1]["object"]]

        def load_labels(self, raw: Any) -> Any:
            return [o["name"] for o in raw[1]["object"]]

        load_label = load_labels

        def load_mask(self, raw: Any) -> Any:
            return read_label_map(tmp_path / "SegmentationClass" / f"{raw[0].stem}.png")

    def made(task: type, **more: Any) -> Any:
        return type("Data", (Base, task), more)(tmp_path / "JPEGImages", tmp_path / "Annotations")[0]

    assert made(DetectionTask)["boxes"].tolist() == [[1, 2, 4, 6]]
    assert made(DetectionTask)["labels"].tolist() == [1]
    assert made(ClassificationTask, multi_label=True)["target"].tolist() == [0.0, 1.0]
    assert torch.equal(made(SegmentationTask)["mask"], maps()[0].long())


# Laws of tasks


def test_a_data_set_is_a_few_lines_and_its_fields_have_any_name(tmp_path: Path) -> None:
    """A storage, a task and its loaders; `renamed` names the fields, the order of the bases does not matter."""
    picture(tmp_path / "cat" / "x.png")

    class Cats(ClassificationTask, FolderPerClassDataset):
        renamed = {"input": "pixels", "target": "label"}  # noqa: RUF012

        def load_input(self, raw: Any) -> Any:
            return read_image(raw[0])

        def load_label(self, raw: Any) -> Any:
            return raw[1]

    assert list(Cats(tmp_path)[0]) == ["pixels", "label"]


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (Classified, {"label": "dgo"}, "unknown class 'dgo'. Did you mean 'dog'"),
        (Classified, {"label": 2}, "there is no class 2; there are 2"),
        (Classified, {"label": -1}, "there is no class -1"),
        (Classified, {"label": 0.5}, "expected a class index, got float 0.5"),
        (MultiLabelled, {"labels": "cat cow"}, "unknown class 'cow'"),
        (Valued, {"value": float("nan")}, "the target is not finite"),
        (Valued, {"value": "high"}, "load_target: expected a tensor, .* got str"),
        (Detected, {"boxes": [[1, 2, 3]]}, r"load_boxes: expected \(N, 4\) finite numbers"),
        (Detected, {"names": ["cat"]}, "the fields of the objects differ in length: boxes 2, labels 1"),
        (Pointed, {"points": [[1, 2]]}, r"load_keypoints: expected \(N, K, 2\)"),
        (Timed, {"series": [1.0, float("inf")]}, "load_series: not finite at time 1, channel 0"),
        (Timed, {"series": []}, r"load_series: expected \(T, C\)"),
        (Spoken, {"text": "naz"}, r"the character 'z' \(at 2\) is not in the alphabet of 4"),
        (Read, {"text": 3}, "expected text, got int 3"),
        (Linked, {"edges": [[0, 3]]}, "expected node indices from 0 to 2 in the edges, got 0 to 3"),
        (Linked, {"nodes": [1, 2]}, r"expected nodes \(N, F\)"),
    ],
)
def test_what_a_loader_gives_is_checked(task: Any, change: Any, message: str, tmp_path: Path) -> None:
    """A value of a wrong kind, shape or range is an error that says which and what is expected: a bad sample."""
    data = type("Data", (ListDataset, task), {})([{**record(tmp_path), **change}])
    with pytest.raises((ValueError, TypeError, DataError), match=message):
        data[0]


def test_a_mask_has_the_classes_and_the_size_of_its_image(tmp_path: Path) -> None:
    """255 is no class; another number beyond the classes, and a map of another size, are reported."""
    raw = record(tmp_path)
    data = type("Data", (ListDataset, Segmented), {})([raw])
    picture(tmp_path / "semantic.png", torch.full((H, W), 255, dtype=torch.uint8))
    assert data[0]["mask"].unique().tolist() == [255]
    picture(tmp_path / "semantic.png", torch.full((H, W), 7, dtype=torch.uint8))
    with pytest.raises(ValueError, match="the mask has the class 7; expected 0 to 1"):
        data[0]
    picture(tmp_path / "semantic.png", torch.zeros(H, W + 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected a map of the image's \(12, 16\) pixels, got \(12, 17\)"):
        data[0]


def test_label_maps_of_every_mode(tmp_path: Path) -> None:
    """A palette gives indices, 16 bits their values, colours COCO's panoptic numbers; a mode without classes is reported."""
    import numpy as np
    from PIL import Image

    values = torch.arange(H * W).view(H, W) % 200
    indexed = Image.fromarray(values.numpy().astype("uint8"))
    indexed.putpalette([i % 256 for i in range(768)])
    indexed.save(tmp_path / "p.png")
    assert indexed.mode == "P"
    assert torch.equal(read_label_map(tmp_path / "p.png"), values)
    deep = values * 300
    Image.fromarray(deep.numpy().astype(np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(read_label_map(tmp_path / "deep.png"), deep)
    colour = torch.stack([deep % 256, deep // 256, deep * 0])
    picture(tmp_path / "rgb.png", colour.to(torch.uint8))
    assert torch.equal(read_label_map(tmp_path / "rgb.png"), deep)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.tif")
    whole = (tmp_path / "p.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:-40])
    (tmp_path / "text.png").write_text("no image")
    cases = {"c.tif": "unsupported_mode", "none.png": "missing", "cut.png": "truncated", "text.png": "corrupt", "p.png": "bomb"}
    for name, kind in cases.items():
        with pytest.raises(BadFile, match=name) as error:
            read_label_map(tmp_path / name, max_pixels=100 if kind == "bomb" else 1e6)
        assert error.value.kind == kind


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_samples_of_every_width(tmp_path: Path, width: int) -> None:
    """The ends and the middle of the range come out in [-1, 1]; parts are read from any frame; channels are apart."""
    top = 2 ** (8 * width - 1)
    whole = torch.tensor([[-top, 0, top // 2, top - 1], [0, 0, -top, 1]])
    path = sound(tmp_path / "x.wav", whole + top if width == 1 else whole, width=width)
    audio, rate = read_audio(path)
    torch.testing.assert_close(audio, (whole / top).float())
    assert rate == 8000
    assert torch.equal(read_audio(path, start=1, frames=2)[0], audio[:, 1:3])
    assert read_audio(path, start=3, frames=5)[0].shape == (2, 1)
    assert read_audio(path, start=9)[0].shape == (2, 0)


def test_flac_is_read_by_soundfile_and_reported_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples as WAV; WAV with floats too; without the package, a message that says what to install."""
    import sys

    soundfile = pytest.importorskip("soundfile")
    samples = torch.arange(-8, 8)[None] * 2048
    wav = read_audio(sound(tmp_path / "x.wav", samples))[0]
    soundfile.write(tmp_path / "x.flac", wav[0].numpy(), 8000, subtype="PCM_16")
    soundfile.write(tmp_path / "float.wav", wav[0].numpy(), 8000, subtype="FLOAT")
    for name in ("x.flac", "float.wav"):
        assert torch.equal(read_audio(tmp_path / name)[0], wav)
        assert torch.equal(read_audio(tmp_path / name, start=2, frames=3)[0], wav[:, 2:5])
    (tmp_path / "bad.flac").write_bytes(b"no sound")
    with pytest.raises(BadFile, match=r"bad\.flac: it cannot be decoded"):
        read_audio(tmp_path / "bad.flac")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for name in ("x.flac", "float.wav"):
        with pytest.raises(DataError, match=r"needs the package soundfile: pip install 'ailab\[audio\]'"):
            read_audio(tmp_path / name)


def test_a_damaged_wav_is_reported(tmp_path: Path) -> None:
    """Empty, foreign, cut in the header or in the sound, and missing: by kind."""
    whole = sound(tmp_path / "x.wav", torch.arange(100)[None]).read_bytes()
    cases = {b"": "truncated", b"text" * 20: "corrupt", whole[:30]: "truncated", whole[:100]: "truncated"}
    for content, kind in cases.items():
        (tmp_path / "y.wav").write_bytes(content)
        with pytest.raises(BadFile, match=r"y\.wav: ") as error:
            read_audio(tmp_path / "y.wav")
        assert error.value.kind == kind
    with pytest.raises(BadFile, match=r"none\.wav: there is no such file"):
        read_audio(tmp_path / "none.wav")


def test_frames_are_spread_over_a_clip(tmp_path: Path) -> None:
    """Evenly, by name; an empty folder and frames of two sizes are reported."""
    for i in range(10):
        picture(tmp_path / f"{i}.png", torch.full((3, 4, 4), i, dtype=torch.uint8))
    assert read_frames(tmp_path, 5)[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]
    assert read_frames(sorted(tmp_path.iterdir())[:2], 3)[:, 0, 0, 0].tolist() == [0, 1, 1]
    picture(tmp_path / "9.png", pixels())
    with pytest.raises(ValueError, match="differ in size"):
        read_frames(tmp_path, 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match="there is no frame"):
        read_frames(tmp_path / "empty", 5)


def test_vocabularies_read_back_what_they_write() -> None:
    """Any text through bytes, texts of the alphabet through characters; special tokens are no text."""
    for vocabulary, text in ((ByteVocabulary(), "näive\n語"), (ByteVocabulary(), ""), (CharVocabulary(["ab", "c"]), "cab")):
        tokens = vocabulary.encode(text)
        assert tokens.dtype == torch.int64
        assert vocabulary.decode(tokens) == vocabulary.decode(vocabulary.with_special_tokens(tokens)) == text
        assert int(vocabulary.with_special_tokens(tokens).max()) < len(vocabulary)


@settings(max_examples=40)
@given(st.text(max_size=8), st.text(max_size=8))
def test_characters_are_looked_up_exactly(alphabet: str, text: str) -> None:
    """For any texts, the index in the sorted alphabet, or an error that names the first strange character."""
    vocabulary = CharVocabulary(alphabet)
    strange = [i for i, c in enumerate(text) if c not in alphabet]
    if strange:
        with pytest.raises(DataError) as error:
            vocabulary.encode(text)
        assert f"{text[strange[0]]!r} (at {strange[0]})" in str(error.value)
    else:
        assert vocabulary.encode(text).tolist() == [3 + sorted(set(alphabet)).index(c) for c in text]


def test_graphs_of_different_sizes_make_one_batch() -> None:
    """Nodes and edges are padded to static sizes, with masks that say which are real."""
    rows = [{"nodes": [[1, 2]] * n, "edges": [[0, n - 1]] * e, "value": 0} for n, e in ((3, 2), (1, 0))]
    data = type("Data", (ListDataset, Linked), {})(rows)
    batch = PadCollate(max_size={"nodes": 4, "edges": 3})([data[0], data[1]])
    assert batch["nodes"].shape == (2, 4, 2)
    assert batch["edges"].shape == (2, 3, 2)
    assert batch["nodes_mask"].sum(1).tolist() == [3, 1]
    assert batch["edges_mask"].sum(1).tolist() == [2, 0]
