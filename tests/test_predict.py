"""`python -m ailab.predict` and `Predictor`: every readable input has its row, in order, and the numbers are evaluate's."""

from __future__ import annotations

import csv
import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import damage, encoded, photo
from PIL import Image
from tiny import cfg_file, tiny_cfg
from torch import Tensor, nn

from ailab.errors import ConfigError, DataError
from ailab.evaluate import evaluate
from ailab.fit import fit
from ailab.predict import Predictor, main
from ailab.registry import DATASETS, MODELS

CROP = [dict(type="Resize", size=[24, 30]), dict(type="ToDtype", dtype="float32", scale=True)]


def quiet(line: str) -> None:
    pass


def photos(root: Path, count: int = 30) -> Path:
    """Pictures of three classes that are not square, and of different sizes."""
    for i in range(count):
        path = root / ("ant", "bee", "cat")[i % 3] / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(i, (32 + i % 5, 48)), "JPEG"))
    return root


def photo_cfg(root: Path, work_dir: Path) -> dict[str, Any]:
    entry = dict(type="ClassificationImageDataset", source=str(root), transform=CROP, resize=[40, 50])
    return dict(
        seed=0,
        work_dir=str(work_dir),
        total_epochs=2,
        data=dict(train=entry, val=entry, train_dataloader=dict(batch_size=8), val_dataloader=dict(batch_size=7)),
        model=dict(type="ConvNet", in_channels=3, num_classes=3, widths=[4, 8], depth=1),
        loss=dict(type="CrossEntropyLoss"),
        optimizer=dict(type="AdamW", lr=0.01),
        hooks=dict(
            metrics=dict(type="MetricHook", top1=dict(type="Top1Accuracy", mapping={"pred": "output", "label": "target"})),
            ema=dict(type="EMAHook", decay=0.5),
            checkpoint=dict(type="CheckpointHook"),
        ),
        compile=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Path]:
    folder = tmp_path_factory.mktemp("predict")
    cfg = photo_cfg(photos(folder / "set"), folder / "run")
    fit(cfg)
    return cfg, folder / "set", folder / "run"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_predict_equals_evaluate(trained: tuple[dict[str, Any], Path, Path], tmp_path: Path, form: str) -> None:
    """Accuracy and cross-entropy, computed from the file that predict wrote, are those of evaluate to 1e-6."""
    cfg, root, run = trained
    wanted = evaluate(cfg, "last", out=tmp_path / "evaluate", say=quiet)
    arguments = [str(run), str(root), "--out", str(tmp_path / "out"), "--topk", "0", "--format", form, "--batch-size", "4"]
    assert main(arguments) == 0
    if form == "jsonl":
        rows = rows_of(tmp_path / "out" / "predictions.jsonl")
        found = {r["path"]: dict(zip(r["classes"], r["scores"], strict=True)) for r in rows}
        best = {r["path"]: r["class"] for r in rows}
    else:
        table = list(csv.DictReader(io.StringIO((tmp_path / "out" / "predictions.csv").read_text())))
        found = {r["path"]: {r[f"class{k}"]: float(r[f"score{k}"]) for k in (1, 2, 3)} for r in table}
        best = {r["path"]: r["class1"] for r in table}
    true = {str(p): p.parent.name for p in sorted(root.rglob("*.jpg"))}
    assert list(found) == list(true) and len(found) == 30
    top1 = sum(best[p] == true[p] for p in true) / 30
    entropy = sum(-math.log(found[p][true[p]]) for p in true) / 30
    assert top1 == pytest.approx(wanted.results["top1"].value, abs=1e-6)
    assert entropy == pytest.approx(wanted.results["loss"].value, abs=1e-6)


def test_every_kind_of_input_gives_its_row(
    trained: tuple[dict[str, Any], Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file, a folder, a pattern, lists of five kinds, standard input, arrays: the same answer, and the path as it was given."""
    _, root, run = trained
    p = Predictor(run, workers=2, batch_size=4)
    shutil.copytree(root, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    first = "set/ant/000.jpg"
    [wanted] = p(first)
    assert wanted["path"] == first and set(wanted) == {"path", "class", "score", "classes", "scores"}
    assert wanted["class"] == wanted["classes"][0] and sum(wanted["scores"]) == pytest.approx(1)
    Path("l.csv").write_text(f"id,path\n7,{first}\n")
    Path("bare.csv").write_text(f"{first},ant\n")
    Path("l.tsv").write_text(f"image\tn\n{first}\t1\n")
    Path("l.jsonl").write_text(json.dumps({"image": first}) + "\n")
    Path("l.json").write_text(json.dumps([first]))
    Path("l.txt").write_text(f"{first}\n\n")
    for source in ("l.csv", "bare.csv", "l.tsv", "l.jsonl", "l.json", "l.txt", Path(first), "set/a*/000.jpg"):
        assert list(p(source)) == [wanted], source
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n"))
    assert list(p("-")) == [wanted]
    assert [r["path"] for r in p("set")] == sorted(str(f) for f in Path("set").rglob("*.jpg"))
    assert list(p([first, "l.csv", Path(first)])) == [wanted] * 3
    from ailab.datasets import read_image

    pixels = read_image(first, resize=(40, 50))
    [array] = p(pixels)
    assert array == {**wanted, "path": ""}
    assert [r["index"] for r in p(torch.stack([pixels, pixels]))] == [0, 1]
    np.save("a.npy", torch.stack([pixels, pixels]).numpy())
    torch.save(pixels, "b.pt")
    files = list(p(["a.npy", "b.pt"]))
    assert [(r["path"], r.get("index")) for r in files] == [("a.npy", 0), ("a.npy", 1), ("b.pt", None)]
    assert all(r["scores"] == pytest.approx(wanted["scores"], abs=1e-6) for r in files)


def test_it_needs_neither_data_nor_cfg(tmp_path: Path) -> None:
    """With the training set deleted, and only one checkpoint folder moved elsewhere, the answers are the same."""
    cfg = photo_cfg(photos(tmp_path / "set", 9), tmp_path / "run")
    fit(cfg)
    shutil.copy(tmp_path / "set" / "cat" / "002.jpg", tmp_path / "x.jpg")
    before = list(Predictor(tmp_path / "run")(tmp_path / "x.jpg"))
    shutil.rmtree(tmp_path / "set")
    step = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    shutil.move(step, tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    assert list(Predictor(tmp_path / "moved")(tmp_path / "x.jpg")) == before


def spoilt(root: Path, count: int, every: int) -> tuple[list[str], list[str]]:
    """`count` small pictures, one in `every` damaged: the good paths and the bad ones, in the order of the folder."""
    good, bad = [], []
    root.mkdir(parents=True)
    data = [encoded(photo(i, (20, 24)), "JPEG") for i in range(8)]
    for i in range(count):
        path = root / f"{i:05}.jpg"
        path.write_bytes(data[i % 8])
        (bad if i % every == every - 1 else good).append(str(path))
    for i, path in enumerate(bad):
        damage(Path(path), ("empty", "png_checksum")[i % 2])
    return good, bad


def test_a_bad_input_costs_a_line(
    trained: tuple[dict[str, Any], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 60 inputs with 6 damaged ones all good rows are there in order; the others are in bad.jsonl, and the exit code is 3."""
    good, bad = spoilt(tmp_path / "in", 60, 10)
    out = tmp_path / "out"
    assert (
        main([str(trained[2]), str(tmp_path / "in"), str(tmp_path / "none.jpg"), "--out", str(out), "--batch-size", "7"]) == 3
    )
    assert [r["path"] for r in rows_of(out / "predictions.jsonl")] == good
    assert [r["path"] for r in rows_of(out / "bad.jsonl")] == [*bad, str(tmp_path / "none.jpg")]
    assert {r["kind"] for r in rows_of(out / "bad.jsonl")} == {"empty", "corrupt", "missing"}
    told = capsys.readouterr()
    assert "61 inputs, 7 could not be read" in told.out and "DataError: 7 of 61 inputs could not be read" in told.err
    p = Predictor(trained[2])
    assert [r["path"] for r in p(tmp_path / "in")] == good and [b.path for b in p.bad] == bad


def _memory(argv: list[str], pipe: Any) -> None:
    code = main(argv)
    pipe.send((code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


@pytest.mark.nightly
def test_memory_does_not_grow_with_the_inputs(trained: tuple[dict[str, Any], Path, Path], tmp_path: Path) -> None:
    """10,000 inputs with 100 damaged ones: all good rows in order, and at most 1.1 times the memory of 1,000 inputs."""
    peaks = []
    for count in (1000, 10_000):
        good, bad = spoilt(tmp_path / str(count), count, 100)
        out = tmp_path / f"out{count}"
        ours, theirs = multiprocessing.Pipe()
        argv = [str(trained[2]), str(tmp_path / str(count)), "--out", str(out), "--workers", "2"]
        process = multiprocessing.get_context("spawn").Process(target=_memory, args=(argv, theirs))
        process.start()
        code, peak = ours.recv()
        process.join()
        assert code == 3 and [r["path"] for r in rows_of(out / "predictions.jsonl")] == good
        assert [r["path"] for r in rows_of(out / "bad.jsonl")] == bad
        peaks.append(peak)
    assert peaks[1] <= 1.1 * peaks[0], peaks


CALLS: list[int] = []  # forwards of this process


@MODELS.register_module()
class Mortal(nn.Module):
    """Kills its process at the forward that the environment says."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        if "MORTAL" in os.environ:
            CALLS.append(len(CALLS))
            if len(CALLS) == int(os.environ["MORTAL"]):
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line(input)


def _dying(argv: list[str], at: str) -> None:
    os.environ["MORTAL"] = at
    torch.set_num_threads(1)
    sys.exit(main(argv))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_killed_three_times_and_resumed_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    """SIGKILL within three batches, a cut last line, and --resume each time: predictions and bad.jsonl have the same bytes."""
    cfg = {**tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")), "model": dict(type="Mortal")}
    fit(cfg)
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(61, 4)).astype("float32"))
    holes = np.full((3, 4), np.nan, dtype="float32")
    np.save(tmp_path / "y.npy", holes)
    context = multiprocessing.get_context("forkserver")

    def ran(out: str, at: int, *more: str) -> int | None:
        argv = [str(tmp_path / "run"), str(tmp_path / "y.npy"), str(tmp_path / "x.npy"), "--out", str(tmp_path / out)]
        process = context.Process(target=_dying, args=([*argv, "--batch-size", "5", "--format", form, *more], str(at)))
        process.start()
        process.join(60)
        return process.exitcode

    assert ran("whole", -1) == 3
    assert ran("cut", 3) == -9
    for at in (4, 2):
        with (tmp_path / "cut" / f"predictions.{form}").open("a") as file:
            file.write('{"path": "x.n')  # as a kill within a write leaves it
        assert ran("cut", at, "--resume") == -9
    assert ran("cut", -1, "--resume") == 3
    for name in (f"predictions.{form}", "bad.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(rows_of(tmp_path / "whole" / "bad.jsonl")) == 3


def test_processes_share_the_inputs(
    trained: tuple[dict[str, Any], Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three processes each writes rows of its own; together they are those of one process, none twice."""
    _, root, run = trained
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert main([str(run), str(root), "--out", str(tmp_path / "out"), "--batch-size", "4"]) == 0
    rows = [r for n in range(3) for r in rows_of(tmp_path / "out" / f"predictions-{n}-of-3.jsonl")]
    alone = {r["path"]: r for r in Predictor(run, batch_size=4)(root)}
    assert len(rows) == len(alone) == 30 and {r["path"]: r for r in rows} == alone


def test_top_classes_a_threshold_and_the_mirror_image(trained: tuple[dict[str, Any], Path, Path]) -> None:
    """`topk` and `threshold` choose from all scores; "flip" is the mean with the probabilities of the mirrored input."""
    _, root, run = trained
    file = root / "bee" / "001.jpg"
    [whole] = Predictor(run, topk=0)(file)
    assert len(whole["scores"]) == 3 and whole["scores"] == sorted(whole["scores"], reverse=True)
    [two] = Predictor(run, topk=2)(file)
    assert two["scores"] == whole["scores"][:2]
    level = whole["scores"][1] + 1e-6
    [one] = Predictor(run, threshold=level)(file)
    assert one["scores"] == whole["scores"][:1]
    [none] = Predictor(run, threshold=1.0)(file)
    assert none["class"] is None and none["scores"] == []
    p = Predictor(run, topk=0)
    from ailab.datasets import read_image

    pixels = read_image(str(file), resize=(40, 50))
    [left], [right] = p(pixels), p(pixels.flip(-1))
    [both] = Predictor(run, topk=0, tta="flip")(file)
    for name, score in zip(both["classes"], both["scores"], strict=True):
        parts = [dict(zip(r["classes"], r["scores"], strict=True))[name] for r in (left, right)]
        assert score == pytest.approx(
            sum(parts) / 2, abs=2e-3
        )  # a resize of a mirror image is not quite the mirror of a resize


@DATASETS.register_module()
class Blobs:
    """Images whose pixels above a half are class 1."""

    classes = ("dark", "light")

    def __init__(self, size: int = 8):
        self.x = torch.rand(size, 1, 6, 9, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.x[index], "target": (self.x[index, 0] > 0.5).long()}


@MODELS.register_module()
def PixelNet() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))


def test_class_maps_are_pictures(tmp_path: Path) -> None:
    """Each input of a segmentation has a PNG with the class of each pixel, and the accuracy of these is evaluate's."""
    cfg = {
        **tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")),
        "model": dict(type="PixelNet"),
        "data": dict(train=dict(type="Blobs"), val=dict(type="Blobs"), train_dataloader=dict(batch_size=4)),
    }
    cfg["data"]["val_dataloader"] = dict(batch_size=4)
    fit(cfg)
    torch.save(Blobs().x, tmp_path / "x.pt")
    assert main([str(tmp_path / "run"), str(tmp_path / "x.pt"), "--out", str(tmp_path / "out")]) == 0
    rows = rows_of(tmp_path / "out" / "predictions.jsonl")
    masks = torch.stack([torch.from_numpy(np.array(Image.open(tmp_path / "out" / r["mask"]))) for r in rows])
    wanted = evaluate(cfg, "last", out=tmp_path / "evaluate", say=quiet)
    right = (masks.long() == (Blobs().x[:, 0] > 0.5)).double().mean()
    assert float(right) == pytest.approx(wanted.results["top1"].value, abs=1e-6)
    assert [sum(r["shares"].values()) for r in rows] == pytest.approx([1.0] * 8)
    assert set(rows[0]["shares"]) <= {"dark", "light"}


def test_an_input_that_does_not_fit_is_a_bad_one(tmp_path: Path) -> None:
    """An array of another shape and one with a NaN are bad inputs; those beside them are answered. An image is refused by name."""
    cfg = {**tiny_cfg(tmp_path / "run", checkpoint=dict(type="CheckpointHook")), "model": dict(type="Mortal")}
    fit(cfg)
    p = Predictor(tmp_path / "run")
    torch.save(torch.zeros(7), tmp_path / "wide.pt")
    torch.save(torch.full((4,), math.nan), tmp_path / "hole.pt")
    (tmp_path / "a.jpg").write_bytes(encoded(photo(0, (8, 8)), "JPEG"))
    (tmp_path / "text.npy").write_bytes(b"no array")
    names = ["wide.pt", "hole.pt", "a.jpg", "text.npy"]
    rows = list(p([torch.zeros(4), *(str(tmp_path / n) for n in names), np.ones(4)]))
    assert len(rows) == 2
    assert [b.kind for b in p.bad] == ["wrong_shape", "not_a_number", "not_an_array", "corrupt"]
    assert "it was trained on (4,)" in p.bad[0].message


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["empty"], 3, "the folder has no image and no array"),
        (["*.gif"], 3, "no file matches"),
        (["x.csv"], 3, "the list cannot be read"),
        (["x.jpg", "--topk", "-1"], 2, "topk at least 0"),
        (["x.jpg", "--checkpoint", "nowhere"], 5, "there is no checkpoint in nowhere"),
        (["x.jpg", "--checkpoint", "best"], 5, "has no best.json"),
        (["x.jpg", "--out", "/dev/null/x"], 2, "Choose another folder: --out."),
    ],
)
def test_what_is_wrong_gets_one_message(
    trained: tuple[dict[str, Any], Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    """Inputs without a file, arguments out of range, no checkpoint: the exit code of the kind and one message."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    out = [] if "--out" in arguments else ["--out", "out"]
    assert main([str(trained[2]), *arguments, *out]) == code
    assert words in capsys.readouterr().err


def test_files_of_another_prediction_are_not_continued(
    trained: tuple[dict[str, Any], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --resume files that are there stay; with it, other settings are refused by name."""
    argv = [str(trained[2]), str(trained[1] / "ant"), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert main(argv) == 2 and "exists. To go on with it: --resume." in capsys.readouterr().err
    assert main([*argv, "--resume", "--topk", "1"]) == 2
    assert "these predictions differ in answer" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


def test_a_model_of_the_cfg_is_taken_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that is an object in the cfg works with the cfg file, and without it the error says what to give."""
    file = cfg_file(tmp_path, hooks="checkpoint=dict(type='CheckpointHook')")
    from ailab.fit import main as train

    assert train([file]) == 0
    torch.save(torch.zeros(5, 4), tmp_path / "x.pt")
    assert main([file, str(tmp_path / "x.pt"), "--out", str(tmp_path / "out")]) == 0
    assert len(rows_of(tmp_path / "out" / "predictions.jsonl")) == 5
    with pytest.raises(ConfigError, match="Give the cfg too"):
        Predictor(tmp_path / "run")
    with pytest.raises(DataError, match="an input is a path, a tensor or an array, got int"):
        list(Predictor(tmp_path / "run", cfg=__import__("ailab.config.load", fromlist=["load"]).load(file))([3]))
