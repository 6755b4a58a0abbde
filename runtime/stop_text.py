"""Text of one sequence as its tokens come, up to the first of some texts that end it."""

from __future__ import annotations

from collections.abc import Sequence

from moec.runtime.tokenizer import TextStream


class Continuation:
    """What a sequence says: `push` its tokens, `finish` at its end; the results joined are its text.

    The text ends before the first occurrence of one of `stops`, wherever tokens begin and end; `ended` says so. What
    may be the beginning of one is held back until it is known.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = stream, [stop for stop in stops if stop]
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that `token` settles, often empty."""
        return "" if self.ended else self._take(self._stream.push(token))

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.ended:
            return ""
        text = self._take(self._stream.finish())
        if not self.ended:
            text, self._held = text + self._held, ""
        return text

    def _take(self, more: str) -> str:
        self._held += more
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            text, self._held, self.ended = self._held[: min(found)], "", True
            return text
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
