"""Text as numbers: a token for each byte, or for each character of a given alphabet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ailab.errors import DataError


class Vocabulary(Protocol):
    """Tokens of text; any tokenizer with these methods will do."""

    def __len__(self) -> int:
        """Number of tokens, the special ones included."""
        ...

    def encode(self, text: str) -> Tensor:
        """(L,) int64."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text, without special tokens."""
        ...

    def marked(self, tokens: Tensor) -> Tensor:
        """The tokens between `begin` and `end`."""
        ...


class ByteVocabulary:
    """The 256 bytes of UTF-8, then three special tokens: 256 pad, 257 begin, 258 end. It can write any text."""

    pad, begin, end = 256, 257, 258

    def __len__(self) -> int:
        return 259

    def encode(self, text: str) -> Tensor:
        """(bytes,) int64.

        Raises:
            TypeError: this is no text.
        """
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected text, got {type(text).__name__} {text!r:.60}")
        content = bytearray(text.encode())
        return torch.frombuffer(content, dtype=torch.uint8).long() if content else torch.zeros(0, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD, special tokens are left out."""
        return bytes(int(t) for t in tokens if int(t) < 256).decode(errors="replace")

    def marked(self, tokens: Tensor) -> Tensor:
        """The tokens between `begin` and `end`."""
        return torch.cat([torch.tensor([self.begin]), tokens, torch.tensor([self.end])])


class CharVocabulary:
    """Three special tokens, 0 pad, 1 begin, 2 end, then the characters, sorted.

    Args:
        characters: the alphabet: a text, or texts, whose distinct characters are taken.
    """

    pad, begin, end = 0, 1, 2

    def __init__(self, characters: Iterable[str]):
        self.characters = sorted({c for text in characters for c in text})
        self._codes = torch.tensor([ord(c) for c in self.characters], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.characters) + 3

    def encode(self, text: str) -> Tensor:
        """(characters,) int64.

        Raises:
            DataError: a character is not in the alphabet.
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
            raise DataError(f"the character {text[at]!r} (at {at}) is not in the alphabet of {len(self.characters)}.")
        return known + 3

    def decode(self, tokens: Tensor) -> str:
        """The text, without special tokens."""
        return "".join(self.characters[int(t) - 3] for t in tokens if int(t) > 2)

    def marked(self, tokens: Tensor) -> Tensor:
        """The tokens between `begin` and `end`."""
        return torch.cat([torch.tensor([self.begin]), tokens, torch.tensor([self.end])])
