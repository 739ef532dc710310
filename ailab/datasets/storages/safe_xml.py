"""XML files as nested dicts. Declared entities are refused: nothing is expanded, no other file is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.parsers import expat

from ailab.errors import DataError

_MAX_BYTES, _MAX_DEPTH = 16 << 20, 64


def read_xml(path: str | Path) -> dict[str, Any]:
    """Read an XML file as `{tag: content}`. The content is a text, or a dict of the child elements.

    Repeated elements become a list. Text is stripped. Attributes are ignored.

    Raises:
        DataError: The file cannot be read, is larger than 16 MiB, is nested deeper than 64 elements, declares a document type or
            an entity, or is no XML. The message has the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: the file has {path.stat().st_size} bytes, and {_MAX_BYTES} are allowed.")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    tree = _Tree(path)
    try:
        tree.parser.Parse(content, True)
    except expat.ExpatError as error:
        raise DataError(f"{path}, line {error.lineno}: no XML: {expat.ErrorString(error.code)}.") from error
    except (LookupError, ValueError) as error:  # an encoding that Python or expat does not know
        raise DataError(f"{path}, line 1: {error}. Save the file as UTF-8.") from error
    return tree.root


class _Tree:
    """Builds the nested dicts from the events of the parser."""

    def __init__(self, path: Path):
        self.path = path
        self.root: dict[str, Any] = {}
        self.open: list[tuple[str, dict[str, Any], list[str]]] = [("", self.root, [])]  # tag, children, text
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.EntityDeclHandler = self._refuse

    def _start(self, tag: str, _: dict[str, str]) -> None:
        if len(self.open) > _MAX_DEPTH:
            raise DataError(f"{self.path}, line {self.parser.CurrentLineNumber}: nested deeper than {_MAX_DEPTH} elements.")
        self.open.append((tag, {}, []))

    def _text(self, text: str) -> None:
        self.open[-1][2].append(text)

    def _end(self, _: str) -> None:
        tag, children, text = self.open.pop()
        content: Any = children or "".join(text).strip()
        siblings = self.open[-1][1]
        if tag not in siblings:
            siblings[tag] = content
        elif isinstance(siblings[tag], list):
            siblings[tag].append(content)
        else:
            siblings[tag] = [siblings[tag], content]

    def _refuse(self, name: str, *_: Any) -> None:
        raise DataError(
            f"{self.path}, line {self.parser.CurrentLineNumber}: declares a document type or entity ({name!r:.40}).\n"
            "  It is refused, since entities can use up the memory or read other files. Delete the declaration."
        )
