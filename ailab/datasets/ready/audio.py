"""Audio classification from one folder per class, or from an annotation file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.datasets.files.audio import AUDIO_EXTENSIONS, audio_info, check_audio_decoder, read_audio
from ailab.datasets.ready.image_classification import read_labels
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
    """Audio clips of one length with a class label: `{"audio": (C, frames) float32 in [-1, 1], "target": () int64}`.

        AudioClassificationDataset("clips/", frames=16000)  # clips/dog/1.wav, clips/cat/2.wav, ...
        AudioClassificationDataset("train.csv", frames=16000)  # a CSV file with the columns audio and label

    Args:
        source: A folder with one folder of audio files per class, or an annotation file. The annotation file has the formats
            of `ClassificationImageDataset`.
        frames: Length of a sample in frames. A longer clip is cropped. A shorter clip is padded with zeros at its end.
        rate: Sample rate in frames per second that every file must have. None accepts any rate. There is no resampling.
        crop: Which part of a longer clip is read: "random" (a new part each time), "center" or "start".
        mono: Whether to average the channels into one.
        x_key: Name of the audio path in a record.
        y_key: Name of the label in a record.
        classes: Class names in the order of their indices. Default: the distinct names of the data, sorted.
        root: Folder that relative paths start from. Default: the folder of the annotation file.
        transform: Transforms of a sample, see `build_transform`. They get all fields.
        allow_outside_root: Whether to accept audio files outside `root`.

    Raises:
        DataError: At build time, as `ClassificationImageDataset`; also for a FLAC, Ogg or AIFF file if the package soundfile is
            not installed. While reading, a file with another sample rate is a bad sample.
    """

    def __init__(
        self,
        source: str | Path,
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
        if os.path.isdir(source):
            folders = FolderPerClassDataset(source, classes, extensions=AUDIO_EXTENSIONS)
            self.classes, items = folders.classes, list(folders.samples)
        else:
            self.classes, items = read_labels(
                source, x_key, y_key, classes=classes, root=root, allow_outside_root=allow_outside_root
            )
        check_audio_decoder(path for path, _ in items)
        super().__init__(SharedList(items))
        self.targets = torch.tensor([label for _, label in items])  # of all samples: (N,) int64

    def load_audio(self, raw: Any) -> Tensor:
        """The clip: (C, frames) float32."""
        info = audio_info(raw[0])
        if self.rate is not None and info.rate != self.rate:
            raise ValueError(f"{raw[0]}: {info.rate} frames per second; expected {self.rate}")
        spare = max(info.frames - self.frames, 0)
        start = {"random": int(torch.randint(spare + 1, ())), "center": spare // 2, "start": 0}[self.crop]
        audio, _ = read_audio(raw[0], start=start, frames=self.frames)
        audio = audio.mean(0, keepdim=True) if self.mono else audio
        return torch.nn.functional.pad(audio, (0, self.frames - audio.shape[1]))

    def load_label(self, raw: Any) -> int:
        """The class index."""
        return raw[1]
