"""A list of records in one block of memory, which worker processes share."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, overload


class SharedList(Sequence[Any]):
    """An immutable list of JSON values. Each access decodes the value again.

    Reading a Python list changes the reference counts of its items. So every forked worker gets a copy of all items during an
    epoch. One bytes object stays shared, and needs a third of the memory.

    Args:
        values: Dicts with str keys, lists, texts, numbers, True, False and None. A tuple comes back as a list.

    Raises:
        TypeError: A value cannot be encoded as JSON.
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
    """The values as a `SharedList`; unchanged if they are not JSON, such as dates of an Excel sheet."""
    try:
        return SharedList(values)
    except (TypeError, ValueError):
        return values
