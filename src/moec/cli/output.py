"""Notes and progress: always on stderr, so that stdout holds results only."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from moec.errors import InputError, printable


class NoSuchPlace(InputError):
    """A file that could not be written once the work is done."""

    template: ClassVar[str] = "{option} {path}: {why}"


def check_file(option: str, path: Path | None) -> None:
    """Refuse before the work begins a file that could not be written after it; raises NoSuchPlace."""
    if path is None:
        return
    if path.is_dir():
        raise NoSuchPlace(option=option, path=path, why="is a folder, a file is to be written")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        parent = printable(path.parent)
        raise NoSuchPlace(option=option, path=path, why=f"{parent} is no folder that can be written to")


def note(line: str) -> None:
    """One line for the reader."""
    print(f"moec: {printable(line)}", file=sys.stderr)


class Progress:
    """A progress bar over bytes; silent when stderr is not a terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show `done` of `total` bytes, at most ten times a second."""
        now = time.monotonic()
        if not sys.stderr.isatty() or (now - self._shown < 0.1 and done < total):
            return
        self._shown = now
        width = 30
        filled = width * done // max(total, 1)
        bar = "#" * filled + "." * (width - filled)
        print(f"\r{self.title} [{bar}] {done / 1e9:.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print(file=sys.stderr)
