"""Storages, the datasets that come with ailab, and the batch augmentations."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ailab.datasets import (
    BatchAffine,
    BatchErase,
    BatchFlip,
    BatchNormalize,
    BatchShift,
    Digits,
    FashionMNIST,
    LabBaseDataset,
    TableAnnotationDataset,
    TableDataset,
)
from ailab.datasets.ready.digits import stratified_choice
from ailab.errors import DataError
from ailab.models import MLP, ConvNet

# Tables


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_storage_and_a_task_compose_in_any_order() -> None:
    """A dataset is a class that inherits a storage and a task, and nothing else."""

    class Squares(LabBaseDataset):
        def _len(self) -> int:
            return 4

        def _get_raw(self, index: int) -> int:
            return index**2

    class Halved(LabBaseDataset):
        def _get_sample(self, raw: int) -> dict[str, float]:
            return {"input": raw / 2}

    for bases in ((Squares, Halved), (Halved, Squares)):
        made = type("Made", bases, {})()
        assert [made[i]["input"] for i in range(len(made))] == [0, 0.5, 2, 4.5]
    with pytest.raises(NotImplementedError, match="Squares inherits no task"):
        Squares()[0]


def test_a_table_is_a_storage_of_rows(tmp_path: Path) -> None:
    """With a task, a sample is made of the row, by column name."""

    class Sums(TableAnnotationDataset):
        def _get_sample(self, raw: Any) -> Any:
            return raw["a"] + raw["b"], raw["c"]

    assert Sums(table(tmp_path, "a,b,c\n1,2,x\n3,4,y\n"))[1] == (7, "y")


def test_a_table_of_numbers_is_ready_made(tmp_path: Path) -> None:
    """Inputs are float32; a target is int64, float32 or a class index by its kind; columns go by name or position."""
    path = table(tmp_path, "a,b,c,name\n1,2,3,cat\n4,5.5,6,ant\n7,8,9,cat\n")
    named = TableDataset(path)
    assert named.classes == ["ant", "cat"]
    assert named[1]["input"].tolist() == [4, 5.5, 6]
    assert named.tensors()["target"].tolist() == [1, 0, 1]
    chosen = TableDataset(path, inputs=["c", 0], target="b").tensors()
    assert chosen["input"].tolist() == [[3, 1], [6, 4], [9, 7]]
    assert (chosen["target"].dtype, TableDataset(path, inputs=["b"], target="a")[0]["target"].dtype) == (
        torch.float32,
        torch.int64,
    )
    bare = TableDataset(table(tmp_path, "1\t2\n3\t4\n", "u.tsv"), target=None, header=False)
    assert bare[0].keys() == {"input"}
    assert (len(bare), bare[1]["input"].dtype) == (2, torch.float32)


def test_an_excel_sheet_is_a_table(tmp_path: Path) -> None:
    """The same table from .xlsx and from .csv.gz gives the same tensors."""
    pytest.importorskip("openpyxl")
    import pandas as pd

    frame = pd.DataFrame({"x": [1.5, 2.5], "y": [0, 1]})
    frame.to_excel(tmp_path / "t.xlsx", index=False)
    frame.to_csv(tmp_path / "t.csv.gz", index=False)
    sheet, text = TableDataset(tmp_path / "t.xlsx").tensors(), TableDataset(tmp_path / "t.csv.gz").tensors()
    assert all(torch.equal(sheet[k], text[k]) and sheet[k].dtype == text[k].dtype for k in text)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a,b\n1,2\n", {"target": "c"}, r"t\.csv: there is no column 'c'"),
        ("length,b\n1,2\n", {"inputs": ["lenght"]}, "Did you mean 'length'"),
        ("a,b\n1,2\nx,3\n", {}, r"record 1, column 'a' has 'x', which is not a number"),
        ("a,b\n1,2\n,3\n", {}, "record 1, column 'a' is empty"),
        ("a,b\n1,2\n2,\n", {}, "record 1, column 'b' is empty"),
        ("", {}, "cannot be read as a table"),
        (None, {}, "cannot be read as a table: FileNotFoundError"),
    ],
)
def test_a_table_that_does_not_fit_says_where(tmp_path: Path, text: str | None, settings: Any, message: str) -> None:
    """A missing file or column and a cell that is no number are DataErrors with the file, the record and the column."""
    path = table(tmp_path, text) if text is not None else tmp_path / "t.csv"
    with pytest.raises(DataError, match=message):
        TableDataset(path, **settings)


# Ready-made


def test_the_digits_are_what_their_source_says() -> None:
    """1,437 + 360 images of 8x8 pixels in 0..16, the two splits disjoint, each class with its share."""
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1437, 360)
    pixels = torch.cat([train.tensors()["input"], val.tensors()["input"]])
    assert (pixels.shape, pixels.dtype) == ((1797, 1, 8, 8), torch.uint8)
    assert (int(pixels.min()), int(pixels.max())) == (0, 16)
    labels = [s.tensors()["target"].bincount() for s in (train, val)]
    assert (labels[0] + labels[1]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI lists them
    assert all(abs(v - 0.2 * (t + v)) < 1 for t, v in zip(*[x.tolist() for x in labels], strict=True))
    sample = val[3]
    assert (sample["input"].shape, sample["target"].dtype) == ((1, 8, 8), torch.int64)
    assert torch.equal(sample["input"], val.tensors()["input"][3])
    with pytest.raises(DataError, match="split='test'"):
        Digits("test")  # type: ignore[arg-type]


def test_the_split_is_a_pure_function_of_its_seed() -> None:
    """The same seed gives the same split, another seed another; the size is ceil(N * fraction) for any fraction."""
    labels = torch.arange(103) % 4
    assert torch.equal(stratified_choice(labels, 0.3, 1), stratified_choice(labels, 0.3, 1))
    assert not torch.equal(stratified_choice(labels, 0.3, 1), stratified_choice(labels, 0.3, 2))
    assert [int(stratified_choice(labels, f, 0).sum()) for f in (0.0, 0.001, 0.5, 1.0)] == [0, 1, 52, 103]


def idx(folder: Path, name: str, values: Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    (folder / name).write_bytes(gzip.compress(header + values.numpy().tobytes()))


def test_fashion_mnist_reads_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and labels come out as they were written, from `root` or from the folder the environment names."""
    images, labels = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)
    idx(tmp_path, "t10k-images-idx3-ubyte.gz", images)
    idx(tmp_path, "t10k-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv("AILAB_FASHION_MNIST", str(tmp_path))
    for data in (FashionMNIST(tmp_path, "test"), FashionMNIST(split="test")):
        assert torch.equal(data.tensors()["input"], images.unsqueeze(1))
        assert torch.equal(data.tensors()["target"], labels.long())
        assert (len(data), data[4]["input"].shape) == (5, (1, 28, 28))
    with pytest.raises(DataError, match=r"train-images.*FileNotFoundError"):
        FashionMNIST()
    with pytest.raises(DataError, match="split='val'"):
        FashionMNIST(split="val")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage", [b"", b"\x1f\x8b", gzip.compress(b"text"), gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1]))]
)
def test_a_damaged_idx_file_is_a_data_error(tmp_path: Path, damage: bytes) -> None:
    """An empty, cut or foreign file, or one shorter than its header says, is named and never read as data."""
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(DataError, match="t10k-images"):
        FashionMNIST(tmp_path, "test")


# Augmentation


def pictures(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(1, 17, (6, 2, 8, 10)).to(dtype)


OPS = [
    BatchShift(2),
    BatchAffine(10, 0.1, (0.9, 1.1), 5),
    BatchFlip(),
    BatchErase(1.0),
    BatchNormalize(3.0, 2.0),
    BatchNormalize([3.0, 1.0], [2.0, 4.0]),
]


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
def test_augmentations_are_pure_seeded_and_trace(op: Any) -> None:
    """The input is untouched, the same seed gives the same images, uint8 works, and there is one graph."""
    for dtype in (torch.float32, torch.uint8):
        x = pictures(dtype)
        kept = x.clone()
        torch.manual_seed(3)
        out = op(x)
        assert out.shape == x.shape
        assert torch.equal(x, kept)
        torch.manual_seed(3)
        torch.compiler.reset()
        assert torch.equal(torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(x), out)


def test_the_neutral_settings_are_the_identity() -> None:
    """No shift, no angle, probability 0 and mean 0 with std 1 leave the images as they are."""
    x = pictures()
    for op in (BatchShift(0), BatchFlip(0.0), BatchErase(0.0), BatchNormalize(0.0, 1.0)):
        assert torch.equal(op(x), x)
    torch.testing.assert_close(BatchAffine()(x), x)


def test_flip_and_shift_are_exact() -> None:
    """Probability 1 mirrors each image; each shifted image is one of the possible shifts of its own."""
    x = pictures()
    assert torch.equal(BatchFlip(1.0)(x), x.flip(-1))
    padded = functional.pad(x, [1, 1, 1, 1], value=9.0)
    possible = [padded[:, :, i : i + 8, j : j + 10] for i in range(3) for j in range(3)]
    seen = set()
    for _ in range(20):
        out = BatchShift(1, fill=9.0)(x)
        found = [[k for k, p in enumerate(possible) if torch.equal(p[i], out[i])] for i in range(6)]
        assert all(found)
        seen |= {k for ks in found for k in ks}
    assert seen == set(range(9))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_quarter_turn_is_rot90(sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation keeps the aspect of an image that is not square: 90 degrees of its square middle is rot90."""

    def extreme(x: Tensor, low: float, high: float, *shape: int) -> Tensor:
        return torch.full((len(x), *shape), sign * high if low < 0 else high)

    monkeypatch.setattr("ailab.datasets.transforms.augment._uniform", extreme)
    x = functional.pad(pictures()[..., 1:9], [1, 1])
    turned = BatchAffine(90.0)(x)
    torch.testing.assert_close(turned[..., 1:9], x[..., 1:9].rot90(sign, (2, 3)), atol=1e-4, rtol=0)


def test_erase_paints_one_rectangle_of_the_asked_size() -> None:
    """What is painted is a full rectangle, over all channels, of no more than the asked share of the image."""
    out = BatchErase(1.0, (0.1, 0.3), fill=-1.0)(torch.zeros(200, 2, 32, 32))
    hit = out == -1
    assert torch.equal(hit[:, 0], hit[:, 1])
    mask = hit[:, 0]
    area = mask.any(1).sum(1) * mask.any(2).sum(1)
    assert torch.equal(area, mask.sum((1, 2)))
    assert area.max() <= 0.3 * 1024 * 1.3  # the rounding of both sides to pixels
    assert 0.3 < (BatchErase(0.5, (0.1, 0.1), fill=1.0)(torch.zeros(400, 1, 16, 16)).amax((1, 2, 3))).mean() < 0.7


def test_normalize_is_per_channel() -> None:
    """(x - mean) / std of each channel, in float32 for uint8 images."""
    x = pictures(torch.uint8)
    out = BatchNormalize([3.0, 1.0], [2.0, 4.0])(x)
    expected = (x.float() - torch.tensor([3.0, 1.0])[:, None, None]) / torch.tensor([2.0, 4.0])[:, None, None]
    torch.testing.assert_close(out, expected)


# Models


def test_a_convnet_normalises_inside() -> None:
    """uint8 images and the same as floats give the same logits; so do images normalised before."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (3, 2, 12, 12), dtype=torch.uint8)
    model = ConvNet(2, 5, widths=(4, 6), depth=(1, 2), mean=[100.0, 50.0], std=[30.0, 40.0]).eval()
    assert model(x).shape == (3, 5)
    torch.testing.assert_close(model(x), model(x.float()))
    plain = ConvNet(2, 5, widths=(4, 6), depth=(1, 2)).eval()
    plain.load_state_dict(
        {**model.state_dict(), "mean": torch.zeros(1, 1, 1), "std": torch.ones(1, 1, 1)}, strict=False, assign=True
    )
    torch.testing.assert_close(plain(BatchNormalize([100.0, 50.0], [30.0, 40.0])(x)), model(x))


def test_an_mlp_has_the_layers_it_is_asked_for() -> None:
    """Sizes (64, 8, 10): two linear layers with a ReLU between; images are flattened."""
    model = MLP((64, 8, 10))
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 64), (8,), (10, 8), (10,)]
    x = torch.randint(0, 16, (3, 1, 8, 8), dtype=torch.uint8)
    first, last = model.layers[0], model.layers[-1]
    torch.testing.assert_close(model(x), last(functional.relu(first(x.flatten(1).float()))))
