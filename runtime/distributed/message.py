"""Plain data as bytes, for ranks to tell each other: JSON, and behind it the arrays that it names.

Not pickle: a process that is not a rank but reaches the port must not be able to run anything here.
"""

from __future__ import annotations

import io
import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ARRAY: Final = "array"


def pack(value: Any) -> bytes:
    """The bytes of numbers, texts, None, arrays, and lists, tuples and dicts (with texts as keys) of these.

    Raises TypeError for anything else.
    """
    arrays: list[NDArray[Any]] = []
    text = json.dumps(_plain(value, arrays)).encode()
    stream = io.BytesIO()
    stream.write(len(text).to_bytes(8, "little") + text)
    for array in arrays:
        np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` was given, tuples as lists."""
    stream = io.BytesIO(data)
    value = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return _whole(value, stream)


def _plain(value: Any, arrays: list[NDArray[Any]]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, dict):
        return {"dict": {key: _plain(inner, arrays) for key, inner in value.items()}}
    if isinstance(value, list | tuple):
        return [_plain(inner, arrays) for inner in value]
    return value.item() if isinstance(value, np.generic) else value


def _whole(value: Any, stream: io.BytesIO) -> Any:
    """Arrays are read in the order in which `_plain` met them, which JSON keeps."""
    if isinstance(value, list):
        return [_whole(inner, stream) for inner in value]
    if isinstance(value, dict) and _ARRAY in value:
        return np.load(stream, allow_pickle=False)
    if isinstance(value, dict):
        return {key: _whole(inner, stream) for key, inner in value["dict"].items()}
    return value
