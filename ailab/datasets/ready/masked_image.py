"""Masked image modelling: images without labels, and random masks of their patches."""

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
    """Draws random masks of patches: (rows * columns,) bool, True for a masked patch.

    Every mask has exactly round(mask_ratio * rows * columns) masked patches. The draw uses torch's global generator, which
    `Stream` seeds for each sample. Source: He et al., arXiv:2111.06377.

    Args:
        input_size: (rows, columns) of patches, or one number for both.
        mask_ratio: Fraction of the patches to mask, in [0, 1].

    Raises:
        ConfigError: `mask_ratio` is not in [0, 1], or there is no patch.
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
        """Draw a new mask."""
        mask = torch.zeros(self.num_patches, dtype=torch.bool)
        mask[torch.randperm(self.num_patches)[: self.num_masked]] = True
        return mask


@DATASETS.register_module()
class MAEAnnFileDataset(FileAnnotationDataset, Task):
    """Images for masked autoencoders: `{"image": (3, img_size, img_size) uint8, "mask": (patches,) bool}`.

    The target of the training is the image itself.

    Args:
        annotation_file: A .txt file with one image path per line, or a file of records (.jsonl, .json, .csv, .tsv, .xlsx). Also
            a list of such files.
        img_size: Side of the image in pixels, after the transform.
        patch_size: Side of a patch in pixels. It must divide `img_size`.
        mask_ratio: Fraction of the patches to mask, in [0, 1]. Every sample has the same number of masked patches.
        transform: Transforms of a sample, see `build_transform`. They must give images of `img_size`. Default: a random resized
            crop and a random horizontal flip.
        x_key: Name of the image path in a record.
        root: Folder that relative paths start from. Default: the folder of the annotation file.
        allow_outside_root: Whether to accept images outside `root`.

    Raises:
        ConfigError: `patch_size` does not divide `img_size`, or `mask_ratio` is not in [0, 1].
        DataError: The file is missing or empty, a record has no `x_key`, or a path leads out of `root`.
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
            raise ConfigError(f"MAEAnnFileDataset: patches of {patch_size} do not fill an image of {img_size} pixels.")
        self.masking, self.img_size = MaskingGenerator(img_size // patch_size, mask_ratio), img_size
        crop = {"type": "RandomResizedCrop", "size": img_size, "scale": (0.2, 1.0), "antialias": True}
        self.transform = build_transform([crop, {"type": "RandomHorizontalFlip"}] if transform is None else transform)
        plain = (r if isinstance(r, str) else lookup(r, x_key, lambda i=i: self.where(i)) for i, r in enumerate(self.samples))
        self.samples = SharedList(self.file(name, i) for i, name in enumerate(plain))

    def load(self, raw: Any) -> Sample:
        """The image and the mask of its patches."""
        return {"image": read_image(raw), "mask": self.masking()}

    def output(self, sample: Sample) -> Sample:
        """The sample, after a check of its image size.

        Raises:
            ValueError: The image is not of `img_size`.
        """
        if tuple(sample["image"].shape[-2:]) != (self.img_size, self.img_size):
            raise ValueError(f"the transform gave {tuple(sample['image'].shape)}; img_size is {self.img_size}")
        return sample
