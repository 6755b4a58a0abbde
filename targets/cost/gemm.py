"""Products: dense, grouped over experts, and the quantisation of activations before them.

One core computes one output tile at a time in steps along k; the cores take the tiles in waves. Time is a floor
(launch, first load, last store) plus the soft maximum of the busiest core's time and the memory time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moec.targets.cost.physics import best_tile, ceildiv, fitted, least_rows, soft_max, throttled
from moec.targets.cost.result import Cost
from moec.targets.schema import Target

_STEP_BYTES = 128
_SPLITS = (1, 2, 4, 8)
# Tiles of the vendor library: height in smallest tiles, width.
_MENU = ((1, 16), (1, 32), (1, 64), (1, 128), (1, 256), (2, 64), (2, 128), (2, 192), (2, 256), (4, 64), (4, 128))
# Tiles of four times the smallest height and at least this width were slow in single waves on the H100.
_WIDE = 88


@dataclass(frozen=True)
class Operands:
    """Bytes per element of the activations, the weights and the result, and the type of the matrix units."""

    activation: int
    weight: float
    result: int
    rate_type: str
    scaled: bool
    """Whether FP8 blocks carry scales that the kernel applies itself."""


def operands(target: Target, dtype: str) -> Operands:
    """How `dtype` runs on the target: FP8 without units for it is widened, as fp8_weight and mxfp4_weight always are.

    An MXFP4 block of 32 elements has 16 bytes and one of scale.
    """
    if dtype == "bf16":
        return Operands(2, 2, 2, "bf16", False)
    if dtype == "f32":
        return Operands(4, 4, 4, "fp32", False)
    if dtype == "mxfp4_weight":
        return Operands(2, 17 / 32, 2, "bf16", False)
    if dtype != "fp8_weight" and target.device.fp8.matrix:
        return Operands(1, 1, 2, "fp8", dtype == "fp8_block")
    return Operands(2, 1, 2, "bf16", False)


def gemm(target: Target, m: int, n: int, k: int, dtype: str, quantise_a: bool) -> Cost:
    """[m, k] x [k, n] -> [m, n]; with `quantise_a`, the activations arrive in BF16 and are quantised first."""
    types = operands(target, dtype)
    cost = _scaled(target, [m], n, k, types, (1, 2, 4)) if types.scaled else _plain(target, m, n, k, types)
    return quantise(target, m, k) + cost if quantise_a and types.activation == 1 else cost


def quantise(target: Target, rows: int, columns: int) -> Cost:
    """BF16[rows, columns] -> FP8 with a FP32 scale for each 1x128 tile."""
    numbers = fitted(target, "quantise")
    moved = rows * columns * 3 + rows * ceildiv(columns, 128) * 4
    memory = moved / (target.device.memory_bandwidth * numbers["memory"])
    floor, memory_us = numbers["floor"] * 1e6, memory * 1e6
    return Cost(floor + memory_us, 2.0 * rows * columns, moved, parts={"latency": floor, "memory": memory_us})


def grouped_gemm(target: Target, rows: Sequence[int], n: int, k: int, dtype: str, layout: str) -> Cost:
    """One product for each group: `rows[g]` rows against the group's own [k, n]; empty groups cost nothing."""
    busy = [r for r in rows if r]
    types = operands(target, dtype)
    heights = (1, 2) if layout == "masked" else (2,)
    return _scaled(target, busy, n, k, types, heights)


def _scaled(target: Target, rows: Sequence[int], n: int, k: int, types: Operands, heights: tuple[int, ...]) -> Cost:
    """Products with block scales, as DeepGEMM computes them: no split along k, tile chosen by waves."""
    numbers = fitted(target, "gemm_fp8" if types.rate_type == "fp8" else "gemm_bf16")
    device, least = target.device, least_rows(target)
    total = sum(rows)
    typical = ceildiv(total, len(rows))
    tile = best_tile(typical, n, len(rows), device.cores, tuple(h * least for h in heights))
    height, width, waves = tile
    if len(rows) > 1:
        waves = ceildiv(sum(ceildiv(r, height) for r in rows) * ceildiv(n, width), device.cores)
    rate = device.matrix_rate(types.rate_type) / device.cores * numbers["compute"]
    depth = int(_STEP_BYTES // types.weight)
    step = numbers["step"] + 2 * height * width * depth / rate
    if height == 4 * least and width >= _WIDE and waves == 1:
        step *= numbers.get("wide", 1.0)
    store = min(typical, height) * width * types.result / numbers["store"]
    busy = throttled(target, waves * (ceildiv(k, depth) * step + store), numbers["sustained"])
    moved = types.activation * total * k + types.weight * len(rows) * n * k + types.result * total * n
    return _cost(target, numbers, busy, moved, 2.0 * total * n * k)


def _plain(target: Target, m: int, n: int, k: int, types: Operands) -> Cost:
    """A product from a vendor library: the fastest of a menu of tiles, with k split where that helps."""
    numbers = fitted(target, "gemm_bf16")
    device, least = target.device, least_rows(target)
    depth = _STEP_BYTES // types.activation
    rate = device.matrix_rate(types.rate_type) / device.cores * numbers["compute"]
    moved = types.activation * m * k + types.weight * n * k + types.result * m * n
    memory = moved / (device.memory_bandwidth * numbers["memory"])
    busiest: dict[int, float] = {}
    for times, width in _MENU:
        height = times * least
        tiles = ceildiv(m, height) * ceildiv(n, width)
        step = numbers["step"] + 2 * height * width * depth / rate
        store = min(m, height) * width * types.result / numbers["store"]
        for parts in _SPLITS[: 1 if tiles >= device.cores else None]:
            busy = ceildiv(tiles * parts, device.cores) * (ceildiv(k, depth * parts) * step + store)
            busiest[parts] = min(busiest.get(parts, math.inf), busy)
    fastest = best = math.inf
    for parts, busy in busiest.items():
        busy = throttled(target, busy, numbers["sustained"])
        time = soft_max(busy, memory, numbers["norm"])
        if parts > 1:
            time += numbers["split"] + parts * m * n * 4 / device.memory_bandwidth
        if time < fastest:
            fastest, best = time, busy
    return _cost(target, numbers, best, moved, 2.0 * m * n * k, fastest)


def _cost(
    target: Target, numbers: Mapping[str, float], busy: float, moved: float, flops: float, time: float | None = None
) -> Cost:
    memory = moved / (target.device.memory_bandwidth * numbers["memory"])
    overlapped = soft_max(busy, memory, numbers["norm"]) if time is None else time
    parts = {"latency": numbers["floor"] * 1e6, "compute": busy * 1e6, "memory": memory * 1e6}
    return Cost((numbers["floor"] + overlapped) * 1e6, flops, moved, parts=parts)
