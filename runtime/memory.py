"""Buffers that kernels read and write: aligned, zero, allocated once and shared by name."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from moec.runtime.plan import Argument

_ALIGNMENT: Final = 4096  # a page: wide enough for every vector load, and huge pages can begin there


def aligned_zeros(nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` zero bytes that begin on a page; the system provides the memory as it is first written."""
    raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes]


class Memory:
    """Caches and workspaces of all entries: arguments of equal kind and name share their bytes."""

    def __init__(self, args: list[Argument]) -> None:
        sizes: dict[tuple[str, str], int] = {}
        for arg in args:
            key = (arg.kind, arg.name)
            sizes[key] = max(sizes.get(key, 0), _nbytes(arg))
        self._buffers = {key: aligned_zeros(size) for key, size in sizes.items()}

    def view(self, arg: Argument) -> NDArray[np.generic]:
        """The buffer of `arg` in its type and shape."""
        raw = self._buffers[arg.kind, arg.name][: _nbytes(arg)]
        return raw.view(arg.dtype).reshape(arg.sizes({}))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


def _nbytes(arg: Argument) -> int:
    return int(np.prod(arg.sizes({}), dtype=np.int64)) * arg.dtype.itemsize
