"""Packing: weight programs run point by point into one safetensors file, never holding more than a few tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from moec.codegen.storage import StoredArray, stored_arrays
from moec.ir import Module, Weight
from moec.ir.evaluate import Loader, WeightPrograms
from moec.ir.numeric import Packed, Quantised

ALIGN = 4096


def pack_weights(
    module: Module, loader: Loader, path: Path, progress: Callable[[int, int], None] | None = None, rank: int = 0
) -> None:
    """Write all weights of a module, of a sharded one those of `rank`; `progress(done, total)` is told bytes.

    Raises OSError when the file cannot be written whole, and what the loader raises.
    """
    plan = [(w, stored_arrays(w)) for w in module.weights.values()]
    offsets, header, total = _header([a for _, arrays in plan for a in arrays])
    programs = WeightPrograms(module, loader, rank)
    done = 0
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
        for weight, arrays in plan:
            as_bytes = [a.safetensors_dtype == "U8" for a in arrays]
            for number, point in enumerate(points(weight)):
                for array, data in zip(arrays, _bytes(programs.value(weight.name, point), as_bytes), strict=True):
                    size = array.nbytes // weight.points()
                    assert data.nbytes == size, (array, data.shape)
                    file.seek(len(header) + offsets[array.name] + number * size)
                    file.write(data.numpy().data)
                    done += size
                if progress is not None:
                    progress(done, total)


def points(weight: Weight) -> Iterator[tuple[int, ...]]:
    """All index points of a weight, last index fastest."""
    return product(*(range(start, stop) for _, start, stop in weight.indices))


def _bytes(value: Any, as_bytes: Sequence[bool]) -> Sequence[torch.Tensor]:
    if isinstance(value, Packed):
        scales = value.scales()
        data = [value.data(), *([scales] if scales is not None else [])]
    elif isinstance(value, Quantised):
        # A power of two is stored as its biased exponent (UE8M0 of the OCP MX specification).
        exponents = value.scale.float().view(torch.int32).bitwise_right_shift(23).to(torch.uint8)
        data = [value.data, exponents if as_bytes[1] else value.scale.float()]
    else:
        data = [value]
    return [d.contiguous().view(torch.uint8).reshape(-1) for d in data]


def _header(arrays: Sequence[StoredArray]) -> tuple[dict[str, int], bytes, int]:
    """Offsets of the arrays, the safetensors header padded so that data starts on a page, and the bytes of data."""
    offsets: dict[str, int] = {}
    entries: dict[str, Any] = {}
    at = 0
    for array in arrays:
        offsets[array.name] = at
        span = [at, at + array.nbytes]
        entries[array.name] = {"dtype": array.safetensors_dtype, "shape": list(array.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return offsets, len(text).to_bytes(8, "little") + text, at
