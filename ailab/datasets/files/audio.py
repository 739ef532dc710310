"""Audio files as float tensors."""

from __future__ import annotations

import sys
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ailab.datasets.files.bad_file import BadFile
from ailab.errors import DataError

AUDIO_EXTENSIONS = (".wav", ".flac", ".ogg", ".aiff", ".aif")


class AudioInfo(NamedTuple):
    """The header of an audio file."""

    frames: int  # length; a frame has one value per channel
    rate: int  # frames per second
    channels: int


def audio_info(path: str | Path) -> AudioInfo:
    """The length, sample rate and channels of an audio file. Only its header is read.

    Raises:
        BadFile: As `read_audio`.
    """
    return _read(path, 0, 0)[1]


def read_audio(path: str | Path, *, start: int = 0, frames: int = -1) -> tuple[Tensor, int]:
    """Read an audio file: the samples as (C, T) float32 in [-1, 1], and the sample rate in frames per second.

    WAV files of 8, 16, 24 or 32-bit integers need no package. FLAC, Ogg, AIFF and WAV files of floats need the package
    soundfile. Only the requested part of the file is read.

    Args:
        path: Path of the file.
        start: First frame to read.
        frames: Number of frames to read. -1 reads to the end. Near the end of the file the result is shorter.

    Raises:
        BadFile: The file is missing, is no audio file, is damaged, or is shorter than its header says.
        DataError: The file needs soundfile, and it is not installed.
    """
    samples, info = _read(path, start, frames)
    return samples, info.rate


def check_audio_decoder(paths: Iterable[str | Path]) -> None:
    """Check that the decoder for these files is installed. Only the file extensions are looked at.

    Raises:
        DataError: A file needs soundfile, and it is not installed.
    """
    other = next((Path(p) for p in paths if Path(p).suffix.lower() != ".wav"), None)
    if other is not None:
        _soundfile(other, f"a {other.suffix or 'sound'} file")


def _soundfile(path: Path, what: str) -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library is missing
        raise DataError(f"{path}: reading {what} needs the package soundfile: pip install 'ailab[audio]'.") from error
    return soundfile


def _read(path: str | Path, start: int, frames: int) -> tuple[Tensor, AudioInfo]:
    path = Path(path)
    if not path.is_file():
        raise BadFile("missing", "there is no such file", str(path))
    if path.suffix.lower() != ".wav":
        return _by_soundfile(path, start, frames, f"a {path.suffix or 'sound'} file")
    try:
        with wave.open(str(path), "rb") as file:
            return _by_wave(path, file, start, frames)
    except wave.Error as error:
        if "unknown format" in str(error):  # floats, mostly
            return _by_soundfile(path, start, frames, f"a WAV file of this kind ({error})")
        raise BadFile("corrupt", f"no WAV file: {error}", str(path)) from error
    except EOFError as error:
        raise BadFile("truncated", "the file ends inside its header", str(path)) from error


def _by_wave(path: Path, file: wave.Wave_read, start: int, frames: int) -> tuple[Tensor, AudioInfo]:
    info = AudioInfo(file.getnframes(), file.getframerate(), file.getnchannels())
    wanted = max(min(info.frames - start, frames if frames >= 0 else info.frames), 0)
    if not wanted:
        return torch.zeros(info.channels, 0), info
    file.setpos(start)
    content = file.readframes(wanted)
    width = file.getsampwidth()
    if len(content) != wanted * width * info.channels:
        expected = wanted * width * info.channels
        raise BadFile("truncated", f"{len(content)} bytes of audio; the header says {expected}", str(path))
    return _samples(content, width).view(-1, info.channels).T.contiguous(), info


def _samples(content: bytes, width: int) -> Tensor:
    """Little-endian integers of `width` bytes as float32 in [-1, 1). One-byte integers are unsigned."""
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if width == 1:
        return (raw.float() - 128) / 128
    assert sys.byteorder == "little"
    if width == 3:
        low, middle, high = raw.view(-1, 3).to(torch.int32).unbind(1)
        signed = torch.where(high >= 128, high - 256, high)
        return (low + 256 * middle + 65536 * signed).float() / 2**23
    return raw.view(torch.int16 if width == 2 else torch.int32).float() / 2 ** (8 * width - 1)


def _by_soundfile(path: Path, start: int, frames: int, what: str) -> tuple[Tensor, AudioInfo]:
    library = _soundfile(path, what)
    try:
        with library.SoundFile(str(path)) as file:
            info = AudioInfo(int(file.frames), int(file.samplerate), int(file.channels))
            file.seek(min(start, info.frames))
            samples = file.read(frames=frames, dtype="float32", always_2d=True)
    except (library.LibsndfileError, RuntimeError) as error:
        raise BadFile("corrupt", f"it cannot be decoded: {error}", str(path)) from error
    return torch.from_numpy(samples).T.contiguous(), info
