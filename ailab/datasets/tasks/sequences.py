"""Video, time series and sound: tensors with a time in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ailab.datasets.files.vocabulary import ByteVocabulary, Vocabulary
from ailab.datasets.tasks.task import Task, target_of, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class VideoClassificationTask(Task):
    """Samples `{"frames": (T, C, H, W) uint8, "target": () int64}`; a transform does the same to every frame."""

    kinds: Mapping[str, str] = {"frames": "video"}
    multi_label: bool = False

    def load_frames(self, raw: Any) -> Any:
        """(T, C, H, W)."""
        raise NotImplementedError(f"{type(self).__name__}: define load_frames.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        frames = _shaped(tensor_of(self.load_frames(raw), "load_frames"), 4, "load_frames: expected (T, C, H, W)")
        return {"frames": frames, "target": target}


class TimeSeriesTask(Task):
    """Samples `{"series": (T, C) float32, "target": float32, or int64 for whole numbers}`."""

    def load_series(self, raw: Any) -> Any:
        """(T, C), or (T,) for one channel; finite numbers."""
        raise NotImplementedError(f"{type(self).__name__}: define load_series.")

    def load_target(self, raw: Any) -> Any:
        """A class, or the numbers to predict."""
        raise NotImplementedError(f"{type(self).__name__}: define load_target.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        series = tensor_of(self.load_series(raw), "load_series").float()
        series = _shaped(series.unsqueeze(-1) if series.dim() == 1 else series, 2, "load_series: expected (T, C)")
        if not series.isfinite().all():
            at = series.isfinite().logical_not().nonzero()[0].tolist()
            raise ValueError(f"load_series: not finite at time {at[0]}, channel {at[1]}")
        return {"series": series, "target": tensor_of(self.load_target(raw), "load_target")}


class AudioClassificationTask(Task):
    """Samples `{"audio": (C, T) float32 in [-1, 1], "target": () int64}`."""

    multi_label: bool = False

    def load_audio(self, raw: Any) -> Any:
        """(C, T), or (T,) for one channel."""
        raise NotImplementedError(f"{type(self).__name__}: define load_audio.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        return {"audio": _waveform(self.load_audio(raw)), "target": target}


class SpeechRecognitionTask(Task):
    """Samples `{"audio": (C, T) float32, "text": (L,) int64}`, the transcript as tokens of `vocabulary`."""

    vocabulary: Vocabulary = ByteVocabulary()

    def load_audio(self, raw: Any) -> Any:
        """(C, T), or (T,) for one channel."""
        raise NotImplementedError(f"{type(self).__name__}: define load_audio.")

    def load_transcript(self, raw: Any) -> str:
        """What is said."""
        raise NotImplementedError(f"{type(self).__name__}: define load_transcript.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        return {"audio": _waveform(self.load_audio(raw)), "text": self.vocabulary.encode(self.load_transcript(raw))}


def _waveform(value: Any) -> Tensor:
    audio = tensor_of(value, "load_audio").float()
    return _shaped(audio.unsqueeze(0) if audio.dim() == 1 else audio, 2, "load_audio: expected (C, T)")


def _shaped(value: Tensor, dims: int, what: str) -> Tensor:
    if value.dim() != dims or not value.numel():
        raise ValueError(f"{what}, got {tuple(value.shape)}")
    return value
