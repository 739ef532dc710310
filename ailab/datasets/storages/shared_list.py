"""A list of records in one piece of memory, which worker processes share."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload


class SharedList(Sequence[Any]):
    """A list of JSON values that cannot be changed; each look-up makes the value anew.

    A process that only reads a Python list writes to the count of references in each item, so that every worker gets a copy of
    all of them in the course of an epoch. One piece of bytes stays shared, and takes a third of the memory.

    Args:
        values: dicts with names as keys, lists, text, numbers, True, False and None; tuples come back as lists.

    Raises:
        TypeError: a value is none of these.
    """

    def __init__(self, values: Iterable[Any]):
        content, encode = bytearray(), json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        self._ends = array("q", [0])
        for value in values:
            content += encode(value).encode("utf-8", "surrogatepass")
            self._ends.append(len(content))
        self._content = bytes(content)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return json.loads(self._content[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogatepass"))


def shared_list(values: list[Any]) -> Sequence[Any]:
    """The values packed, or as they are where they are no JSON, such as the dates of an Excel sheet."""
    try:
        return SharedList(values)
    except (TypeError, ValueError):
        return values
