"""Typed access to the JSON files of an artifact: a wrong field is one clear line, never a KeyError."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from moec.runtime.errors import MalformedFile

DTYPES: Final = ("float32", "int32", "int64", "uint16", "uint8")
"""BF16 travels as its bits, what is quantised or packed as bytes or lanes, ticks of a profile as 64 bits."""


class Fields:
    """A JSON object with its file and the path of keys to it, for messages."""

    def __init__(self, data: Any, file: str, path: str = "") -> None:
        self.file = file
        self.path = path
        if not isinstance(data, dict):
            raise self._wrong(path or "the file", "an object", data)
        self.data: dict[str, Any] = data

    @classmethod
    def parse(cls, raw: bytes, file: str) -> Fields:
        """The JSON object in `raw`; raises MalformedFile when it is none."""
        try:
            return cls(json.loads(raw), file)
        except (ValueError, RecursionError) as error:
            raise MalformedFile(file=file, problem=f"not JSON ({error})") from None

    def text(self, key: str) -> str:
        """A non-empty string."""
        value = self._get(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(self._at(key), "a non-empty string", value)
        return value

    def integer(self, key: str, least: int) -> int:
        """An integer not below `least`."""
        value = self._get(key)
        if not _is_int(value) or value < least:
            raise self._wrong(self._at(key), f"an integer, at least {least}", value)
        return int(value)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers >= 0."""
        value = self._get(key)
        if not isinstance(value, list) or not all(_is_int(v) and v >= 0 for v in value):
            raise self._wrong(self._at(key), "a list of integers >= 0", value)
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self._wrong(self._at(key), "a list of strings", value)
        return tuple(value)

    def dims(self, key: str) -> tuple[int | str, ...]:
        """A shape: integers >= 0 and names."""
        value = self._get(key)
        if not isinstance(value, list) or not all((_is_int(v) and v >= 0) or isinstance(v, str) for v in value):
            raise self._wrong(self._at(key), "a list of sizes", value)
        return tuple(value)

    def dtype(self, key: str) -> np.dtype[np.generic]:
        """One of the element types that kernels take, by numpy's name."""
        name = self.text(key)
        if name not in DTYPES:
            raise self.problem(key, f"is {name[:60]!r}, known: {', '.join(DTYPES)}")
        return np.dtype(name)

    def table(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self._get(key), self.file, self._at(key))

    def tables(self, key: str) -> list[Fields]:
        """A list of objects."""
        value = self._get(key)
        if not isinstance(value, list):
            raise self._wrong(self._at(key), "a list", value)
        return [Fields(item, self.file, f"{self._at(key)}[{i}]") for i, item in enumerate(value)]

    def items(self, key: str) -> list[Any]:
        """A list of anything, empty where the field is missing."""
        value = self.data.get(key, [])
        if not isinstance(value, list):
            raise self._wrong(self._at(key), "a list", value)
        return value

    def rows(self, key: str) -> list[list[Any]]:
        """A list of lists, empty where the field is missing or null."""
        value = self.data.get(key)
        rows = [] if value is None else value
        if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
            raise self._wrong(self._at(key), "a list of lists", value)
        return rows

    def problem(self, key: str, text: str) -> MalformedFile:
        """The error that field `key` `text` (for example: "is 3, but ...")."""
        return MalformedFile(file=self.file, problem=f"{self._at(key)} {text}")

    def _get(self, key: str) -> Any:
        if key not in self.data:
            raise MalformedFile(file=self.file, problem=f"{self._at(key)} is missing")
        return self.data[key]

    def _at(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _wrong(self, at: str, expected: str, value: Any) -> MalformedFile:
        return MalformedFile(file=self.file, problem=f"{at} must be {expected}, is {shortened(value)}")


def shortened(value: Any) -> str:
    """A JSON value for a message, of at most 60 characters."""
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
