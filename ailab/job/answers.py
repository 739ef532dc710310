"""What a row says of an output: the classes of an input, a class map, or values."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ailab.errors import ConfigError
from ailab.workdir import durable

MASKS = "masks"  # the folder of class maps


class Answer(Protocol):
    """How outputs become rows."""

    spatial: ClassVar[bool]  # whether the last dimension of an output is the width of the input

    def read(self, output: Tensor) -> Tensor:
        """The output as it may be averaged over views of an input."""
        ...

    def rows(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The row of each input, without its path. `sizes` are (height, width) of the originals, -1 where they are no images."""
        ...

    def columns(self) -> list[str]:
        """The columns of a CSV file, after the path."""
        ...

    def settings(self) -> dict[str, Any]:
        """What rows depend on beside the outputs."""
        ...

    def begin(self, folder: Path, part: int) -> None:
        """Where files beside the rows go, and the number of this process."""
        ...

    def stored(self, rows: Iterable[dict[str, Any]], first: int) -> Iterator[Mapping[str, Any]]:
        """The rows as they are written; what is no text is written to a file. `first` is the number of the first input."""
        ...


class _Rows:
    """An answer whose rows are text alone."""

    spatial: ClassVar[bool] = False

    def __init__(self, classes: Sequence[str] | None, topk: int, threshold: float):
        self.classes, self.topk, self.threshold = classes, topk, threshold
        self._likely: bool | None = None  # whether the outputs are probabilities already; decided on the first batch

    def settings(self) -> dict[str, Any]:
        """What rows depend on beside the outputs."""
        return {"kind": type(self).__name__, "topk": self.topk, "threshold": self.threshold}

    def begin(self, folder: Path, part: int) -> None:
        """There are no files beside the rows."""

    def _name(self, index: int) -> str:
        return self.classes[index] if self.classes and index < len(self.classes) else str(index)

    def _probabilities(self, output: Tensor) -> Tensor:
        if output.dim() < 2:
            raise ConfigError(f"the model gave {tuple(output.shape)}; class scores are (B, C, ...).")
        if self._likely is None:
            self._likely = bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-3).all())
        return output if self._likely else output.softmax(1)


class Classes(_Rows):
    """`{"class": name, "score": p, "classes": [...], "scores": [...]}`: probabilities in [0, 1], the highest first."""

    def read(self, output: Tensor) -> Tensor:
        """The output as it may be averaged over views of an input."""
        return self._probabilities(output)

    def rows(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The row of each input, without its path."""
        number = min(self.topk or values.shape[1], values.shape[1])
        scores, indices = values.topk(number, dim=1)
        rows: list[dict[str, Any]] = []
        for some, which in zip(scores.tolist(), indices.tolist(), strict=True):
            kept = [(self._name(i), s) for i, s in zip(which, some, strict=True) if s >= self.threshold]
            first = kept[0] if kept else (None, None)
            rows.append({"class": first[0], "score": first[1], "classes": [n for n, _ in kept], "scores": [s for _, s in kept]})
        return rows

    def columns(self) -> list[str]:
        """The columns of a CSV file, after the path."""
        number = self.topk or len(self.classes or ())
        if not number:
            raise ConfigError("--topk 0 with --format csv: the number of classes is not known here. Use --format jsonl.")
        number = min(number, len(self.classes)) if self.classes else number
        return [name for k in range(1, number + 1) for name in (f"class{k}", f"score{k}")]

    def stored(self, rows: Iterable[dict[str, Any]], first: int) -> Iterator[Mapping[str, Any]]:
        """The rows as they are written."""
        for row in rows:
            pairs = enumerate(zip(row["classes"], row["scores"], strict=True), 1)
            # The columns of a CSV file; a JSON line has lists.
            yield _Row(row, {k: v for i, (n, s) in pairs for k, v in ((f"class{i}", n), (f"score{i}", s))})


class Values(_Rows):
    """`{"values": [...]}`: the numbers of the output, flattened."""

    def read(self, output: Tensor) -> Tensor:
        """The output as it may be averaged over views of an input."""
        return output

    def rows(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The row of each input, without its path."""
        return [{"values": row.flatten().tolist()} for row in values]

    def columns(self) -> list[str]:
        """The columns of a CSV file, after the path."""
        return ["values"]

    def stored(self, rows: Iterable[dict[str, Any]], first: int) -> Iterator[Mapping[str, Any]]:
        """The rows as they are written."""
        for row in rows:
            yield _Row(row, {"values": " ".join(map(repr, row["values"]))})


class ClassMap(_Rows):
    """`{"mask": (H, W) class of each pixel, "shares": {name: share of the pixels}}`; in a file, the path of a PNG for the mask.

    The mask is in the frame of the model's input. "original" is the height and the width of the image before the transform. A pixel
    whose class has a score below the threshold is 255.
    """

    spatial: ClassVar[bool] = True

    def __init__(self, classes: Sequence[str] | None, topk: int, threshold: float):
        super().__init__(classes, topk, threshold)
        self._folder, self._part = Path(), 0

    def read(self, output: Tensor) -> Tensor:
        """The output as it may be averaged over views of an input."""
        return self._probabilities(output)

    def rows(self, values: Tensor, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """The row of each input, without its path."""
        score, mask = values.max(1)
        mask[score < self.threshold] = 255
        return [
            {"mask": one, "shares": self._shares(one), "original": list(size)} for one, size in zip(mask, sizes, strict=True)
        ]

    def _shares(self, mask: Tensor) -> dict[str, float]:
        found, counts = mask.unique(return_counts=True)
        return {self._name(int(i)): int(n) / mask.numel() for i, n in zip(found, counts, strict=True)}

    def columns(self) -> list[str]:
        """The columns of a CSV file, after the path."""
        return ["mask"]

    def begin(self, folder: Path, part: int) -> None:
        """Where the masks go."""
        self._folder, self._part = folder, part
        (folder / MASKS).mkdir(parents=True, exist_ok=True)

    def stored(self, rows: Iterable[dict[str, Any]], first: int) -> Iterator[Mapping[str, Any]]:
        """The rows as they are written."""
        from PIL import Image

        for number, row in enumerate(rows, first):
            mask: Tensor = row["mask"]
            wide = mask.to(torch.uint8 if int(mask.max()) < 256 else torch.int32).numpy()
            data = io.BytesIO()
            Image.fromarray(wide if wide.dtype == "uint8" else wide.astype("uint16")).save(data, "PNG")
            name = f"{MASKS}/{self._part}-{number:08d}.png"
            durable.replace(self._folder / name, data.getbuffer())
            yield {**row, "mask": name}


class _Row(dict[str, Any]):
    """A row for JSON, with columns for CSV that `get` finds too."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, Any]):
        super().__init__(row)
        self._columns = columns

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a column."""
        return self._columns.get(key, super().get(key, default))


def _no_boxes(classes: Sequence[str] | None, topk: int, threshold: float) -> Answer:
    raise ConfigError("predict cannot answer with boxes yet: this model was trained on boxes.")


ANSWERS: dict[str, Callable[[Sequence[str] | None, int, float], Answer]] = {
    "classes": Classes,
    "class map": ClassMap,
    "values": Values,
    "boxes": _no_boxes,
}
