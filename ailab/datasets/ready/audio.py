"""Classification of sounds from a folder per class or an annotation file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.datasets.files.audio import SOUNDS, check_reader, read_audio, sound_info
from ailab.datasets.ready.image_classification import labelled
from ailab.datasets.storages.folder import FolderPerClassDataset
from ailab.datasets.storages.sequence import ListDataset
from ailab.datasets.storages.shared_list import SharedList
from ailab.datasets.tasks import AudioClassificationTask
from ailab.datasets.transforms.pipeline import TransformSpec, build_transform
from ailab.registry import DATASETS
from ailab.signature import check_choice

_Crop = Literal["random", "center", "start"]


@DATASETS.register_module()
class AudioClassificationDataset(ListDataset, AudioClassificationTask):
    """Sounds of one length with a class: `{"audio": (C, frames) float32 in [-1, 1], "target": () int64}`.

    Args:
        annotation_file: a folder with one folder of sounds per class; or a file of records, as `ClassificationImageDataset`.
        frames: length of a sample; longer sounds are cut, shorter ones get zeros at their end. Only the cut is read.
        rate: frames per second that every file has to have; any when None.
        crop: which part of a longer sound: "random" (another one each time), "center" or "start".
        mono: the mean of the channels.
        x_key: name of the path in a record.
        y_key: name of the label in a record.
        classes: names of the classes in order; the sorted distinct ones when left out.
        root: the folder that paths are relative to; that of the file when left out.
        transform: see `build_transform`; it is given all fields.
        allow_outside_root: accept sounds outside `root`.

    Raises:
        DataError: as `ClassificationImageDataset`; a FLAC, Ogg or AIFF file without the package soundfile. While reading, a
            sound of another rate is a bad sample: there is no resampling.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        frames: int,
        rate: int | None = None,
        *,
        crop: _Crop = "random",
        mono: bool = True,
        x_key: str = "audio",
        y_key: str = "label",
        classes: Sequence[str] | None = None,
        root: str | Path | None = None,
        transform: TransformSpec = None,
        allow_outside_root: bool = False,
    ):
        check_choice(crop, _Crop, "AudioClassificationDataset: crop")
        self.frames, self.rate, self.crop, self.mono = frames, rate, crop, mono
        self.transform = build_transform(transform)
        if os.path.isdir(annotation_file):
            folders = FolderPerClassDataset(annotation_file, classes, extensions=SOUNDS)
            self.classes, items = folders.classes, list(folders.samples)
        else:
            self.classes, items = labelled(
                annotation_file, x_key, y_key, classes=classes, root=root, allow_outside_root=allow_outside_root
            )
        check_reader(path for path, _ in items)
        super().__init__(SharedList(items))
        self.targets = torch.tensor([label for _, label in items])  # of all samples: (N,) int64

    def load_audio(self, raw: Any) -> Tensor:
        """(C, frames)."""
        sound = sound_info(raw[0])
        if self.rate is not None and sound.rate != self.rate:
            raise ValueError(f"{raw[0]}: {sound.rate} frames per second; expected {self.rate}")
        spare = max(sound.frames - self.frames, 0)
        start = {"random": int(torch.randint(spare + 1, ())), "center": spare // 2, "start": 0}[self.crop]
        audio, _ = read_audio(raw[0], start=start, frames=self.frames)
        audio = audio.mean(0, keepdim=True) if self.mono else audio
        return torch.nn.functional.pad(audio, (0, self.frames - audio.shape[1]))

    def load_label(self, raw: Any) -> int:
        """The index of the class."""
        return raw[1]
