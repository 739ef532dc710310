"""Collation of ragged samples: one static size, masks of what is real, by name out of a cfg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ailab.config.check import check
from ailab.datasets import ListDataset, MultiScaleCollate, PadCollate, SegmentationCollate, Stream
from ailab.datasets.stream.collate import stack_field
from ailab.errors import ConfigError
from ailab.fit import fit


def boxes(n: int) -> dict[str, Any]:
    return {"boxes": torch.arange(4 * n, dtype=torch.float32).view(n, 4) + 1, "name": f"n{n}", "size": n}


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(6, 9))
def test_padding_adds_nothing_and_loses_nothing(lengths: list[int], most: int) -> None:
    """The rows under the mask are those that came, in order; the rest is the padding; the size is static."""
    batch = PadCollate(max_size={"boxes": most}, pad_value={"boxes": -1})([boxes(n) for n in lengths])
    assert batch["boxes"].shape == (len(lengths), most, 4)
    assert batch["boxes_mask"].shape == (len(lengths), most)
    for i, n in enumerate(lengths):
        assert torch.equal(batch["boxes"][i][batch["boxes_mask"][i]], boxes(n)["boxes"])
        assert (batch["boxes"][i][~batch["boxes_mask"][i]] == -1).all()
    assert batch["name"] == [f"n{n}" for n in lengths]
    assert batch["size"].tolist() == lengths


@given(st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(1, 9))
def test_ragged_fields_are_as_long_as_the_longest(lengths: list[int], multiple: int) -> None:
    """Rounded up to a multiple, one row at least."""
    collate = PadCollate(ragged=["t"], multiple_of=multiple)
    batch = collate([{"t": torch.ones(n, dtype=torch.int64)} for n in lengths])
    longest = batch["t"].shape[1]
    assert longest % multiple == 0
    assert max(lengths) <= longest < max(max(lengths), 1) + multiple
    assert batch["t"].sum(1).tolist() == batch["t_mask"].sum(1).tolist() == lengths


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_is_contiguous_however_its_samples_lie(dtype: torch.dtype) -> None:
    """Images as decoders leave them, pixel by pixel, and cut-outs of them: the strides of a batch say nothing of its samples."""
    whole = [torch.randint(0, 256, (7, 9, 3), dtype=torch.uint8).to(dtype).permute(2, 0, 1) for _ in range(4)]
    for samples in (
        whole,
        [x[:, 1:6, 2:8] for x in whole],
        [x.contiguous() for x in whole],
        [whole[0], *map(torch.clone, whole)],
    ):
        joined = stack_field(samples)
        assert joined.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(joined, samples, strict=True))
    with pytest.raises(RuntimeError, match="equal size"):
        stack_field([whole[0], whole[1][:, 1:]])


def test_pictures_and_sounds_are_padded_at_their_end() -> None:
    """A pair of sizes pads height and width, a single one in a list the last dimension; maps get their own value."""
    samples = [{"image": torch.ones(3, h, w), "mask": torch.ones(h, w, dtype=torch.int64)} for h, w in ((4, 6), (5, 2))]
    batch = SegmentationCollate((5, 8))(samples)
    assert batch["image"].shape == (2, 3, 5, 8)
    assert batch["image_mask"].shape == (2, 5, 8)
    assert torch.equal(batch["image"].bool().all(1), batch["image_mask"])
    assert torch.equal(batch["mask"] == 1, batch["mask_mask"])
    assert (batch["mask"][~batch["mask_mask"]] == 255).all()
    sounds = PadCollate(max_size={"audio": [7]})([{"audio": torch.ones(2, t)} for t in (3, 7)])
    assert sounds["audio"].shape == (2, 2, 7)
    assert sounds["audio_mask"].sum(1).tolist() == [3, 7]
    flags = PadCollate(ragged={"m": 2})(
        [{"m": torch.ones(1, 2, 3, dtype=torch.bool)}, {"m": torch.ones(1, 3, 1, dtype=torch.bool)}]
    )
    assert (flags["m"].dtype, flags["m"].shape) == (torch.bool, (2, 1, 3, 3))


def test_fields_in_dicts_and_tuples() -> None:
    """Nested fields go by dotted names; a tuple is (input, target); what is longer may be cut."""
    nested = PadCollate(max_size={"target.boxes": 2}, overflow="cut")
    batch = nested([{"image": torch.ones(2), "target": boxes(n)} for n in (1, 3)])
    assert batch["target"]["boxes"].shape == (2, 2, 4)
    assert batch["target"]["boxes_mask"].tolist() == [[True, False], [True, True]]
    assert list(PadCollate(ragged=["input"])([(torch.ones(n), n) for n in (1, 2)])) == ["input", "input_mask", "target"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_size={"boxes": 2}), r"'boxes' has \[3\] and max_size is \[2\]: raise it, or set overflow='cut'"),
        (dict(), r"'boxes' differs between samples, \[\(1, 4\), \(3, 4\)\]: add it to max_size or ragged"),
        (dict(ragged=["boxes", "boxs"]), "there is no field 'boxs'. Did you mean 'boxes'"),
    ],
)
def test_what_does_not_collate_is_reported(settings: Any, message: str) -> None:
    """The field, its sizes, and what to write."""
    with pytest.raises(ValueError, match=message):
        PadCollate(**settings)([boxes(1), boxes(3)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_size={"boxes": 0}), "max_size.boxes: expected sizes of at least 1, got 0"),
        (dict(multiple_of=0), "multiple_of: expected at least 1"),
        (dict(max_size={"boxes": 2}, pad_value={"boxs": 1}), "pad_value.boxs: .* Did you mean 'boxes'"),
    ],
)
def test_settings_that_make_no_sense_are_reported(settings: Any, message: str) -> None:
    """When the collate function is made."""
    with pytest.raises(ConfigError, match=message):
        PadCollate(**settings)
    with pytest.raises(ConfigError, match="at least one size"):
        MultiScaleCollate([])


def test_a_batch_is_resized_as_a_whole() -> None:
    """Images to one of the sizes, maps to the nearest pixel, points with them; a uint8 image stays one."""
    sample = {
        "image": torch.arange(4, dtype=torch.uint8).repeat_interleave(2).repeat(3, 8, 1) * 60,
        "mask": torch.arange(4).repeat_interleave(2).repeat(8, 1),
        "boxes": torch.tensor([[2.0, 4.0, 8.0, 8.0]]),
    }
    collate = MultiScaleCollate([4, (16, 8)], masks=["mask"], points=["boxes"])
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        batch = collate([sample, sample])
        h, w = batch["image"].shape[-2:]
        seen.add((h, w))
        assert batch["image"].dtype == torch.uint8
        assert batch["mask"].shape == (2, h, w)
        assert torch.equal(batch["mask"][0, 0], torch.arange(4).repeat_interleave(w // 4))
        assert batch["boxes"][1].tolist() == [[2 * w / 8, 4 * h / 8, w, h]]
    assert seen == {(4, 4), (16, 8)}


class Words(ListDataset):
    """Texts of different length."""

    def __init__(self, n: int = 24):
        super().__init__(range(n))

    def _get_sample(self, raw: Any) -> Any:
        length = 1 + raw % 5
        return {"tokens": torch.arange(length) + raw % 2, "target": torch.tensor(raw % 2)}


class Counted(nn.Module):
    """The mean of the embedded tokens that are real."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(8, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, tokens_mask: Tensor) -> Tensor:
        weight = tokens_mask.float().unsqueeze(-1)
        return self.last((self.embed(tokens) * weight).sum(1) / weight.sum(1))


def config(work_dir: Path, collate: Any) -> dict[str, Any]:
    loader = dict(batch_size=7, collate_fn=collate)
    return dict(
        work_dir=str(work_dir),
        total_epochs=2,
        data=dict(train=dict(type=Words), val=dict(type=Words, n=9), train_dataloader=loader, val_dataloader=loader),
        model=dict(type=Counted),
        loss=dict(type="CrossEntropyLoss"),
        optimizer=dict(type="SGD", lr=0.1),
        compile=True,
    )


@pytest.mark.usefixtures("aot_eager")
def test_a_cfg_names_a_collate_function(tmp_path: Path) -> None:
    """One graph a phase serves every batch of a run, the short last ones included; no recompilation."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    fit(config(tmp_path, dict(type="PadCollate", max_size=dict(tokens=5))))
    assert counters["stats"]["unique_graphs"] == 2  # train and val
    assert not counters["recompiles"]


@pytest.mark.parametrize(
    ("collate", "message"),
    [
        ("PadColate", r"train_dataloader.collate_fn.type: there is no collate function 'PadColate'"),
        (dict(type="PadCollate", maxsize=3), r"train_dataloader.collate_fn.maxsize: PadCollate takes no 'maxsize'"),
        (dict(type="PadCollate", overflow="drop"), r"collate_fn.overflow: expected 'error' \| 'cut'"),
    ],
)
def test_a_collate_function_is_checked_before_anything_is_built(collate: Any, message: str, tmp_path: Path) -> None:
    """With its path, the nearest name and what it takes."""
    with pytest.raises(ConfigError, match=message):
        check(config(tmp_path, collate))


def test_workers_and_ranks_make_the_same_batches() -> None:
    """Padded batches are bitwise the same for 0 and 2 workers."""
    made = [
        list(
            Stream(
                Words(),
                batch_size=5,
                shuffle=True,
                seed=1,
                pad=True,
                num_workers=n,
                collate_fn=PadCollate(max_size={"tokens": 6}),
            ).epoch(0)
        )
        for n in (0, 2)
    ]
    assert len(made[0]) == 5
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*made, strict=True) for k in a)


class Squares(ListDataset):
    def _get_sample(self, raw: Any) -> Any:
        torch.rand(raw)  # a sample may draw as it likes
        return {"image": torch.full((1, 8, 8), float(raw))}


def test_the_size_of_a_batch_is_that_of_every_rank() -> None:
    """What a collate function draws is a function of (seed, epoch, batch), whatever the workers and the world size."""

    def sizes(epoch: int, **more: Any) -> list[int]:
        stream = Stream(
            Squares(range(40)), batch_size=4, shuffle=True, seed=2, pad=True, collate_fn=MultiScaleCollate([2, 4, 6]), **more
        )
        return [b["image"].shape[-1] for b in stream.epoch(epoch)]

    first = sizes(0)
    assert len(set(first)) > 1
    assert first == sizes(0, num_workers=2) == sizes(0, rank=0, world_size=2) == sizes(0, rank=1, world_size=2)
    assert first != sizes(1)
