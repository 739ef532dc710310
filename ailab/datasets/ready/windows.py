"""Sliding windows over one long sequence: a time series for forecasting, a text for language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ailab.datasets.base import LabBaseDataset
from ailab.datasets.files.vocabulary import ByteVocabulary, CharVocabulary
from ailab.datasets.storages.records import read_text
from ailab.datasets.storages.table import Column, TableDataset
from ailab.errors import DataError
from ailab.registry import DATASETS
from ailab.signature import check_choice

_Level = Literal["byte", "char"]
_IN_MEMORY = 1 << 26  # tokens that are kept as int64


def _span(rows: int, part: Sequence[float], needed: int, what: str) -> tuple[int, int]:
    """The first and the last row (exclusive) of a part, which is given as two fractions of all rows.

    Raises:
        DataError: The fractions are not 0 <= start < end <= 1, or the part has fewer than `needed` rows.
    """
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise DataError(f"{what}: expected part=(start, end) with 0 <= start < end <= 1, got {tuple(part)}.")
    start, end = round(rows * part[0]), round(rows * part[1])
    if end - start < needed:
        raise DataError(f"{what}: the split is empty: part={tuple(part)} has {end - start} rows; one window needs {needed}.")
    return start, end


@DATASETS.register_module()
class WindowedTimeSeries(LabBaseDataset):
    """Sliding windows over a time series: `{"series": (window, C) float32, "target": (horizon, K) float32}`.

    The table has one row per time step. The target is the `horizon` rows after the window. No window reaches outside its part, so
    the train and val splits have no row in common.

    Args:
        table_path: A .csv, .tsv or Excel file of numbers, as `TableDataset` reads it.
        window: Number of input rows.
        horizon: Number of target rows.
        stride: Number of rows from one window to the next.
        inputs: Input columns, by name or position. Default: all columns.
        targets: Target columns, by name or position. Default: the input columns.
        part: The rows to use, as fractions of all rows, e.g. (0, 0.8) for train and (0.8, 1) for val.
        normalize: The rows, as fractions, whose mean and standard deviation normalise every column. Give every split the part of
            the train split. None does not normalise.
        header: Whether the first row has the column names.

    Raises:
        DataError: The table cannot be read, lacks a column, has a cell that is not a number, or the part is shorter than one
            window.
    """

    def __init__(
        self,
        table_path: str | Path,
        window: int,
        horizon: int = 1,
        *,
        stride: int = 1,
        inputs: Sequence[Column] | None = None,
        targets: Sequence[Column] | None = None,
        part: Sequence[float] = (0.0, 1.0),
        normalize: Sequence[float] | None = None,
        header: bool = True,
    ):
        x = TableDataset(table_path, inputs=inputs, target=None, header=header).tensors()["input"]
        y = x if targets is None else TableDataset(table_path, inputs=targets, target=None, header=header).tensors()["input"]
        if min(window, horizon, stride) < 1:
            raise DataError(
                f"WindowedTimeSeries: window, horizon and stride must be at least 1; got {window}, {horizon}, {stride}."
            )
        if normalize is not None:
            first, last = _span(len(x), normalize, 2, f"{table_path}: normalize")
            x, y = _normalized(x, first, last), _normalized(y, first, last)
        start, end = _span(len(x), part, window + horizon, str(table_path))
        self._fields = {
            "series": x[start : end - horizon].unfold(0, window, stride).transpose(1, 2),
            "target": y[start + window : end].unfold(0, horizon, stride).transpose(1, 2),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All windows, stacked. They are views and overlap in memory."""
        return self._fields

    def _len(self) -> int:
        return len(self._fields["series"])

    def _get_raw(self, index: int) -> Any:
        return {name: values[index] for name, values in self._fields.items()}

    def _get_sample(self, raw: Any) -> Any:
        return raw


def _normalized(values: Tensor, first: int, last: int) -> Tensor:
    """Normalise each column by the mean and standard deviation of some rows. A constant column is only shifted."""
    std, mean = torch.std_mean(values[first:last], 0)
    return (values - mean) / torch.where(std > 0, std, 1.0)


@DATASETS.register_module()
class TextWindows(LabBaseDataset):
    """Sliding windows over a text file, for language modelling: `{"input": (window,) int64, "target": (window,) int64}`.

    The target is the next token of each input token.

    Args:
        path: Path of the file. With the level "byte" any file works; it is memory-mapped and not read as a whole.
        window: Number of tokens of a sample.
        stride: Number of tokens from one window to the next. Default: `window`, so that each token is predicted once.
        level: "byte" for the tokens 0 to 255, or "char" for the tokens of `CharVocabulary`.
        alphabet: All characters, for the level "char". Default: the characters of the whole file, for every part.
        part: The tokens to use, as fractions of the file, e.g. (0, 0.9) for train and (0.9, 1) for val.

    Raises:
        DataError: The file cannot be read, is no UTF-8 text (level "char"), has a character outside `alphabet`, or the part is
            shorter than `window` + 1 tokens.
    """

    def __init__(
        self,
        path: str | Path,
        window: int,
        *,
        stride: int | None = None,
        level: _Level = "byte",
        alphabet: str | None = None,
        part: Sequence[float] = (0.0, 1.0),
    ):
        check_choice(level, _Level, "TextWindows: level")
        self.path, self.level, self.alphabet, self.part = Path(path), level, alphabet, tuple(part)
        self.window, self.stride = window, window if stride is None else stride
        if min(self.window, self.stride) < 1:
            raise DataError(f"TextWindows: window and stride must be at least 1; got {self.window} and {self.stride}.")
        self.vocabulary, self._tokens = self._read()

    def __getstate__(self) -> dict[str, Any]:
        """The state without the tokens. Another process maps the file itself."""
        return {**self.__dict__, "_tokens": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.vocabulary, self._tokens = self._read()

    def _read(self) -> tuple[ByteVocabulary | CharVocabulary, Tensor]:
        """The vocabulary, and the tokens of the part."""
        vocabulary: ByteVocabulary | CharVocabulary = ByteVocabulary()
        if self.level == "char":
            text = read_text(self.path)
            vocabulary = CharVocabulary(text if self.alphabet is None else self.alphabet)
            tokens: Tensor = vocabulary.encode(text)
        else:
            tokens = _mapped(self.path)
        start, end = _span(len(tokens), self.part, self.window + 1, str(self.path))
        return vocabulary, tokens[start:end]

    def tensors(self) -> dict[str, Tensor] | None:
        """All windows, stacked. They are views and overlap in memory. None for a large file, which is read window by window."""
        if len(self._tokens) > _IN_MEMORY:
            return None
        tokens = self._tokens.long()
        return {"input": self._windows(tokens[:-1]), "target": self._windows(tokens[1:])}

    def _windows(self, tokens: Tensor) -> Tensor:
        return tokens.unfold(0, self.window, self.stride)

    def _len(self) -> int:
        return (len(self._tokens) - 1 - self.window) // self.stride + 1

    def _get_raw(self, index: int) -> Tensor:
        if not 0 <= index < self._len():
            raise IndexError(f"window {index} of {self._len()}")
        return self._tokens[index * self.stride : index * self.stride + self.window + 1].long()

    def _get_sample(self, raw: Any) -> Any:
        return {"input": raw[:-1], "target": raw[1:]}


def _mapped(path: Path) -> Tensor:
    """The bytes of a file, memory-mapped: (N,) uint8."""
    try:
        size = path.stat().st_size
        return (
            torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            if size
            else torch.zeros(0, dtype=torch.uint8)
        )
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error
