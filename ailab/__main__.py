"""`python -m ailab`: the commands that there are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ailab import __version__


def commands() -> Iterator[tuple[str, str]]:
    """(name, first line of the docstring) of each module here that can be run; none of them is imported."""
    for file in sorted(Path(__file__).parent.glob("*.py")):
        source = file.read_text(encoding="utf-8")
        if 'if __name__ == "__main__"' in source and file.stem != "__main__":
            yield file.stem, (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("`", "")


def main() -> int:
    """Print them; returns the exit code, 2 where something else was asked for."""
    lines = [f"ailab {__version__}. Commands:", *(f"  {name:<9}{line}" for name, line in commands())]
    asked = sys.argv[1:] not in ([], ["-h"], ["--help"])
    print("\n".join(lines), file=sys.stderr if asked else sys.stdout)
    return 2 if asked else 0


if __name__ == "__main__":
    sys.exit(main())
