"""Reading IR text at a position: tokens, whitespace, and the error that says line, column and shows a caret."""

from __future__ import annotations

import re
from typing import ClassVar, NoReturn

from moec.errors import InputError

SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
MAX_DIGITS = 19


class ParseError(InputError):
    """Text that is not a module: says line and column and shows the place."""

    template: ClassVar[str] = "{file}:{line}:{column}: {message}\n  {text}\n  {caret}"


class Lexer:
    """A position in a text; every method that reads moves it behind what it read, or raises ParseError."""

    def __init__(self, text: str, file: str) -> None:
        self.text = text
        self.file = file
        self.at = 0

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.count("\n", 0, at) + 1
        start = self.text.rfind("\n", 0, at) + 1
        end = self.text.find("\n", at)
        shown = self.text[start : end if end >= 0 else len(self.text)]
        offset = at - start
        left = max(0, offset - 90)
        shown = "".join(c if c.isprintable() else " " for c in shown[left : left + 120])
        raise ParseError(
            file=self.file,
            line=line,
            column=offset + 1,
            message=message,
            text=shown,
            caret=" " * (offset - left) + "^",
        )

    def skip(self) -> None:
        match = SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.at)

    def accept(self, token: str) -> bool:
        if self.peek(token):
            self.at += len(token)
            return True
        return False

    def expect(self, token: str, why: str = "") -> None:
        if not self.accept(token):
            self.fail(f"expected {token!r}{why}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip()
        match = pattern.match(self.text, self.at)
        if match is None:
            self.fail(f"expected {what}")
        self.at = match.end()
        return match.group()

    def integer(self, what: str) -> int:
        self.skip()
        at = self.at
        digits = self.match(re.compile(r"\d+"), what)
        if len(digits) > MAX_DIGITS:
            self.fail(f"{what} has too many digits", at)
        return int(digits)

    def keyword(self, word: str) -> bool:
        self.skip()
        end = self.at + len(word)
        if self.text.startswith(word, self.at) and not re.match(r"[\w.]", self.text[end : end + 1]):
            self.at = end
            return True
        return False
