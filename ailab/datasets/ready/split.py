"""One data set in two parts, for data that comes without a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.ready.digits import held_out
from ailab.errors import DataError
from ailab.registry import DATASETS
from ailab.signature import CheckedBy, check_choice

_Part = Literal["train", "val"]


def check_dataset(spec: Any, path: str) -> list[str]:
    """The problems of a data set that is described by a dict."""
    return DATASETS.check(spec, path) if isinstance(spec, Mapping) else []


DatasetSpec = Annotated[Any, CheckedBy(check_dataset)]  # a data set, or dict(type=...) of one


@DATASETS.register_module()
class SplitDataset(LabBaseDataset):
    """The train or the val part of another data set; each class gives its share where the data set has `targets`.

    Both parts name the same data set and seed. Give val its own `dataset` where its transform differs: the split is the same.

    Args:
        dataset: anything with a length and an index, or `dict(type=...)` of one.
        part: "train" or "val".
        val_fraction: share of "val", rounded up to whole samples.
        seed: of the split; the parts of one seed have no sample in common and are all samples together.

    Raises:
        DataError: the part is empty.
    """

    def __init__(self, dataset: DatasetSpec, part: _Part = "train", *, val_fraction: float = 0.2, seed: int = 0):
        check_choice(part, _Part, "SplitDataset: part")
        self.dataset = DATASETS.build(dataset, "dataset") if isinstance(dataset, Mapping) else dataset
        size = len(self.dataset)
        targets: Any = getattr(self.dataset, "targets", None)
        labels = torch.as_tensor(targets) if targets is not None else torch.zeros(size, dtype=torch.int64)
        held = held_out(labels, val_fraction, seed)
        self.indices = (held if part == "val" else ~held).nonzero()[:, 0]  # of the other data set: (N,) int64
        self.classes = getattr(self.dataset, "classes", None)
        self.targets = labels[self.indices] if targets is not None else None
        if not len(self.indices):
            raise DataError(
                f"SplitDataset: the split is empty: val_fraction={val_fraction} of {size} samples leaves {part!r} none."
            )

    def tensors(self) -> dict[str, Tensor] | None:
        """All samples, stacked, where the other data set has that."""
        stacked = getattr(self.dataset, "tensors", None)
        found = stacked() if callable(stacked) else None
        return {name: values[self.indices] for name, values in found.items()} if isinstance(found, dict) else None

    def _len(self) -> int:
        return len(self.indices)

    def _get_raw(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def _get_sample(self, raw: Any) -> Any:
        return raw
