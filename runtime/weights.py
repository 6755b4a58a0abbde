"""Weights by memory map: a safetensors file whose tensors are views of its mapping.

The safetensors library hands out copies in numpy and knows no raw bytes for types that numpy lacks, so the header (an
8-byte length, then JSON; see the format's own description) is read here.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import WrongWeights
from moec.runtime.huge_pages import HugePages, possible
from moec.runtime.plan import Argument


class Weights:
    """The tensors of one safetensors file as views, which keep the mapping alive."""

    def __init__(self, path: Path, huge_pages: bool = False) -> None:
        """Map `path`; with `huge_pages` a thread moves it into such, where the system has them (see `huge_pages`).

        Raises WrongWeights when the file is truncated or no safetensors file.
        """
        self.path = path
        self._moving: HugePages | None = None
        try:
            file = path.open("rb")
        except OSError as error:
            raise WrongWeights(file=path, problem=f"cannot be mapped ({error})") from None
        with file:
            self._open(file, huge_pages)

    def _open(self, file: BufferedReader, huge_pages: bool) -> None:
        try:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise WrongWeights(file=self.path, problem=f"cannot be mapped ({error})") from None
        shared = np.frombuffer(self._map, dtype=np.uint8)
        # DLPack export wants arrays that numpy calls writable; the pages themselves stay read-only.
        raw = (ctypes.c_uint8 * len(shared)).from_address(shared.ctypes.data)
        raw.mapping = self._map  # type: ignore[attr-defined]  # every view holds `raw`
        self._bytes: NDArray[np.uint8] = np.ctypeslib.as_array(raw)
        self._spans = _read_header(self._bytes, self.path)
        if huge_pages and possible(len(shared)):
            self._moving = HugePages(os.dup(file.fileno()), shared.ctypes.data, len(shared))

    def __del__(self) -> None:
        moving: HugePages | None = getattr(self, "_moving", None)
        if moving:
            moving.close()

    def settle(self) -> None:
        """Wait until the weights lie where they will stay: before a measurement."""
        if self._moving:
            self._moving.settle()

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(end - begin for begin, end in self._spans.values())

    def arrays(self) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Every tensor's name and bytes, in the order of the file."""
        for name, (begin, end) in sorted(self._spans.items(), key=lambda item: item[1]):
            yield name, self._bytes[begin:end]

    def view(self, arg: Argument) -> NDArray[np.generic]:
        """The bytes of tensor `arg.name` as `arg.dtype` of `arg.shape`; raises WrongWeights when they do not fit."""
        if arg.name not in self._spans:
            raise WrongWeights(file=self.path, problem=f"tensor {arg.name} is missing")
        begin, end = self._spans[arg.name]
        shape = arg.sizes({})
        expected = int(np.prod(shape, dtype=np.int64)) * arg.dtype.itemsize
        if end - begin != expected:
            said = f"tensor {arg.name} has {end - begin} bytes, {arg.dtype}{list(shape)} takes {expected}"
            raise WrongWeights(file=self.path, problem=said)
        if begin % arg.dtype.itemsize:
            raise WrongWeights(file=self.path, problem=f"tensor {arg.name} is not aligned to its {arg.dtype} elements")
        return self._bytes[begin:end].view(arg.dtype).reshape(shape)


def _read_header(data: NDArray[np.uint8], path: Path) -> dict[str, tuple[int, int]]:
    """Tensor name -> (begin, end) in bytes of the file."""
    base = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or base > len(data):
        raise WrongWeights(file=path, problem="truncated within its header")
    try:
        header = json.loads(data[8:base].tobytes())
        spans = {name: _span(entry, base) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WrongWeights(file=path, problem=f"its header is no safetensors header ({error})") from None
    for name, (begin, end) in spans.items():
        if not base <= begin <= end <= len(data):
            problem = f"truncated: tensor {name} ends at byte {end}, the file has {len(data)}"
            raise WrongWeights(file=path, problem=problem)
    return spans


def _span(entry: dict[str, Any], base: int) -> tuple[int, int]:
    begin, end = entry["data_offsets"]
    return base + int(begin), base + int(end)
