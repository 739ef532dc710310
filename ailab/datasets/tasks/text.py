"""Text classification and sequence to sequence, on tokens."""

from __future__ import annotations

from typing import Any

from ailab.datasets.files.vocabulary import ByteVocabulary, Vocabulary
from ailab.datasets.tasks.task import Task, target_of
from ailab.datasets.transforms.pipeline import Sample


class TextClassificationTask(Task):
    """Text classification: `{"text": (L,) int64, "target": () int64}`, the tokens of `vocabulary`.

    A longer text is truncated to `max_tokens`. With `multi_label` the target is (classes,) float32 of 0 and 1. Define
    `load_text` and `load_label`.
    """

    vocabulary: Vocabulary = ByteVocabulary()
    max_tokens: int | None = None
    multi_label: bool = False

    def load_text(self, raw: Any) -> str:
        """The text."""
        raise NotImplementedError(f"{type(self).__name__}: define load_text.")

    def load_label(self, raw: Any) -> Any:
        """The index or, with `classes`, the name of a class; a list of them with `multi_label`."""
        raise NotImplementedError(f"{type(self).__name__}: define load_label.")

    def load(self, raw: Any) -> Sample:
        """The fields "text" and "target"."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        return {"text": self.vocabulary.encode(self.load_text(raw))[: self.max_tokens], "target": target}


class Seq2SeqTask(Task):
    """Sequence to sequence: `{"source": (L,) int64, "target": (M,) int64}`. The target has the tokens `begin` and `end` around it.

    Define `load_source` and `load_target`.
    """

    vocabulary: Vocabulary = ByteVocabulary()
    target_vocabulary: Vocabulary | None = None  # None: the same as `vocabulary`
    max_tokens: int | None = None  # of the source and of the target, without `begin` and `end`

    def load_source(self, raw: Any) -> str:
        """The source text."""
        raise NotImplementedError(f"{type(self).__name__}: define load_source.")

    def load_target(self, raw: Any) -> str:
        """The target text."""
        raise NotImplementedError(f"{type(self).__name__}: define load_target.")

    def load(self, raw: Any) -> Sample:
        """The fields "source" and "target"."""
        into = self.target_vocabulary or self.vocabulary
        source = self.vocabulary.encode(self.load_source(raw))[: self.max_tokens]
        return {"source": source, "target": into.with_special_tokens(into.encode(self.load_target(raw))[: self.max_tokens])}
