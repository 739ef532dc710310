"""Sound from files, as float tensors."""

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

SOUNDS = (".wav", ".flac", ".ogg", ".aiff", ".aif")


class Sound(NamedTuple):
    """What the header of a file says."""

    frames: int
    rate: int  # frames per second
    channels: int


def sound_info(path: str | Path) -> Sound:
    """The length, rate and channels of a file, from its header.

    Raises:
        BadFile: as `read_audio`.
    """
    return _opened(path, 0, 0)[1]


def read_audio(path: str | Path, *, start: int = 0, frames: int = -1) -> tuple[Tensor, int]:
    """A sound as (C, T) float32 in [-1, 1], and its rate in frames per second. Only the part asked for is read.

    WAV files with 8, 16, 24 or 32-bit integers are read by Python itself; FLAC, Ogg, AIFF and WAV with floats by the package
    soundfile.

    Args:
        path: of the file.
        start: first frame.
        frames: number of them; all that follow when -1. Fewer come at the end of the file.

    Raises:
        BadFile: the file is missing, is no sound, is damaged or shorter than its header says.
        DataError: it needs soundfile, which is not installed.
    """
    samples, sound = _opened(path, start, frames)
    return samples, sound.rate


def check_reader(paths: Iterable[str | Path]) -> None:
    """Check that what the endings of the files ask for is installed.

    Raises:
        DataError: a file needs soundfile, which is not.
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


def _opened(path: str | Path, start: int, frames: int) -> tuple[Tensor, Sound]:
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
        raise BadFile("truncated", "the file ends within its header", str(path)) from error


def _by_wave(path: Path, file: wave.Wave_read, start: int, frames: int) -> tuple[Tensor, Sound]:
    sound = Sound(file.getnframes(), file.getframerate(), file.getnchannels())
    wanted = max(min(sound.frames - start, frames if frames >= 0 else sound.frames), 0)
    if not wanted:
        return torch.zeros(sound.channels, 0), sound
    file.setpos(start)
    content = file.readframes(wanted)
    width = file.getsampwidth()
    if len(content) != wanted * width * sound.channels:
        said = wanted * width * sound.channels
        raise BadFile("truncated", f"{len(content)} bytes of sound; the header says {said}", str(path))
    return _samples(content, width).view(-1, sound.channels).T.contiguous(), sound


def _samples(content: bytes, width: int) -> Tensor:
    """Little-endian integers of `width` bytes as float32 in [-1, 1); those of one byte have no sign."""
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if width == 1:
        return (raw.float() - 128) / 128
    assert sys.byteorder == "little"
    if width == 3:
        low, middle, high = raw.view(-1, 3).to(torch.int32).unbind(1)
        signed = torch.where(high >= 128, high - 256, high)
        return (low + 256 * middle + 65536 * signed).float() / 2**23
    return raw.view(torch.int16 if width == 2 else torch.int32).float() / 2 ** (8 * width - 1)


def _by_soundfile(path: Path, start: int, frames: int, what: str) -> tuple[Tensor, Sound]:
    library = _soundfile(path, what)
    try:
        with library.SoundFile(str(path)) as file:
            sound = Sound(int(file.frames), int(file.samplerate), int(file.channels))
            file.seek(min(start, sound.frames))
            samples = file.read(frames=frames, dtype="float32", always_2d=True)
    except (library.LibsndfileError, RuntimeError) as error:
        raise BadFile("corrupt", f"it cannot be decoded: {error}", str(path)) from error
    return torch.from_numpy(samples).T.contiguous(), sound
