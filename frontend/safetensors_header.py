"""The header of a safetensors file, read and checked as if it came from anyone (safetensors format, version 0.x)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from moec.errors import InputError, printable

DTYPES = {
    "F64": ("f64", 8),
    "F32": ("f32", 4),
    "BF16": ("bf16", 2),
    "F16": ("f16", 2),
    "F8_E4M3": ("fp8_e4m3", 1),
    "F8_E5M2": ("fp8_e5m2", 1),
    "F8_E8M0": ("ue8m0", 1),
    "I64": ("i64", 8),
    "I32": ("i32", 4),
    "U8": ("u8", 1),
}
"""Element types by the format's name: ours, and the bytes of an element. Tensors of others are known, not read."""
LONGEST = 100_000_000
"""Bytes that the format allows a header."""


class CheckpointError(InputError):
    """Weights that are missing or damaged."""

    template: ClassVar[str] = "{file}: {message}"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: file, element type, shape, first byte and number of bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file by name; raises CheckpointError when the header is damaged or the file too short for it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(file=path, message=f"is truncated: {size} bytes cannot hold its header")
            if length > LONGEST:
                message = f"has a header of {length} bytes, the format allows {LONGEST}"
                raise CheckpointError(file=path, message=message)
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(file=path, message=f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(file=path, message="has no readable safetensors header") from None
    if not isinstance(header, dict):
        raise CheckpointError(file=path, message="has no readable safetensors header")
    entries = dict(_entries(path, header, 8 + length))
    _check_spans(path, entries, size)
    return entries


def _entries(path: Path, header: dict[str, Any], data: int) -> Iterator[tuple[str, TensorEntry]]:
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        match fields:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
                sizes = [*shape, start, stop]
                if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes) or stop < start:
                    raise _wrong(path, name, "has a wrong shape or wrong offsets in the header")
                known, width = DTYPES.get(dtype, (printable(dtype), 0))
                if width and prod(shape) * width != stop - start:
                    text = (
                        f"{list(shape)} of {dtype} takes {prod(shape) * width} bytes, the header gives {stop - start}"
                    )
                    raise _wrong(path, name, text)
                yield name, TensorEntry(path, known, tuple(shape), data + start, stop - start)
            case _:
                raise _wrong(path, name, "has no dtype, shape and data_offsets in the header")


def _check_spans(path: Path, entries: dict[str, TensorEntry], size: int) -> None:
    """Tensors must lie within the file and apart from each other."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start < end:
            raise _wrong(path, name, f"overlaps {printable(before)}")
        end, before = entry.start + entry.nbytes, name
    if end > size:
        raise CheckpointError(file=path, message=f"is truncated: {size} bytes, its header promises {end}")


def _wrong(path: Path, name: str, message: str) -> CheckpointError:
    return CheckpointError(file=path, message=f"tensor {printable(name)}: {message}")
