"""Notes and progress: always on stderr, so that stdout holds results only."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from moec.errors import printable


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
