"""Video, time series and audio: tensors with a time dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ailab.datasets.files.vocabulary import ByteVocabulary, Vocabulary
from ailab.datasets.tasks.task import Task, target_of, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class VideoClassificationTask(Task):
    """Video classification: `{"frames": (T, C, H, W) uint8, "target": () int64}`.

    With `multi_label` the target is (classes,) float32 of 0 and 1. A transform changes all frames in the same way. Define
    `load_frames` and `load_label`.
    """

    kinds: Mapping[str, str] = {"frames": "video"}
    multi_label: bool = False

    def load_frames(self, raw: Any) -> Any:
        """The frames: (T, C, H, W) uint8."""
        raise NotImplementedError(f"{type(self).__name__}: define load_frames.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The fields "frames" and "target"."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        frames = _shaped(tensor_of(self.load_frames(raw), "load_frames"), 4, "load_frames: expected (T, C, H, W)")
        return {"frames": frames, "target": target}


class TimeSeriesTask(Task):
    """Time series: `{"series": (T, C) float32, "target": float32, or int64 for integers}`.

    Define `load_series` and `load_target`.
    """

    def load_series(self, raw: Any) -> Any:
        """The time series: (T, C), or (T,) for one channel, of finite numbers."""
        raise NotImplementedError(f"{type(self).__name__}: define load_series.")

    def load_target(self, raw: Any) -> Any:
        """The target: a class index, or numbers of any shape."""
        raise NotImplementedError(f"{type(self).__name__}: define load_target.")

    def load(self, raw: Any) -> Sample:
        """The fields "series" and "target"."""
        series = tensor_of(self.load_series(raw), "load_series").float()
        series = _shaped(series.unsqueeze(-1) if series.dim() == 1 else series, 2, "load_series: expected (T, C)")
        if not series.isfinite().all():
            at = series.isfinite().logical_not().nonzero()[0].tolist()
            raise ValueError(f"load_series: not finite at time {at[0]}, channel {at[1]}")
        return {"series": series, "target": tensor_of(self.load_target(raw), "load_target")}


class AudioClassificationTask(Task):
    """Audio classification: `{"audio": (C, T) float32 in [-1, 1], "target": () int64}`.

    With `multi_label` the target is (classes,) float32 of 0 and 1. Define `load_audio` and `load_label`.
    """

    multi_label: bool = False

    def load_audio(self, raw: Any) -> Any:
        """The waveform: (C, T), or (T,) for one channel."""
        raise NotImplementedError(f"{type(self).__name__}: define load_audio.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The fields "audio" and "target"."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        return {"audio": _waveform(self.load_audio(raw)), "target": target}


class SpeechRecognitionTask(Task):
    """Speech recognition: `{"audio": (C, T) float32 in [-1, 1], "text": (L,) int64}`, the tokens of the transcript.

    Define `load_audio` and `load_transcript`.
    """

    vocabulary: Vocabulary = ByteVocabulary()

    def load_audio(self, raw: Any) -> Any:
        """The waveform: (C, T), or (T,) for one channel."""
        raise NotImplementedError(f"{type(self).__name__}: define load_audio.")

    def load_transcript(self, raw: Any) -> str:
        """The transcript, a text."""
        raise NotImplementedError(f"{type(self).__name__}: define load_transcript.")

    def load(self, raw: Any) -> Sample:
        """The fields "audio" and "text"."""
        return {"audio": _waveform(self.load_audio(raw)), "text": self.vocabulary.encode(self.load_transcript(raw))}


def _waveform(value: Any) -> Tensor:
    audio = tensor_of(value, "load_audio").float()
    return _shaped(audio.unsqueeze(0) if audio.dim() == 1 else audio, 2, "load_audio: expected (C, T)")


def _shaped(value: Tensor, dims: int, what: str) -> Tensor:
    if value.dim() != dims or not value.numel():
        raise ValueError(f"{what}, got {tuple(value.shape)}")
    return value
