"""Masked-image modelling: pictures without labels, and which patches of them to hide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ailab.datasets.files.image import read_image
from ailab.datasets.storages.file_annotation import FileAnnotationDataset
from ailab.datasets.storages.records import lookup
from ailab.datasets.storages.shared_list import SharedList
from ailab.datasets.tasks.task import Task
from ailab.datasets.transforms.pipeline import Sample, TransformSpec, build_transform
from ailab.errors import ConfigError
from ailab.registry import DATASETS


class MaskingGenerator:
    """Random masks of patches: (rows * columns,) bool with exactly round(mask_ratio * rows * columns) that are True, hidden.

    He et al., arXiv:2111.06377. It draws from torch's global generator, which is seeded for each sample.

    Args:
        input_size: (rows, columns) of patches, or one number for both.
        mask_ratio: the share to hide, in [0, 1].

    Raises:
        ConfigError: the ratio is not in [0, 1], or there is no patch.
    """

    def __init__(self, input_size: int | Sequence[int], mask_ratio: float = 0.75):
        rows, columns = (input_size, input_size) if isinstance(input_size, int) else input_size
        if not 0 <= mask_ratio <= 1 or rows * columns < 1:
            raise ConfigError(
                f"MaskingGenerator: expected a ratio in [0, 1] and patches, got {mask_ratio} of {rows}x{columns}."
            )
        self.num_patches = rows * columns
        self.num_masked = round(mask_ratio * self.num_patches)

    def __call__(self) -> Tensor:
        """Another mask."""
        mask = torch.zeros(self.num_patches, dtype=torch.bool)
        mask[torch.randperm(self.num_patches)[: self.num_masked]] = True
        return mask


@DATASETS.register_module()
class MAEAnnFileDataset(FileAnnotationDataset, Task):
    """Pictures to restore: `{"image": (3, img_size, img_size) uint8, "mask": (patches,) bool}`; the target is the image itself.

    Args:
        annotation_file: a .txt file with a path in each line; or records, of which `x_key` is the path.
        img_size: side of the picture in pixels.
        patch_size: side of a patch, a divisor of `img_size`.
        mask_ratio: share of the patches to hide; the number of them is the same for every sample.
        transform: see `build_transform`; it has to give pictures of `img_size`. A random crop and a flip when left out.
        x_key: name of the path in a record.
        root: the folder that paths are relative to; that of the file when left out.
        allow_outside_root: accept pictures outside `root`.

    Raises:
        ConfigError: the patches do not fill the picture, or the ratio is none.
        DataError: the file is missing or empty, lacks `x_key`, or a path leads out of `root`.
    """

    kinds: Mapping[str, str] = {"image": "image"}

    def __init__(
        self,
        annotation_file: str | Path | Sequence[str | Path],
        img_size: int = 224,
        patch_size: int = 16,
        mask_ratio: float = 0.75,
        transform: TransformSpec = None,
        *,
        x_key: str = "image",
        root: str | Path | None = None,
        allow_outside_root: bool = False,
    ):
        super().__init__(annotation_file, root=root, allow_outside_root=allow_outside_root)
        if img_size % patch_size:
            raise ConfigError(f"MAEAnnFileDataset: patches of {patch_size} do not fill a picture of {img_size} pixels.")
        self.masking, self.img_size = MaskingGenerator(img_size // patch_size, mask_ratio), img_size
        crop = {"type": "RandomResizedCrop", "size": img_size, "scale": (0.2, 1.0), "antialias": True}
        self.transform = build_transform([crop, {"type": "RandomHorizontalFlip"}] if transform is None else transform)
        plain = (r if isinstance(r, str) else lookup(r, x_key, lambda i=i: self.where(i)) for i, r in enumerate(self.samples))
        self.samples = SharedList(self.file(name, i) for i, name in enumerate(plain))

    def load(self, raw: Any) -> Sample:
        """The picture and the patches to hide."""
        return {"image": read_image(raw), "mask": self.masking()}

    def delivered(self, sample: Sample) -> Sample:
        """The sample, whose picture has to be of the size that the mask is for.

        Raises:
            ValueError: it is not.
        """
        if tuple(sample["image"].shape[-2:]) != (self.img_size, self.img_size):
            raise ValueError(f"the transform gave {tuple(sample['image'].shape)}; img_size is {self.img_size}")
        return sample
