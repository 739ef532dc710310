"""Vocabularies: text to tokens, one token per byte or per character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ailab.errors import DataError


class Vocabulary(Protocol):
    """The interface of a vocabulary. Any tokenizer with these methods can be used."""

    def __len__(self) -> int:
        """Number of tokens, including the special tokens."""
        ...

    def encode(self, text: str) -> Tensor:
        """The tokens of a text: (L,) int64, without special tokens."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens. Special tokens are left out."""
        ...

    def with_special_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens with `begin` in front and `end` behind: (L + 2,) int64."""
        ...


class ByteVocabulary:
    """One token per UTF-8 byte (0 to 255), then three special tokens: 256 pad, 257 begin, 258 end. It can encode any text."""

    pad, begin, end = 256, 257, 258

    def __len__(self) -> int:
        return 259

    def encode(self, text: str) -> Tensor:
        """The tokens of a text: (bytes,) int64.

        Raises:
            TypeError: `text` is not a str.
        """
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected text, got {type(text).__name__} {text!r:.60}")
        content = bytearray(text.encode())
        return torch.frombuffer(content, dtype=torch.uint8).long() if content else torch.zeros(0, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens. Invalid UTF-8 becomes U+FFFD. Special tokens are left out."""
        return bytes(int(t) for t in tokens if int(t) < 256).decode(errors="replace")

    def with_special_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens with `begin` in front and `end` behind."""
        return torch.cat([torch.tensor([self.begin]), tokens, torch.tensor([self.end])])


class CharVocabulary:
    """One token per character. Three special tokens come first: 0 pad, 1 begin, 2 end. Then the characters, sorted.

    Args:
        characters: A text or several texts. Their distinct characters are the alphabet.
    """

    pad, begin, end = 0, 1, 2

    def __init__(self, characters: Iterable[str]):
        self.characters = sorted({c for text in characters for c in text})
        self._codes = torch.tensor([ord(c) for c in self.characters], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.characters) + 3

    def encode(self, text: str) -> Tensor:
        """The tokens of a text: (characters,) int64.

        Raises:
            DataError: A character is not in the alphabet.
            TypeError: `text` is not a str.
        """
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected text, got {type(text).__name__} {text!r:.60}")
        if not text:
            return torch.zeros(0, dtype=torch.int64)
        codes = torch.frombuffer(bytearray(text.encode("utf-32-le", "surrogatepass")), dtype=torch.int32).long()
        if len(self._codes):
            known = torch.searchsorted(self._codes, codes).clamp_max(len(self._codes) - 1)  # the characters are sorted by code
            same = self._codes[known] == codes
        else:
            known = same = torch.zeros_like(codes)
        if not same.all():
            at = int(same.int().argmin())
            raise DataError(
                f"the character {text[at]!r} (at {at}) is not in the alphabet of {len(self.characters)} characters."
            )
        return known + 3

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens. Special tokens are left out."""
        return "".join(self.characters[int(t) - 3] for t in tokens if int(t) > 2)

    def with_special_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens with `begin` in front and `end` behind."""
        return torch.cat([torch.tensor([self.begin]), tokens, torch.tensor([self.end])])
