"""The handwritten digits dataset that is part of ailab."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ailab.datasets.storages.table import TableDataset
from ailab.errors import DataError
from ailab.registry import DATASETS
from ailab.rng import mix


@DATASETS.register_module()
class Digits(TableDataset):
    """1,797 handwritten digits of 8x8 pixels: `{"input": (1, 8, 8) uint8 in 0..16, "target": () int64 in 0..9}`.

    Source: Optical Recognition of Handwritten Digits, E. Alpaydin, C. Kaynak, 1998, UCI ML Repository, CC BY 4.0.

    Args:
        split: "train" or "val".
        val_fraction: Fraction of the samples in "val", rounded up. The split is stratified by class. 0.2 gives 1,437 training
            and 360 validation samples.
        seed: Seed of the random split. Use the same seed for both splits; then they have no sample in common.

    Raises:
        DataError: `split` is neither "train" nor "val".
    """

    def __init__(self, split: Literal["train", "val"] = "train", val_fraction: float = 0.2, seed: int = 0):
        if split not in ("train", "val"):
            raise DataError(f"Digits: split={split!r}; there are 'train' and 'val'.")
        super().__init__(Path(__file__).with_name("digits.csv.gz"), header=False)
        held = stratified_choice(self._fields["target"], val_fraction, seed)
        part = held if split == "val" else ~held
        self.table = self.table[part.numpy()]
        pixels = self._fields["input"][part].to(torch.uint8).view(-1, 1, 8, 8)
        self._fields = {"input": pixels, "target": self._fields["target"][part]}


def stratified_choice(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Choose ceil(N * fraction) samples at random, the same fraction of each class to within one sample.

    Args:
        labels: (N,) class of each sample.
        fraction: Fraction of the samples to choose, in [0, 1].
        seed: Seed of the choice.

    Returns:
        (N,) bool, True for a chosen sample.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix(seed)))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    quota = (torch.arange(len(labels) + 1, dtype=torch.float64) * fraction).ceil()  # chosen among the first k
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class] = quota[1:] > quota[:-1]
    return chosen
