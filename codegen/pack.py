"""Packing: weight programs run point by point into one safetensors file, never holding more than a few tensors."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from moec.codegen.resume import Journal
from moec.codegen.storage import StoredArray, stored_arrays
from moec.ir import Module, Weight
from moec.ir.evaluate import Loader, WeightPrograms
from moec.ir.numeric import Packed, Quantised

ALIGN = 4096
T = TypeVar("T")
R = TypeVar("R")


def pack_weights(
    module: Module,
    loader: Loader,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    journal: Journal | None = None,
) -> None:
    """Write all weights of a module, of a sharded one those of `rank`; `progress(done, total)` is told bytes.

    With a `journal` of `path` its points are taken as written, and further ones are recorded there. Raises OSError when
    the file cannot be written whole, and what the loader raises.
    """
    plan = [(w, stored_arrays(w)) for w in module.weights.values()]
    offsets, header, total = _header([a for _, arrays in plan for a in arrays])
    work = [(plan_of, point) for plan_of in plan for point in enumerate(points(plan_of[0]))]

    def make(item: tuple[tuple[Weight, list[StoredArray]], tuple[int, tuple[int, ...]]]) -> Sequence[torch.Tensor]:
        (weight, arrays), (_, point) = item
        # Programs keep the point that they are at: each run has its own.
        value = WeightPrograms(module, loader, rank).value(weight.name, point)
        return _bytes(value, [a.safetensors_dtype == "U8" for a in arrays])

    begin = journal.begin(len(header) + total) if journal else 0
    done = sum(a.nbytes // weight.points() for (weight, arrays), _ in work[:begin] for a in arrays)
    with path.open("r+b" if begin else "wb") as file:
        file.write(header)
        file.truncate(len(header) + total)
        for count, (((weight, arrays), (number, _)), parts) in enumerate(_ahead(make, work[begin:]), begin + 1):
            before = done
            for array, data in zip(arrays, parts, strict=True):
                size = array.nbytes // weight.points()
                assert data.nbytes == size, (array, data.shape)
                file.seek(len(header) + offsets[array.name] + number * size)
                file.write(data.numpy().data)
                done += size
            if journal is not None:
                journal.record(file, count, done - before)
            if progress is not None:
                progress(done, total)
        if journal is not None:
            journal.finish(file, len(work))


def packed_bytes(module: Module) -> int:
    """Size of the file that `pack_weights` writes for a rank."""
    _, header, total = _header([array for weight in module.weights.values() for array in stored_arrays(weight)])
    return len(header) + total


def _ahead(make: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """(item, make(item)) in order, made by a thread for each usable CPU, at most one result ahead of each."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, "moec-pack", initializer=torch.set_num_threads, initargs=(1,))
    try:
        made: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            if len(made) > workers:
                first, result = made.popleft()
                yield first, result.result()
            made.append((item, pool.submit(make, item)))
        for first, result in made:
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


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
