"""Errors that a user of moec can act on: one class per mistake, its message a template on the class.

The command line prints the message as one line and exits with `exit_code`; a traceback is only ever a bug in moec.
Packages define their own subclasses next to the code that raises them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

_NAMES = frozenset(("path", "file", "folder", "artifact", "spec"))
"""Fields that hold what a user wrote, such as a file's name."""


class MoecError(Exception):
    """Work that failed although the input was right (a full disk, a dead rank): exit code 1.

    Subclasses set `template`; the keyword arguments of the constructor fill it and stay as attributes. Paths, and texts
    under a name of `_NAMES`, are shown printable: a file name cannot break the line. `found_by_all`: of several ranks
    every one raises it alike.
    """

    exit_code: ClassVar[int] = 1
    found_by_all: ClassVar[bool] = True
    template: ClassVar[str] = "{message}"

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        shown = {
            name: printable(value) if isinstance(value, Path) or (name in _NAMES and isinstance(value, str)) else value
            for name, value in fields.items()
        }
        super().__init__(self.template.format(**shown))


class InputError(MoecError):
    """Wrong usage or input: exit code 2."""

    exit_code: ClassVar[int] = 2


def printable(text: object) -> str:
    """`text` with line breaks and other control characters as escapes, so that a message stays one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text: str) -> str:
    """`text` with the middle left out of words that nobody reads to the end."""
    return re.sub(r"\S{400,}", lambda word: f"{word[0][:150]}...{word[0][-150:]}", text)


def near(name: str, known: list[str]) -> str:
    """` (did you mean a, b?)` for the known names close to `name`, or the whole short list when none is close."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f" (did you mean {printable(', '.join(close))}?)"
    return f" (known: {printable(', '.join(sorted(known)))})" if known else ""
