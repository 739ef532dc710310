"""A train and a val split of one dataset, for data without a split of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.ready.digits import stratified_choice
from ailab.errors import DataError
from ailab.registry import DATASETS
from ailab.signature import CheckedBy, check_choice

_Part = Literal["train", "val"]


def check_dataset(spec: Any, path: str) -> list[str]:
    """The problems of a dataset in a cfg; none for a dataset that is built already."""
    return DATASETS.check(spec, path) if isinstance(spec, Mapping) else []


DatasetSpec = Annotated[Any, CheckedBy(check_dataset)]  # a dataset, or dict(type=...) of one


@DATASETS.register_module()
class SplitDataset(LabBaseDataset):
    """The train or the val part of another dataset, split at random.

    The split is stratified by class if the dataset has `targets`. Both parts need the same dataset, fraction and seed. The two
    entries of `dataset` may have different transforms.

    Args:
        dataset: A dataset with `__len__` and `__getitem__`, or `dict(type=...)` of one.
        part: "train" or "val".
        val_fraction: Fraction of the samples in "val", rounded up to whole samples.
        seed: Seed of the random split. With the same seed the two parts have no sample in common, and together all samples.

    Raises:
        DataError: The part is empty.
    """

    def __init__(self, dataset: DatasetSpec, part: _Part = "train", *, val_fraction: float = 0.2, seed: int = 0):
        check_choice(part, _Part, "SplitDataset: part")
        self.dataset = DATASETS.build(dataset, "dataset") if isinstance(dataset, Mapping) else dataset
        size = len(self.dataset)
        targets: Any = getattr(self.dataset, "targets", None)
        labels = torch.as_tensor(targets) if targets is not None else torch.zeros(size, dtype=torch.int64)
        held = stratified_choice(labels, val_fraction, seed)
        self.indices = (held if part == "val" else ~held).nonzero()[:, 0]  # in `dataset`: (N,) int64
        self.classes = getattr(self.dataset, "classes", None)
        self.targets = labels[self.indices] if targets is not None else None
        if not len(self.indices):
            raise DataError(
                f"SplitDataset: the split is empty: val_fraction={val_fraction} of {size} samples leaves none for {part!r}."
            )

    def tensors(self) -> dict[str, Tensor] | None:
        """All samples, stacked; None if `dataset` has no `tensors`."""
        stacked = getattr(self.dataset, "tensors", None)
        found = stacked() if callable(stacked) else None
        return {name: values[self.indices] for name, values in found.items()} if isinstance(found, dict) else None

    def _len(self) -> int:
        return len(self.indices)

    def _get_raw(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def _get_sample(self, raw: Any) -> Any:
        return raw
