"""Text: tokens in, a class or tokens out."""

from __future__ import annotations

from typing import Any

from ailab.datasets.files.vocabulary import ByteVocabulary, Vocabulary
from ailab.datasets.tasks.task import Task, target_of
from ailab.datasets.transforms.pipeline import Sample


class TextClassificationTask(Task):
    """Samples `{"text": (L,) int64 tokens of `vocabulary`, "target": () int64}`; longer texts are cut at `max_tokens`."""

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
        """Both fields."""
        target = target_of(self.load_label(raw), self.classes, self.multi_label)
        return {"text": self.vocabulary.encode(self.load_text(raw))[: self.max_tokens], "target": target}


class Seq2SeqTask(Task):
    """Samples `{"source": (L,) int64, "target": (M,) int64}`; the target runs from the token `begin` to the token `end`."""

    vocabulary: Vocabulary = ByteVocabulary()
    target_vocabulary: Vocabulary | None = None  # None: the same
    max_tokens: int | None = None  # of either, the two marks of the target aside

    def load_source(self, raw: Any) -> str:
        """The text to read."""
        raise NotImplementedError(f"{type(self).__name__}: define load_source.")

    def load_target(self, raw: Any) -> str:
        """The text to write."""
        raise NotImplementedError(f"{type(self).__name__}: define load_target.")

    def load(self, raw: Any) -> Sample:
        """Both fields."""
        into = self.target_vocabulary or self.vocabulary
        source = self.vocabulary.encode(self.load_source(raw))[: self.max_tokens]
        return {"source": source, "target": into.marked(into.encode(self.load_target(raw))[: self.max_tokens])}
