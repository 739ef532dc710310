"""Classification and regression of any tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ailab.datasets.tasks.task import Task, target_of, tensor_of
from ailab.datasets.transforms.pipeline import Sample


class ClassificationTask(Task):
    """Classification: `{"input": tensor, "target": () int64}`. With `multi_label` the target is (classes,) float32 of 0 and 1.

    A transform treats an input of three dimensions as an image. Define `load_input` and `load_label`.
    """

    input_field: str | None = "input"
    kinds: Mapping[str, str] = {"input": "image"}
    multi_label: bool = False

    def load_input(self, raw: Any) -> Any:
        """A tensor, an array, an image or numbers."""
        raise NotImplementedError(f"{type(self).__name__}: define load_input.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The fields "input" and "target"."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        return {"input": tensor_of(self.load_input(raw), "load_input"), "target": target}


class RegressionTask(Task):
    """Regression: `{"input": tensor, "target": float32 of any shape}`.

    A transform treats an input of three dimensions as an image. Define `load_input` and `load_target`.
    """

    input_field: str | None = "input"
    kinds: Mapping[str, str] = {"input": "image"}

    def load_input(self, raw: Any) -> Any:
        """A tensor, an array, an image or numbers."""
        raise NotImplementedError(f"{type(self).__name__}: define load_input.")

    def load_target(self, raw: Any) -> Any:
        """The target: finite numbers of any shape."""
        raise NotImplementedError(f"{type(self).__name__}: define load_target.")

    def load(self, raw: Any) -> Sample:
        """The fields "input" and "target"."""
        target = tensor_of(self.load_target(raw), "load_target").float()
        if not target.isfinite().all():
            raise ValueError(f"the target is not finite: {target.tolist()!r:.80}")
        return {"input": tensor_of(self.load_input(raw), "load_input"), "target": target}
